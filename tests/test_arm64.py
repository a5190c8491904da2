"""A real aarch64 userland behind ssh: the files score there as here, and times do not count."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeft import catalog, devices
from edgeft.errors import UserError

DEVICE = "emulated-arm64"
TARGETS = ("gguf-q8_0", "gguf-q4_0", "gguf-q4_k_m", "onnx-int4")
COUNT = 20

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    try:
        return devices.probe(catalog.find_device(DEVICE))
    except UserError as error:
        pytest.skip(f"there is no {DEVICE} here (make arm64): {error}")


@pytest.fixture(scope="module")
def run(
    facts: dict[str, Any], make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny model's run, benched here and there."""
    out = tmp_path_factory.mktemp("arm64") / "run"
    settings = (
        *("task.train=16", "task.heldout=4", f"task.evaluation={COUNT}", "task.unseen=2"),
        *("train.epochs=1", "bench.max_new_tokens=8", "bench.devices=[local, emulated-arm64]"),
        *("bench.latency_prompt_tokens=16", "bench.latency_new_tokens=4"),
    )
    model = make_model("Llama", hidden_size=256, intermediate_size=512)  # K-quants take rows of 256
    program = [sys.executable, "-m", "edgeft", "run", "--model", model, "--out", out]
    program += [part for name in TARGETS for part in ("--target", name)]
    program += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def rows(run: Path, device: str, target: str) -> dict[str, dict[str, Any]]:
    path = run / "bench" / device / target / "tuned" / "results.jsonl"
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_it_is_an_arm_and_says_that_it_is_emulated(facts: dict[str, Any]) -> None:
    assert facts["architecture"] == "aarch64" and facts["emulated"]
    assert {"asimddp", "fphp"} <= set(facts["cpu_features"].split())
    assert facts["runtimes"].keys() >= {"llama-cpp-python", "onnxruntime-genai", "edgeft"}
    assert devices.missing(catalog.find_device(DEVICE), facts) == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_file_scores_there_as_here(run: Path, target: str) -> None:
    here, there = rows(run, "local", target), rows(run, DEVICE, target)
    assert len(there) == COUNT and there.keys() <= here.keys()
    nats = [
        abs(row["gold_logprob"] - here[name]["gold_logprob"]) / row["gold_tokens"]
        for name, row in there.items()
    ]
    assert sum(nats) / COUNT < 0.1  # of about 22 nats a token: the weights are random
    # They drift apart in a free run once rounding has turned one token.
    same = sum(row["tokens"][:1] == here[name]["tokens"][:1] for name, row in there.items())
    assert same >= 0.8 * COUNT


def test_its_times_are_not_measured(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    there = {v["target"]: v for v in report["variants"] if v["device"] == DEVICE}
    assert there.keys() == set(TARGETS)
    for variant in there.values():
        assert variant["latency"] is None and "mean nothing" in variant["not_measured"]
        assert variant["same_as_local"][1] == COUNT
    assert report["machine"][DEVICE]["architecture"] == "aarch64"
    text = (run / "report.md").read_text()
    assert f"## On {DEVICE}" in text and "not measured" in text
