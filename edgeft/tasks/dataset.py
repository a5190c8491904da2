"""From the rows of a data set to fixed, disjoint splits of questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from edgeft.errors import UserError
from edgeft.tasks import Question, Splits, TaskSettings, normalized
from edgeft.tasks.rows import ALL, Row
from edgeft.tasks.template import renderer

HELDOUT = 128  # held-out questions, if no number is given and there are that many
Make = Callable[[Row], Question | str]
"""A question of a row, whose ``id`` may be empty, or the reason why it is left out."""


@dataclass(frozen=True)
class Shares:
    """What becomes of rows that come without a split: parts of 1, the rest is for training."""

    evaluation: float = 0.2
    heldout: float = 1 / 32


def divide(
    rows: dict[str, list[Row]], make: Make, settings: TaskSettings, shares: Shares = Shares()
) -> Splits:
    """The splits of a data set.

    A split that the data does not name is a share of ``train`` (or of all), by a digest of the
    question: it is the same for every seed and size, and two rows with one question never part.

    Raises:
        UserError: a row is malformed, or a number asked for is larger than what there is.
    """
    left_out: Counter[str] = Counter()
    render = renderer(settings.template)
    ids: set[str] = set()
    found = {
        split: _questions(split, part, make, settings, render, left_out, ids)
        for split, part in rows.items()
    }
    rest = [*found.get("train", []), *found.get(ALL, [])]
    evaluation, heldout = found.get("test"), found.get("heldout")
    if evaluation is None:
        evaluation, rest = _part(rest, 0, shares.evaluation)
    if heldout is None:
        at = 0.0 if "test" in found else shares.evaluation
        heldout, rest = _part(rest, at, at + shares.heldout)
    if settings.heldout is None:
        heldout = heldout[:HELDOUT]
    return Splits(
        train=_first(rest, settings, "train"),
        heldout=_first(heldout, settings, "heldout"),
        evaluation=_first(evaluation, settings, "evaluation"),
        left_out=dict(left_out),
    )


def _questions(
    split: str,
    rows: Sequence[Row],
    make: Make,
    settings: TaskSettings,
    render: Callable[[dict[str, object], str], str] | None,
    left_out: Counter[str],
    ids: set[str],
) -> list[Question]:
    made = []
    for i, row in enumerate(rows):
        question = make(row)
        if isinstance(question, str):
            left_out[question] += 1
            continue
        prompt = ""
        if render:
            prompt = render({**row.columns, "question": question.question}, row.where)
        name = question.id or f"{settings.name}-{split}-{i}"
        if name in ids:
            raise UserError(f"{row.where}: the id '{name}' comes a second time")
        ids.add(name)
        made.append(replace(question, id=name, prompt=prompt))
    return made


def _part(
    questions: Sequence[Question], low: float, high: float
) -> tuple[list[Question], list[Question]]:
    """Those whose place is between, of few questions at least the nearest one, and the others."""
    if len(questions) < 2 or low == high:
        return [], list(questions)
    places = [_place(question) for question in questions]
    nearest = min(places, key=lambda place: abs(place - (low + high) / 2))
    inside: list[Question] = []
    outside: list[Question] = []
    for question, place in zip(questions, places, strict=True):
        (inside if low <= place < high or place == nearest else outside).append(question)
    return inside, outside


def _place(question: Question) -> float:
    """Somewhere from 0 to 1, by the question's words alone."""
    digest = sha256(normalized(question.question).encode()).digest()
    return int.from_bytes(digest[:4]) / 2**32


def _first(questions: list[Question], settings: TaskSettings, key: str) -> list[Question]:
    count = getattr(settings, key)
    if count is None:
        return questions
    if count > len(questions):
        raise UserError(
            f"{settings.name} has {len(questions):,} questions for task.{key} and {count:,} were "
            f"asked for: lower task.{key} or leave it out"
        )
    return questions[:count]
