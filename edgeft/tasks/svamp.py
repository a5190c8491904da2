"""``svamp``: one-step word problems with distracting numbers (Patel et al. 2021, arXiv 2103.07191).

The hub's split (700 and 300), or ``--data SVAMP.json``, the original file, which has none: then a
fixed 30% is for evaluation. The worked solution is the equation.
"""

from __future__ import annotations

import re

from edgeft.tasks import Question, Splits, Task, TaskSettings
from edgeft.tasks.dataset import Shares, divide
from edgeft.tasks.grading import gold_answer
from edgeft.tasks.rows import Row, rows

HUB = "ChilleD/SVAMP"
_WHOLE = re.compile(r"(?<=[0-9])\.0+(?![0-9])")


def make(settings: TaskSettings, seed: int) -> Splits:
    """The questions of each split; the seed changes nothing."""
    return divide(rows(settings.data, HUB), _question, settings, Shares(evaluation=0.3))


def _question(row: Row) -> Question:
    answer = gold_answer(row.text("Answer"))
    body = row.text("Body")
    if body[-1] not in ".!?,":
        body += "."
    solution = f"{_plain(row.text('Equation'))} = {answer}\n#### {answer}"
    return Question("", f"{body} {row.text('Question')}", solution, answer)


def _plain(equation: str) -> str:
    """``( 8.0 - 3.0 )`` as ``8 - 3``."""
    text = _WHOLE.sub("", equation).replace("( ", "(").replace(" )", ")")
    inner = text[1:-1]
    return inner if text[0] == "(" and text[-1] == ")" and _balanced(inner) else text


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return False
    return depth == 0


TASK = Task("svamp", f"one-step word problems (hub {HUB}, or the original SVAMP.json)", make)
