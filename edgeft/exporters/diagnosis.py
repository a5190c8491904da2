"""What is wrong with the weights of a GGUF that was made elsewhere, as far as they prove it.

Against the tuned weights, the base's and what rounding alone does, a file tells which weights are in
it: the tuned ones, the base's without the adapter, an update of another size, rows in another order,
weights that were rounded to 4 bits before they were written, or another model's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeft.exporters.faults import WEIGHTS, Fault
from edgeft.exporters.tensors import WORST, Tensors, Weights, read

_MORE = 1.5  # times what rounding to the file's own types costs: then it is not the rounding
_SIXTEEN_BIT = 2e-3  # relative error that 16 bits may have (bfloat16: 2^-9)
_UNQUANTIZED = ("F16", "BF16", "F32")
_FORGOTTEN = 0.1  # how near 0 the update is missing
_RIGHT_SIZE = (0.9, 1.1)  # times the update that should be there
# Rounded by an importance matrix 0.79 times of it were left where 0.91 are without one.
_ROUNDED_SIZE = (0.25, 1.5)
_TELLING = 0.5  # of the update that rounding leaves; of less nothing is to be said
_MOST = 0.9  # of the tensors or rows that a cause has to explain
_SURE = 4  # standard errors
_MOVED, _ALIKE = 0.5, 0.85  # how far a row is from home; its cosine with the row that it is
_ROWS_SEEN = 256  # of a matrix
_NEARER = 0.85  # times the distance from the tuned weights: then it is NF4's weights
_BLOCK, _LEVELS = 64, 16  # NF4's block, and the values that 4 bits can have
# Dettmers et al. 2023, QLoRA, appendix E, as bitsandbytes has them.
_NF4 = np.array(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ],
    np.float32,
)
_AGAIN = "merge and convert again, from the base that the adapter was trained on"


@dataclass(frozen=True)
class Files:
    """The tensors of four GGUF files.

    Attributes:
        theirs: the file in question.
        tuned, base: ours in 16 bits.
        expected: tuned, quantized by us to the types of ``theirs``: what rounding alone does.
    """

    theirs: Tensors
    tuned: Tensors
    base: Tensors
    expected: Tensors


@dataclass(frozen=True)
class _Tensor:
    """One tensor in the four files; lengths and products are those of all its values.

    Attributes:
        size: how many values.
        tuned, base, update: squared length, update being tuned - base; ``base_update``: product.
        off, rounded: squared length of theirs - tuned and expected - tuned.
        from_base: of theirs - base.
        along, expected: product of theirs - base, and of expected - base, with the update.
    """

    name: str
    type: str
    size: int
    tuned: float
    base: float
    update: float
    base_update: float
    off: float
    rounded: float
    from_base: float
    along: float
    expected: float

    @property
    def error(self) -> float:
        """Relative to tuned."""
        return math.sqrt(self.off / self.tuned) if self.tuned else 0.0

    @property
    def allowed(self) -> float:
        """The error that rounding may make, with another importance matrix too."""
        return (
            max(_MORE * math.sqrt(self.rounded / self.tuned), _SIXTEEN_BIT) if self.tuned else 0.0
        )

    def rest(self, share: float) -> float:
        """Squared length of theirs - (base + share x update)."""
        return max(0.0, self.from_base - 2 * share * self.along + share**2 * self.update)

    def explained(self, share: float) -> bool:
        """Whether base + share x update, rounded, is what the file has."""
        whole = self.base + 2 * share * self.base_update + share**2 * self.update
        return math.sqrt(self.rest(share)) <= self.allowed * math.sqrt(max(whole, self.tuned))


def diagnose(files: Files) -> list[Fault]:
    """What is wrong with the weights, what can be proved first; nothing where nothing is."""
    lacking = sorted(files.tuned.keys() - files.theirs.keys())
    if lacking:
        text = f"it lacks {len(lacking)} of the model's tensors, such as {lacking[0]}"
        return [Fault(WEIGHTS, text, _AGAIN)]
    seen = [_measured(name, files) for name in files.tuned]
    found = sorted((m for m in seen if m.error > m.allowed), key=lambda m: -m.error)
    return (
        _reordered(found, files)
        or _rounded_before(seen, files)
        or _other_update(seen, files)
        or _other_weights(found, len(seen))
    )


def _measured(name: str, files: Files) -> _Tensor:
    theirs, tuned, base = (read(f[name]) for f in (files.theirs, files.tuned, files.base))
    rounded = tuned if files.expected is files.tuned else read(files.expected[name])
    update, from_base = tuned - base, theirs - base
    return _Tensor(
        name,
        files.theirs[name].tensor_type.name,
        tuned.size,
        tuned=_product(tuned, tuned),
        base=_product(base, base),
        update=_product(update, update),
        base_update=_product(base, update),
        off=_product(theirs - tuned, theirs - tuned),
        rounded=_product(rounded - tuned, rounded - tuned),
        from_base=_product(from_base, from_base),
        along=_product(from_base, update),
        expected=_product(rounded - base, update),
    )


def _product(a: Weights, b: Weights) -> float:
    return float(np.vdot(a, b))


def _reordered(found: Sequence[_Tensor], files: Files) -> list[Fault]:
    """Matrices whose rows are the model's, but elsewhere."""
    moved = [
        (m.name, share)
        for m in found[:WORST]
        if (share := _moved(read(files.theirs[m.name]), read(files.tuned[m.name])))
    ]
    if not moved:
        return []
    name, share = moved[0]
    text = f"the rows of {name} are the model's in another order ({share:.0%} moved)"
    if more := ", ".join(name for name, _ in moved[1:]):
        text += f", and so are those of {more}"
    remedy = "keep the vocabulary's order when converting"
    if "attn_" in name:
        remedy = "convert with llama.cpp's converter for this architecture, which orders these rows"
    return [Fault(WEIGHTS, text, remedy)]


