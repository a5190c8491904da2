"""The searches for a block's scale, compiled by numba for a CPU: many times as fast as torch's steps.

What they compute is what their namesakes in torch do, bit for bit: every product and sum is rounded
to float32 on its own, and sums have the same order. Here a tile of blocks goes through a search in
the core's own cache, side by side in its vector registers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PART = 1 << 16  # weights that are worth a thread's while


@functools.cache
def available() -> bool:
    """Whether numba is there, on a CPU on which ggml's compiler fuses no products and sums."""
    here = platform.machine() in ("x86_64", "AMD64")
    return here and importlib.util.find_spec("numba") is not None


def takes(x: Tensor) -> bool:
    """Whether these blocks can be searched here."""
    return x.device.type == "cpu" and x.is_contiguous() and available()


def affine(
    x: Tensor, weights: Tensor, most: int, first: float, steps: int, square: bool
) -> tuple[Tensor, Tensor]:
    """ggml's ``make_qkx2_quants``: scale and minus the minimum by weighted error.

    Args:
        x: float32 [weights of a group, groups], contiguous; ``weights`` too.
        most: the highest code.
        first: of the counts that are tried, and ``steps`` more in tenths.
        square: the error's square counts, else its amount.

    Returns:
        float32 [groups] each.
    """
    counts = np.float32(first) + np.float32(0.1) * np.arange(steps + 1, dtype=np.float32)
    counts = (counts + np.float32(most)).astype(np.float32)
    scale, low = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    _run(_kernels().affine, x, weights, np.float32(most), counts, square, scale, low)
    return scale, -low


def signed(x: Tensor, most: int) -> Tensor:
    """ggml's ``make_qx_quants`` with weights x^2: the scale by weighted error, float32 [groups].

    Args:
        x: float32 [weights of a group, groups], contiguous.
        most: codes go from minus that to one below it.
    """
    tenths = [0, *range(-9, 0), *range(1, 10)]
    counts = -(np.float32(most) + np.float32(0.1) * np.array(tenths, np.float32))
    scale = x.new_empty(x.shape[1])
    _run(_kernels().signed, x, np.float32(most), counts.astype(np.float32), scale)
    return scale


def nonlinear(x: Tensor, values: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """ggml's search for IQ4_NL: scales, float32 [blocks], and what the codes stand for.

    Args:
        x: float32 [32, blocks], contiguous.
        values: what codes may stand for, ascending.

    Returns:
        The second: float32 [32, blocks], of ``values``.
    """
    scale, codes = x.new_empty(x.shape[1]), torch.empty_like(x)
    _run(_kernels().nonlinear, x, np.array(values, np.float32), scale, codes)
    return scale, codes


def k_quant(x: Tensor, out: Tensor | None) -> Tensor:
    """onnxruntime's ``k_quant`` in 4 bits, to codes and back.

    Args:
        x: float32 [blocks, weights of a block], contiguous; at most 128 of them, a multiple of 8.
        out: where the result goes, as many numbers, contiguous; it may be ``x``. None: new memory.

    Returns:
        The shape of x.
    """
    counts = np.array([15, *(-1 + 0.1 * number + 15 for number in range(20))], np.float32)
    out = torch.empty_like(x) if out is None else out.view(x.shape)
    _run(_kernels().k_quant, x, counts, out, blocks=x.shape[0])
    return out


def _run(
    kernel: Callable[..., None], x: Tensor, *arguments: Any, blocks: int | None = None
) -> None:
    """Blocks, x's columns unless there is their number, are shared out to threads.

    numba lets go of Python's lock meanwhile.
    """
    columns = blocks or x.shape[1]
    given = [a.numpy() if isinstance(a, Tensor) else a for a in arguments]
    workers = max(1, min(_cores(), x.numel() // _PART))
    tile: int = _kernels().TILE
    share = -(-columns // (workers * tile)) * tile
    parts = [(at, min(columns, at + share)) for at in range(0, columns, share)]
    if len(parts) == 1:
        kernel(x.numpy(), *parts[0], *given)
        return
    list(_pool().map(lambda part: kernel(x.numpy(), *part, *given), parts))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores())


@functools.cache
def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _kernels() -> Any:
    """numba and what it compiles are imported when they are needed."""
    from edgeft.rounding import kernels

    return kernels
