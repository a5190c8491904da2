"""Out of memory: seen as such, and answered with a batch size that fits."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import psutil
import torch

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
_SLACK = 1 << 30  # reserved, but never touched, by thread pools and the allocator


def limit_memory() -> None:
    """Let allocations fail where the machine has no more, so that Linux does not kill us instead.

    On the CPU alone: a GPU's driver reserves address space that is never memory.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return
    import resource

    free = psutil.virtual_memory().available + psutil.swap_memory().free + _SLACK
    used = psutil.Process().memory_info().rss
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    ours = free + used
    if soft == resource.RLIM_INFINITY or ours < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (ours, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an exception of torch's or Python's means."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def advice(batch_size: int, accumulation: int, fits: Callable[[int], object]) -> str:
    """What a user whose batch did not fit can do.

    Args:
        fits: runs one training step at a batch size, or fails for want of memory.
    """
    smaller = batch_size // 2
    while smaller and not _succeeds(fits, smaller):
        smaller //= 2
    if not smaller:
        return (
            f"out of memory at train.batch_size={batch_size}, and even a batch of 1 does not fit: "
            "take a smaller model, or train.activation_checkpointing=true"
        )
    steps = accumulation * -(-batch_size // smaller)
    return (
        f"out of memory at train.batch_size={batch_size}: {smaller} fits; with "
        f"--set train.batch_size={smaller} --set train.gradient_accumulation_steps={steps} "
        "every step sees the same questions"
    )


def _succeeds(fits: Callable[[int], object], batch_size: int) -> bool:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        fits(batch_size)
    except Exception as error:
        if is_out_of_memory(error):
            return False
        raise
    return True