def _moved(theirs: Weights, ours: Weights) -> float:
    """The share of rows that are not theirs; 0 unless those are other rows of the matrix."""
    lengths = np.linalg.norm(ours, axis=1)
    away = np.linalg.norm(theirs - ours, axis=1) / np.maximum(lengths, 1e-12)
    rows = np.argsort(-away)[:_ROWS_SEEN]
    rows = rows[away[rows] > _MOVED]
    if not len(rows):
        return 0.0
    cosines = _unit(theirs[rows]) @ _unit(ours).T
    best, at_home = cosines.max(1), cosines[np.arange(len(rows)), rows]
    elsewhere = (best > _ALIKE) & (best > at_home)
    return float(np.mean(away > _MOVED)) if elsewhere.mean() > _MOST else 0.0


def _unit(rows: Weights) -> Weights:
    found: Weights = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return found


def _rounded_before(seen: Sequence[_Tensor], files: Files) -> list[Fault]:
    """Weights that passed through 4 bits before they were written in the file's own types."""
    worst = [m for m in seen if m.off > m.rounded and m.error > _SIXTEEN_BIT]
    worst = sorted(worst, key=lambda m: (m.rounded - m.off) / m.tuned)[:WORST]
    proofs = [proof for m in worst if (proof := _coarse(m, files) or _nearer(m, files))]
    if not proofs or 2 * len(proofs) < len(worst):
        return []
    text = f"{proofs[0]}: it was rounded to 4 bits before it was written, as when an adapter is "
    text += "merged into a 4-bit model"
    return [Fault(WEIGHTS, text, "merge into the 16-bit base, and quantize once, at the end")]


def _coarse(m: _Tensor, files: Files) -> str | None:
    """16 bits that take no more values than 4 could, where base takes more."""
    if m.type not in _UNQUANTIZED or _levels(read(files.theirs[m.name])) > _LEVELS:
        return None
    if _levels(read(files.base[m.name])) <= _LEVELS:
        return None
    return f"{m.name} has at most {_LEVELS} different values in every block of {_BLOCK}"


