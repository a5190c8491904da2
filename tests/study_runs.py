"""A real study on a tiny model: its file, the command, and what its runs hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

TARGETS = ("gguf-q4_0",)
SEEDS = (0, 1)
# On tiny models a second thread only waits, which takes long on a machine that does other work.
ENVIRONMENT = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
# Random weights write a vowel sooner or later, and sometimes the right one.
_TASK = {"name": "jsonl", "label": "vowels", "pattern": "[aeiou]"}
_RECIPE = {
    "train": {
        "max_steps": 2,
        "lr": 0.01,
        "heldout_points": 2,
        "heldout_answers": 0,
        "keep": "last",
    },
    "bench": {
        "max_new_tokens": 12,
        "parallel": 8,
        "latency_prompt_tokens": 8,
        "latency_new_tokens": 4,
        "latency_repetitions": 1,
    },
}


def write_questions(folder: Path) -> Path:
    """Data of the task ``jsonl``."""
    folder.mkdir()
    for split, count in (("train", 32), ("test", 24)):
        rows = [
            {"question": f"The vowel of {split} word {i}?", "answer": "aei"[i % 3]}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_study(path: Path, model: Path, data: Path, **said: Any) -> Path:
    """STUDY.yaml: every kind of method, two seeds, unless a test says otherwise."""
    known = {
        "models": [str(model)],
        "tasks": [{**_TASK, "data": str(data)}],
        "methods": ["zero-shot", "2-shot", "lora", "full"],
        "seeds": list(SEEDS),
        "targets": list(TARGETS),
        "recipe": _RECIPE,
    }
    path.write_text(yaml.safe_dump({**known, **said}))
    return path


def command(file: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "edgeft", "study", str(file), "--out", str(out), *more]


def study(
    file: Path, out: Path, *more: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(file, out, *more),
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        cwd=cwd,
    )


def copied(whole: Path, out: Path, without: tuple[str, ...] = ()) -> Path:
    """The study again, without the cells of some methods and seeds."""

    def copy(source: str, place: str) -> None:
        if source.endswith((".safetensors", ".gguf")):
            os.link(source, place)
        else:
            shutil.copy2(source, place)

    shutil.copytree(whole, out, copy_function=copy)
    for name in without:
        shutil.rmtree(runs(out) / name)
        [outcome] = (out / "cells").glob(f"*--{name}.json")
        outcome.unlink()
    return out


def runs(out: Path) -> Path:
    """Where its only model's runs on its only task are."""
    [found] = (out / "runs").glob("*/vowels")
    return found


def answers(run: Path) -> dict[str, list[tuple[str, Any]]]:
    """Every question's output tokens, by results file; what does not change from run to run."""
    return {
        str(path.relative_to(run)): sorted(
            (row["id"], tuple(row["tokens"]), round(row["gold_logprob"], 3))
            for row in map(json.loads, path.read_text().splitlines())
        )
        for path in sorted(run.glob("bench/**/results.jsonl"))
    }


def marks(out: Path) -> dict[str, int]:
    """When each finished stage of the study was finished."""
    return {
        str(path.relative_to(out)): path.stat().st_mtime_ns
        for path in sorted(out.glob("runs/**/stage.json"))
        if ".partial" not in str(path)
    }


def outcomes(out: Path) -> dict[str, dict[str, Any]]:
    """How each cell ended, by method and seed."""
    found = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    return {outcome["id"].rpartition("/")[2]: outcome for outcome in found}
