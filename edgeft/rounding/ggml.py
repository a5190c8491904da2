"""Rounding by llama.cpp's own library, through ctypes: exact, whatever compiler built it."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# ggml.h's enum ggml_type; the numbers are those of GGUF files and never change.
TYPES = {
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
}

_PART = 1 << 15  # weights at once: with all buffers they stay in a core's own cache
_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


class _Traits(ctypes.Structure):
    """The head of ggml.h's ``struct ggml_type_traits``."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@functools.cache
def _library() -> Any:
    """libggml-base of the installed llama-cpp-python, or None; the package is not imported."""
    spec = importlib.util.find_spec("llama_cpp")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for name in _NAMES:
            path = Path(place) / "lib" / name
            if path.is_file():
                try:
                    library = ctypes.CDLL(str(path))
                    quantize, traits = library.ggml_quantize_chunk, library.ggml_get_type_traits
                except (OSError, AttributeError):
                    return None
                pointer, count = ctypes.c_void_p, ctypes.c_int64
                quantize.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
                quantize.restype = ctypes.c_size_t
                traits.argtypes = [ctypes.c_int]
                traits.restype = ctypes.POINTER(_Traits)
                return library
    return None


def available() -> bool:
    """Whether llama-cpp-python's libggml-base is there and loads."""
    return _library() is not None


def rounded(
    weight: Tensor, kind: str, *, half: bool, out: Tensor, threads: int | None = None
) -> Tensor:
    """Quantize by ``ggml_quantize_chunk`` without an importance matrix, dequantize by ``to_float``.

    Args:
        weight: float32 [rows, columns] in the CPU's memory, contiguous; columns a multiple of the
            kind's block.
        kind: a key of :data:`TYPES`.
        half: round to float16 first.
        out: as ``weight``; it may be ``weight`` itself.
        threads: None: one a core. ctypes releases the GIL, so they run side by side.

    Returns:
        ``out``.
    """
    library, number = _library(), TYPES[kind]
    traits = library.ggml_get_type_traits(number).contents
    rows, columns = weight.shape
    at_once = max(1, _PART // columns)
    source, target = weight.data_ptr(), out.data_ptr()
    workers = min(threads or _cores(), -(-rows // at_once))

    def work(worker: int) -> None:
        blocks = torch.empty(at_once * columns // traits.block * traits.bytes, dtype=torch.uint8)
        narrow = torch.empty(at_once * columns if half else 0, dtype=torch.float16)
        widened = torch.empty(at_once * columns if half else 0)
        for start in range(worker * at_once, rows, workers * at_once):
            count = min(at_once, rows - start)
            numbers = count * columns
            here = source + 4 * start * columns
            if half:
                narrow[:numbers].copy_(weight[start : start + count].view(-1))
                widened[:numbers].copy_(narrow[:numbers])
                here = widened.data_ptr()
            library.ggml_quantize_chunk(number, here, blocks.data_ptr(), 0, count, columns, None)
            traits.to_float(blocks.data_ptr(), target + 4 * start * columns, numbers)

    if workers == 1:
        work(0)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, range(workers)))
    return out


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
