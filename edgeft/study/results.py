"""From a study's runs to one result object; the page, its JSON and recommendations show this."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeft import survival
from edgeft.report.results import HEADLINE, HOST, of_group, read_json, read_results, scored
from edgeft.study.cell import DONE, Outcome, outcome, run_folder
from edgeft.study.settings import ZERO_SHOT, Cell
from edgeft.study.statistics import Answers, Estimate, Estimates, answers, estimates
from edgeft.survival import Interval, Result

Place = tuple[str | None, str | None]  # target and device; both None: the host
ON_HOST: Place = (None, None)


@dataclass(frozen=True)
class Score:
    """One method at one place, over all its seeds and questions.

    Attributes:
        target, device: None on the host.
        benefit: over zero-shot at the same place; None for zero-shot itself.
        retention: benefit here over benefit on the host; None on the host, and where the host has
            no sure benefit.
        verdict: DESIGN's words; on the host ``benefit``, ``no-benefit`` or ``negative-transfer``.
        n: questions; asked with every seed.
        bytes, tok_s, memory_mb: of the artifact; medians over seeds.
        draws: of benefit and retention, to pool them.
    """

    target: str | None
    device: str | None
    n: int
    accuracy: float
    accuracy_ci: Interval
    benefit: float | None
    benefit_ci: Interval | None
    retention: float | None
    retention_ci: Interval | None
    verdict: str | None
    bytes: int | None = None
    tok_s: float | None = None
    memory_mb: float | None = None
    draws: dict[str, Estimate] = field(default_factory=dict, repr=False, compare=False)
    answers: Answers | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Row:
    """One method on one task with one model. ``seeds``: those that are scored."""

    model: str
    task: str
    method: str
    parameters: int | None
    seeds: list[int]
    scores: list[Score]

    def at(self, place: Place) -> Score | None:
        """Its score at a place."""
        return next((s for s in self.scores if (s.target, s.device) == place), None)


@dataclass(frozen=True)
class StudyResult:
    """A whole study.

    Attributes:
        places: where anything was scored, the host first.
        machines: facts by device.
    """

    name: str
    edgeft: str
    keep: float
    rows: list[Row]
    places: list[Place]
    outcomes: list[Outcome]
    machines: dict[str, Any]


def collect(study: Path, cells: Sequence[Cell]) -> StudyResult:
    """Read what the study's runs left; of a cell that failed, what was scored all the same."""
    outcomes = [outcome(study, cell.id) for cell in cells]
    pairs = zip(cells, outcomes, strict=True)
    there = [cell for cell, found in pairs if found.state == DONE or found.scored]
    rows = []
    for model, task in dict.fromkeys((c.model, c.task) for c in cells):
        rows += _rows(study, [c for c in there if (c.model, c.task) == (model, task)])
    keep = cells[0].recipe.report.keep if cells else survival.KEEP
    scored_at = {(s.target, s.device) for row in rows for s in row.scores}
    asked = dict.fromkeys(place for cell in cells for place in _places(cell))
    machines: dict[str, Any] = {}
    for cell in there:
        for path in sorted((run_folder(study, cell.id) / "bench").glob("*/machine.json")):
            machines.setdefault(path.parent.name, read_json(path))
    version = ""
    if there:
        run = read_json(run_folder(study, there[0].id) / "run.json") or {}
        version = str(run.get("edgeft", ""))
    return StudyResult(
        name=study.resolve().name,
        edgeft=version,
        keep=keep,
        rows=rows,
        places=[place for place in asked if place in scored_at],
        outcomes=outcomes,
        machines=machines,
    )


def _places(cell: Cell) -> list[Place]:
    """Where a cell is scored, the host first; a run may know more, from earlier."""
    return [ON_HOST, *((t, d["name"]) for d in cell.devices for t in d["targets"])]


def _rows(study: Path, cells: Sequence[Cell]) -> list[Row]:
    """The methods on one task with one model, zero-shot first."""
    # Zero-shot's base; where that cell failed, what another has scored in its place.
    same = [c for c in cells if c.method == ZERO_SHOT or c.seed is not None]
    base = next(filter(None, (_scored(study, cell, "base") for cell in same)), None)
    if base is None:
        return []
    parameters = _parameters(study, cells)
    model, task, keep = cells[0].model, cells[0].task, cells[0].recipe.report.keep
    rows = []
    for method in dict.fromkeys(c.method for c in cells):
        own = [c for c in cells if c.method == method]
        found = [_scored(study, cell, cell.weights[-1]) for cell in own]
        # A target whose types the tuned weights choose has another base in each cell.
        bases = [{**_scored(study, cell, "base"), **base} for cell in own]
        scores = []
        for place in _places(own[0]):
            if not all(place in there for there in [*found, *bases]):
                continue  # a seed without it: not comparable
            score = _score(place, bases, found, keep, method == ZERO_SHOT)
            if score:
                scores.append(_with_facts(score, study, own))
        seeds = [c.seed for c in own if c.seed is not None]
        rows.append(Row(model, task, method, parameters, seeds, _with_few(scores)))
    return rows


