"""Settings of small checkpoints that several tests make."""

from __future__ import annotations

from typing import Any

# Llama 3.2's rotary embedding, with wavelengths that a short prompt reaches.
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
