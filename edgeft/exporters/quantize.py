"""Quantize a 16-bit GGUF by llama.cpp's own ``llama_model_quantize``, in a child process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.errors import UserError, near

_PREFIX = "LLAMA_FTYPE_MOSTLY_"


def ftypes() -> dict[str, int]:
    """llama.cpp's quantization types by the name that a target's TOML uses."""
    import llama_cpp

    return {
        name.removeprefix(_PREFIX): getattr(llama_cpp, name)
        for name in dir(llama_cpp)
        if name.startswith(_PREFIX)
    }


def quantize(source: Path, out: Path, ftype: str) -> None:
    """Write ``out`` from the 16-bit GGUF ``source``.

    Raises:
        UserError: llama.cpp has no such type, or refused the file.
    """
    import llama_cpp

    known = ftypes()
    if ftype not in known:
        raise UserError(f"llama.cpp has no quantization '{ftype}'{near(ftype, list(known))}")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = known[ftype]
    parameters.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), parameters)
    if code:
        raise UserError(f"llama.cpp could not quantize {source} to {ftype} (code {code})")


def _work(request: Any, emit: Callable[..., None]) -> None:
    quantize(Path(request["source"]), Path(request["out"]), request["ftype"])


if __name__ == "__main__":
    child.serve(_work)
