"""What a recipe says about its questions."""

from __future__ import annotations

from dataclasses import dataclass, field

FIELDS = ("question", "solution", "answer", "id")


@dataclass(frozen=True)
class TaskSettings:
    """Where the questions come from, how many there are, and how they are asked and read.

    A number that is left out is the task's own default; for a data set that is all there is (of
    the held-out questions, at most 128).

    Attributes:
        name: a task of ``edgeft tasks``, or a YAML file that holds these settings.
        train: questions to train on.
        heldout: questions that are never trained on, for the loss during training.
        evaluation: questions that are scored.
        unseen: questions of templates that are never trained on, scored apart.
        limit: at most so many of each, whatever the numbers above say.
        shots: worked training questions in front of each evaluation question.
        data: a file, a folder or a hub id (``org/name``), instead of the task's own hub data set.
        fields: what the columns of ``jsonl`` are called, by what they are: ``question``,
            ``solution``, ``answer``, ``id``.
        template: Jinja, what the model is asked; it knows ``question`` and the row's columns.
        system: a system prompt. None: the chat template's own, if it has one.
        pattern: a regular expression whose last match (its first group, if it has one) is the
            answer in a completion.
        seed: of the questions; None: the recipe's, so that other seeds train on other questions.
        annotations: keep GSM8K's calculator annotations, as in ``48/2=<<48/2=24>>24``.
    """

    name: str = "wordmath"
    train: int | None = None
    heldout: int | None = None
    evaluation: int | None = None
    unseen: int | None = None
    limit: int | None = None
    shots: int = 0
    data: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    system: str | None = None
    pattern: str | None = None
    seed: int | None = None
    annotations: bool = True

    def __post_init__(self) -> None:
        for name in ("train", "heldout", "evaluation", "unseen", "shots"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be at least 1")
        for name in self.fields:
            if name not in FIELDS:
                raise ValueError(f"fields: '{name}' is none of: {', '.join(FIELDS)}")
        if self.pattern is not None:
            _check_pattern(self.pattern)


def _check_pattern(pattern: str) -> None:
    import re

    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern is no regular expression: {error}") from error
