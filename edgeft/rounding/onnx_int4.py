"""What onnxruntime-genai's model builder writes at precision int4, in torch.

The builder (0.18, for a CPU) reads the folder's weights in the dtype they are saved in, casts them to
float32 and rounds those: no float16 in between. (edgeft's merged folders are float32.) It rounds
every MatMul with a constant matrix: of a Llama such as SmolLM2 q, k, v, o, gate, up and down of each
layer, and the head. Blocks lie along a matrix's input, as a row of ``torch.nn.Linear.weight``. The
norms stay float32. The embedding is no MatMul: where the model ties it to the head and the target's
``tied`` is true, it looks up the head's 4 bits (GatherBlockQuantized), so both are rounded alike;
otherwise it stays float32.

The graph has codes, float32 scales and zero points; MatMulNBits takes ``(code - zero point) * scale``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgeft.errors import UserError, near
from edgeft.rounding import compiled
from edgeft.rounding.exact import at_once, away, divided, folded, inverse, over, prepared

ALGORITHMS = ("default", "rtn", "k_quant")

_MOST = 15


def rounded_int4(
    weight: Tensor,
    *,
    block_size: int = 32,
    symmetric: bool = True,
    algorithm: str = "k_quant",
    out: Tensor | None = None,
) -> Tensor:
    """Quantized to 4 bits and back, as onnxruntime 1.32's MatMulNBitsQuantizer does it on a CPU.

    Args:
        weight: float32 [out features, in features], finite, not rounded to float16 before. A last
            block that is not full is filled with zeros, as there.
        block_size: 16, 32, 64, 128 or 256.
        symmetric: no zero points. ``k_quant`` does not know it: it always has zero points.
        algorithm: ``default``: MLAS's ``MlasQuantizeBlockwise``. ``rtn`` and ``k_quant``:
            ``quant_tensor`` and ``quant_tensor_k_quant_cpu`` in
            onnxruntime/quantization/neural_compressor/weight_only.py.
        out: where the result goes: float32, contiguous, of the same shape and device; it may be
            ``weight``.

    Returns:
        float32 [out features, in features].

    Raises:
        UserError: an unknown algorithm or block size; another dtype or shape.
    """
    if algorithm not in ALGORITHMS:
        raise UserError(f"no int4 algorithm '{algorithm}'{near(algorithm, ALGORITHMS)}")
    if block_size not in (16, 32, 64, 128, 256):
        raise UserError(f"int4 takes blocks of 16, 32, 64, 128 or 256, not of {block_size}")
    weight, out = prepared(weight, out)
    if not weight.numel():
        return out
    columns = weight.shape[1]
    padding = -columns % block_size
    per_row = (columns + padding) // block_size
    # Longer blocks are added up in another order there.
    if algorithm == "k_quant" and block_size <= 128 and compiled.takes(weight):
        blocks = torch.nn.functional.pad(weight, (0, padding)) if padding else weight
        done = compiled.k_quant(blocks.view(-1, block_size), None if padding else out)
        return out.copy_(done.view(len(weight), -1)[:, :columns]) if padding else out
    some = max(1, at_once(weight) // columns)
    for source, target in zip(weight.split(some), out.split(some), strict=True):
        blocks = torch.nn.functional.pad(source, (0, padding)).view(-1, block_size).t().contiguous()
        if algorithm == "default":
            done = _mlas(blocks, symmetric)
        elif algorithm == "rtn":
            done = _nearest(blocks, symmetric)
        else:
            done = _searched(blocks)
        target.copy_(done.t().reshape(-1, per_row * block_size)[:, :columns])
    return out


def _mlas(x: Tensor, symmetric: bool) -> Tensor:
    """float32 [block, blocks] to the same; halves go away from zero."""
    low, high = x.amin(0), x.amax(0)
    if symmetric:
        scale = torch.where(high.abs() > low.abs(), high, low) / -8
        zero = torch.full_like(scale, 8)
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scale = divided(high - low, _MOST)
        zero = away(torch.where(scale != 0, low / -scale, 0)).clamp_(0, _MOST)
    codes = away((x * inverse(scale)).add_(zero)).clamp_(0, _MOST)
    return codes.sub_(zero).mul_(scale)


def _nearest(x: Tensor, symmetric: bool) -> Tensor:
    """float32 [block, blocks] to the same; scales in float64 until the codes are chosen."""
    low, high = x.amin(0), x.amax(0)
    if symmetric:
        reach = torch.maximum(low.abs(), high.abs())
        scale = torch.where(reach > 0, divided((reach * 2).double(), _MOST), 1)
        zero = torch.full_like(scale, 8)
    else:
        scale = torch.where(low != high, divided((high - low).double(), _MOST), 1)
        zero = (-low / scale).round_().clamp_(0, _MOST)
    return _coded(x, scale, zero)


def _searched(x: Tensor) -> Tensor:
    """float32 [block, blocks] to the same: the scale and zero point of the least weighted error.

    llama.cpp's ``make_qkx2_quants`` with changes; every step starts from the best minimum until then.
    """
    low, high = x.amin(0), x.amax(0)
    # In float64: torch's float32 root, of MKL, is not always the nearest.
    spread = divided(_added(x * x), x.shape[0]).double().sqrt_().float()
    weights = spread + x.abs()
    sum_w, sum_x = _added(weights), _added(weights * x)
    codes = torch.empty_like(x)
    terms = x.new_empty(x.shape[0], 3, x.shape[1])

    def chosen(count: float) -> Tensor:
        step = torch.where(low != high, over(count, high - low), 1)
        torch.sub(x, low, out=codes).mul_(step).round_().clamp_(0, _MOST)
        return step

    def error(scale: Tensor, minimum: Tensor) -> Tensor:
        codes.mul_(scale).add_(minimum).sub_(x)
        return _added(codes.square_().mul_(weights))

    scale = over(1, chosen(_MOST))
    best = error(scale, low)
    for number in range(20):
        chosen(float(np.float32(-1 + 0.1 * number + _MOST)))
        torch.mul(weights, codes, out=terms[:, 0])
        torch.mul(terms[:, 0], codes, out=terms[:, 1])
        torch.mul(terms[:, 0], x, out=terms[:, 2])
        sum_l, sum_l2, sum_xl = _added(terms)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        found = error(new_scale, new_low)
        better = found < best
        best = torch.where(better, found, best)
        scale = torch.where(better, new_scale, scale)
        low = torch.where(better, new_low, low)
    zero = (-low / scale).round_().clamp_(0, _MOST)
    return _coded(x, scale.double(), zero)


def _coded(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x to codes by a float64 scale, and back by what is stored of it, a float32."""
    codes = (x / scale).add_(zero).round_().clamp_(0, _MOST)
    return codes.sub_(zero).float().mul_(scale.float())


def _added(terms: Tensor) -> Tensor:
    """The sum along the first dimension in numpy's order: eight partial sums, 128 terms at most."""
    count = terms.shape[0]
    if count > 128:
        return _added(terms[: count // 2]) + _added(terms[count // 2 :])
    a, b, c, d, e, f, g, h = folded(terms.unflatten(0, (-1, 8)))
    return ((a + b) + (c + d)) + ((e + f) + (g + h))
