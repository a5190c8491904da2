"""Two processes over gloo, by the launchers that people use."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edgeft.train.record import last_checkpoint, rows

SETTINGS = (
    "task.train=48",
    "task.heldout=8",
    "task.evaluation=8",
    "task.unseen=0",
    "train.epochs=2",
    "train.checkpoint_steps=2",
    "train.heldout_answers=2",
    "train.dtype=float32",
    "bench.max_new_tokens=8",
)


def launcher(name: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if name == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run"]
        return [*run, "--nproc_per_node", "2", "--master_port", port, "-m", "edgeft"]
    # accelerate starts several processes on CPUs by mpirun alone, or as if they were GPUs.
    run = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    run += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", port]
    return [*run, "-m", "edgeft"]


def train(start: list[str], model: Path, out: Path, batch: int, *more: str) -> list[str]:
    settings = [part for s in (*SETTINGS, f"train.batch_size={batch}") for part in ("--set", s)]
    return [*start, "train", "--model", str(model), "--out", str(out), *settings, *more]


def call(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=300
    )


def curve(out: Path) -> list[tuple[int, float, float | None]]:
    log = rows(out / "train" / "log.jsonl")
    return [
        (row["step"], row.get("loss", row.get("heldout_loss")), row.get("tokens")) for row in log
    ]


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the batch of both."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = call(train([sys.executable, "-m", "edgeft"], tiny, out, 8))
    assert done.returncode == 0, done.stderr
    return out


def check_same(alone: Path, out: Path) -> None:
    one, two = curve(alone), curve(out)
    assert [(step, tokens) for step, _, tokens in one] == [(s, t) for s, _, t in two]
    assert [loss for _, loss, _ in two] == pytest.approx([loss for _, loss, _ in one], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_two_processes_train_as_one(name: str, tiny: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = call(train(launcher(name), tiny, out, 4))
    assert done.returncode == 0, done.stderr
    check_same(alone, out)
    assert done.stdout.count(str(out / "merged")) == 1  # rank 0 alone prints
    assert json.loads((out / "train" / "train.json").read_text())["steps"] == 12
    again = call(train(launcher(name), tiny, out, 4))
    assert again.returncode == 0, again.stderr
    assert "up to date" in again.stderr


@pytest.mark.slow
def test_killed_and_resumed(tiny: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = train(launcher("torchrun"), tiny, out, 4)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as process:
        log = out / "train.partial" / "log.jsonl"
        while process.poll() is None and not any(row["step"] >= 5 for row in rows(log)):
            time.sleep(0.02)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        for member in family:
            os.kill(member.pid, signal.SIGKILL)
    assert not (out / "train").exists()
    checkpoint, step = last_checkpoint(out / "train.partial" / "checkpoints")
    assert checkpoint and step >= 2
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {p.name for p in checkpoint.iterdir()}
    done = call(train(launcher("torchrun"), tiny, out, 4))
    assert done.returncode == 0, done.stderr
    check_same(alone, out)


@pytest.mark.slow
def test_a_mistake_is_one_clear_line(tiny: Path, tmp_path: Path) -> None:
    done = call(train(launcher("torchrun"), tiny, tmp_path / "run", 4, "--set", "train.lr=-1"))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "lr must be above 0" in line]
    assert len(lines) == 1 and lines[0].startswith("edgeft: ")
