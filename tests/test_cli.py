"""What people type: mistakes are one line and exit code 2, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def edgeft(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeft", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


def refused(*arguments: str | Path, cwd: Path | None = None) -> str:
    done = edgeft(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("edgeft: "), done.stderr
    assert "Traceback" not in done.stderr
    return lines[-1]


def test_targets_and_tasks_are_listed() -> None:
    names = [row["target"] for row in json.loads(edgeft("targets", "--json").stdout)]
    assert {"gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "gguf-q4_0"} <= set(names)
    listed = edgeft("tasks").stdout
    assert "wordmath" in listed and "edgeft[symbolic]" in listed
    assert "local" in edgeft("devices").stdout


def test_a_users_own_target_comes_first(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "gguf-q8_0.toml").write_text(
        'format = "gguf"\nruntime = "llama.cpp"\nabout = "mine"\n[gguf]\nftype = "Q8_0"\n'
    )
    rows = json.loads(edgeft("targets", "--json", cwd=tmp_path).stdout)
    assert next(row for row in rows if row["target"] == "gguf-q8_0")["about"] == "mine"
    assert any(row["target"] == "gguf-f16" for row in rows)
    (tmp_path / "export" / "bad.toml").write_text('fromat = "gguf"\n')
    assert "unknown key 'fromat'; did you mean 'format'" in refused("targets", cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--target", "gguf-q4_km"], "unknown target 'gguf-q4_km'; did you mean"),
        (["run", "--task", "wordmaths"], "unknown task 'wordmaths'; did you mean 'wordmath'"),
        (["run", "--model", "smollm"], "no model 'smollm'"),
        (["train", "--method", "loro"], "loro"),
        (["run", "--set", "train.lrr=1"], "unknown key 'train.lrr'"),
        (["run", "nothing.yaml"], "cannot read the recipe nothing.yaml"),
        (["export"], "give a run directory, or --model BASE --adapter DIR"),
        (["export", ".", "--target", "gguf"], "not an edgeft run"),
        (["bench", "."], "not an edgeft run"),
        (["report", "nowhere"], "not an edgeft run"),
        (["check", "nowhere"], "not an edgeft run"),
        (["card", "nowhere"], "not an edgeft run"),
        (["export", ".", "--file", "no.gguf"], "there is no file no.gguf"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused(*arguments, cwd=tmp_path)


def test_a_misspelt_key_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("seed: 0\ntask:\n  evaluaton: 5\n")
    line = refused("run", "r.yaml", cwd=tmp_path)
    assert "r.yaml, line 3: unknown key 'task.evaluaton'; did you mean 'evaluation'" in line


def test_an_output_folder_that_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    assert "not an edgeft run and not empty" in refused("run", "--out", tmp_path)


def test_a_model_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert "no config.json" in refused("run", "--model", "./m", "--out", "x", cwd=tmp_path)


def test_what_cannot_be_exported_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    for target, format_ in (("onnx-int4", "ONNX"), ("onnx-portable-fp32", "onnx-portable")):
        chosen = ["--model", "./m", "--target", target, "--out", target]
        line = refused("run", *chosen, cwd=tmp_path)
        assert f"cannot export GPT2LMHeadModel to {format_} (supported: Llama" in line
        assert not (tmp_path / target / "data").exists()


@pytest.mark.slow
def test_a_truncated_gguf(tmp_path: Path, embedded_gguf: Path) -> None:
    with embedded_gguf.open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(5_000_000))
    line = refused("run", "--model", "cut.gguf", "--out", "x", cwd=tmp_path)
    assert "truncated or not a GGUF" in line


def test_importing_edgeft_is_light() -> None:
    code = (
        "import time; t = time.perf_counter(); import edgeft, edgeft.cli, edgeft.survival, sys;"
        "heavy = {'torch', 'transformers', 'peft', 'llama_cpp', 'matplotlib'} & set(sys.modules);"
        "print(heavy or '', time.perf_counter() - t)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout


def test_the_version() -> None:
    assert edgeft("--version").stdout.startswith("edgeft 0.")
