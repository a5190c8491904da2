"""A run benched on a device behind a real sshd: cut, killed, set up from nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sshd

pytestmark = pytest.mark.skipif(sshd.SSHD is None, reason="there is no sshd (openssh-server)")

COUNT = 6


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two targets, benched here."""
    out = tmp_path_factory.mktemp("ssh-run") / "run"
    settings = (
        *("task.train=16", "task.heldout=4", "task.evaluation=12", "task.unseen=4"),
        *("train.epochs=1", "bench.max_new_tokens=12", "bench.parallel=2"),
        *("bench.latency_prompt_tokens=16", "bench.latency_new_tokens=4"),
    )
    chosen = [part for setting in settings for part in ("--set", setting)]
    targets = ["--target", "gguf-q8_0", "--target", "gguf-q4_0"]
    done = edgeft("run", "--model", tiny, "--out", out, *targets, *chosen)
    assert done.returncode == 0, done.stderr
    return out


def edgeft(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "edgeft", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, cwd=cwd, check=False)


def answers(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows), "a question twice"
    return {row["id"]: {k: v for k, v in row.items() if k != "seconds"} for row in rows}


def scored(run: Path, device: str) -> dict[str, Any]:
    return {
        f"{target}/{weights}": answers(run / "bench" / device / target / weights)
        for target in ("gguf-q8_0", "gguf-q4_0")
        for weights in ("base", "tuned")
    }


