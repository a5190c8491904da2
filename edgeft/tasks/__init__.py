"""Tasks: where questions come from and how an answer is read. A task is one small file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from edgeft.errors import UserError, near
from edgeft.tasks.settings import TaskSettings

__all__ = ["Question", "Splits", "Task", "TaskSettings", "draw_shots", "filled", "find", "tasks"]

PLUGINS = "edgeft.tasks"  # the entry points by which other packages bring a Task
_SHIPPED = ("wordmath", "gsm8k", "orca_math", "svamp", "gsm_symbolic", "jsonl")
SHOTS_OUT_OF = 64  # worked examples come from the first so many training questions


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: stable for a task, split and seed.
        question: what people read.
        solution: the worked solution that training teaches; the answer can be read in it.
        answer: the answer alone; a number in the canonical form of :mod:`edgeft.tasks.answers`.
        group: ``""`` or the name of a part reported apart, such as ``"unseen templates"``.
        prompt: what the model is asked, where a template makes that of the question; else ``""``.
    """

    id: str
    question: str
    solution: str
    answer: str
    group: str = ""
    prompt: str = ""


@dataclass(frozen=True)
class Splits:
    """Disjoint by question: no evaluation question is among the training or held-out ones.

    ``left_out`` counts what the source holds and this does not, by reason.
    """

    train: list[Question]
    heldout: list[Question]
    evaluation: list[Question]
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A source of questions.

    Attributes:
        make: ``make(settings, seed)``: the questions of each split.
        read: ``read(text)``: the answer in a completion, or None. None: the usual reading, see
            :func:`edgeft.tasks.grading.reader`.
        defaults: numbers that settings leave out; what is None here too is all there is.
        max_new_tokens: tokens that an answer may take, unless a recipe says otherwise.
    """

    name: str
    about: str
    make: Callable[[TaskSettings, int], Splits]
    read: Callable[[str], str | None] | None = None
    defaults: TaskSettings = field(default_factory=TaskSettings)
    max_new_tokens: int = 256  # as lm-evaluation-harness has it


def normalized(question: str) -> str:
    """The question in lower case, words and numbers only: what makes two questions the same."""
    text = unicodedata.normalize("NFKC", question).casefold()
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text)
    return " ".join(re.findall(r"\w+", text))


def draw_shots(train: Sequence[Question], count: int, seed: int) -> list[Question]:
    """``count`` worked examples for few-shot prompts, in an order that is always the same.

    They are drawn by ``seed`` out of the first questions alone, so that training on more of them
    does not change the prompts.

    Raises:
        UserError: there are fewer than ``count``.
    """
    if count > len(train):
        raise UserError(
            f"task.shots={count} needs as many training questions and there are {len(train)}: "
            "lower task.shots or raise task.train"
        )
    pool = train[: max(count, SHOTS_OUT_OF)]
    return sorted(pool, key=lambda q: sha256(f"shots {seed} {q.id}".encode()).digest())[:count]


def tasks() -> dict[str, Task]:
    """Every task by name: the shipped ones, then those of installed packages.

    Raises:
        UserError: an installed package's task does not load.
    """
    shipped = [import_module(f"edgeft.tasks.{module}").TASK for module in _SHIPPED]
    found: dict[str, Task] = {task.name: task for task in shipped}
    for entry in entry_points(group=PLUGINS):
        found.setdefault(entry.name, replace(_plugin(entry), name=entry.name))
    return found


def _plugin(entry: EntryPoint) -> Task:
    try:
        task = entry.load()
    except Exception as error:  # whatever another package's import raises
        raise UserError(f"the task '{entry.name}' ({entry.value}) does not load: {error}") from (
            error
        )
    if not isinstance(task, Task):
        raise UserError(f"the task '{entry.name}' ({entry.value}) is no edgeft.tasks.Task")
    return task


def find(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none, or it does not load.
    """
    shipped = {module.replace("_", "-"): module for module in _SHIPPED}
    if name in shipped:
        task: Task = import_module(f"edgeft.tasks.{shipped[name]}").TASK
        return task
    others = {entry.name: entry for entry in entry_points(group=PLUGINS)}
    if name not in others:
        raise UserError(f"unknown task '{name}'{near(name, (*shipped, *others))}")
    return replace(_plugin(others[name]), name=name)


def filled(settings: TaskSettings) -> TaskSettings:
    """The settings with the task's own numbers where none are given."""
    defaults = find(settings.name).defaults
    sizes = ("train", "heldout", "evaluation", "unseen")
    missing = {n: getattr(defaults, n) for n in sizes if getattr(settings, n) is None}
    return replace(settings, **missing)