def _levels(weights: Weights) -> int:
    """The most different values in any block of the first rows."""
    rows = weights[:_ROWS_SEEN].reshape(-1)
    blocks = np.sort(rows[: len(rows) // _BLOCK * _BLOCK].reshape(-1, _BLOCK), axis=1)
    if not len(blocks):
        return _BLOCK
    return int((np.diff(blocks, axis=1) != 0).sum(1).max()) + 1


def _nearer(m: _Tensor, files: Files) -> str | None:
    """Quantized weights that NF4's rounding of tuned explains better than tuned does."""
    theirs, tuned, base = (read(f[m.name]) for f in (files.theirs, files.tuned, files.base))
    if tuned.shape[1] % _BLOCK or not m.update:
        return None
    tried = (nf4(tuned), nf4(nf4(base) + tuned - base))  # of a plain base, and of one in NF4
    off = min(float(np.linalg.norm(theirs - weights)) for weights in tried) / math.sqrt(m.tuned)
    if off > _NEARER * m.error:
        return None
    return (
        f"{m.name} is nearer to NF4's rounding of tuned ({off:.1%}) than to tuned ({m.error:.1%})"
    )


def nf4(weights: Weights) -> Weights:
    """What NF4 in blocks of 64 leaves of (rows, columns)."""
    blocks = weights.reshape(-1, _BLOCK)
    scales = np.maximum(np.abs(blocks).max(1, keepdims=True), 1e-12)
    nearest = np.searchsorted((_NF4[1:] + _NF4[:-1]) / 2, blocks / scales)
    found: Weights = (_NF4[nearest] * scales).reshape(weights.shape)
    return found


def _other_update(seen: Sequence[_Tensor], files: Files) -> list[Fault]:
    """Tuning's update in another size, if that explains the file.

    The share of the update is the projection of (theirs - base) on it. Rounding may undo an update
    by itself, so ours tells how much of it should be there.
    """
    changed = [m for m in seen if m.update]
    size = sum(m.update for m in changed)
    if not size:
        return []
    share, left = (
        sum(x) / size for x in zip(*((m.along, m.expected) for m in changed), strict=True)
    )
    noise = sum((m.rest(share) + m.rounded) * m.update / m.size for m in changed)
    sure = _SURE * math.sqrt(noise) / size
    low, high = _RIGHT_SIZE if all(m.type in _UNQUANTIZED for m in changed) else _ROUNDED_SIZE
    if left < _TELLING or low <= share / left <= high or abs(share - left) < sure:
        return []
    if sum(m.explained(share) for m in changed) < _MOST * len(changed):
        return []
    if abs(share) < max(_FORGOTTEN, sure):
        text = "the fine-tuning is not in it"
        if sum(m.from_base for m in changed) < size / 4:  # else it may be another one
            text += ": these are the base's weights"
        return [Fault(WEIGHTS, text, "merge the adapter before converting (merge_and_unload)")]
    text = f"the fine-tuning is in it {share / left:.2f} times"
    remedy = "merge with the adapter's own lora_alpha and r, once, and the adapter that was scored"
    if share < left and all(_is_bfloat16(read(files.theirs[m.name])) for m in changed):
        text += ": it was merged in bfloat16, which rounds small updates away"
        remedy = "merge with the base in float32 (dtype=torch.float32)"
    return [Fault(WEIGHTS, text, remedy)]


def _is_bfloat16(weights: Weights) -> bool:
    return not bool((np.ascontiguousarray(weights).view(np.uint32) & 0xFFFF).any())


def _other_weights(found: Sequence[_Tensor], count: int) -> list[Fault]:
    if not found:
        return []
    worst = ", ".join(f"{m.name} {100 * m.error:.1f}% ({m.type})" for m in found[:3])
    what = "not the tuned model's, by more than rounding"
    if 2 * len(found) > count and found[len(found) // 2].error > 1:
        what = "another model's"
    text = f"{len(found)} of its {count} tensors are {what}: {worst}"
    return [Fault(WEIGHTS, text, _AGAIN)]
