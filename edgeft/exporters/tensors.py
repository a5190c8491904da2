"""How far a GGUF's weights lie from the ones it was made of, tensor by tensor.

Of a file made elsewhere that tells which weights are in it: the tuned ones, the base's without the
adapter, an update of another size, rows in another order, or weights that were rounded to 4 bits
before they were written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.exporters.faults import WEIGHTS, Fault

Weights = NDArray[np.float32]
WORST = 5
_BLOCK, _LEVELS = 64, 16  # NF4's block, and the values that 4 bits can have
_MORE = 1.5  # times what rounding to the file's own types costs: then it is not the rounding
_SIXTEEN_BIT = 2e-3  # relative error that 16 bits may have (bfloat16: 2^-9)
_SAME = 1e-3  # relative difference of two row norms that are one row's
_FORGOTTEN, _WRONG_SIZE = 0.1, 0.1  # how near 0 the update is missing; how far from 1 it is wrong
_ROWS_SEEN = 256  # of a matrix, for the number of values in a block


@dataclass(frozen=True)
class TensorError:
    """``error``: Frobenius norm of the difference over that of the reference."""

    name: str
    type: str
    error: float


def errors(artifact: Path, reference: Path) -> list[TensorError]:
    """Every matrix of a GGUF against that of the same name in another, the worst first.

    Args:
        reference: the file in 16 bits that it was quantized from.
    """
    theirs = matrices(reference)
    found = []
    for name, tensor in matrices(artifact).items():
        if name in theirs and list(tensor.shape) == list(theirs[name].shape):
            ours = read(theirs[name])
            error = _relative(read(tensor) - ours, ours)
            found.append(TensorError(name, tensor.tensor_type.name, error))
    return sorted(found, key=lambda e: -e.error)


def summary(found: Sequence[TensorError]) -> dict[str, Any]:
    """As a manifest has it: the mean error and the worst tensors."""
    worst = [vars(e) for e in found[:WORST]]
    return {"error": float(np.mean([e.error for e in found])) if found else 0.0, "worst": worst}


def matrices(path: Path) -> dict[str, Any]:
    """``gguf.gguf_reader.ReaderTensor`` by name, of what has two dimensions."""
    from gguf import GGUFReader

    return {t.name: t for t in GGUFReader(path).tensors if len(t.shape) > 1}


def read(tensor: Any) -> Weights:
    """float32 (rows, columns)."""
    from gguf.quants import dequantize

    data: Weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    return data.reshape(-1, int(tensor.shape[0]))


def diagnose(artifact: Path, tuned: Path, base: Path, expected: Path) -> list[Fault]:
    """What is wrong with the weights of a GGUF that was made elsewhere.

    Args:
        tuned, base: our 16-bit files.
        expected: tuned, quantized by us to the artifact's own types: what rounding alone does.
    """
    theirs, ours, before = matrices(artifact), matrices(tuned), matrices(base)
    lacking = sorted(ours.keys() - theirs.keys())
    if lacking:
        text = f"it lacks {len(lacking)} of the model's matrices, such as {lacking[0]}"
        return [Fault(WEIGHTS, text, _AGAIN)]
    allowed = {e.name: max(_MORE * e.error, _SIXTEEN_BIT) for e in errors(expected, tuned)}
    found = [e for e in errors(artifact, tuned) if e.error > allowed.get(e.name, _SIXTEEN_BIT)]
    if faults := _reordered(found, theirs, ours) or _rounded_before(found, theirs):
        return faults
    # Rounding may undo an update by itself, so ours tells how much of it should be there.
    share, ours_left = (update_share(matrices(p), ours, before) for p in (artifact, expected))
    if abs(share - ours_left) > _WRONG_SIZE:
        return [_other_update(share, ours_left)]
    if not found:
        return []
    worst = ", ".join(f"{e.name} {100 * e.error:.1f}% ({e.type})" for e in found[:3])
    text = (
        f"{len(found)} of its {len(ours)} matrices are not the tuned model's, by more than "
        f"rounding: {worst}"
    )
    return [Fault(WEIGHTS, text, _AGAIN)]


_AGAIN = "merge and convert again, from the base that the adapter was trained on"


def _reordered(
    found: Sequence[TensorError], theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> list[Fault]:
    """Matrices whose rows are all there, but elsewhere."""
    faults = []
    for e in found[:WORST]:
        norms = [np.sort(np.linalg.norm(read(t[e.name]), axis=1)) for t in (theirs, ours)]
        here, there = (np.linalg.norm(read(t[e.name]), axis=1) for t in (theirs, ours))
        moved = np.mean(np.abs(here - there) > _SAME * norms[1].max())
        slack = max(_SAME, 0.1 * e.error if "F16" not in e.type else _SAME)
        if moved > slack and np.abs(norms[0] - norms[1]).max() <= slack * norms[1].max():
            text = f"the rows of {e.name} are the model's in another order ({moved:.0%} moved)"
            faults.append(Fault(WEIGHTS, text, "keep the vocabulary's order when converting"))
    return faults


def _rounded_before(found: Sequence[TensorError], theirs: Mapping[str, Any]) -> list[Fault]:
    """Weights in 16 bits that take no more values than 4 bits could."""
    names = [e.name for e in found if e.type in ("F16", "BF16", "F32")]
    coarse = [name for name in names if _levels(read(theirs[name])) <= _LEVELS]
    if not coarse or 2 * len(coarse) < len(names):
        return []
    text = (
        f"{len(coarse)} matrices, such as {coarse[0]}, have at most {_LEVELS} different values in "
        f"every block of {_BLOCK}: they were rounded to 4 bits before they were written, as when "
        "an adapter is merged into a 4-bit model"
    )
    return [Fault(WEIGHTS, text, "merge into the 16-bit base, and quantize once, at the end")]


def _levels(weights: Weights) -> int:
    """The most different values in any block of the first rows."""
    rows = weights[:_ROWS_SEEN].reshape(-1)
    blocks = np.sort(rows[: len(rows) // _BLOCK * _BLOCK].reshape(-1, _BLOCK), axis=1)
    if not len(blocks):
        return _BLOCK
    return int((np.diff(blocks, axis=1) != 0).sum(1).max()) + 1


def _other_update(share: float, expected: float) -> Fault:
    if abs(share) < _FORGOTTEN:
        text = "these are the base's weights: the fine-tuning is not in them"
        return Fault(WEIGHTS, text, "merge the adapter before converting (merge_and_unload)")
    text = f"the fine-tuning is in it {share / expected:.2f} times"
    remedy = "merge with the adapter's own lora_alpha and r, once, and the adapter that was scored"
    return Fault(WEIGHTS, text, remedy)


def update_share(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], before: Mapping[str, Any]
) -> float:
    """How often tuning's update is in a file's weights: 1 where they are the tuned ones.

    The projection of (theirs - base) on (tuned - base), over all matrices.
    """
    along, size = 0.0, 0.0
    for name, tensor in ours.items():
        base = read(before[name])
        update = read(tensor) - base
        if update.any():
            along += float(np.vdot(read(theirs[name]) - base, update))
            size += float(np.vdot(update, update))
    return along / size if size else 1.0


def _relative(difference: Weights, reference: Weights) -> float:
    norm = float(np.linalg.norm(reference))
    return float(np.linalg.norm(difference)) / norm if norm else 0.0
