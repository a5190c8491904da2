"""How far a GGUF's weights lie from the ones it was made of, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]
Tensors = Mapping[str, Any]  # gguf.gguf_reader.ReaderTensor by name
WORST = 5


@dataclass(frozen=True)
class TensorError:
    """``error``: Frobenius norm of the difference over that of the reference."""

    name: str
    type: str
    error: float


def errors(artifact: Tensors, reference: Tensors) -> list[TensorError]:
    """Each of a GGUF's matrices against that of the same name in another, the worst first.

    Args:
        reference: of the file in 16 bits that it was quantized from.
    """
    found = []
    for name, tensor in matrices(artifact).items():
        if name in reference and list(tensor.shape) == list(reference[name].shape):
            ours = read(reference[name])
            error = _relative(read(tensor) - ours, ours)
            found.append(TensorError(name, tensor.tensor_type.name, error))
    return sorted(found, key=lambda e: -e.error)


def summary(found: Sequence[TensorError]) -> dict[str, Any]:
    """As a manifest has it: the mean error and the worst tensors."""
    worst = [vars(e) for e in found[:WORST]]
    return {"error": float(np.mean([e.error for e in found])) if found else 0.0, "worst": worst}


def opened(path: Path) -> tuple[dict[str, Any], Tensors]:
    """A GGUF's metadata, of which ``contents()`` is the value, and its tensors.

    Raises:
        ValueError, IndexError, OSError: it is truncated or no GGUF.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)  # which takes seconds: a vocabulary is long
    return dict(reader.fields), {tensor.name: tensor for tensor in reader.tensors}


def matrices(tensors: Tensors) -> Tensors:
    """Those that have two dimensions, which are what is quantized."""
    return {name: tensor for name, tensor in tensors.items() if len(tensor.shape) > 1}


def read(tensor: Any) -> Weights:
    """float32 (rows, columns), a vector as one row."""
    from gguf.quants import dequantize

    data: Weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    return data.reshape(-1, int(tensor.shape[0]))


def _relative(difference: Weights, reference: Weights) -> float:
    norm = float(np.linalg.norm(reference))
    return float(np.linalg.norm(difference)) / norm if norm else 0.0
