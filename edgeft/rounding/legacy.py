"""llama.cpp's types of 32-weight blocks, in torch.

Each function takes and returns float32 [32, blocks]: a block is a column, so that every step works
on rows of neighbours in memory. The formulas are those of ``quantize_row_*_ref`` and
``dequantize_row_*`` in ggml-quants.c; every product and sum is rounded to float32 on its own, as
there. Scales are float16 in the file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeft.rounding import compiled
from edgeft.rounding.exact import away, divided, folded, inverse, peak

BLOCK = 32

# kvalues_iq4nl in ggml-common.h
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def symmetric(x: Tensor, bits: int) -> Tensor:
    """Q4_0 and Q5_0: the number farthest from zero gets the lowest code."""
    lowest = 2 ** (bits - 1)
    scale = peak(x) / -lowest
    codes = (x * inverse(scale)).add_(lowest + 0.5).trunc_().clamp_(max=2 * lowest - 1)
    return codes.sub_(lowest).mul_(_stored(scale))


def affine(x: Tensor, bits: int) -> Tensor:
    """Q4_1 and Q5_1: codes from the minimum up."""
    most = 2**bits - 1
    low, high = x.amin(0), x.amax(0)
    scale = divided(high - low, most)
    codes = (x - low).mul_(inverse(scale)).add_(0.5).trunc_().clamp_(max=most)
    return codes.mul_(_stored(scale)).add_(_stored(low))


def eight_bit(x: Tensor) -> Tensor:
    """Q8_0: symmetric around zero."""
    scale = divided(x.abs().amax(0), 127)
    return away(x * inverse(scale)).add_(0).mul_(_stored(scale))  # no -0 among integers


def nonlinear(x: Tensor) -> Tensor:
    """IQ4_NL: the scale of the least squared error out of 16, weighted by x^2."""
    values = torch.tensor(_NONLINEAR, dtype=torch.float32, device=x.device)
    if compiled.takes(x):
        scale, codes = compiled.nonlinear(x, _NONLINEAR)
    else:
        scale = _nonlinear_search(x, values)
        codes = values[_nearest(x * inverse(scale), values)]
    return codes.mul_(_stored(scale))


def _nonlinear_search(x: Tensor, values: Tensor) -> Tensor:
    """float32 [blocks]; ``values``: what codes may stand for."""
    far = peak(x)
    empty = far.abs() < 1e-15
    square = x * x
    terms = x.new_empty(x.shape[0], 2, x.shape[1])

    def sums(inverse_scale: Tensor) -> tuple[Tensor, Tensor]:
        codes = values[_nearest(x * inverse_scale, values)]
        weighted = square * codes
        torch.mul(weighted, x, out=terms[:, 0])
        torch.mul(weighted, codes, out=terms[:, 1])
        of_x, of_codes = folded(terms)
        return of_x, of_codes

    of_x, of_codes = sums(inverse(divided(-far, _NONLINEAR[0])))
    scale = torch.where(of_codes > 0, of_x / of_codes, 0)
    best = scale * of_x
    for step in range(-7, 8):
        of_x, of_codes = sums(torch.full_like(far, step + _NONLINEAR[0]).div_(far))
        better = (of_codes > 0) & (of_x * of_x > best * of_codes)
        scale = torch.where(better, of_x / of_codes, scale)
        best = torch.where(better, scale * of_x, best)
    return scale.masked_fill(empty, 0)


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """int64: where in the ascending ``values`` the nearest stands; a tie takes the upper one."""
    upper = torch.bucketize(x, values, right=True).clamp_(1, len(values) - 1)
    return upper.sub_((x - values[upper - 1] < values[upper] - x).long())


def _stored(scale: Tensor) -> Tensor:
    return scale.half().float()
