"""Training, in a child process with the memory allocator set up for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.allocator import allocator
from edgeft.progress import Update
from edgeft.train.settings import TrainSettings


def train(
    base: Path,
    data: Path,
    out: Path,
    settings: TrainSettings,
    facts: dict[str, Any],
    seed: int,
    progress: Update,
) -> None:
    """Train on ``data/train.jsonl`` into ``out``: ``log.jsonl``, ``train.json``, and ``adapter/``.

    Full fine-tuning leaves ``model/`` instead. Goes on from the last whole checkpoint in ``out``.

    Args:
        facts: ``task``, ``stop`` and ``max_new_tokens``, to answer held-out questions.

    Raises:
        UserError: training failed, with the reason.
    """
    request = {
        "base": str(base),
        "data": str(data),
        "out": str(out),
        "settings": asdict(settings),
        "facts": facts,
        "seed": seed,
    }
    for event in child.call("edgeft.train.worker", request, env=allocator()):
        progress(event["done"], event["total"], event["text"])
