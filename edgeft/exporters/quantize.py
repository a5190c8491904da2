"""Quantize a 16-bit GGUF by llama.cpp's own ``llama_model_quantize``, in a child process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.errors import UserError, near
from edgeft.exporters import gguf_settings
from edgeft.exporters.imatrix import Matrix, block_count, read

_PREFIX = "LLAMA_FTYPE_MOSTLY_"
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_KV_INT, _KV_STR = 0, 3  # LLAMA_KV_OVERRIDE_TYPE_*
_KV_BYTES = 127


def ftypes() -> dict[str, int]:
    """llama.cpp's quantization types by the name that a target's TOML uses."""
    import llama_cpp

    return {
        name.removeprefix(_PREFIX): getattr(llama_cpp, name)
        for name in dir(llama_cpp)
        if name.startswith(_PREFIX)
    }


def quantize(
    source: Path,
    out: Path,
    ftype: str,
    imatrix: Path | None = None,
    types: Mapping[str, str] | None = None,
) -> None:
    """Write ``out`` from the 16-bit GGUF ``source``.

    Args:
        imatrix: an importance matrix; the file then says so, as llama-quantize writes it.
        types: a regular expression that is searched for in a tensor's name, to the tensor's ggml
            type; the first that is found counts. What a row's length does not allow gets the type
            that llama.cpp falls back to.

    Raises:
        UserError: llama.cpp has no such type, the matrix is another model's, an expression is in
            no tensor's name, or llama.cpp refused the file.
    """
    import llama_cpp

    known = ftypes()
    if ftype not in known:
        raise UserError(f"llama.cpp has no quantization '{ftype}'{near(ftype, list(known))}")
    if (imatrix or types) and not hasattr(llama_cpp, "llama_model_imatrix_data"):
        raise UserError(
            f"llama-cpp-python {llama_cpp.__version__} takes no importance matrix and no types: "
            "pip install --upgrade llama-cpp-python"
        )
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = known[ftype]
    parameters.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    kept: list[Any] = []  # what llama.cpp points to must live until it is done
    sizes = _sizes(source) if imatrix or types else {}
    if imatrix:
        matrix = read(imatrix)
        _check_fits(matrix, imatrix, sizes, source)
        parameters.imatrix = _columns(matrix, kept)
        parameters.kv_overrides = _said(matrix, imatrix.name, kept)
    if types:
        gguf_settings.check_types(types, sizes)
        parameters.tt_overrides = _overrides(types, kept)
    errors: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), parameters)
    if code:
        reason = errors[-1] if errors else f"code {code}"
        raise UserError(f"llama.cpp could not quantize {source} to {ftype}: {reason}")


def _sizes(source: Path) -> dict[str, int]:
    """Of every matrix in a GGUF: how long an importance matrix's entry for it must be."""
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(source).tensors
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{source} is truncated or not a GGUF file") from error
    shapes = {tensor.name: [*map(int, tensor.shape), 1] for tensor in tensors}
    return {n: shape[0] * shape[2] for n, shape in shapes.items() if len(shape) > 2}


def _check_fits(matrix: Matrix, path: Path, sizes: Mapping[str, int], source: Path) -> None:
    """llama.cpp quantizes without a word what a matrix of fewer blocks says nothing about."""
    blocks = block_count(sizes)
    if matrix.blocks() != blocks:
        raise UserError(
            f"{path} is another model's importance matrix: it has {matrix.blocks()} blocks, "
            f"{source} has {blocks}"
        )
    for name, columns in matrix.columns.items():
        if name.startswith("blk.") and sizes.get(name) != len(columns):
            raise UserError(
                f"{path} is another model's importance matrix: {name} has {len(columns)} columns "
                f"there, {sizes.get(name, 'no place')} in {source}"
            )


def _columns(matrix: Matrix, kept: list[Any]) -> Any:
    """An array of ``llama_model_imatrix_data``; the last one has no name."""
    import llama_cpp

    array = (llama_cpp.llama_model_imatrix_data * (len(matrix.columns) + 1))()
    for entry, (name, columns) in zip(array, matrix.columns.items(), strict=False):
        entry.name = name.encode()
        entry.data = columns.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = len(columns)
    kept += [array, matrix]
    return array


def _overrides(types: Mapping[str, str], kept: list[Any]) -> Any:
    """An array of ``llama_model_tensor_override``; the last one has no pattern."""
    import gguf
    import llama_cpp

    array = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for entry, (pattern, kind) in zip(array, types.items(), strict=False):
        if kind not in gguf_settings.TYPES:
            raise UserError(f"llama.cpp has no type '{kind}'{near(kind, gguf_settings.TYPES)}")
        entry.pattern = pattern.encode()
        entry.type = int(gguf.GGMLQuantizationType[kind])
    kept.append(array)
    return array


def _said(matrix: Matrix, name: str, kept: list[Any]) -> Any:
    """llama-quantize's ``quantize.imatrix.*``, but the file without its folder; the last is empty."""
    import llama_cpp

    said: dict[str, int | str] = {"file": name}
    if matrix.datasets:
        said["dataset"] = matrix.datasets[0]
    said["entries_count"] = len(matrix.columns)
    if matrix.chunks:
        said["chunks_count"] = matrix.chunks
    array = (llama_cpp.llama_model_kv_override * (len(said) + 1))()
    for entry, (key, value) in zip(array, said.items(), strict=False):
        entry.key = f"quantize.imatrix.{key}".encode()
        if isinstance(value, int):
            entry.tag, entry.value.val_i64 = _KV_INT, value
        else:
            entry.tag, entry.value.val_str = _KV_STR, value.encode()[:_KV_BYTES]
    kept.append(array)
    return array


def _work(request: Any, emit: Callable[..., None]) -> None:
    matrix = request.get("imatrix")
    quantize(
        Path(request["source"]),
        Path(request["out"]),
        request["ftype"],
        Path(matrix) if matrix else None,
        request.get("types"),
    )


if __name__ == "__main__":
    child.serve(_work)
