"""Tasks: where questions come from and how an answer is read. A task is one small file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from edgeft.errors import UserError, near

_SHOTS_OUT_OF = 64


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: stable for a task, split and seed.
        question: what the model is asked.
        solution: the worked solution that training teaches, ending in ``#### answer``.
        answer: the answer alone, in the form that the task's reader returns.
        group: ``""`` or the name of a part reported apart, such as ``"unseen templates"``.
    """

    id: str
    question: str
    solution: str
    answer: str
    group: str = ""


@dataclass(frozen=True)
class Splits:
    """Disjoint by question: no evaluation question is among the training or held-out ones."""

    train: list[Question]
    heldout: list[Question]
    evaluation: list[Question]


@dataclass(frozen=True)
class Sizes:
    """How many questions of each kind to make. ``unseen`` come on top of ``evaluation``."""

    train: int
    heldout: int
    evaluation: int
    unseen: int = 0


@dataclass(frozen=True)
class Task:
    """``make(sizes, seed)`` gives the questions; ``read(text)`` the answer in a completion or None."""

    name: str
    about: str
    make: Callable[[Sizes, int], Splits]
    read: Callable[[str], str | None]


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
    pool = train[: max(count, _SHOTS_OUT_OF)]
    return sorted(pool, key=lambda q: sha256(f"shots {seed} {q.id}".encode()).digest())[:count]


def tasks() -> dict[str, Task]:
    """Every task by name."""
    from edgeft.tasks.wordmath import TASK as WORDMATH

    return {task.name: task for task in (WORDMATH,)}


def find(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none.
    """
    known = tasks()
    if name not in known:
        raise UserError(f"unknown task '{name}'{near(name, tuple(known))}")
    return known[name]
