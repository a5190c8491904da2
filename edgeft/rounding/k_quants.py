"""llama.cpp's K-quants, in torch: super-blocks of 256 weights, in groups of 16 or 32.

Each function takes and returns float32 [weights of a group, groups]; a super-block's groups are
neighbours. The formulas are those of ``quantize_row_*_K_ref`` and ``dequantize_row_*_K`` in
ggml-quants.c, sums in the same order, every product and sum rounded to float32 on its own (as in a
build for x86-64; GCC fuses some of them where the baseline has FMA, such as arm64).

The codes are chosen twice there: once to find a group's scale, and again with the scale as stored.
So the first codes are not kept here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgeft.rounding import compiled
from edgeft.rounding.exact import divided, folded, over, peak

SUPER_BLOCK = 256
_NOTHING = 1e-15  # GROUP_MAX_EPS


def affine(x: Tensor, bits: int) -> Tensor:
    """Q4_K and Q5_K: groups of 32 with 6-bit scales and minima."""
    most = 2**bits - 1
    # In float64: torch's float32 root, of MKL, is not always the nearest.
    spread = divided(folded(x * x), 32).double().sqrt_().float()
    first, steps = (-1.0, 20) if bits == 4 else (-0.5, 15)
    scales, minima = _affine_search(x, spread + x.abs(), most, first, steps, square=True)
    scale_codes, scale = _unsigned(scales, 63, 8)
    minimum_codes, minimum = _unsigned(minima, 63, 8)
    # C keeps them as bytes before it clips them.
    scale_codes = scale_codes.remainder_(256).clamp_(max=63)
    minimum_codes = minimum_codes.remainder_(256).clamp_(max=63)
    return _affine_codes(x, scale_codes * scale, minimum_codes * minimum, most)


def two_bit(x: Tensor) -> Tensor:
    """Q2_K: groups of 16 with 4-bit scales and minima."""
    scales, minima = _affine_search(x, x.abs(), 3, -0.5, 15, square=False)
    scale_codes, scale = _unsigned(scales, 15, 16)
    minimum_codes, minimum = _unsigned(minima, 15, 16)
    # One byte has both: a negative code of a scale spills into the minimum's four bits.
    both = scale_codes.int() | (minimum_codes.int() << 4)
    return _affine_codes(x, (both & 15) * scale, ((both >> 4) & 15) * minimum, 3)


def three_bit(x: Tensor) -> Tensor:
    """Q3_K: groups of 16 with 6-bit signed scales."""
    scales = _descent(x).view(-1, 16)
    far = peak(scales.t()).unsqueeze(1)
    steps = over(-32, far)
    codes = torch.where(far != 0, (steps * scales).round_().clamp_(-32, 31), 0)
    scale = torch.where(far != 0, over(1, steps), 0).half().float()
    return _signed_codes(x, (codes * scale).view(-1), -4, 3)


def six_bit(x: Tensor) -> Tensor:
    """Q6_K: groups of 16 with 8-bit signed scales."""
    scales = _signed_search(x, 32).view(-1, 16)
    far = peak(scales.t()).unsqueeze(1)
    steps = over(-128, far)
    empty = far.abs() < _NOTHING
    codes = (steps * scales).round_().clamp_(max=127).masked_fill_(empty, 0)
    scale = over(1, steps).masked_fill_(empty, 0).half().float()
    return _signed_codes(x, (codes * scale).view(-1), -32, 31)


def _affine_search(
    x: Tensor,
    weights: Tensor,
    most: int,
    first: float,
    steps: int,
    square: bool,
) -> tuple[Tensor, Tensor]:
    """``make_qkx2_quants``: scale and minus the minimum by weighted error, both [groups].

    Every step starts from the best minimum until then, so the steps cannot be taken side by side.
    """
    if compiled.takes(x):
        return compiled.affine(x, weights, most, first, steps, square)
    error_of = torch.square if square else torch.abs
    low, high = x.amin(0).clamp_(max=0), x.amax(0)
    flat = high == low
    terms = x.new_empty(x.shape[0], 3, x.shape[1])
    codes = torch.empty_like(x)
    sum_w, sum_x = folded(weights), folded(torch.mul(weights, x))

    def chosen(step: Tensor) -> None:
        torch.sub(x, low, out=codes).mul_(step).round_().clamp_(0, most)

    def error(scale: Tensor, minimum: Tensor) -> Tensor:
        codes.mul_(scale).add_(minimum).sub_(x)
        return folded(error_of(codes, out=codes).mul_(weights))

    span = (high - low).masked_fill_(flat, 1)
    step = over(most, span)
    scale = over(1, step)
    chosen(step)
    best = error(scale, low)
    for number in range(steps + 1):
        count = np.float32(first) + np.float32(0.1) * np.float32(number) + np.float32(most)
        chosen(over(float(count), (high - low).masked_fill_(flat, 1)))
        torch.mul(weights, codes, out=terms[:, 0])
        torch.mul(terms[:, 0], codes, out=terms[:, 1])
        torch.mul(terms[:, 0], x, out=terms[:, 2])
        sum_l, sum_l2, sum_xl = folded(terms)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_low > 0
        new_scale = torch.where(above, sum_xl / sum_l2, new_scale)
        new_low.masked_fill_(above, 0)
        found = error(new_scale, new_low)
        better = (determinant > 0) & (found < best)
        best = torch.where(better, found, best)
        scale = torch.where(better, new_scale, scale)
        low = torch.where(better & ~flat, new_low, low)
    return scale.masked_fill(flat, 0), -low


def _signed_search(x: Tensor, most: int) -> Tensor:
    """``make_qx_quants`` with weights x^2: the scale by weighted error out of 19, [groups]."""
    if compiled.takes(x):
        return compiled.signed(x, most)
    far = peak(x)
    empty = far.abs() < _NOTHING
    square = x * x
    cube = square * x
    terms = x.new_empty(x.shape[0], 2, x.shape[1])
    codes = torch.empty_like(x)

    def sums(step: Tensor) -> tuple[Tensor, Tensor]:
        torch.mul(x, step, out=codes).round_().clamp_(-most, most - 1)
        torch.mul(cube, codes, out=terms[:, 0])
        torch.mul(square, codes, out=terms[:, 1]).mul_(codes)
        of_x, of_codes = folded(terms)
        return of_x, of_codes

    of_x, of_codes = sums(over(-most, far))
    scale = torch.where(of_codes != 0, of_x / of_codes, 0)
    best = scale * of_x
    for number in (*range(-9, 0), *range(1, 10)):
        count = -(np.float32(most) + np.float32(0.1) * np.float32(number))
        of_x, of_codes = sums(over(float(count), far))
        better = (of_codes > 0) & (of_x * of_x > best * of_codes)
        scale = torch.where(better, of_x / of_codes, scale)
        best = torch.where(better, scale * of_x, best)
    return scale.masked_fill(empty, 0)


def _descent(x: Tensor) -> Tensor:
    """``make_q3_quants``: codes changed one after the other, five times over; the scales [groups]."""
    far = peak(x)
    empty = far.abs() < _NOTHING
    square = x * x
    cube = square * x
    codes = (x * over(-4, far)).round_().clamp_(-4, 3)
    sum_x, sum_l = folded(cube * codes), folded((square * codes).mul_(codes))
    for _ in range(5):
        changed = False
        for here, w, wx, code in zip(x, square, cube, codes, strict=True):
            rest_x = sum_x - wx * code
            rest_l = sum_l - (w * code).mul_(code)
            new = (here * rest_l).div_(rest_x).round_().clamp_(-4, 3)
            new_x = (wx * new).add_(rest_x)
            new_l = (w * new).mul_(new).add_(rest_l)
            better = (new_x * new_x).mul_(sum_l) > (sum_x * sum_x).mul_(new_l)
            better &= (rest_x > 0) & (new != code) & (new_l > 0)
            code.copy_(torch.where(better, new, code))
            sum_x = torch.where(better, new_x, sum_x)
            sum_l = torch.where(better, new_l, sum_l)
            changed = changed or x.is_cuda or bool(better.any())
        if not changed:
            break
    return torch.where(sum_l > 0, sum_x / sum_l, 0).masked_fill(empty, 0)


def _unsigned(values: Tensor, most: int, groups: int) -> tuple[Tensor, Tensor]:
    """Codes [super-blocks, groups] and the step [super-blocks, 1] as stored in float16."""
    values = values.view(-1, groups)
    high = values.amax(1, keepdim=True).clamp_(min=0)
    codes = (torch.where(high > 0, over(most, high), 0) * values).round_()
    return codes, divided(high, most).half().float()


def _affine_codes(x: Tensor, scales: Tensor, minima: Tensor, most: int) -> Tensor:
    """x to codes and back, with the scales and minima as stored."""
    scales, minima = scales.view(-1), minima.view(-1)
    codes = (x + minima).div_(scales).round_().clamp_(0, most).masked_fill_(scales == 0, 0)
    return codes.add_(0).mul_(scales).sub_(minima)


def _signed_codes(x: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    """x to codes and back, with the scales as stored."""
    codes = (x / scales).round_().clamp_(least, most).masked_fill_(scales == 0, 0)
    return codes.add_(0).mul_(scales)  # no -0 among integers
