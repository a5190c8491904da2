"""An export counts only when it is verified: it opens, reads prompts as the host does, agrees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgeft import child, tokenizer
from edgeft.errors import UserError
from edgeft.exporters.faults import WEIGHTS, Fault, in_genai, in_gguf
from edgeft.prompts import Item, read_items
from edgeft.runtimes import open_session

# Rounding to 16 bits moves few of the top tokens; a permuted head or a wrong norm moves most.
_LEAST_AGREEMENT = 0.9
_MOST_KL = 0.005  # nats; 16 bits cost under 0.0001, a wrong rotary base 0.015 within 60 tokens
# Prompts whose logits are compared, spread over the evaluation set. Of weights that were not
# quantized nearly all, for they must agree; of others enough for a mean.
_COMPARED = {True: 256, False: 64}
_CONTEXT_ROOM = 8


@dataclass(frozen=True)
class Verification:
    """What was checked in one artifact.

    Attributes:
        exact: the weights have 16 bits or more, so that logits must agree.
        tokenizer_prompts: evaluation prompts that the runtime's own tokenizer reads as we do;
            None where the runtime has none.
        chat_template: whether the artifact carries the model's chat template (None: it has none).
        max_logit_diff: largest difference to the host's logits.
        top1_agreement: share of positions with the same most likely token.
        mean_kl: mean over positions of KL(host || artifact) over next tokens, nats.
        positions: how many positions were compared.
        faults: what is wrong; of our own exports nothing, for they count only without.
    """

    exact: bool
    tokenizer_prompts: int | None
    chat_template: bool | None
    max_logit_diff: float
    top1_agreement: float
    mean_kl: float
    positions: int
    faults: list[Fault] = field(default_factory=list)


def verify(
    runtime: str,
    artifact: Path,
    folder: Path,
    evaluation: Path,
    *,
    exact: bool,
    strict: bool = True,
) -> Verification:
    """Check an artifact against the model folder that it was made from.

    Args:
        runtime: what opens it, a name in :data:`edgeft.runtimes.RUNTIMES`.
        evaluation: the evaluation set; every prompt is tokenized by the runtime, and of some the
            logits at every position behind the prompts' common prefix are compared with the
            host's in float32.
        exact: the weights are 16 bits or more, so the logits must agree.
        strict: raise what is wrong; otherwise only say so (of a file made elsewhere).

    Raises:
        UserError: the first fault; or the artifact does not open.
    """
    items = read_items(evaluation)
    context = max(len(item.prompt) for item in items) + _CONTEXT_ROOM
    session: Any = open_session(runtime, artifact, threads=0, context=context, parallel=8)
    try:
        check = _CHECKS.get(runtime, _nothing)
        faults, prompts, template = check(artifact, session, items, folder)
        if faults and strict:
            raise UserError(f"{artifact}: {faults[0].text}")
        every = -(-len(items) // _COMPARED[exact])
        compared = _compare([item.prompt for item in items[::every]], session, folder, context)
    finally:
        session.close()
    found = Verification(exact, prompts, template, *compared, faults)
    same = found.top1_agreement >= _LEAST_AGREEMENT and found.mean_kl <= _MOST_KL
    if exact and not same:
        text = (
            f"{runtime} and the host agree on only {found.top1_agreement:.0%} of the top tokens "
            f"(largest logit difference {found.max_logit_diff:.3g}, KL divergence "
            f"{found.mean_kl:.3g} nats): the weights were not written right"
        )
        if strict:
            raise UserError(f"{artifact}: {text}")
        faults.append(Fault(WEIGHTS, text, "convert the merged model again, or export with edgeft"))
    return found


Checked = tuple[list[Fault], int | None, bool | None]


def _check_gguf(artifact: Path, session: Any, items: list[Item], folder: Path) -> Checked:
    return in_gguf(session, items, folder)


def _check_genai(artifact: Path, session: Any, items: list[Item], folder: Path) -> Checked:
    """GenAI's own tokenizer is not used here, but it is what a program on the device has."""
    from edgeft.runtimes import onnxruntime_genai

    texts = [item.text for item in items]
    theirs = onnxruntime_genai.tokenize(session, texts)
    same = sum(ids == item.prompt for ids, item in zip(theirs, items, strict=True))
    ours = tokenizer.chat_template(folder)
    template = None if ours is None else ours == tokenizer.chat_template(artifact)
    return in_genai(artifact, items, folder), same, template


def _nothing(artifact: Path, session: Any, items: list[Item], folder: Path) -> Checked:
    """A bare graph has neither tokenizer nor template."""
    return [], None, None


_CHECKS: dict[str, Callable[[Path, Any, list[Item], Path], Checked]] = {
    "llama.cpp": _check_gguf,
    "onnxruntime-genai": _check_genai,
}


def _compare(
    prompts: Sequence[Sequence[int]], session: Any, folder: Path, context: int
) -> tuple[float, float, float, int]:
    """The last four of a :class:`Verification`."""
    import numpy as np

    host: Any = open_session("transformers", folder, threads=0, context=context, parallel=8)
    largest, same, divergence, positions = 0.0, 0, 0.0, 0
    for ours, theirs in zip(host.logits(prompts), session.logits(prompts), strict=True):
        largest = max(largest, float(np.abs(ours - theirs).max()))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        host_log, log = _log_softmax(ours), _log_softmax(theirs)
        divergence += float((np.exp(host_log) * (host_log - log)).sum(dtype=np.float64))
        positions += len(ours)
    host.close()
    return largest, same / positions, max(divergence / positions, 0.0), positions  # NaN stays


def _log_softmax(logits: Any) -> Any:
    import numpy as np

    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _work(request: Any, emit: Callable[..., None]) -> None:
    done = verify(
        request["runtime"],
        Path(request["artifact"]),
        Path(request["folder"]),
        Path(request["evaluation"]),
        exact=request["exact"],
        strict=request.get("strict", True),
    )
    tensors = None
    if request.get("reference"):
        from edgeft.exporters.tensors import errors, opened, summary

        compared = [opened(Path(request[name]))[1] for name in ("artifact", "reference")]
        tensors = summary(errors(*compared))
    emit("verified", **asdict(done), tensors=tensors)


if __name__ == "__main__":
    child.serve(_work)
