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
from edgeft.tasks.grading import gold_answer, reader, same
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
        asked, answer = row.text(fields["question"]), row.text(fields["answer"])
        if fields["solution"] in row.columns:
            gold: str | None = gold_answer(answer)
            solution, more = row.text(fields["solution"]), f"\n#### {gold}"
        elif settings.pattern:
            found = read(answer, "words").answer
            gold, solution, more = found and gold_answer(found), answer, ""
        elif _is_worked(answer):
            gold, solution, more = _concluded(answer), answer, ""
        else:
            gold = gold_answer(answer)
            solution, more = f"#### {gold}", ""
        if gold is None:
            return UNREADABLE if settings.pattern else NO_CONCLUSION
        if not same(read(solution, gold).answer, gold):
            solution += more
            if not same(read(solution, gold).answer, gold):
                return UNREADABLE
        name = row.text(fields["id"]) if "id" in fields else ""
        return Question(name, asked, solution, gold)

    return divide(rows(settings.data), question, settings)


def _is_worked(answer: str) -> bool:
    """Whether a column that holds the answer holds a worked solution with it."""
    marked = next(places(answer), None) is not None
    return marked or "\n" in answer or len(_WORD.findall(answer)) >= PROSE


def _concluded(solution: str) -> str | None:
    boxed = next((place for how, place in places(solution) if how == BOXED), None)
    return conclusion(solution) if boxed is None else gold_answer(boxed)


TASK = Task("jsonl", "your own questions, one JSON object a line: --data FILE or DIR", make)
