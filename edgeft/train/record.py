"""What is written while training runs: the log, the held-out curve, marks on whole checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from edgeft.errors import UserError
from edgeft.prompts import Item
from edgeft.train.batches import heldout_loss

Emit = Callable[..., None]
_WHOLE = "whole"  # the last file of a checkpoint


class Record(TrainerCallback):  # type: ignore[misc]
    """Follows one training; ``step`` is where it starts, after 0 steps or at a checkpoint.

    Attributes:
        tokens: prompt and gold tokens trained on so far; whoever runs a batch adds to it.
    """

    def __init__(
        self, log: Path, held: Sequence[Item], points: int, pad: int, emit: Emit, step: int
    ) -> None:
        self.log, self.held, self.points, self.pad, self.emit = log, held, points, pad, emit
        kept = [row for row in rows(log) if 0 < step >= row["step"]]
        log.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.tokens = max((row["tokens"] for row in kept if "tokens" in row), default=0)
        self.seconds = max((row["seconds"] for row in kept if "seconds" in row), default=0.0)
        self.before, self.resumed = self.tokens, step > 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if not self.resumed:
            self._heldout(model, state, args.learning_rate)
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A checkpoint at the very end would be removed at once.
        control.should_save = control.should_save and state.global_step < state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, model: Any, **_: Any) -> None:
        if "loss" not in logs:  # the Trainer's own summary
            return
        step, took = state.global_step, time.perf_counter() - self.started
        check_finite(logs.get("grad_norm", 0.0), "gradient", step, args.learning_rate)
        rate = (self.tokens - self.before) / took
        row = {"step": step, "steps": state.max_steps, "loss": round(logs["loss"], 6)}
        row |= {"lr": logs["learning_rate"], "tokens": self.tokens}
        self._write(
            {**row, "tokens_per_s": round(rate, 1), "seconds": round(self.seconds + took, 2)}
        )
        text = f"loss {logs['loss']:.2f} · {rate:.0f} tok/s"
        self.emit("progress", done=step, total=state.max_steps, text=text)
        if step in {round(state.max_steps * i / (self.points - 1)) for i in range(1, self.points)}:
            paused = time.perf_counter()
            self._heldout(model, state, args.learning_rate)
            self.started += time.perf_counter() - paused

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()

    def _heldout(self, model: Any, state: Any, lr: float) -> None:
        loss = heldout_loss(model, self.held, self.pad)
        check_finite(loss, "held-out loss", state.global_step, lr)
        self._write({"step": state.global_step, "heldout_loss": round(loss, 6)})

    def _write(self, row: dict[str, Any]) -> None:
        with self.log.open("a") as out:
            out.write(json.dumps(row) + "\n")


def check_finite(value: float, name: str, step: int, lr: float) -> None:
    """Raise a UserError unless ``value`` is finite; ``step`` counts from 1, 0 is before training."""
    if math.isfinite(value):
        return
    if step == 0:
        raise UserError(f"the {name} is {value} before training: is the base model damaged?")
    raise UserError(f"the {name} is {value} at step {step}: try a train.lr far below {lr:g}")


def rows(log: Path) -> list[dict[str, Any]]:
    """The log's rows, as far as they are whole."""
    found = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # what a kill cut off
            break
    return found


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint that was written to its end, and its step; the others are removed."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / _WHOLE).exists():
            whole.append((int(checkpoint.name.rpartition("-")[2]), checkpoint))
        else:
            shutil.rmtree(checkpoint)
    if not whole:
        return None, 0
    step, checkpoint = max(whole)
    return checkpoint, step
