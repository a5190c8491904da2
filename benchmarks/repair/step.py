"""The time of a step that sees a target's rounding, beside an ordinary one of the same batches.

    python benchmarks/repair/step.py runs/demo --target gguf-q4_0 --target onnx-int4 [--rounds 3]

Both train the run's tuned weights as ``edgeft repair`` does. They take turns, each in a process of
its own; the first steps do not count. Figures are medians, the ratio by rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeft import repair, stages
from edgeft.stages import Run
from edgeft.train import train
from edgeft.train.record import rows
from edgeft.train.settings import TrainSettings

WARM_UP = 3


def tokens_per_s(this: Run, settings: TrainSettings, plan: Mapping[str, Any] | None) -> float:
    """Of the steps after the first ones."""
    facts = stages.training_facts(this)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        seed = this.recipe.seed + 1
        tuned, data = this.folder("tuned"), this.path / "data"
        train(tuned, data, out, settings, facts, seed, lambda *_: None, None, plan)
        log = [row for row in rows(out / "log.jsonl") if "loss" in row]
    first, last = log[WARM_UP - 1], log[-1]
    return float((last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]))


def main() -> None:
    """Parse, measure in turns, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--target", action="append", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found: dict[str, list[float]] = {"ordinary": []}
    with stages.opened(given.run) as this:
        targets = [repair.find(name) for name in given.target]
        plans = {target.name: repair.plan_of(this, target) for target in targets}
        settings = replace(
            repair.settings_of(targets[0]),
            max_steps=given.steps,
            heldout_points=2,
            keep="last",
            target=None,
        )
        for _ in range(given.rounds):
            found["ordinary"].append(tokens_per_s(this, settings, None))
            for name, plan in plans.items():
                seen = tokens_per_s(this, replace(settings, target=name), plan)
                found.setdefault(name, []).append(seen)
    print("| | tok/s | a step takes | by round |")
    print("|---|---:|---:|---|")
    for name, each in found.items():
        ratios = [own / seen for own, seen in zip(found["ordinary"], each, strict=True)]
        print(
            f"| {name} | {statistics.median(each):.0f} | {statistics.median(ratios):.2f}x "
            f"| {', '.join(f'{ratio:.2f}' for ratio in ratios)} |"
        )


if __name__ == "__main__":
    main()
