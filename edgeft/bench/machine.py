"""What machine this is, without loading anything heavy."""

from __future__ import annotations

import platform
import re
import resource
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from edgeft import __version__
from edgeft.runtimes import thread_count

_FEATURES = (
    *("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
_PACKAGES = (
    *("llama-cpp-python", "onnxruntime-genai", "onnxruntime"),
    *("torch", "transformers", "peft"),
)


def machine_facts() -> dict[str, Any]:
    """CPU, memory, system, Python and the versions of what executes models here."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    facts: dict[str, Any] = {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": thread_count(0),
        "cpu_features": " ".join(name for name in _FEATURES if name in flags),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
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


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
