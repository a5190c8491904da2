"""One cell: a run, made with what it shares with another one, and how it ended."""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft import __version__, catalog, model, pipeline, recipe, report, run, stages
from edgeft.errors import UserError
from edgeft.progress import say
from edgeft.recipe import Recipe
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
        scored: the host's scores are there, and what of the rest did not fail.
    """

    id: str
    state: str
    error: str | None = None
    seconds: float = 0.0
    attempts: int = 0
    fingerprint: str = ""
    scored: bool = False


def order(study: Path, cell: Cell) -> Order:
    """The cell's work in the study's folder."""
    study = study.resolve()  # a worker may stand elsewhere
    inputs = {
        "edgeft": __version__,
        "recipe": asdict(cell.recipe),
        "files": _sources(cell.recipe),
        "targets": [asdict(t) for t in catalog.find_targets(cell.recipe.export.targets)],
        "weights": list(cell.weights),
        "devices": cell.devices,
        "profiles": [asdict(catalog.find_device(device["name"])) for device in cell.devices],
    }
    return Order(
        id=cell.id,
        run=str(run_folder(study, cell.id)),
        recipe=recipe.dump(cell.recipe),
        weights=cell.weights,
        devices=cell.devices,
        share=str(run_folder(study, cell.shares)) if cell.shares else None,
        fingerprint=run.fingerprint(inputs),
    )


def _sources(given: Recipe) -> dict[str, list[int]]:
    """Size and time of the local files that a cell begins with; its stages compare what they hold."""
    files: list[Path] = []
    for place in (model.source(given.model), given.task.data and Path(given.task.data)):
        if isinstance(place, Path):
            files += place.rglob("*") if place.is_dir() else [place]
    found = {path: path.stat() for path in sorted(files) if path.is_file()}
    return {str(path): [stat.st_size, stat.st_mtime_ns] for path, stat in found.items()}


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
    """Do a cell's work, or go on with it. What goes wrong is an outcome, not an exception."""
    start = time.monotonic()
    error: str | None = None
    scored = False
    try:
        failed = _do(given)
        error, scored = str(failed) if failed else None, True
    except UserError as wrong:
        error = str(wrong)
    except Exception as wrong:  # of ours: the other cells can do without it, its place is said
        traceback.print_exc()
        error = f"{type(wrong).__name__}: {wrong}"
    state = DONE if error is None else FAILED
    seconds = round(time.monotonic() - start, 1)
    return Outcome(given.id, state, error, seconds, 1, given.fingerprint, scored)


def _do(given: Order) -> UserError | None:
    """See :func:`edgeft.pipeline.run`."""
    settings = recipe.parse(given.recipe, name=given.id)
    path = Path(given.run)
    path.mkdir(parents=True, exist_ok=True)
    with stages.opened(path, settings) as this:
        trains = "tuned" in given.weights
        if given.share:
            share(Path(given.share), path, anew=trains)
        targets = catalog.find_targets(settings.export.targets)
        failed = pipeline.run(this, targets, given.devices, given.weights)
        if trains:
            report.write(path)
    return failed


def share(source: Path, run_: Path, *, anew: bool) -> None:
    """Take over what base left in another run: finished stages that this one does not have.

    Whether they fit is decided as always, by the stages' fingerprints. Files are linked; no stage
    writes into a finished one.

    Args:
        anew: take what is another than here as well; this run has the same base and questions.
    """
    for pattern in _SHARED:
        for stage in sorted(source.glob(pattern)):
            place = run_ / stage.relative_to(source)
            mark = run.mark(stage)
            if mark is None or (place.exists() and not (anew and run.mark(place) != mark)):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_name(place.name + ".shared")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(stage, partial, copy_function=_link)
            if place.exists():
                shutil.rmtree(place)
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
