"""How far a model is from the host's tuned one, by next-token distributions, on any device.

Of the first questions the host keeps, at every token of the gold solution, its ``TOP`` likeliest next
tokens and their log-probabilities; all others count as one. That is small enough to travel with a
bundle. Merging outcomes never raises a KL divergence (Cover & Thomas 2006, Elements of Information
Theory, log sum inequality), so what is measured is at most the divergence over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeft import child
from edgeft.allocator import allocator
from edgeft.prompts import Item, first, read_items
from edgeft.runtimes import open_session

if TYPE_CHECKING:
    from edgeft.runtimes.likelihood import Logits

FILE = "reference.npz"
QUESTIONS, TOP = 32, 64
_LEAST = 1e-12  # probability; keeps logarithms finite


@dataclass(frozen=True)
class Reference:
    """The host's next-token distributions.

    Attributes:
        ids: of the questions.
        starts: rows of question i are ``starts[i]`` to ``starts[i + 1]``, int64 (questions + 1,).
        tokens: the likeliest next tokens, int32 (rows, TOP).
        logprobs: their natural logarithms of probability, float32 (rows, TOP).
    """

    ids: list[str]
    starts: NDArray[np.int64]
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]


def make(folder: Path, evaluation: Path, out: Path) -> None:
    """Write the reference of a model folder, in a child process; see :class:`Reference`.

    Raises:
        UserError: the model does not open.
    """
    request = {"folder": str(folder), "evaluation": str(evaluation), "out": str(out)}
    child.run("edgeft.bench.divergence", request, allocator())


def write(reference: Reference, path: Path) -> None:
    """Write a reference as numpy's ``.npz``."""
    with path.open("wb") as out:
        np.savez(out, **{**vars(reference), "ids": np.array(reference.ids)})


def read(path: Path) -> Reference:
    """A file that :func:`make` wrote."""
    with np.load(path, allow_pickle=False) as data:
        ids = [str(name) for name in data["ids"]]
        return Reference(ids, data["starts"], data["tokens"], data["logprobs"])


def divergences(session: Any, items: Sequence[Item], reference: Reference) -> dict[str, float]:
    """Mean KL(host || session) a gold token, nats, by question that the reference has.

    Args:
        session: of any runtime.
        items: questions; those that the reference has not are left out.
    """
    at = {name: i for i, name in enumerate(reference.ids)}
    known = [item for item in items if item.id in at and item.gold]
    found = {}
    for item, logits in zip(known, gold_logits(session, known), strict=True):
        rows = slice(reference.starts[at[item.id]], reference.starts[at[item.id] + 1])
        found[item.id] = kl(reference.tokens[rows], reference.logprobs[rows], logits)
    return found


def gold_logits(session: Any, items: Sequence[Item]) -> Iterator[Logits]:
    """Logits at every token of each gold solution: float32 (gold tokens, vocabulary)."""
    texts = [[*item.prompt, *item.gold[:-1]] for item in items]
    # Only these rows: what all texts share may reach into the solutions, and all rows take memory.
    yield from session.logits(texts, [len(item.gold) for item in items])


def kl(tokens: NDArray[np.int32], logprobs: NDArray[np.float32], logits: Logits) -> float:
    """Mean over rows of KL(reference || logits) between distributions of TOP tokens and the rest.

    Args:
        tokens, logprobs: (rows, TOP), see :class:`Reference`.
        logits: (rows, vocabulary).
    """
    here = _log_softmax(np.take_along_axis(logits, tokens, 1), logits)
    there = logprobs.astype(np.float64)
    p, q = np.exp(there), np.exp(here)
    kept = (p * (there - here)).sum(1)
    p_rest, q_rest = (np.maximum(1 - x.sum(1), _LEAST) for x in (p, q))
    found = float((kept + p_rest * np.log(p_rest / q_rest)).mean())
    return max(found, 0.0)  # in this order NaN stays NaN


def _log_softmax(picked: Logits, logits: Logits) -> NDArray[np.float64]:
    top = logits.max(1, keepdims=True)
    sums = np.concatenate(  # row by row, for they are long and memory may be short
        [
            np.exp(row - at).sum(-1, dtype=np.float64, keepdims=True)
            for row, at in zip(logits, top, strict=True)
        ]
    )
    found: NDArray[np.float64] = picked - top.astype(np.float64) - np.log(sums)[:, None]
    return found


def likeliest(logits: Logits) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """``tokens`` and ``logprobs`` of a :class:`Reference` for rows of logits, (rows, vocabulary)."""
    top = min(TOP, logits.shape[1])
    tokens = np.argpartition(-logits, top - 1, 1)[:, :top].astype(np.int32)
    logprobs = _log_softmax(np.take_along_axis(logits, tokens, 1), logits)
    return tokens, logprobs.astype(np.float32)


def reference_of(session: Any, items: Sequence[Item]) -> Reference:
    """What a session of the host makes of the questions."""
    rows = [likeliest(logits) for logits in gold_logits(session, items)]
    tokens, logprobs = zip(*rows, strict=True)
    starts = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    ids = [item.id for item in items]
    return Reference(ids, starts, np.concatenate(tokens), np.concatenate(logprobs))


def _work(request: Any, emit: Callable[..., None]) -> None:
    items = first(read_items(Path(request["evaluation"])), QUESTIONS)
    items = [item for item in items if item.gold]
    context = max(len(item.prompt) + len(item.gold) for item in items)
    session = open_session(
        "transformers", Path(request["folder"]), threads=0, context=context, parallel=8
    )
    found = reference_of(session, items)
    session.close()
    write(found, Path(request["out"]))


if __name__ == "__main__":
    child.serve(_work)
