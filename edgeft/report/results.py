"""What the stages left in a run's ``bench`` folder: per-question results, the source of every figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from edgeft.errors import UserError
from edgeft.report.variant import Facts
from edgeft.survival import Result

HOST, LOCAL = "host", "local"
HEADLINE = ""  # the group that the verdict is about


def benched(run: Path) -> Iterable[tuple[str, str, list[Result], list[Result]]]:
    """Device, target, base's and tuned's results, where they are of the weights scored on the host."""
    host = run / "bench" / "host"
    for folder in sorted((run / "bench").glob("*/*")):
        base, tuned = read_results(folder / "base"), read_results(folder / "tuned")
        if folder.parent.name == "host" or base is None or tuned is None:
            continue
        if all(scored(folder / name) == scored(host / name) for name in ("base", "tuned")):
            yield folder.parent.name, folder.name, base, tuned


def adapter_results(run: Path) -> list[Result] | None:
    """The adapter's on the host before it was merged; None where it was not scored, or is another."""
    host = run / "bench" / HOST
    stage = read_json(host / "adapter" / "stage.json") or {}
    made_from, evaluation = scored(host / "tuned")
    same = (stage.get("merged"), stage.get("evaluation")) == (made_from, evaluation)
    return read_results(host / "adapter") if same else None


def same_as_local(run: Path, target: str, tuned: Sequence[Result]) -> tuple[int, int] | None:
    """How many answers are this machine's, of those questions that were answered on both."""
    folder = run / "bench" / LOCAL / target / "tuned"
    here = read_results(folder)
    if here is None or scored(folder) != scored(run / "bench" / HOST / "tuned"):
        return None
    answers = {r.id: r.answer for r in here}
    both = [r for r in tuned if r.id in answers]
    return sum(r.answer == answers[r.id] for r in both), len(both)


def scored(folder: Path) -> tuple[Any, Any]:
    """Which weights and which questions; results of earlier ones are no part of a report."""
    stage = read_json(folder / "stage.json") or {}
    return stage.get("made_from"), stage.get("evaluation")


def read_results(folder: Path) -> list[Result] | None:
    """The questions scored in a bench folder; None if it was not benched."""
    path = folder / "results.jsonl"
    if not path.is_file():
        return None
    names = [f.name for f in fields(Result) if f.default is MISSING]
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [Result(**{name: line[name] for name in names}, kl=line.get("kl")) for line in lines]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): delete {folder} and bench again") from error


def of_group(results: Sequence[Result], group: str = HEADLINE) -> list[Result]:
    """Those of a group."""
    return [r for r in results if r.group == group]


def read_json(path: Path) -> Facts | None:
    """A stage's file; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        # Python writes NaN, which is no JSON: a loss that diverged is no figure.
        data: Facts = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and give the command again") from (
            error
        )
    return data
