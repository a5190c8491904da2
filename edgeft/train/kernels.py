"""Pieces of a transformer with backward passes of their own: the same numbers, less time and memory.

Each keeps only what its gradient needs and recomputes the rest. All work under autocast and without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class LoraLinear(torch.autograd.Function):  # type: ignore[misc]
    """``x W' + bias + scaling (x A') B'`` with W frozen (Hu et al. 2021, arXiv 2106.09685).

    The products of rank r are added into the large ones in place, and of all activations only ``x``
    and ``x A'`` are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """x [..., in], weight [out, in], a [r, in], b [out, r] -> [..., out] of the weight's dtype."""
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(weight.dtype).reshape(-1, x.shape[-1])
            low_a, low_b = a.to(weight.dtype), b.to(weight.dtype)
            inner = flat @ low_a.t()
            y = torch.nn.functional.linear(flat, weight, bias)
            y.addmm_(inner, low_b.t(), alpha=scale)
        ctx.save_for_backward(flat, weight, inner, low_a, low_b)
        ctx.scale, ctx.like = scale, (x.shape, x.dtype, a.dtype, b.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b; the rest is frozen."""
        flat, weight, inner, a, b = ctx.saved_tensors
        shape, x_dtype, a_dtype, b_dtype = ctx.like
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(weight.dtype).reshape(-1, grad.shape[-1])
            narrow = (grad @ b).mul_(ctx.scale)
            grad_a = (narrow.t() @ flat).to(a_dtype)
            grad_b = (grad.t() @ inner).to(b_dtype).mul_(ctx.scale)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ weight).addmm_(narrow, a).view(shape).to(x_dtype)
        return grad_x, None, None, grad_a, grad_b, None


class RoundedLinear(torch.autograd.Function):  # type: ignore[misc]
    """``x Q(W + scaling B A)' + bias``: what a quantizer Q will leave of base and adapter.

    Gradients pass straight through Q (Bengio et al. 2013, arXiv 1308.3432), so a and b get those of
    :class:`LoraLinear`, by products of rank r: the gradient of the whole matrix is never made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rounded: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        """x [..., in], rounded [out, in], a [r, in], b [out, r] -> [..., out] of rounded's dtype."""
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(rounded.dtype).reshape(-1, x.shape[-1])
            y = torch.nn.functional.linear(flat, rounded, bias)
        ctx.save_for_backward(flat, rounded, a.to(rounded.dtype), b.to(rounded.dtype))
        ctx.scale, ctx.like = scale, (x.shape, x.dtype, a.dtype, b.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b."""
        flat, rounded, a, b = ctx.saved_tensors
        shape, x_dtype, a_dtype, b_dtype = ctx.like
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(rounded.dtype).reshape(-1, grad.shape[-1])
            grad_a = ((grad @ b).mul_(ctx.scale).t() @ flat).to(a_dtype)
            grad_b = (grad.t() @ (flat @ a.t())).to(b_dtype).mul_(ctx.scale)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ rounded).view(shape).to(x_dtype)
        return grad_x, None, None, grad_a, grad_b, None


class RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    """``weight * x / sqrt(mean(x^2) + eps)`` in float32 (Zhang & Sennrich 2019, arXiv 1910.07467).

    Keeps ``x`` as it came, not its float32 copies.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., n], weight [n] -> [..., n]."""
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and, where it is trained, of the weight."""
        x, weight, inverse = ctx.saved_tensors
        unit = x.float() * inverse
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * unit).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        wide = (grad * weight).float()
        along = torch.linalg.vecdot(wide, unit).div_(x.shape[-1]).unsqueeze_(-1)
        grad_x = wide.sub_(unit.mul_(along)).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None


class GatedSilu(torch.autograd.Function):  # type: ignore[misc]
    """``silu(gate) * up`` (Shazeer 2020, arXiv 2002.05202); ``silu(gate)`` is not kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """gate and up [..., n] -> [..., n]."""
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, torch.nn.functional.silu(gate).mul_(grad)


class CausalAttention(torch.autograd.Function):  # type: ignore[misc]
    """Causal attention on a CPU: PyTorch's flash kernel forward, plain products backward.

    The kernel's own backward pass takes several times as long at the lengths of word problems. The
    gradients are FlashAttention's (Dao et al. 2022, arXiv 2205.14135, appendix B): probabilities
    come again from the row sums that the forward pass kept.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [n, heads, length, d]; key, value [n, kv heads, length, d] -> as query."""
        out, row_sums = _flash(query, key, value, 0.0, True, scale=scale)
        ctx.save_for_backward(query, key, value, out, row_sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, row_sums = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            n, heads, length, width = query.shape
            kv = key.shape[1]
            rows = heads // kv * length  # the queries that share a key, one after the other
            q, g, o = (t.reshape(n, kv, rows, width) for t in (query, grad, out))
            p = (q.float() @ key.float().transpose(-1, -2)).mul_(ctx.scale)
            p = p.sub_(row_sums.reshape(n, kv, rows, 1)).exp_()
            p.view(n, heads, length, length).tril_()
            grad_value = p.to(g.dtype).transpose(-1, -2) @ g
            own = torch.linalg.vecdot(g.float(), o.float()).unsqueeze_(-1)
            slope = (g @ value.transpose(-1, -2)).float().sub_(own)
            scores = p.mul_(slope).mul_(ctx.scale).to(q.dtype)
            grad_query = (scores @ key).view(query.shape)
            grad_key = scores.transpose(-1, -2) @ q
        return grad_query, grad_key, grad_value, None


class CrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Sum of -log softmax(logits) at the targets, in float32, some rows at a time.

    Next to the logits nothing of their size is kept: the gradient, softmax - one-hot, comes from
    the rows' log-sums.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """logits [n, vocabulary], targets int64 [n] -> float32 [], nats."""
        targets = targets.unsqueeze(1)
        found = []
        with torch.autocast(logits.device.type, enabled=False):
            for some, gold in _rows(logits, targets):
                found.append(torch.log_softmax(some, -1, dtype=torch.float32).gather(1, gold))
            of_gold = torch.cat(found)
        ctx.save_for_backward(logits, targets, logits.gather(1, targets) - of_gold)
        return -of_gold.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient of the logits."""
        logits, targets, log_sums = ctx.saved_tensors
        out = torch.empty_like(logits)
        for some, gold, log_sum, into in _rows(logits, targets, log_sums, out):
            p = (some - log_sum).exp_()
            into.copy_(p.scatter_add_(1, gold, p.new_full((1, 1), -1).expand_as(gold)).mul_(grad))
        return out, None


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors cut alike along their rows, such that a part of the first fits a CPU's cache."""
    first = tensors[0]
    elements = 1 << (20 if first.device.type == "cpu" else 26)
    rows = max(1, elements // first.shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
