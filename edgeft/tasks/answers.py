"""Reading a number out of what a model wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

# A mixed number ("1 1/2"), else digits with what may stand between them, else ".5".
_RUN = re.compile(
    r"(?<![0-9.,:/])[0-9]+ [0-9]+/[0-9]+(?![0-9/])"
    r"|[0-9]+(?:[.,:/][0-9]+)*"
    r"|(?<![\w.])\.[0-9]+"
)
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_DECIMAL = re.compile(r"[0-9]*(?:\.[0-9]+)?")
_FRACTION = re.compile(r"(?:([0-9]{1,18}) )?([0-9]{1,18})/([0-9]{1,18})")
_CURRENCY = re.compile(r"[$€£¥₹]\s?$")
_EXPONENT = re.compile(r"\^\{?$")
_BEFORE = re.compile(r"[\s$€£¥₹~≈+-]*(?:(?:USD|EUR|GBP|INR|Rs)\.?\s*)?")
_UNIT = re.compile(r"(?![abcnpqrxyz](?![A-Za-z]))[^\\^=+*(){}\[\]<>|]*")
_MARK = re.compile(r"####+")
_BOXED = re.compile(r"\\boxed\s*\{")
_ANSWER_IS = re.compile(r"\banswer\s*(?:is\b|:)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\n")
_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")
NO_CONCLUSION = "no certain final answer"  # why a row is left out
# What may stand between "####" and its number; other words make it a heading.
_LEAD = re.compile(r"(?:[\W_]|\b(?:the|final|answer|is|usd|eur|gbp|rs)\b)*", re.IGNORECASE)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_LATEX_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!])(?=[0-9]{3})")
_PLAIN = str.maketrans({"\u2212": "-", "\u2010": "-", "\u2011": "-", "\u00a0": " ", "\u202f": " "})


@dataclass(frozen=True)
class Reading:
    """An answer, and where it was found: one of :data:`PLACES`; both None where there is none."""

    answer: str | None = None
    how: str | None = None


# The places where an answer is looked for, in this order.
MARK, BOXED, ANSWER_IS, LAST = PLACES = ("####", "boxed", "answer is", "last")


def read(text: str) -> Reading:
    r"""The number that a completion answers with, in canonical form.

    Looked for behind the last ``####`` that a number follows, else in the last ``\boxed{}``, else
    behind the last "answer is", else it is the last number of all. Where that place holds an
    equation, its right-hand side counts.

    Canonical: no separators, units, currency or percent signs, no needless zeros; a fraction stays
    one, in lowest terms (``1,200.00`` is ``1200``, ``$5.50`` is ``5.5``, ``-0`` is ``0``,
    ``6/8`` is ``3/4``). Times, dates and version numbers are no numbers, and neither is the 2 of
    ``m^2``.
    """
    text = plain(text)
    for how, place in places(text):
        number = _stated(place, strict=how == MARK)
        if number is not None:
            return Reading(number, how)
    numbers = _numbers(text)
    return Reading(numbers[-1][1], LAST) if numbers else Reading()


def read_number(text: str) -> str | None:
    """The answer of :func:`read` alone."""
    return read(text).answer


def conclusion(solution: str) -> str | None:
    """The number that a free-text solution concludes with; None where that is not certain.

    It is the one that is marked (``####``, ``\\boxed{}``, "the answer is"), else the only one in the
    last sentence, or in that sentence's part behind its last equals sign.
    """
    found = read(solution)
    if found.answer is None or found.how != LAST:
        return found.answer
    last = [sentence for sentence in _SENTENCES.split(solution) if sentence.strip()][-1]
    numbers = {number for _, number in _numbers(plain(last.rpartition("=")[2]))}
    return numbers.pop() if len(numbers) == 1 else None


def only_number(text: str) -> str | None:
    """The number that a text is and nothing else, but for its currency or unit; else None."""
    text = plain(text)
    runs = [run for run in _RUN.finditer(text) if not _EXPONENT.search(text, 0, run.start())]
    if len(runs) != 1:
        return None
    [run] = runs
    numbers = _canonical(run[0], _negative(text[: run.start()]))
    bare = _BEFORE.fullmatch(text[: run.start()]) and _UNIT.fullmatch(text[run.end() :])
    return numbers[0] if bare and len(numbers) == 1 else None


def plain(text: str) -> str:
    """The text with LaTeX fractions and thousands, odd minus signs and spaces made plain."""
    text = _LATEX_FRACTION.sub(r"\1/\2", text.translate(_PLAIN))
    return _LATEX_COMMA.sub("", text)


def places(text: str) -> Iterator[tuple[str, str]]:
    """Where a text may state its answer, best first: what kind of place, and what stands there."""
    for mark in reversed(list(_MARK.finditer(text))):
        yield MARK, text[mark.end() :]
    for mark in reversed(list(_BOXED.finditer(text))):
        yield BOXED, _braced(text[mark.end() :])
    for mark in reversed(list(_ANSWER_IS.finditer(text))):
        yield ANSWER_IS, text[mark.end() :]


def _stated(text: str, *, strict: bool = False) -> str | None:
    """The number that the first sentence states; ``strict``: with no other words before it."""
    text = text.lstrip()
    end = _SENTENCE_END.search(text)
    sentence = text[: end.start()] if end else text
    sentence = sentence.rpartition("=")[2]
    numbers = _numbers(sentence)
    if not numbers or (strict and not _LEAD.fullmatch(sentence[: numbers[0][0]])):
        return None
    return numbers[0][1]


def _braced(text: str) -> str:
    """Up to the brace that closes one opened before the text."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    return text


def _numbers(text: str) -> list[tuple[int, str]]:
    """Where each number starts, and the number in canonical form."""
    return [
        (run.start(), number)
        for run in _RUN.finditer(text)
        if not _EXPONENT.search(text, 0, run.start())
        for number in _canonical(run[0], _negative(text[: run.start()]))
    ]


def _negative(before: str) -> bool:
    """Whether the text before some digits ends in a minus sign that is not a subtraction."""
    before = _CURRENCY.sub("", before)
    if not before.endswith("-"):
        return False
    before = _CURRENCY.sub("", before[:-1])
    attached = bool(before) and (before[-1].isalnum() or before[-1] in ")]}%-_.")
    return not attached and not (before.rstrip()[-1:].isdigit() and before[-1:] == " ")


def _canonical(run: str, negative: bool) -> list[str]:
    """The numbers in a run of digits and separators; the sign is the first one's."""
    if _THOUSANDS.fullmatch(run):
        run = run.replace(",", "")
    if _DECIMAL.fullmatch(run):
        whole, _, part = run.partition(".")
        part = part.rstrip("0")
        value = (whole.lstrip("0") or "0") + ("." + part if part else "")
    elif (match := _FRACTION.fullmatch(run)) and int(match[3]):
        below = int(match[3])
        above = int(match[1] or 0) * below + int(match[2])
        shared = gcd(above, below)
        value = str(above // shared) + (f"/{below // shared}" if below != shared else "")
    elif "," in run:
        first, *rest = run.split(",")
        return [*_canonical(first, negative), *(n for r in rest for n in _canonical(r, False))]
    else:
        return []
    return ["-" + value if negative and value != "0" else value]
