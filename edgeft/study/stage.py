"""The study as a whole: which cells are left, who does them, and what stands of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from edgeft import run
from edgeft.errors import UserError
from edgeft.progress import say
from edgeft.study import cell as work
from edgeft.study import settings
from edgeft.study.cell import DONE, FAILED, Order, Outcome
from edgeft.study.settings import Cell, Study

FILE = "study.yaml"
LOCAL, RAY = "local", "ray"
EXECUTORS = (LOCAL, RAY)
Tell = Callable[[Outcome], None]


@dataclass(frozen=True)
class Plan:
    """A study in its folder.

    Attributes:
        orders: of every cell, bases first.
        left: ids of those that are to be done.
    """

    path: Path
    study: Study
    cells: list[Cell]
    orders: dict[str, Order]
    left: list[str]


def plan(path: Path, study: Study) -> Plan:
    """What is to be done in the folder ``path``; nothing is written."""
    check(path)
    cells = settings.cells(study)
    orders = {c.id: work.order(path, c) for c in cells}
    left = [i for i, given in orders.items() if not is_done(path, given)]
    return Plan(path, study, cells, orders, left)


def is_done(path: Path, given: Order) -> bool:
    """Whether a cell was done for just this."""
    found = work.outcome(path, given.id)
    return found.state == DONE and found.fingerprint == given.fingerprint


def check(path: Path) -> None:
    """Whether a folder is a study's, or can become one.

    Raises:
        UserError: it is something else.
    """
    if path.is_dir() and not (path / FILE).is_file() and any(path.iterdir()):
        raise UserError(f"{path} is no study and not empty: give another folder with --out")


@contextlib.contextmanager
def opened(path: Path, study: Study) -> Iterator[None]:
    """Make or lock a study's folder.

    Raises:
        UserError: it holds other things, or another process works on it.
    """
    check(path)
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run.locked(path))
            text = yaml.safe_dump(settings.described(study), sort_keys=False)
            (path / FILE).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}") from error
        yield


def execute(this: Plan, executor: str = LOCAL, address: str | None = None) -> list[Outcome]:
    """Do what is left; a cell that fails does not keep the others, and is tried again.

    Args:
        executor: ``local``, one after the other here, or ``ray``.
        address: of the Ray cluster; None: one is started here.

    Returns:
        How every cell of the study stands.
    """
    count = [len(this.cells) - len(this.left)]
    if count[0]:
        say(f"· {count[0]} of {len(this.cells)} cells: up to date")

    def tell(found: Outcome) -> None:
        before = work.outcome(this.path, found.id)
        if before.fingerprint == found.fingerprint:  # all work on it counts
            seconds, attempts = found.seconds + before.seconds, found.attempts + before.attempts
        else:  # much of it may have been up to date
            seconds, attempts = max(found.seconds, before.seconds), found.attempts
        found = replace(found, seconds=round(seconds, 1), attempts=attempts)
        work.keep(this.path, found)
        count[0] += 1
        work.told(found, count[0], len(this.cells))

    if this.left:
        if executor == RAY:
            from edgeft.study.on_ray import execute as by_ray

            by_ray(this, tell, address)
        else:
            _here(this, tell)
    return [work.outcome(this.path, c.id) for c in this.cells]


def _here(this: Plan, tell: Tell) -> None:
    for i in this.left:
        say(f"□ {i}")
        found = attempt(this.orders[i], this.study.retries, work.do)
        tell(found)


def attempt(given: Order, retries: int, do: Callable[[Order], Outcome]) -> Outcome:
    """Try a cell, and again where it fails; what was finished before counts."""
    seconds, tries = 0.0, 0
    while True:
        found = do(given)
        seconds, tries = seconds + found.seconds, tries + 1
        if found.state != FAILED or tries > retries:
            return replace(found, seconds=round(seconds, 1), attempts=tries)
        say(f"  {given.id}: {found.error}; again")
