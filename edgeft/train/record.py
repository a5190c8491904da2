"""What is written while training runs: log, held-out curve, best weights, marks on checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from edgeft.errors import UserError
from edgeft.run import write_json
from edgeft.train.heldout import Heldout, heldout_accuracy, heldout_loss
from edgeft.train.settings import TrainSettings

Emit = Callable[..., None]
_WHOLE = "whole"  # the last file of a checkpoint
POINT = "point.json"  # the last file of the best weights


@dataclass(frozen=True)
class Folders:
    """Where one training keeps its things, in ``out``."""

    out: Path

    @property
    def log(self) -> Path:
        """One JSON line a step, and one a held-out point."""
        return self.out / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """What a killed training goes on from."""
        return self.out / "checkpoints"

    @property
    def start(self) -> Path:
        """The adapter before the first step, where the end needs it."""
        return self.out / "start"

    @property
    def best(self) -> Path:
        """The weights with the lowest held-out loss so far."""
        return self.out / "best"


class Record(TrainerCallback):  # type: ignore[misc]
    """Follows one training; ``step`` is where it starts, after 0 steps or at a checkpoint.

    Only the ``main`` process writes, and looks at the held-out questions.

    Attributes:
        tokens: prompt and gold tokens trained on so far; whoever runs a batch adds to it.
        report: passes figures on to a tracker, such as the Trainer's own ``log``.
    """

    report: Callable[[dict[str, float]], None] = staticmethod(lambda figures: None)

    def __init__(
        self,
        folders: Folders,
        held: Heldout,
        settings: TrainSettings,
        emit: Emit,
        step: int,
        *,
        main: bool = True,
    ) -> None:
        self.folders, self.held, self.settings, self.emit = folders, held, settings, emit
        self.main, self.tokens, self.resumed, self.lowest = main, 0, step > 0, math.inf
        if main:
            self._go_on(step)

    def _go_on(self, step: int) -> None:
        folders = self.folders
        kept = [row for row in rows(folders.log) if 0 < step >= row["step"]]
        folders.log.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.tokens = max((row["tokens"] for row in kept if "tokens" in row), default=0)
        self.seconds = max((row["seconds"] for row in kept if "seconds" in row), default=0.0)
        self.before = self.tokens
        best = best_point(folders.best)
        if best and best["step"] > step:  # it will come again, the same
            shutil.rmtree(folders.best, ignore_errors=True)
        elif best:
            self.lowest = best["heldout_loss"]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if not self.resumed and self.main:
            self._heldout(model, state)
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A checkpoint at the very end would be removed at once.
        control.should_save = control.should_save and state.global_step < state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, model: Any, **_: Any) -> None:
        if "loss" not in logs:  # the Trainer's own summary
            return
        step, took = state.global_step, time.perf_counter() - self.started
        self.check_finite(logs.get("grad_norm", 0.0), "gradient", step)
        if not self.main:
            return
        rate = (self.tokens - self.before) / took
        row = {"step": step, "steps": state.max_steps, "loss": round(logs["loss"], 6)}
        row |= {"lr": logs["learning_rate"], "tokens": self.tokens}
        self._write(
            {**row, "tokens_per_s": round(rate, 1), "seconds": round(self.seconds + took, 2)}
        )
        text = f"loss {logs['loss']:.2f} · {rate:.0f} tok/s"
        self.emit("progress", done=step, total=state.max_steps, text=text)
        points = self.settings.heldout_points
        if step in {round(state.max_steps * i / (points - 1)) for i in range(1, points)}:
            paused = time.perf_counter()
            self._heldout(model, state)
            self.started += time.perf_counter() - paused

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process has random numbers of its own there
        if self.main:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()

    def check_finite(self, value: float, name: str, step: int) -> None:
        """Raise a UserError unless ``value`` is finite; step 0 is before training."""
        if math.isfinite(value):
            return
        if step == 0:
            raise UserError(f"the {name} is {value} before training: is the base model damaged?")
        good, at = last_checkpoint(self.folders.checkpoints) if self.main else (None, 0)
        kept = f"; step {at} is kept in {good}" if good else ""
        lr = self.settings.peak_lr
        raise UserError(
            f"the {name} is {value} at step {step}: try a train.lr far below {lr:g}{kept}"
        )

    def _heldout(self, model: Any, state: Any) -> None:
        step = state.global_step
        loss = heldout_loss(model, self.held.items, self.held.pad)
        self.check_finite(loss, "held-out loss", step)
        accuracy = heldout_accuracy(model, self.held)
        point: dict[str, Any] = {"step": step, "heldout_loss": round(loss, 6)}
        if accuracy is not None:
            point["heldout_accuracy"] = round(accuracy, 6)
        if self.settings.keep == "best" and step and point["heldout_loss"] < self.lowest:
            self._keep(model, point)
        self._write(point)
        self.report({f"eval_{name}": value for name, value in point.items() if name != "step"})

    def _keep(self, model: Any, point: dict[str, Any]) -> None:
        self.lowest = point["heldout_loss"]
        partial = self.folders.best.with_name("best.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        write_json(partial / POINT, point)
        shutil.rmtree(self.folders.best, ignore_errors=True)
        partial.rename(self.folders.best)

    def _write(self, row: dict[str, Any]) -> None:
        with self.folders.log.open("a") as out:
            out.write(json.dumps(row) + "\n")


def best_point(folder: Path) -> dict[str, Any] | None:
    """``step``, ``heldout_loss`` and perhaps ``heldout_accuracy`` of the weights kept there."""
    if not (folder / POINT).is_file():
        return None
    point: dict[str, Any] = json.loads((folder / POINT).read_text())
    return point


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
