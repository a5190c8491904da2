"""``jsonl``: your own questions, ``--data FILE`` or a folder with ``train.jsonl`` and ``test.jsonl``.

A row needs ``question`` and ``answer`` (``task.fields`` gives other names). The answer may be the
answer alone or a worked solution that ends in it; with a field ``solution`` that is what is taught.
"""

from __future__ import annotations

import re

from edgeft.errors import UserError
from edgeft.tasks import Question, Splits, Task, TaskSettings
from edgeft.tasks.answers import BOXED, NO_CONCLUSION, conclusion, places
from edgeft.tasks.dataset import divide
from edgeft.tasks.grading import Read, gold_answer, reader, same
from edgeft.tasks.rows import Row, rows

PROSE = 4  # words from which on an answer is a worked solution
_WORD = re.compile(r"[^\W\d_]{2,}")
UNREADABLE = "the answer cannot be read in the solution"


def make(settings: TaskSettings, seed: int) -> Splits:
    """The questions of each split; the seed changes nothing.

    Raises:
        UserError: there is no data, or a row is malformed.
    """
    if settings.data is None:
        raise UserError("the task jsonl needs its questions: --data FILE or DIR")
    read = reader("jsonl", settings.pattern)
    fields = {name: name for name in ("question", "answer", "solution")} | settings.fields

    def question(row: Row) -> Question | str:
        answer = row.text(fields["answer"])
        worked = fields["solution"] in row.columns
        solution = row.text(fields["solution"]) if worked else answer
        gold = gold_answer(answer) if worked else _gold(answer, settings.pattern and read)
        if gold is None:
            return NO_CONCLUSION
        if not same(read(solution, gold).answer, gold):
            solution = f"{solution}\n#### {gold}" if worked else f"#### {gold}"
            if not same(read(solution, gold).answer, gold):
                return UNREADABLE
        name = row.text(fields["id"]) if "id" in fields else ""
        group = row.text(fields["group"]) if "group" in fields else ""
        return Question(name, row.text(fields["question"]), solution, gold, group)

    return divide(rows(settings.data), question, settings)


def _gold(answer: str, by_pattern: Read | str | None) -> str | None:
    """The answer in a column that holds it alone or behind a worked solution."""
    if callable(by_pattern):
        found = by_pattern(answer, "words").answer
        return gold_answer(found) if found else None
    if len(_WORD.findall(answer)) < PROSE:
        return gold_answer(answer)
    boxed = next((place for how, place in places(answer) if how == BOXED), None)
    return conclusion(answer) if boxed is None else gold_answer(boxed)


TASK = Task("jsonl", "your own questions, one JSON object a line: --data FILE or DIR", make)
