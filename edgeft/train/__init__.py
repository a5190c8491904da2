"""Training, in a child process with the memory allocator set up for it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.allocator import allocator
from edgeft.errors import UserError
from edgeft.progress import Update
from edgeft.train import ranks
from edgeft.train.settings import TrainSettings

# OpenMP's threads wait by spinning. Between torch's own steps that pays, but the threads that round
# would wait for them about as long as they work: a step at ONNX's int4 would take 1.2 times as long.
_SHORT_WAIT = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}


def train(
    base: Path,
    data: Path,
    out: Path,
    settings: TrainSettings,
    facts: dict[str, Any],
    seed: int,
    progress: Update,
    tracker: Mapping[str, str] | None = None,
    plan: Mapping[str, Any] | None = None,
) -> None:
    """Train on ``data/train.jsonl`` into ``out``: ``log.jsonl``, ``train.json``, and ``adapter/``.

    Full fine-tuning leaves ``model/`` instead. Goes on from the last whole checkpoint in ``out``.

    Args:
        facts: ``task``, ``stop``, ``max_new_tokens`` and perhaps ``pattern``, to answer held-out
            questions.
        tracker: what :func:`tracker` returned.
        plan: how a target stores the weights, see :func:`edgeft.repair.plan_of`.

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
        "track": (tracker or {}).get("EDGEFT_TRACK"),
        "plan": plan,
    }
    env = {**allocator(), **(tracker or {}), **(_SHORT_WAIT if plan else {})}
    for event in child.call(ranks.WORKER, request, env=env):
        progress(event["done"], event["total"], event["text"])


def tracker(name: str | None, run: Path) -> dict[str, str]:
    """Environment variables that make transformers report to a tracker, under the run's name.

    Raises:
        UserError: it is not installed.
    """
    if name is None:
        return {}
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{name} is not installed: pip install {name}")
    return {
        "EDGEFT_TRACK": name,
        "TENSORBOARD_LOGGING_DIR": str(run / "track"),
        "WANDB_PROJECT": os.environ.get("WANDB_PROJECT", "edgeft"),
        "WANDB_DIR": str(run),
    }
