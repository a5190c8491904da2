"""A study's folder as its cells leave it, with answers that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from edgeft.study import cell as work
from edgeft.study import stage
from edgeft.study.settings import Cell, Study, cells, parse

N = 200
# Share of the questions answered correctly, by method: on the host, at gguf-q8_0, at gguf-q4_0.
CHANCES = {
    "zero-shot": (0.30, 0.30, 0.20),
    "5-shot": (0.32, 0.30, 0.20),
    "full": (0.10, 0.10, 0.05),
    "lora": (0.70, 0.69, 0.35),
    "dora": (0.68, 0.68, 0.35),
}
SIZES = {"gguf-q8_0": 145_000_000, "gguf-q4_0": 92_000_000}
SPEEDS = {"gguf-q8_0": 125.0, "gguf-q4_0": 200.0}
_SEED_MOVES = 0.02
Right = Callable[[Cell, str, int], Iterable[bool]]


def study_of(**said: Any) -> Study:
    """One model, one task, ``gguf-q8_0`` and ``gguf-q4_0``, unless a test says otherwise."""
    known = {
        "models": ["smollm2-135m"],
        "methods": ["zero-shot", "5-shot", "full", "lora", "dora"],
        "seeds": [0, 1],
        "targets": list(SIZES),
    }
    return parse(yaml.safe_dump({**known, **said}))


def by_chance(cell: Cell, weights: str, place: int) -> Iterable[bool]:
    """Right answers as :data:`CHANCES` has them; hard questions are hard for all."""
    method = cell.method if weights == cell.weights[-1] else "zero-shot"
    chance = CHANCES[method][place] + _SEED_MOVES * (cell.seed or 0)
    return (np.random.default_rng(0).random(N) < chance).tolist()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_results(folder: Path, right: Iterable[bool], made_from: str = "x") -> None:
    """One line a question, in an order that is another for every folder."""
    lines = [
        {
            "id": f"q{i:03}",
            "group": "",
            "text": str(i),
            "answer": str(i),
            "correct": bool(correct),
            "gold_logprob": -1.0,
            "gold_tokens": 4,
        }
        for i, correct in enumerate(right)
    ]
    np.random.default_rng(len(str(folder))).shuffle(lines)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "stage.json", {"made_from": made_from, "evaluation": "all"})


def write_cell(study: Path, cell: Cell, right: Right = by_chance, **outcome: Any) -> None:
    """The run of a cell and how it ended."""
    run = work.run_folder(study, cell.id)
    write_json(run / "run.json", {"schema": 1, "edgeft": "0.1.0"})
    for weights in cell.weights:
        write_results(run / "bench/host" / weights, right(cell, weights, 0))
        for place, target in enumerate(cell.recipe.export.targets, 1):
            here = run / "bench/local" / target / weights
            write_results(here, right(cell, weights, place))
            files = {"model.gguf": {"bytes": SIZES[target]}, "tokenizer.json": {"bytes": 9}}
            manifest = {"artifact": "model.gguf", "files": files}
            write_json(run / "export" / target / weights / "manifest.json", manifest)
            if weights == "tuned":
                times = {"decode_tok_s": SPEEDS[target] + (cell.seed or 0), "peak_rss_mb": 310.0}
                write_json(here / "latency.json", times)
    if cell.seed is not None:
        write_json(run / "train/train.json", {"parameters": 134_515_008})
    write_json(run / "bench/local/machine.json", {"cpu": "Example 9000"})
    print_ = work.order(study, cell).fingerprint
    ended = {"state": work.DONE, "seconds": 60.0, "attempts": 1, "fingerprint": print_, **outcome}
    work.keep(study, work.Outcome(cell.id, **ended))


def make_study(path: Path, given: Study, right: Right = by_chance) -> list[Cell]:
    """Every cell done."""
    found = cells(given)
    path.mkdir(parents=True, exist_ok=True)
    (path / stage.FILE).write_text("")
    for cell in found:
        write_cell(path, cell, right)
    return found
