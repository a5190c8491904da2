"""``gsm8k``: grade-school word problems (Cobbe et al. 2021, arXiv 2110.14168).

Its own split: 7,473 questions to train on, of which a fixed thirty-second is held out, and 1,319
to evaluate. ``--data DIR``: the original ``train.jsonl`` and ``test.jsonl``.
"""

from __future__ import annotations

import re

from edgeft.tasks import Question, Splits, Task, TaskSettings
from edgeft.tasks.answers import MARK, read
from edgeft.tasks.dataset import divide
from edgeft.tasks.rows import Row, rows

HUB, CONFIG = "openai/gsm8k", "main"
_ANNOTATION = re.compile(r"<<[^<>]*>>")


def make(settings: TaskSettings, seed: int) -> Splits:
    """The questions of each split; the seed changes nothing."""

    def question(row: Row) -> Question | str:
        solution = row.text("answer")
        found = read(solution)
        if found.how != MARK or found.answer is None:
            return "no readable answer"
        if not settings.annotations:
            solution = _ANNOTATION.sub("", solution)
        return Question("", row.text("question"), solution, found.answer)

    return divide(rows(settings.data, HUB, CONFIG), question, settings)


TASK = Task("gsm8k", "grade-school word problems (hub openai/gsm8k, or its JSONL files)", make)
