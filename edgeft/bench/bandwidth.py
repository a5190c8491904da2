"""How fast this machine reads its memory: the limit of decoding, which reads every weight once a token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil

_BYTES = 256 * 2**20  # a thread; far more than any cache
_ROUNDS = 6


def read_bandwidth(threads: int) -> float:
    """The best of a few rounds in which every thread reads memory of its own once.

    Args:
        threads: how many read at the same time.

    Returns:
        10^9 bytes a second, of all threads together.
    """
    room = psutil.virtual_memory().available // (2 * threads)
    words = max(2**20, min(_BYTES, room) // 8)
    # Written to, so that every page is there.
    blocks = [np.full(words, i, np.uint64) for i in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, blocks))
            best = max(best, threads * words * 8 / (time.perf_counter() - start))
    return best / 1e9
