"""Weights as a target's quantizer will round them, float by float, for training that sees the loss.

A straight-through pass (Bengio et al. 2013, arXiv 1308.3432) multiplies by ``rounded(w)`` and lets
the gradient go to ``w``. Here is what llama.cpp writes; :mod:`edgeft.rounding.onnx_int4` has the
ONNX builder's 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from edgeft.errors import UserError, near
from edgeft.rounding import compiled, ggml, k_quants, legacy
from edgeft.rounding.exact import at_once, prepared

# kind: (weights in a block, weights that share a scale, float32 [that, n] -> the same)
_KINDS: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "F16": (1, 1, lambda x: x.half().float()),
    "Q4_0": (32, 32, partial(legacy.symmetric, bits=4)),
    "Q4_1": (32, 32, partial(legacy.affine, bits=4)),
    "Q5_0": (32, 32, partial(legacy.symmetric, bits=5)),
    "Q5_1": (32, 32, partial(legacy.affine, bits=5)),
    "Q8_0": (32, 32, legacy.eight_bit),
    "IQ4_NL": (32, 32, legacy.nonlinear),
    "Q2_K": (256, 16, k_quants.two_bit),
    "Q3_K": (256, 16, k_quants.three_bit),
    "Q4_K": (256, 32, partial(k_quants.affine, bits=4)),
    "Q5_K": (256, 32, partial(k_quants.affine, bits=5)),
    "Q6_K": (256, 16, k_quants.six_bit),
}
KINDS = tuple(_KINDS)
# Compiled here for side by side blocks, they are faster than one block after the other in ggml.
_SEARCHED = ("Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")


def block_size(kind: str) -> int:
    """How many weights of a row make a block of one of :data:`KINDS`."""
    return _KINDS[kind][0]


def rounded(
    weight: Tensor,
    kind: str,
    *,
    half: bool = False,
    out: Tensor | None = None,
    library: bool | None = None,
) -> Tensor:
    """Quantized to ggml type ``kind`` and back, as ``llama_model_quantize`` without an importance matrix.

    That is ``ggml_quantize_chunk`` and the type's ``to_float``. Blocks lie along a row. llama.cpp
    gets its weights from a file; where that has float16, ask for ``half``.

    Args:
        weight: float32 [rows, columns], finite.
        kind: one of :data:`KINDS`.
        half: round to float16 first.
        out: where the result goes: float32, contiguous, of the same shape and device; it may be
            ``weight``. Without one, most of the time for the 32-blocks goes to fresh memory.
        library: by llama.cpp's own code (a CPU's memory only), or in torch. None: the library
            where there is one, since it is the faster there.

    Returns:
        float32 [rows, columns].

    Raises:
        UserError: no such kind; columns that are no multiple of its block; another dtype or shape.
    """
    if kind not in _KINDS:
        raise UserError(f"no rounding to '{kind}'{near(kind, KINDS)}")
    weight, out = prepared(weight, out)
    block, group, function = _KINDS[kind]
    if weight.shape[1] % block:
        raise UserError(f"{kind} takes rows of a multiple of {block}, not of {weight.shape[1]}")
    if library is None:
        slow = kind in _SEARCHED and compiled.available()
        library = weight.device.type == "cpu" and ggml.available() and not slow
    if not weight.numel():
        return out
    if library and kind != "F16":
        return ggml.rounded(weight, kind, half=half, out=out)
    step = max(block, group)
    blocks = max(step, at_once(weight) // step * step) // group
    for source, target in zip(
        weight.view(-1, group).split(blocks), out.view(-1, group).split(blocks), strict=True
    ):
        columns = (source.half().float() if half else source).t().contiguous()
        target.copy_(function(columns).t())
    return out
