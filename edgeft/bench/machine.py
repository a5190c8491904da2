"""What machine this is, without loading anything heavy."""

from __future__ import annotations

import platform
import re
import resource
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from edgeft import __version__, child
from edgeft.bench import board

_PACKAGES = (
    *("llama-cpp-python", "onnxruntime-genai", "onnxruntime"),
    *("torch", "transformers", "peft"),
)
_LASTING = ("cpu", "board", "architecture", "cores", "cpu_features", "system", "governor")


def machine_facts() -> dict[str, Any]:
    """CPU, memory, system, Python and the versions of what executes models here."""
    found = board.facts()
    facts: dict[str, Any] = {
        **{name: found[name] for name in _LASTING if found[name] is not None},
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        "edgeft": __version__,
    }
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def peak_rss_mb() -> float:
    """This process's largest resident memory so far, MB (10^6 bytes)."""
    try:  # on Linux getrusage counts what the parent held before exec
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / 1e6
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def rss_mb() -> float:
    """This process's resident memory now, MB (10^6 bytes)."""
    return float(psutil.Process().memory_info().rss) / 1e6


def _work(_: Any, emit: Callable[..., None]) -> None:
    emit("machine", **machine_facts())


if __name__ == "__main__":
    child.serve(_work)
