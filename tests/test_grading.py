"""How an answer was read, and whether it is the gold one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgeft.errors import UserError
from edgeft.tasks.answers import only_number, read
from edgeft.tasks.grading import (
    check_installed,
    gold_answer,
    is_expression,
    is_number,
    reader,
    same,
)


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("12 + 7 = 19\n#### 19", "####"),
        (r"#### Step 1 \boxed{19} and 20", "boxed"),
        ("The answer is 19, since 20 - 1 is that", "answer is"),
        ("Answer: 19\nNot 20.", "answer is"),
        ("There are 19 of 20", "last"),
        ("None.", None),
        ("#### none\nThe answer is unknown", None),
    ],
)
def test_it_says_where_the_answer_was(text: str, how: str | None) -> None:
    assert read(text).how == how


@pytest.mark.parametrize(
    ("gold", "canonical"),
    [
        ("18", "18"),
        ("1,200", "1200"),
        ("$5.50", "5.5"),
        ("-$5", "-5"),
        ("Rs. 50", "50"),
        ("50%", "50"),
        ("5 km/h", "5"),
        ("1 1/2", "3/2"),
        (r"\frac{3}{4}", "3/4"),
        ("3.", "3"),
        ("12:30", None),
        ("3 or 4", None),
        ("x = 3", None),
        ("(3, 5)", None),
        ("2x", None),
        ("2kg", "2"),
        ("2 boxes", "2"),
        ("x^2", None),
        ("five", None),
    ],
)
def test_gold_answers_that_are_numbers(gold: str, canonical: str | None) -> None:
    assert only_number(gold) == canonical
    assert gold_answer(f" {gold}\n") == (canonical or gold)
    assert is_number(gold_answer(gold)) == (canonical is not None)


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("3/4", "0.75", True),
        ("0.75", "3/4", True),
        ("3/4", "0.76", False),
        ("18", "18", True),
        ("18", "18 1", False),
        ("18", "", False),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 5000, "8" * 5000, False),
        ("x^2 + 1", "1 + x^2", True),
        ("x^2 + 1", "x^2 - 1", False),
        ("(3, 5)", "(3,5)", True),
        ("(3, 5)", "(5, 3)", False),
        (r"\frac{\sqrt{3}}{2}", r"$\frac{\sqrt 3}{2}$", True),
        (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}", False),
        (r"\sqrt{12}", r"2\sqrt{3}", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("x^2 + 1", r"\frac{{{", False),
        ("Tuesday", "tuesday.", True),
        ("Tuesday", "Monday", False),
        ("yes", "Yes", True),
    ],
)
def test_what_equals_the_gold_answer(gold: str, answer: str, equal: bool) -> None:
    assert same(answer, gold) is equal
    assert not same(None, gold)


@pytest.mark.parametrize(
    ("gold", "text", "correct"),
    [
        ("x^2 + 1", r"So it is \boxed{1 + x^2}, not $x$.", True),
        ("x^2 + 1", "Then $x^2 + 1$ is left", True),
        ("x^2 + 1", "The answer is $x^2 - 1$.", False),
        ("x^2 + 1", "First x = 2.\nSo what is left is 1 + x^2.", True),
        ("x^2 + 1", "Therefore y = x^2 + 1", True),
        ("x^2 + 1", "y = x^2 + 1, which is not x^2.", False),
        ("x = 3", "x = 3", True),
        ("(3, 5)", "The answer is (3,5).", True),
        (r"\sqrt{12}", "It follows.\n#### $2\\sqrt{3}$", True),
        ("yes", "I think so.\n#### Yes", True),
        ("yes", "The answer is no.", False),
        ("Tuesday", "It is late.\nTuesday.", True),
        ("Tuesday", "", False),
        ("x^2 + 1", "no idea", False),
    ],
)
def test_answers_that_are_no_numbers(gold: str, text: str, correct: bool) -> None:
    found = reader("wordmath")(text, gold)
    assert same(found.answer, gold) is correct
    assert (found.how is None) == (found.answer is None)


@pytest.mark.parametrize(
    ("pattern", "gold", "text", "answer"),
    [
        ("Result: (.+)", "7", "Result: 6\nResult: $7.00!", "7"),
        (r"\[(\w+)\]", "yes", "maybe [no] or [yes]", "yes"),
        (r"[A-D](?=\))", "B", "A) or B)", "B"),
        ("Result: (.+)", "7", "It is 7", None),
        ("Result: (.*)", "7", "Result: none", None),
        ("Result: (x)?", "yes", "Result: ", None),
        ("Result: (.+)", "x+1", "Result: 1 + x", "1 + x"),
    ],
)
def test_a_pattern(pattern: str, gold: str, text: str, answer: str | None) -> None:
    found = reader("wordmath", pattern)(text, gold)
    assert found.answer == answer
    assert found.how == (None if answer is None else "pattern")
    assert same(found.answer, gold) is (answer is not None)


def test_without_math_verify_numbers_still_work() -> None:
    """A device needs it only for answers that are no numbers, and says so before anything runs."""
    code = (
        "import sys; sys.modules['math_verify'] = None\n"
        "from edgeft.tasks.grading import check_installed, same\n"
        "check_installed(['18', '3/4', 'Tuesday']); assert same('0.75', '3/4')\n"
        "check_installed(['18', 'x^2'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("edgeft.errors.UserError: the answer 'x^2' is no plain number, and math-verify")
    )
    check_installed(["x^2"])
    assert is_expression("x^2") and not is_expression("18") and not is_expression("Tuesday")


def test_an_unknown_task() -> None:
    with pytest.raises(UserError, match="unknown task 'gsm9k'; did you mean 'gsm8k'"):
        reader("gsm9k")
