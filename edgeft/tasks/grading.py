"""Reading a completion's answer and comparing it with the gold one, whatever the task.

A gold answer that is a number is compared as one. Of any other that holds some mathematics
(``x^2 + 1``, ``\\frac{\\sqrt{3}}{2}``, ``(3, 5)``) math-verify decides whether an answer equals it.
The rest is text: ``yes``, ``Tuesday``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from edgeft.errors import UserError
from edgeft.tasks import find
from edgeft.tasks.answers import (
    BOXED,
    LAST,
    PLACES,
    Reading,
    only_number,
    places,
    plain,
    read,
    read_number,
)

Read = Callable[[str, str], Reading]
PATTERN, TASK, EXPRESSION = "pattern", "task", "expression"  # further kinds of place
HOWS = (*PLACES, EXPRESSION, PATTERN, TASK)

_MATH = re.compile(r"[0-9\\^=+*/(){}\[\]|<>]")
_SENTENCE = re.compile(r"(.+?)(?:[.!?;](?:\s|$)|\n|$)", re.DOTALL)
_LATEX = re.compile(r"\$|\\\(|\\\[|\\boxed")
_COMES_TO = re.compile(r".*(?:\b(?:is|are|get)\b|[=:])\s*(.+?)[.\s]*$")
_LONGEST = 1_000  # characters of a number whose value we look at
_EDGES = " \t\n.,:;!?*_`'\"$"


def reader(task: str, pattern: str | None = None) -> Read:
    """``read(text, gold)``: the answer in a completion, as the task or the pattern has it.

    The gold answer only decides what kind of answer is looked for.

    Raises:
        UserError: there is no such task.
    """
    if pattern is not None:
        compiled = re.compile(pattern)
        return lambda text, gold: _by_pattern(compiled, text, gold)
    own = find(task).read
    if own is not None:
        return lambda text, gold: _by_task(own(text))
    return lambda text, gold: read(text) if is_number(gold) else _stated(text, gold)


def is_number(gold: str) -> bool:
    """Whether it is a number in canonical form."""
    return gold == read_number(f"#### {gold}")


def is_expression(gold: str) -> bool:
    """Whether math-verify must decide what equals it."""
    return not is_number(gold) and bool(_MATH.search(gold))


def gold_answer(text: str) -> str:
    """An answer as a data set gives it: a number in canonical form where it is one, else as it is."""
    return only_number(text) or text.strip()


def same(answer: str | None, gold: str) -> bool:
    """Whether the answer is the gold one: as numbers, as mathematics or as text.

    Raises:
        UserError: math-verify is needed and not installed.
    """
    if answer is None:
        return False
    if _text(answer) == _text(gold):
        return True
    if is_number(gold):
        return is_number(answer) and (value := _value(answer)) is not None and value == _value(gold)
    return is_expression(gold) and _verified(answer, gold)


def check_installed(golds: Iterable[str]) -> None:
    """Refuse gold answers that need math-verify where that is not installed.

    Raises:
        UserError: it is needed and not there.
    """
    needed = next((gold for gold in golds if is_expression(gold)), None)
    if needed is not None:
        _math_verify(needed)


def _by_pattern(pattern: re.Pattern[str], text: str, gold: str) -> Reading:
    found = list(pattern.finditer(text))
    if not found:
        return Reading()
    words = (found[-1][1] if pattern.groups else found[-1][0]) or ""
    if is_number(gold):
        answer = read(words).answer
    else:
        answer = words.strip(_EDGES) if not is_expression(gold) else words.strip()
    return Reading(answer, PATTERN) if answer else Reading()


def _by_task(answer: str | None) -> Reading:
    return Reading() if answer is None else Reading(answer, TASK)


def _stated(text: str, gold: str) -> Reading:
    """An answer that is no number: what the first place that states one holds."""
    text = plain(text)
    for how, place in places(text):
        found = _SENTENCE.match(place.strip()) if how != BOXED else None
        words = (found[1] if found else place).strip(_EDGES if not is_expression(gold) else " \n.:")
        if words:
            return Reading(words, how)
    line = text.strip().rpartition("\n")[2]
    if not is_expression(gold):
        words = line.strip(_EDGES)
        return Reading(words, LAST) if words else Reading()
    if not _LATEX.search(text):  # of prose, what its last line comes to
        found = None if "=" in gold else _COMES_TO.match(line)
        text = found[1] if found else line.strip(" .")
    return Reading(text, EXPRESSION) if _MATH.search(text) else Reading()


def _text(answer: str) -> str:
    return " ".join(answer.casefold().strip(_EDGES).split())


def _value(number: str) -> Fraction | None:
    try:
        return Fraction(number) if len(number) < _LONGEST else None
    except (ValueError, ZeroDivisionError):
        return None


def _verified(answer: str, gold: str) -> bool:
    math = _math_verify(gold)
    try:
        return bool(math.verify(_parsed(math, gold), _parsed(math, answer)))
    except Exception:  # of what a model writes, sympy may raise anything
        return False


def _parsed(math: Any, text: str) -> Any:
    # Outside of a LaTeX environment only the numbers in a text would be read.
    wrapped = text if _LATEX.search(text) else f"${text}$"
    return math.parse(wrapped)


def _math_verify(gold: str) -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise UserError(
            f"the answer '{gold}' is no plain number, and math-verify, which compares such, is not "
            "installed: pip install 'math-verify[antlr4_13_2]'"
        ) from error
    return math_verify
