"""A run that ships the base and its adapter apart: exported, benched here and elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sshd
from test_bench import BLOCKER, NOT_ON_A_DEVICE
from test_gguf_lora import make_adapter

from edgeft.exporters.weights import bytes_per_token


def edgeft(*arguments: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgeft", *map(str, arguments)]
    environment = {**os.environ, **env}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def test_it_is_refused_before_training(tiny: Path, tmp_path: Path) -> None:
    chosen = ["--target", "gguf-q4_0+lora", "--out", "x"]
    done = edgeft("run", "--model", tiny, "--method", "dora", *chosen, cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "x" / "data").exists()
    [line] = done.stderr.splitlines()
    assert "target gguf-q4_0+lora ships the base with a LoRA adapter, and method dora" in line


SMALL = (
    *("task.train=16", "task.heldout=4", "task.evaluation=12", "task.unseen=4"),
    *("bench.max_new_tokens=12", "bench.parallel=2"),
    *("bench.latency_prompt_tokens=16", "bench.latency_new_tokens=4"),
)
SETTINGS = [part for setting in SMALL for part in ("--set", setting)]
OWN = 'format = "gguf"\nruntime = "llama.cpp"\nabout = ""\n[gguf]\nftype = "F16"\nlora = true\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a target of the user's own."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "export").mkdir()
    (folder / "export" / "mine+lora.toml").write_text(OWN)
    return folder


@pytest.fixture(scope="module")
def run(tiny: Path, place: Path) -> Path:
    """A trained run, exported merged and not, benched here."""
    targets = [
        part for name in ("gguf-f16", "mine+lora", "gguf-q4_0+lora") for part in ("--target", name)
    ]
    more = ["--set", "train.rslora=true", "--set", "train.epochs=2"]
    done = edgeft("run", "--model", tiny, "--out", "run", *targets, *SETTINGS, *more, cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "run"


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return {row["id"]: {k: v for k, v in row.items() if k != "seconds"} for row in lines}


@pytest.mark.slow
def test_a_run_ships_one_base_and_its_adapter(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    found = {variant["target"]: variant for variant in report["variants"]}
    assert found.keys() == {"gguf-f16", "mine+lora", "gguf-q4_0+lora"}
    for name in ("mine+lora", "gguf-q4_0+lora"):
        base, tuned = (run / "export" / name / weights for weights in ("base", "tuned"))
        assert [path.name for path in (base / "model").iterdir()] == ["model.gguf"]
        files = json.loads((tuned / "manifest.json").read_text())["files"]
        before = json.loads((base / "manifest.json").read_text())["files"]
        assert files["model/model.gguf"] == before["model/model.gguf"]
        parts = [files[f"model/{part}.gguf"]["bytes"] for part in ("model", "adapter")]
        assert found[name]["bytes"] == sum(parts)
        more = bytes_per_token(tuned / "model") - bytes_per_token(base / "model")
        assert 0.8 * parts[1] < more < parts[1], "the adapter is read for every token too"
        assert found[name]["latency"]["decode_tok_s"] > 0
    whole = rows(run / "bench" / "local" / "gguf-f16" / "tuned")
    both = rows(run / "bench" / "local" / "mine+lora" / "tuned")
    for id_, row in whole.items():
        assert both[id_]["gold_logprob"] == pytest.approx(row["gold_logprob"], rel=5e-3)
    assert found["mine+lora"]["verify"]["mean_kl"] < 1e-4
    assert "gguf-q4_0+lora" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_device_needs_the_runtime_alone(run: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER % NOT_ON_A_DEVICE)
    bundle = shutil.copytree(run / "export" / "gguf-q4_0+lora" / "tuned", tmp_path / "a b+c")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    more = ["--out", tmp_path / "out", "--batch", "2", "--json"]
    done = edgeft("bench", bundle, *more, cwd=place, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "out") == rows(run / "bench" / "local" / "gguf-q4_0+lora" / "tuned")
    with (bundle / "model" / "adapter.gguf").open("r+b") as file:
        file.truncate(1000)
    done = edgeft("bench", bundle, *more, cwd=place, PYTHONPATH=path)
    assert done.returncode == 2 and "adapter.gguf is not the file that was exported" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sshd.SSHD is None, reason="there is no sshd (openssh-server)")
def test_over_ssh_the_base_goes_over_once(server: sshd.Sshd, run: Path, place: Path) -> None:
    device = server.set_up("board")
    server.profile(place, device)
    target = ["--target", "gguf-q4_0+lora"]
    done = edgeft("bench", run, "--device", "board", *target, cwd=place)
    assert done.returncode == 0, done.stderr
    for weights in ("base", "tuned"):
        there, here = (run / "bench" / name / target[1] / weights for name in ("board", "local"))
        assert rows(there) == rows(here)
    kept = [path.stat().st_size for path in (Path(device.folder) / "files").iterdir()]
    size = (run / "export" / target[1] / "base" / "model" / "model.gguf").stat().st_size
    assert kept.count(size) == 1


@pytest.mark.slow
def test_an_adapter_trained_elsewhere(tiny: Path, place: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    chosen = ["--adapter", adapter, "--target", "gguf-q4_0+lora", "--out", "theirs"]
    done = edgeft("export", "--model", tiny, *chosen, *SETTINGS, cwd=place)
    assert done.returncode == 0, done.stderr
    done = edgeft("bench", "theirs", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    [variant] = json.loads(done.stdout)["variants"]
    assert variant["target"] == "gguf-q4_0+lora" and variant["tuned"]["n"] == 12
