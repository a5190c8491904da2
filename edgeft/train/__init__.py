"""Training, in a child process with the memory allocator set up for it."""

from __future__ import annotations

import ctypes.util
import os
import sys
from dataclasses import asdict
from pathlib import Path

from edgeft import child
from edgeft.progress import Update
from edgeft.train.settings import TrainSettings

# Freed tensors stay in the process, in huge pages; the defaults give them back to the kernel and
# fault them in again at every step.
_GLIBC = {
    "hugetlb": 1,
    "mmap_threshold": 4 << 30,
    "trim_threshold": 16 << 30,
    "top_pad": 256 << 20,
}


def train(
    base: Path, data: Path, out: Path, settings: TrainSettings, seed: int, progress: Update
) -> None:
    """Train on ``data/train.jsonl`` into ``out``: ``adapter/``, ``log.jsonl``, ``train.json``.

    Goes on from the last whole checkpoint that it finds in ``out``.

    Raises:
        UserError: training failed, with the reason.
    """
    request = {
        "base": str(base),
        "train": str(data / "train.jsonl"),
        "heldout": str(data / "heldout.jsonl"),
        "out": str(out),
        "settings": asdict(settings),
        "seed": seed,
    }
    for event in child.call("edgeft.train.worker", request, env=allocator()):
        progress(event["done"], event["total"], event["text"])


def allocator() -> dict[str, str]:
    """Environment of a training process: tcmalloc where it is installed, else glibc set up."""
    if sys.platform != "linux":
        return {}
    if tcmalloc := ctypes.util.find_library("tcmalloc_minimal"):
        return {"LD_PRELOAD": ":".join(filter(None, [tcmalloc, os.environ.get("LD_PRELOAD")]))}
    ours = ":".join(f"glibc.malloc.{name}={value}" for name, value in _GLIBC.items())
    theirs = os.environ.get("GLIBC_TUNABLES")
    return {"GLIBC_TUNABLES": ":".join(filter(None, [theirs, ours]))}
