"""The memory allocator of processes that run torch on the CPU."""

from __future__ import annotations

import ctypes.util
import os
import sys

# Freed tensors stay in the process, in huge pages; the defaults give them back to the kernel and
# fault them in again at every step.
_GLIBC = {
    "hugetlb": 1,
    "mmap_threshold": 4 << 30,
    "trim_threshold": 16 << 30,
    "top_pad": 256 << 20,
}


def allocator() -> dict[str, str]:
    """Environment variables for such a process: tcmalloc where it is installed, else glibc set up."""
    if sys.platform != "linux":
        return {}
    if tcmalloc := ctypes.util.find_library("tcmalloc_minimal"):
        return {"LD_PRELOAD": ":".join(filter(None, [tcmalloc, os.environ.get("LD_PRELOAD")]))}
    ours = ":".join(f"glibc.malloc.{name}={value}" for name, value in _GLIBC.items())
    theirs = os.environ.get("GLIBC_TUNABLES")
    return {"GLIBC_TUNABLES": ":".join(filter(None, [theirs, ours]))}
