"""An export counts only when it is verified: it opens, reads prompts as the host does, agrees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft import child, tokenizer
from edgeft.errors import UserError
from edgeft.prompts import Item, read_items

# Rounding to 16 bits moves few of the top tokens; a permuted head or a wrong norm moves most.
_LEAST_AGREEMENT = 0.9


@dataclass(frozen=True)
class Verification:
    """What was checked in one artifact.

    Attributes:
        tokenizer_prompts: evaluation prompts that the runtime's own tokenizer reads as we do.
        chat_template: whether the file carries the model's chat template (None: it has none).
        max_logit_diff: largest difference to the host's logits, None where not compared.
        top1_agreement: share of positions with the same most likely token.
        positions: how many positions were compared.
    """

    tokenizer_prompts: int
    chat_template: bool | None
    max_logit_diff: float | None = None
    top1_agreement: float | None = None
    positions: int = 0


def verify_gguf(artifact: Path, folder: Path, evaluation: Path, *, logits: bool) -> Verification:
    """Check a GGUF against the model folder that it was made from.

    Args:
        evaluation: the evaluation set; every prompt is tokenized by llama.cpp.
        logits: also compare the logits at every position behind the prompts' common prefix with
            the host's in float32.

    Raises:
        UserError: the first check that fails.
    """
    from edgeft.runtimes import llama_cpp

    items = read_items(evaluation)
    longest = max(len(item.prompt) for item in items)
    session = llama_cpp.open_session(artifact, threads=0, context=longest + 8, parallel=8)
    try:
        _check_tokenizer(artifact, session, items, folder)
        template = _check_template(artifact, session, folder)
        if not logits:
            return Verification(len(items), template)
        compared = _compare_logits(session, folder, items)
    finally:
        session.close()
    if compared[1] < _LEAST_AGREEMENT:
        raise UserError(
            f"{artifact}: llama.cpp and the host agree on only {compared[1]:.0%} of the top tokens "
            f"(largest logit difference {compared[0]:.3g}): the weights were not written right"
        )
    return Verification(len(items), template, *compared)


def _check_tokenizer(artifact: Path, session: Any, items: list[Item], folder: Path) -> None:
    from tokenizers import Tokenizer

    from edgeft.runtimes import llama_cpp

    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.special_ids(ours, tokenizer.tokenizer_config(folder))
    bos = ours.id_to_token(ids["bos"]) if tokenizer.adds_bos(ours, ids) else None
    for item in items:
        # A template that writes the BOS itself is rendered without it by llama.cpp's programs.
        text = item.text.removeprefix(bos) if bos else item.text
        theirs = llama_cpp.tokenize(session, text, special=True)
        if theirs != item.prompt:
            at = next(
                (i for i, (a, b) in enumerate(zip(theirs, item.prompt, strict=False)) if a != b),
                min(len(theirs), len(item.prompt)),
            )
            raise UserError(
                f"{artifact}: llama.cpp's tokenizer reads {item.id} differently from token {at} "
                f"({theirs[at : at + 3]} against {item.prompt[at : at + 3]}): "
                "users' prompts would not be the ones scored here"
            )


def _check_template(artifact: Path, session: Any, folder: Path) -> bool | None:
    from edgeft.runtimes import llama_cpp

    ours, theirs = tokenizer.chat_template(folder), llama_cpp.chat_template(session)
    if ours is None:
        return None
    if ours != theirs:
        raise UserError(f"{artifact}: its chat template is not the model's")
    return True


def _compare_logits(session: Any, folder: Path, items: list[Item]) -> tuple[float, float, int]:
    import numpy as np

    from edgeft.runtimes import transformers

    prompts = [item.prompt for item in items]
    longest = max(map(len, prompts))
    host = transformers.open_session(folder, threads=0, context=longest + 8, parallel=8)
    largest, same, positions = 0.0, 0, 0
    for ours, theirs in zip(host.logits(prompts), session.logits(prompts), strict=True):
        largest = max(largest, float(np.abs(ours - theirs).max()))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        positions += len(ours)
    host.close()
    return largest, same / positions, positions


def _work(request: Any, emit: Callable[..., None]) -> None:
    done = verify_gguf(
        Path(request["artifact"]),
        Path(request["folder"]),
        Path(request["evaluation"]),
        logits=request["logits"],
    )
    emit("verified", **asdict(done))


if __name__ == "__main__":
    child.serve(_work)
