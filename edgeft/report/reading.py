"""How the answers were read, and how many completions had none."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from edgeft.tasks.grading import HOWS

NONE = "none"  # no answer was found


@dataclass(frozen=True)
class Readings:
    """Of one model's answers to all questions, how many were found where.

    Attributes:
        target: None: the host; so is ``device``.
        weights: ``base`` or ``tuned``.
        counts: by place, in the order in which places are looked at; ``none`` at the end.
    """

    target: str | None
    device: str | None
    weights: str
    counts: dict[str, int]


def readings(folder: Path, target: str | None, device: str | None) -> list[Readings]:
    """Those of a bench folder's base and tuned; nothing of results that do not say."""
    found = []
    for weights in ("base", "tuned"):
        counts = counted(folder / weights)
        if counts:
            found.append(Readings(target, device, weights, counts))
    return found


def counted(folder: Path) -> dict[str, int]:
    """How many answers in a folder's results were found where; empty if they do not say."""
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    if not all("read" in row for row in rows):
        return {}
    seen = Counter(row["read"] or NONE for row in rows)
    return {how: seen[how] for how in (*HOWS, NONE) if seen[how] or how == NONE}
