"""Training, in a child process with the memory allocator set up for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from edgeft import child
from edgeft.allocator import allocator
from edgeft.progress import Update
from edgeft.train.settings import TrainSettings


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
