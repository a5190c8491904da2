"""Reading the answer out of a completion."""

import json
import re
from pathlib import Path

import pytest

from edgeft.tasks.answers import read_number

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # Behind the mark.
        ("Tom has 12 + 7 = 19.\n#### 19", "19"),
        ("####14", "14"),
        ("#### 14 apples", "14"),
        ("#### $14.00", "14"),
        ("#### $ 1,200.50", "1200.5"),
        ("#### **14**", "14"),
        ("#### The answer is 14.", "14"),
        ("#### 14.", "14"),
        ("#### 14, because 5 is 5", "14"),
        ("####\n14", "14"),
        ("#### 12 + 2 = 14", "14"),
        ("#### x = 14", "14"),
        ("#### 3 or 4", "3"),
        # Rambling on after the answer.
        ("First: 9 + 5 = 14.\n#### 14\n\nQuestion: Tom has 7 hats and 8 caps. How many?", "14"),
        ("#### 14\nThe answer is: 15", "14"),
        ("#### 14. Then 3 more", "14"),
        # The last mark that has a number, and headings are no answers.
        ("#### 14\nNo, wait.\n#### 15", "15"),
        ("#### 14\n####", "14"),
        ("#### 0\n#### answer\n#####\n#####", "0"),
        ("#### Step 1\n4 + 3 = 7\n#### Step 2\nThe answer is 7", "7"),
        # Boxed.
        (r"so \boxed{14} and 15 others", "14"),
        (r"\boxed{\frac{1}{2}}", "1/2"),
        (r"\boxed{-\dfrac{6}{8}}", "-3/4"),
        (r"\boxed{\text{14 apples}} 3", "14"),
        (r"\boxed{x = 14}", "14"),
        (r"$\boxed{12\,000}$", "12000"),
        (r"\boxed{1{,}200}", "1200"),
        (r"\boxed{3} then \boxed{4}", "4"),
        (r"\boxed{14", "14"),
        # In words.
        ("The answer is 14. I had 20 before.", "14"),
        ("the final Answer is: $5.50!", "5.5"),
        ("Answer: 14 apples in 2 boxes", "14"),
        ("The answer is 3 * 4 = 12. So there are 13", "12"),
        ("The answer is no. 14", "14"),
        # The last number.
        ("He has 3 + 4 apples, 7 in all", "7"),
        ("5-3=2", "2"),
        ("5-3", "3"),
        ("between 5 -3 and 10-12", "12"),
        ("1.", "1"),
        ("3,", "3"),
        ("1,2,3", "3"),
        ("25%", "25"),
        ("25\\%", "25"),
        ("14kg", "14"),
        ("60 km/h", "60"),
        ("- 3 apples", "3"),
        # Signs, zeros, fractions.
        ("#### -5", "-5"),
        ("#### \u22125", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("x = -1,000", "-1000"),
        ("(-7)", "-7"),
        ("#### -0", "0"),
        ("#### -0.00", "0"),
        ("#### 0", "0"),
        ("#### 007", "7"),
        ("#### 0.50", "0.5"),
        ("#### .5", "0.5"),
        ("#### 100", "100"),
        ("#### 1,200.00", "1200"),
        ("#### 1,234,567", "1234567"),
        ("#### 3/4", "3/4"),
        ("#### 6/8 of it", "3/4"),
        ("#### 12/4", "3"),
        ("#### 1 1/2", "3/2"),
        ("#### -1 1/2", "-3/2"),
        ("#### " + "9" * 5000, "9" * 5000),
        # No number.
        ("", None),
        ("####", None),
        ("I cannot tell.", None),
        ("12:30", None),
        ("#### 12:30", None),
        ("11/24/2026", None),
        ("3/0", None),
        ("v1.2.3", None),
        ("\u0663", None),  # a digit of another script
    ],
)
def test_reads(text: str, number: str | None) -> None:
    assert read_number(text) == number


def test_reading_is_stable() -> None:
    """What was read reads back as itself."""
    for text in ("#### -0.50", "#### 1,200", "#### 6/8", "#### -1 1/2", "7"):
        number = read_number(text)
        assert number is not None
        assert read_number(number) == number
        assert read_number(f"#### {number}") == number


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not here")
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gsm8k_solution(split: str) -> None:
    lines = (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 1000
    for line in lines:
        solution = json.loads(line)["answer"]
        gold = solution.rpartition("####")[2].strip().replace(",", "")
        gold = re.sub(r"\.0+$", "", gold)
        assert read_number(solution) == gold, solution
