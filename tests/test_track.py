"""Trackers: off unless asked for, refused when not installed, fed by the Trainer itself."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from edgeft import recipe, train
from edgeft.errors import UserError

SETTINGS = (
    *("task.train=16", "task.heldout=4", "task.evaluation=4", "task.unseen=0"),
    *("train.batch_size=4", "train.heldout_answers=2", "bench.max_new_tokens=4"),
)


def test_off_by_default(tmp_path: Path) -> None:
    assert recipe.parse("").track is None
    assert train.tracker(None, tmp_path) == {}


def test_an_unknown_one_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="track 'paper' is none of: tensorboard, wandb, trackio"):
        recipe.parse("track: paper")


def test_one_that_is_not_installed_is_one_clear_line(tmp_path: Path) -> None:
    missing = [n for n in recipe.TRACKERS if importlib.util.find_spec(n) is None]
    if not missing:
        pytest.skip("all trackers are installed here")
    with pytest.raises(UserError, match=f"{missing[0]} is not installed: pip install {missing[0]}"):
        train.tracker(missing[0], tmp_path)


@pytest.mark.slow
def test_tensorboard_gets_the_curves(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "edgeft", "train", "--model", tiny, "--out", out, *settings]
    for extra in ([], ["--track", "tensorboard"]):
        done = subprocess.run(
            [*map(str, command), *extra], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert not (out / "track").exists()  # nor is it trained again to be tracked
    tracked = tmp_path / "tracked"
    command[command.index(out)] = tracked
    subprocess.run([*map(str, command), "--track", "tensorboard"], check=True, capture_output=True)
    events = EventAccumulator(str(tracked / "track"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "eval/heldout_loss", "eval/heldout_accuracy"} <= set(tags)
    assert len(events.Scalars("train/loss")) == 4
