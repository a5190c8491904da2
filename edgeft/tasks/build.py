"""The questions that a recipe asks for: made by its task, limited, templated, checked for overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgeft.errors import UserError
from edgeft.tasks import Question, Splits, TaskSettings, find, normalized
from edgeft.tasks.template import renderer

_SHOWN = 60  # characters of a question in an error


def build(settings: TaskSettings, seed: int) -> Splits:
    """The questions of each split.

    Raises:
        UserError: the data cannot be had or is malformed, a split is empty though some of it was
            asked for, or evaluation questions are trained on too.
    """
    splits = find(settings.name).make(settings, seed)
    if settings.limit is not None:
        splits = replace(
            splits,
            train=splits.train[: settings.limit],
            heldout=splits.heldout[: settings.limit],
            evaluation=_limited(splits.evaluation, settings.limit),
        )
    if not splits.evaluation and settings.evaluation != 0:
        raise UserError(f"{settings.name} has no evaluation question left{_because(splits)}")
    refuse_contamination(splits)
    render = renderer(settings.template)
    if render is None:
        return splits

    def asked(questions: Sequence[Question]) -> list[Question]:
        return [
            q if q.prompt else replace(q, prompt=render({"question": q.question}, q.id))
            for q in questions
        ]

    return replace(
        splits,
        train=asked(splits.train),
        heldout=asked(splits.heldout),
        evaluation=asked(splits.evaluation),
    )


def refuse_contamination(splits: Splits) -> None:
    """Refuse evaluation questions that are trained on or held out, and held-out ones trained on.

    Two questions are the same if what the model is asked is, after
    :func:`edgeft.tasks.normalized`.

    Raises:
        UserError: there are some; one is shown.
    """
    trained = {_asked(q): q for q in splits.train}
    held = {_asked(q): q for q in splits.heldout}
    pairs = (
        ("evaluation", splits.evaluation, "train", trained),
        ("evaluation", splits.evaluation, "heldout", held),
        ("heldout", splits.heldout, "train", trained),
    )
    for name, questions, other, seen in pairs:
        twice = [(q, seen[key]) for q in questions if (key := _asked(q)) in seen]
        if twice:
            question, same = twice[0]
            raise UserError(
                f"{len(twice)} of the {name} questions are among those of '{other}' too, such as "
                f"{question.id} and {same.id} ('{question.question[:_SHOWN]}'): a score on them "
                "would say nothing; take them out of one of the two"
            )


def _asked(question: Question) -> str:
    return normalized(question.prompt or question.question)


def _limited(questions: Sequence[Question], limit: int) -> list[Question]:
    """The first ones of each group."""
    counts: dict[str, int] = {}
    kept = []
    for question in questions:
        counts[question.group] = counts.get(question.group, 0) + 1
        if counts[question.group] <= limit:
            kept.append(question)
    return kept


def _because(splits: Splits) -> str:
    reasons = ", ".join(f"{reason}: {n:,}" for reason, n in splits.left_out.items())
    return f"; left out: {reasons}" if reasons else ""
