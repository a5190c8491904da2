"""One cell: a run, made with what it shares with another one, and how it ended."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft import __version__, catalog, pipeline, recipe, report, run, stages
from edgeft.errors import UserError
from edgeft.progress import say
from edgeft.study.settings import Cell

DONE, FAILED, WAITING = "done", "failed", "waiting"
# What base leaves in a run, and the questions: stages that are the same for every method.
_SHARED = (
    "base",
    "data",
    "gguf/base",
    "imatrix/base",
    "bench/host/base",
    "bench/general/*/base",
    "bench/*/*/base",
    "export/*/base",
)


@dataclass(frozen=True)
class Order:
    """What a worker needs to do a cell, as JSON.

    Attributes:
        id: the cell's.
        run: its run directory.
        recipe: YAML.
        weights: what is scored.
        devices: as :func:`edgeft.pipeline.run` takes them.
        share: the run directory whose base is taken over; None: none.
        fingerprint: of all that the result depends on.
    """

    id: str
    run: str
    recipe: str
    weights: Sequence[str]
    devices: Sequence[dict[str, Any]]
    share: str | None
    fingerprint: str


@dataclass(frozen=True)
class Outcome:
    """How a cell stands.

    Attributes:
        state: ``done``, ``failed`` or ``waiting``.
        error: why it failed.
        seconds: of work, all attempts added up.
        attempts: how often it was tried.
    """

    id: str
    state: str
    error: str | None = None
    seconds: float = 0.0
    attempts: int = 0
    fingerprint: str = ""


def order(study: Path, cell: Cell, devices: Sequence[dict[str, Any]]) -> Order:
    """The cell's work in the study's folder."""
    targets = {t.name: asdict(t) for t in catalog.find_targets(cell.recipe.export.targets)}
    inputs = {
        "edgeft": __version__,
        "recipe": asdict(cell.recipe),
        "targets": targets,
        "weights": list(cell.weights),
        "devices": list(devices),
    }
    return Order(
        id=cell.id,
        run=str(run_folder(study, cell.id)),
        recipe=recipe.dump(cell.recipe),
        weights=cell.weights,
        devices=devices,
        share=str(run_folder(study, cell.shares)) if cell.shares else None,
        fingerprint=run.fingerprint(inputs),
    )


def run_folder(study: Path, cell: str) -> Path:
    """A cell's run directory."""
    return study / "runs" / cell


def outcome_file(study: Path, cell: str) -> Path:
    """Where it stands how a cell ended."""
    return study / "cells" / f"{cell.replace('/', '--')}.json"


def outcome(study: Path, cell: str) -> Outcome:
    """How a cell stands."""
    try:
        return Outcome(**json.loads(outcome_file(study, cell).read_text()))
    except (OSError, ValueError, TypeError):
        return Outcome(cell, WAITING)


def keep(study: Path, found: Outcome) -> None:
    """Write it down."""
    path = outcome_file(study, found.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    run.write_json(path, asdict(found))


def do(given: Order) -> Outcome:
    """Do a cell's work, or go on with it. What a user can cause is an outcome, not an exception."""
    start = time.monotonic()
    error: str | None = None
    try:
        _do(given)
    except UserError as wrong:
        error = str(wrong)
    state = FAILED if error else DONE
    seconds = round(time.monotonic() - start, 1)
    return Outcome(given.id, state, error, seconds, 1, given.fingerprint)


def _do(given: Order) -> None:
    settings = recipe.parse(given.recipe, name=given.id)
    path = Path(given.run)
    path.mkdir(parents=True, exist_ok=True)
    with stages.opened(path, settings) as this:
        if given.share:
            share(Path(given.share), path)
        targets = catalog.find_targets(settings.export.targets)
        failed = pipeline.run(this, targets, given.devices, given.weights)
        if "tuned" in given.weights:
            report.write(path)
    if failed:
        raise failed


def share(source: Path, run_: Path) -> None:
    """Take over what base left in another run: finished stages that this one does not have.

    Whether they fit is decided as always, by the stages' fingerprints. Files are linked; no stage
    writes into a finished one.
    """
    for pattern in _SHARED:
        for stage in sorted(source.glob(pattern)):
            place = run_ / stage.relative_to(source)
            if not (stage / "stage.json").is_file() or place.exists():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_name(place.name + ".shared")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(stage, partial, copy_function=_link)
            partial.rename(place)


def _link(source: str, out: str) -> None:
    try:
        os.link(source, out)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, out)


def told(found: Outcome, done: int, total: int) -> None:
    """One line about how a cell ended."""
    if found.state == DONE:
        say(f"■ {found.id}: done in {found.seconds:.0f} s ({done} of {total})")
    else:
        say(f"■ {found.id}: failed: {found.error} ({done} of {total})")
