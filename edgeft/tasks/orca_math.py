"""``orca-math``: 200,000 word problems with solutions in free text (arXiv 2402.14830).

It has one split, so a fixed fiftieth is for evaluation and another is held out. The final answer
must be found in the solution's words: where that is not certain the row is left out, and counted.
"""

from __future__ import annotations

from edgeft.tasks import Question, Splits, Task, TaskSettings
from edgeft.tasks.answers import MARK, NO_CONCLUSION, conclusion, read
from edgeft.tasks.dataset import Shares, divide
from edgeft.tasks.rows import Row, rows

HUB = "microsoft/orca-math-word-problems-200k"
NO_ANSWER = "no certain final answer"


def make(settings: TaskSettings, seed: int) -> Splits:
    """The questions of each split; the seed changes nothing."""
    source = rows(settings.data, HUB)
    return divide(source, _question, settings, Shares(evaluation=1 / 50, heldout=1 / 50))


def _question(row: Row) -> Question | str:
    solution = row.text("answer")
    answer = conclusion(solution)
    if answer is None:
        return NO_CONCLUSION
    if read(solution).how != MARK:
        solution = f"{solution}\n#### {answer}"  # what is taught must be read without a doubt
    return Question("", row.text("question"), solution, answer)


TASK = Task("orca-math", f"word problems, free-text solutions (hub {HUB}, or JSONL)", make)
