"""Steps that C takes and torch would round differently if they were written the usual way."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeft.errors import UserError

_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 24}  # weights: for a CPU's cache, for few launches


def at_once(weight: Tensor) -> int:
    """How many weights to work on at a time on this device."""
    return _AT_ONCE.get(weight.device.type, _AT_ONCE["cuda"])


def prepared(weight: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The matrix without its gradient, contiguous, and a place for the result.

    Raises:
        UserError: what is wrong with either.
    """
    if weight.dim() != 2 or weight.dtype != torch.float32:
        kind = str(weight.dtype).removeprefix("torch.")
        raise UserError(f"rounding takes float32 in 2 dimensions, not {kind} in {weight.dim()}")
    weight = weight.detach().contiguous()
    if out is None:
        return weight, torch.empty_like(weight)
    if (out.shape, out.dtype, out.device) != (weight.shape, weight.dtype, weight.device):
        raise UserError("rounding: out is not of the weight's shape, dtype and device")
    if not out.is_contiguous():
        raise UserError("rounding: out is not contiguous")
    return weight, out


def divided(x: Tensor, by: float) -> Tensor:
    """``x / by``, rounded once: on CUDA a number as divisor becomes a product with its inverse."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def over(number: float, x: Tensor) -> Tensor:
    """``number / x``, rounded once: torch takes ``number / x`` as the inverse times the number."""
    return torch.full((), number, dtype=x.dtype, device=x.device) / x


def inverse(x: Tensor) -> Tensor:
    """``1 / x``, and 0 where x is 0."""
    return torch.where(x != 0, over(1, x), 0)


def folded(terms: Tensor) -> Tensor:
    """The sum along the first dimension, one after the other as C adds; ``terms`` [n, ...] -> [...]."""
    total = terms[0].clone()
    for row in terms[1:]:
        total.add_(row)
    return total


def peak(x: Tensor) -> Tensor:
    """What is farthest from zero in each column, the first of equals; x [n, blocks] -> [blocks]."""
    return x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0)


def away(x: Tensor) -> Tensor:
    """C's ``roundf``: halves go away from zero."""
    whole = x.trunc()
    return whole.add_((x - whole).abs_().ge_(0.5).copysign_(x))
