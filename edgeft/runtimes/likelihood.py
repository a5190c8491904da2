"""Log-likelihoods from logits, for the runtimes that give logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
_ROWS_AT_ONCE = 8  # log-softmax in the processor's cache


def log_likelihood(logits: Logits, targets: Sequence[int]) -> float:
    """sum over rows of log softmax(logits)[target], in nats; float32 terms, float64 sums."""
    total = 0.0
    for at in range(0, len(targets), _ROWS_AT_ONCE):
        rows = logits[at : at + _ROWS_AT_ONCE]
        top = rows.max(-1, keepdims=True)
        sums = np.exp(rows - top).sum(-1, dtype=np.float64)
        picked = rows[np.arange(len(rows)), list(targets[at : at + _ROWS_AT_ONCE])]
        total += float((picked - top[:, 0].astype(np.float64) - np.log(sums)).sum())
    return total