@pytest.mark.slow
def test_a_run_is_benched_on_a_device(server: sshd.Sshd, run: Path, tmp_path: Path) -> None:
    device = server.set_up("bench", threads="auto")
    server.profile(tmp_path, device)
    done = edgeft("bench", run, "--device", "bench", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert scored(run, "bench") == scored(run, "local")
    report = json.loads((run / "report.json").read_text())
    there = [v for v in report["variants"] if v["device"] == "bench"]
    assert {v["target"] for v in there} == {"gguf-q8_0", "gguf-q4_0"}
    for variant in there:
        assert variant["same_as_local"] == [12, 12]
        latency = variant["latency"]
        assert latency["decode_tok_s"] > 0
        tried = {int(count): speed for count, speed in latency["threads_tried"].items()}
        assert list(tried) == list(range(1, len(tried) + 1)) and latency["threads"] in tried
        low, high = latency["decode_tok_s_range"]
        assert low <= latency["decode_tok_s"] <= high
    assert report["machine"]["bench"]["llama-cpp-python"]
    again = edgeft("bench", run, "--device", "bench", cwd=tmp_path)
    assert again.stderr.count("up to date") >= 4 and "✓ bench" not in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("accident", ["cut", "reboot"])
def test_a_lost_connection_loses_nothing(
    server: sshd.Sshd, run: Path, tmp_path: Path, accident: str
) -> None:
    """It goes on by itself; what was answered before is not asked again."""
    name = f"lost-{accident}"
    server.profile(tmp_path, server.set_up(name))
    place = run / "bench" / name
    partial = place / "gguf-q4_0" / "base.partial" / "results.jsonl"
    program = [sys.executable, "-m", "edgeft", "bench", str(run), "--device", name]
    client = subprocess.Popen(program, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (partial.exists() and b"\n" in partial.read_bytes()):
        assert client.poll() is None
        time.sleep(0.002)
    assert getattr(server, accident)() > 0, "there was nothing to cut"
    kept = partial.read_bytes()
    _, said = client.communicate(timeout=120)
    assert client.returncode == 0, said
    results = (place / "gguf-q4_0" / "base" / "results.jsonl").read_bytes()
    assert results.startswith(kept[: kept.rfind(b"\n") + 1])
    assert scored(run, name) == scored(run, "local")


@pytest.mark.slow
def test_a_killed_client_loses_nothing(server: sshd.Sshd, run: Path, tmp_path: Path) -> None:
    server.profile(tmp_path, server.set_up("killed"))
    place = run / "bench" / "killed"
    partial = place / "gguf-q4_0" / "base.partial" / "results.jsonl"
    program = [sys.executable, "-m", "edgeft", "bench", str(run), "--device", "killed"]
    client = subprocess.Popen(program, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (partial.exists() and b"\n" in partial.read_bytes()):
        assert client.poll() is None
        time.sleep(0.002)
    client.kill()
    client.wait()
    kept = partial.read_bytes()
    done = edgeft("bench", run, "--device", "killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = (place / "gguf-q4_0" / "base" / "results.jsonl").read_bytes()
    assert results.startswith(kept[: kept.rfind(b"\n") + 1])
    assert scored(run, "killed") == scored(run, "local")


@pytest.mark.slow
def test_a_device_that_fails_does_not_keep_another(
    server: sshd.Sshd, run: Path, tmp_path: Path
) -> None:
    server.profile(tmp_path, server.set_up("there"))
    server.profile(tmp_path, server.device("gone", port=1))
    done = edgeft(
        "bench",
        run,
        "--device",
        "gone",
        "--device",
        "there",
        "--target",
        "gguf-q4_0",
        "--limit",
        str(COUNT),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "gone: [127.0.0.1]:1 cannot be reached" in done.stderr.splitlines()[-1]
    assert len(answers(run / "bench" / "there" / "gguf-q4_0" / "tuned")) == COUNT
    report = json.loads((run / "report.json").read_text())
    [variant] = [v for v in report["variants"] if v["device"] == "there"]
    assert variant["tuned"]["n"] == COUNT and variant["same_as_local"] == [COUNT, COUNT]
    assert f"On there {COUNT} of 12 questions were asked" in (run / "report.md").read_text()


@pytest.mark.slow
def test_set_up_makes_a_device_of_a_bare_machine(
    server: sshd.Sshd, run: Path, tmp_path: Path
) -> None:
    """A real environment by the real pip, without torch; twice is once."""
    device = server.device("bare")
    server.profile(tmp_path, device)
    probed = edgeft("devices", "probe", "bare", "--json", cwd=tmp_path)
    facts = json.loads(probed.stdout)
    assert facts["missing"] == ["edgeft: edgeft devices setup bare"] and facts["setup"] is None
    done = edgeft("devices", "setup", "bare", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for step in ("virtual environment", "send edgeft", "install", "the runtimes open"):
        assert f"✓ bare: {step}" in done.stderr
    python = Path(device.folder) / "venv" / "bin" / "python"
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 1
    again = edgeft("devices", "setup", "bare", cwd=tmp_path)
    assert again.stderr.strip() == "· bare: up to date"
    facts = json.loads(edgeft("devices", "probe", "bare", "--json", cwd=tmp_path).stdout)
    assert facts["missing"] == [] and facts["runtimes"]["llama-cpp-python"]
    bundle = run / "export" / "gguf-q8_0" / "tuned"
    done = edgeft("bench", bundle, "--device", "bare", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path / "out") == answers(run / "bench" / "local" / "gguf-q8_0" / "tuned")
    # By hand on the device, from the folder that was sent.
    [placed] = (Path(device.folder) / "bundles").iterdir()
    by_hand = [python, "-m", "edgeft", "bench", placed, "--out", tmp_path / "hand", "--json"]
    done = subprocess.run(by_hand, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 12
    assert answers(tmp_path / "hand") == answers(tmp_path / "out")


@pytest.mark.slow
def test_set_up_says_what_is_lacking(server: sshd.Sshd, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "python").write_text(f'#!/bin/sh\nPATH={tmp_path}/bin exec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    server.profile(tmp_path, server.device("poor", python=str(tmp_path / "python")))
    done = edgeft("devices", "setup", "poor", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("edgeft: poor lacks a C++ compiler for llama.cpp: sudo apt")
    (tmp_path / "wheels").mkdir()
    wheels = ["--wheelhouse", tmp_path / "wheels"]
    done = edgeft("devices", "setup", "poor", *wheels, cwd=tmp_path)
    assert done.returncode == 2 and "has no wheel for" in done.stderr
    # A wheel that is none: pip's own words.
    (tmp_path / "wheels" / "llama_cpp_python-0.0.1-py3-none-any.whl").write_bytes(b"")
    done = edgeft("devices", "setup", "poor", *wheels, "--no-index", cwd=tmp_path)
    assert done.returncode == 2
    assert "edgeft: poor: install: ERROR: " in done.stderr.splitlines()[-1]
    shutil.rmtree(server.place / "poor")
