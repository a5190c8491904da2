"""Your own questions: what a row may hold, and what is wrong with one is named by its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Write

from edgeft.errors import UserError
from edgeft.tasks import Question, Splits, TaskSettings
from edgeft.tasks.build import build


def numbered(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "question": f"What is {i} and {i + 1}?",
            "answer": f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1}",
        }
        for i in range(first, first + count)
    ]


def jsonl(data: Path, **settings: Any) -> Splits:
    return build(TaskSettings("jsonl", data=str(data), **settings), 0)


def everything(splits: Splits) -> list[Question]:
    return [*splits.train, *splits.heldout, *splits.evaluation]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"bad\.jsonl is empty"),
        (["", " "], r"bad\.jsonl is empty"),
        ([numbered(1)[0], '{"question": '], r"bad\.jsonl, line 2 is no JSON"),
        ([[1, 2]], r"bad\.jsonl, line 1 is no JSON object such as"),
        (
            [numbered(1)[0], "", {"question": "a", "result": 1}],
            r"line 3: there is no field 'answer'; there are: question, result",
        ),
        ([{"question": "", "answer": 1}], r"line 1: the field 'question' is empty"),
        (
            [{"question": ["a"], "answer": 1}],
            r"line 1: the field 'question' is neither text nor a number",
        ),
        ([{"question": "a", "answer": None}], r"line 1: there is no field 'answer'"),
    ],
)
def test_malformed_lines_are_named(write: Write, lines: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        jsonl(write("bad.jsonl", *lines))
    assert "\n" not in str(raised.value)


def test_no_data_at_all(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the task jsonl needs its questions: --data"):
        build(TaskSettings("jsonl"), 0)
    with pytest.raises(
        UserError, match="no data at .*nowhere.jsonl: give a file, a folder or a hub"
    ):
        jsonl(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds neither train.jsonl and test.jsonl"):
        jsonl(tmp_path / "empty")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read .*x.jsonl"):
        jsonl(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="object.json is no list of questions"):
        jsonl(write("object.json", "{}"))


@pytest.mark.parametrize(
    ("row", "answer", "solution"),
    [
        ({"answer": "12"}, "12", "#### 12"),
        ({"answer": 1200}, "1200", "#### 1200"),
        ({"answer": "$1,200.50"}, "1200.5", "#### 1200.5"),
        ({"answer": "12 apples"}, "12", "#### 12"),
        ({"answer": "7 + 5 = 12\n#### 12"}, "12", "7 + 5 = 12\n#### 12"),
        ({"answer": "There are 7 + 5 = 12 of them."}, "12", "There are 7 + 5 = 12 of them."),
        ({"answer": "3", "solution": "One and two."}, "3", "One and two.\n#### 3"),
        ({"answer": "3", "solution": "So 1 + 2 = 3."}, "3", "So 1 + 2 = 3."),
        ({"answer": "x^2 + 1"}, "x^2 + 1", "#### x^2 + 1"),
        (
            {"answer": r"We square it twice and get \boxed{\frac{\sqrt{3}}{2}}."},
            r"\frac{\sqrt{3}}{2}",
            r"We square it twice and get \boxed{\frac{\sqrt{3}}{2}}.",
        ),
        ({"answer": "Tuesday"}, "Tuesday", "#### Tuesday"),
    ],
)
def test_the_gold_answer_of_a_row(
    write: Write, row: dict[str, Any], answer: str, solution: str
) -> None:
    splits = jsonl(write("one.jsonl", {"question": "Why?", **row}), evaluation=0)
    [question] = everything(splits)
    assert (question.answer, question.solution) == (answer, solution)


def test_a_row_whose_answer_is_not_certain_is_left_out_and_counted(write: Write) -> None:
    vague = {"question": "How many?", "answer": "Then 3 boxes would hold 15 apples."}
    splits = jsonl(write("v.jsonl", vague, *numbered(30)))
    assert splits.left_out == {"no certain final answer": 1} and len(everything(splits)) == 30
    with pytest.raises(UserError, match="no evaluation question left; left out: no certain .*: 1"):
        jsonl(write("w.jsonl", vague))


def test_fields_template_and_pattern(write: Write) -> None:
    data = write(
        "own.jsonl",
        *(
            {
                "problem": f"{i} apples?",
                "unit": "kg",
                "key": f"k{i}",
                "out": f"{i} so. Result: {i}!",
            }
            for i in range(40)
        ),
    )
    fields = {"question": "problem", "answer": "out", "id": "key"}
    template = "{{ question }} Answer in {{ unit }}."
    splits = jsonl(data, fields=fields, template=template, pattern="Result: (.+)")
    first = next(q for q in everything(splits) if q.id == "k7")
    assert (first.question, first.answer) == ("7 apples?", "7")
    assert first.prompt == "7 apples? Answer in kg." and first.solution == "7 so. Result: 7!"
    with pytest.raises(
        UserError, match=r"own.jsonl, line 1: there is no field 'question'; there are"
    ):
        jsonl(data)
    with pytest.raises(UserError, match=r"line 1: 'units' is undefined; it may use: problem, unit"):
        jsonl(data, fields=fields, template="{{ units }}")
    with pytest.raises(UserError, match="task.template is no Jinja"):
        jsonl(data, fields=fields, template="{{ units ")
    with pytest.raises(UserError, match="does not render.*unsafe"):
        jsonl(data, fields=fields, template="{{ question.__class__.__mro__ }}")
    with pytest.raises(UserError, match=r"own.jsonl, line 2: the id 'kg' comes a second time"):
        jsonl(data, fields={**fields, "id": "unit"}, pattern="Result: (.+)")
    with pytest.raises(ValueError, match="fields: 'questoin' is none of"):
        TaskSettings(fields={"questoin": "problem"})
    with pytest.raises(ValueError, match="pattern is no regular expression"):
        TaskSettings(pattern="(")