def _with_few(scores: list[Score]) -> list[Score]:
    """A benefit that all questions show and a device's few do not is not gone, but undecided."""
    on_host = next((s.verdict for s in scores if s.target is None), None)
    return [
        replace(s, verdict="inconclusive")
        if (on_host, s.verdict) == ("benefit", "no-benefit")
        else s
        for s in scores
    ]


def _score(
    place: Place,
    bases: Sequence[dict[Place, list[Result]]],
    seeds: Sequence[dict[Place, list[Result]]],
    keep: float,
    is_base: bool,
) -> Score | None:
    given = answers(
        [
            {
                "base": base[place],
                "tuned": there[place],
                "host_base": base[ON_HOST],
                "host_tuned": there[ON_HOST],
            }
            for base, there in zip(bases, seeds, strict=True)
        ]
    )
    if given is None:
        return None
    found = estimates(given)
    score = Score(
        *place,
        n=found.n,
        accuracy=found.accuracy.value,
        accuracy_ci=found.accuracy.ci,
        benefit=None,
        benefit_ci=None,
        retention=None,
        retention_ci=None,
        verdict=None,
        answers=given,
    )
    return score if is_base else _compared(score, found, keep)


def _compared(score: Score, found: Estimates, keep: float) -> Score:
    """With what a method brings; ``score`` has the accuracy."""
    low, high = found.host_benefit.ci
    verdict = "benefit" if low > 0 else "negative-transfer" if high < 0 else "no-benefit"
    draws = {"benefit": found.benefit}
    if score.target is not None and found.retention:
        verdict = survival.verdict_of(found.benefit.ci, found.retention.ci, keep)
        draws["retention"] = found.retention
    kept = found.retention if score.target is not None else None
    return replace(
        score,
        benefit=found.benefit.value,
        benefit_ci=found.benefit.ci,
        retention=kept.value if kept else None,
        retention_ci=kept.ci if kept else None,
        verdict=verdict,
        draws=draws,
    )


def _scored(study: Path, cell: Cell, weights: str) -> dict[Place, list[Result]]:
    """Results of base or tuned by place; those of other weights or questions are left out."""
    bench = run_folder(study, cell.id) / "bench"
    host = bench / HOST / weights
    found: dict[Place, list[Result]] = {}
    for place in _places(cell):
        target, device = place
        folder = host if place == ON_HOST else bench / str(device) / str(target) / weights
        results = of_group(read_results(folder) or [], HEADLINE)
        if results and scored(folder) == scored(host):
            found[place] = results
    return found if ON_HOST in found else {}


def _with_facts(score: Score, study: Path, cells: Iterable[Cell]) -> Score:
    """Size, speed and memory of the artifact, where there is one."""
    if score.target is None:
        return score
    sizes, speeds, memory = [], [], []
    for cell in cells:
        run = run_folder(study, cell.id)
        weights = cell.weights[-1]
        manifest = read_json(run / "export" / score.target / weights / "manifest.json") or {}
        artifact = str(manifest.get("artifact"))
        files = manifest.get("files", {}).items()
        sizes.append(sum(f["bytes"] for name, f in files if name.split("/")[0] == artifact))
        place = run / "bench" / str(score.device) / score.target / weights
        latency = read_json(place / "latency.json") or {}
        speeds.append(latency.get("decode_tok_s"))
        memory.append(latency.get("peak_rss_mb"))
    size = median(sizes)
    return replace(
        score,
        bytes=None if size is None else round(size),
        tok_s=median(speeds),
        memory_mb=median(memory),
    )


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value]
    return statistics.median(known) if known else None


def _parameters(study: Path, cells: Sequence[Cell]) -> int | None:
    for cell in cells:
        facts = read_json(run_folder(study, cell.id) / "train" / "train.json") or {}
        if facts.get("parameters"):
            return int(facts["parameters"])
    return None


def as_json(found: StudyResult) -> dict[str, Any]:
    """The public format, study.json."""
    rows = []
    for row in found.rows:
        scores = [
            {k: v for k, v in vars(score).items() if k not in ("draws", "answers")}
            for score in row.scores
        ]
        rows.append({**vars(row), "scores": scores})
    return {
        "schema": 1,
        "name": found.name,
        "edgeft": found.edgeft,
        "keep": found.keep,
        "machines": found.machines,
        "rows": rows,
        "cells": [asdict(o) for o in found.outcomes],
    }


def read(path: Path) -> dict[str, Any]:
    """A study.json, or that of a study's folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from edgeft.errors import UserError

    file = path / "study.json" if path.is_dir() else path
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        data["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no study: make one with edgeft study") from error
    return data
