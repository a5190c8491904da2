"""A run directory written as the stages write theirs, without a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

N, UNSEEN = 200, 40
TARGETS = {  # share of the host's right answers kept, bytes, decode tok/s
    "gguf-f16": (1.0, 270_900_000, 91.0),
    "gguf-q8_0": (0.99, 144_800_000, 125.4),
    "gguf-q4_k_m": (0.85, 105_454_144, 138.2),
    "gguf-q4_0": (0.7, 91_730_000, 199.0),
    "gguf-q2_k": (0.03, 88_200_000, 150.9),
}
NASTY = "<script>alert('x')</script> | *bold* & \"quoted\"\nsecond line"


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_results(folder: Path, right: Iterable[bool], logprob: float = -20.0) -> None:
    lines = []
    for i, correct in enumerate(right):
        answer = str(i % 90) if correct else str(i % 90 + 1)
        lines.append(
            {
                "id": f"q{i:03}",
                "group": "" if i < N else "unseen templates",
                "tokens": [1, 2],
                "text": f"{NASTY}\n#### {answer}",
                "answer": None if i % 50 == 49 and not correct else answer,
                "read": None if i % 50 == 49 and not correct else "####" if i % 3 else "last",
                "correct": bool(correct),
                "finish": "stop",
                "gold_logprob": logprob,
                "gold_tokens": 10,
                "seconds": 0.5,
            }
        )
    write_lines(folder / "results.jsonl", lines[::-1])
    write_json(folder / "stage.json", {"fingerprint": "x", "done": True})


def make_run(run: Path, targets: Sequence[str] = tuple(TARGETS)) -> Path:
    """A run as the stages leave it, with the given targets benched."""
    rng = np.random.default_rng(5)
    write_json(run / "run.json", {"schema": 1, "edgeft": "0.1.0"})
    recipe = {
        "model": "smollm2-135m",
        "task": {"name": "wordmath", "train": 640, "evaluation": N, "unseen": UNSEEN},
        "train": {"method": "lora", "lr": 0.001},
        "report": {"keep": 0.8},
        "seed": 0,
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    items = [
        {
            "id": f"q{i:03}",
            "group": "" if i < N else "unseen templates",
            "question": f"Ada has {i} boxes <b>of</b> pens & gives {i // 2} away. How many are left?",
            "prompt": [1, 2, 3],
            "gold": [4, 5],
            "answer": str(i % 90),
            "text": "",
        }
        for i in range(N + UNSEEN)
    ]
    write_lines(run / "data" / "evaluation.jsonl", items)
    base = rng.random(N + UNSEEN) < 0.18
    tuned = base | (rng.random(N + UNSEEN) < 0.72)
    write_results(run / "bench" / "host" / "base", base, -19.0)
    write_results(run / "bench" / "host" / "tuned", tuned, -2.1)
    write_json(run / "bench" / "host" / "machine.json", {"cpu": "Example 9000", "cores": 2})
    for name in targets:
        kept, size, speed = TARGETS[name]
        here = run / "bench" / "local" / name
        write_results(here / "base", base)
        write_results(
            here / "tuned", np.where(base, tuned, tuned & (rng.random(len(tuned)) < kept))
        )
        latency = {
            "load_s": 0.41,
            "ttft_ms": 121.7,
            "prefill_tok_s": 703.2,
            "decode_tok_s": speed,
            "peak_rss_mb": 310.4,
            "threads": 2,
            "prompt_tokens": 128,
            "new_tokens": 64,
            "repetitions": 3,
        }
        write_json(here / "tuned" / "latency.json", latency)
        checked = {"tokenizer_prompts": N + UNSEEN, "chat_template": True, "positions": 0}
        compared: dict[str, float | None] = {"max_logit_diff": None, "top1_agreement": None}
        if name == "gguf-f16":
            compared = {"max_logit_diff": 0.031, "top1_agreement": 0.9991, "positions": 5120}
        manifest = {
            "schema": 1,
            "runtime": "llama.cpp",
            "target": name,
            "artifact": "model.gguf",
            "files": {"model.gguf": {"bytes": size}, "tokenizer.json": {"bytes": 999}},
            "verify": checked | compared,
        }
        write_json(run / "export" / name / "tuned" / "manifest.json", manifest)
    write_json(run / "bench" / "local" / "machine.json", {"cpu": "Example 9000", "cores": 2})
    log: list[dict[str, Any]] = []
    for step in range(1, 81):
        loss = 1.9 * math.exp(-step / 12) + 0.2 + 0.05 * float(rng.random())
        log.append({"step": step, "steps": 80, "loss": loss, "lr": 1e-3, "tokens": 600 * step})
        if step % 20 == 0:
            log.append({"step": step, "heldout_loss": 1.8 * math.exp(-step / 12) + 0.24})
    write_lines(run / "train" / "log.jsonl", log)
    facts = {
        "method": "lora",
        "steps": 80,
        "tokens": 48_000,
        "seconds": 171.5,
        "heldout": [[80, 1]],
    }
    write_json(run / "train" / "train.json", {**facts, "final_loss": math.nan})
    return run
