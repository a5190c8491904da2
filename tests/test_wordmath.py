"""The generated word problems."""

import re
from collections import Counter
from dataclasses import astuple
from hashlib import sha256
from itertools import combinations

import pytest

from edgeft.errors import UserError
from edgeft.tasks import Question, Splits, TaskSettings, normalized
from edgeft.tasks.answers import read_number
from edgeft.tasks.wordmath import HIGHEST, UNSEEN_GROUP, draw, make
from edgeft.tasks.wordmath_templates import INSTRUCTION, TRAIN, UNSEEN, Template

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def splits() -> Splits:
    return make(TaskSettings(train=4000, heldout=300, evaluation=1000, unseen=500), seed=0)


def everything(splits: Splits) -> list[Question]:
    return [*splits.train, *splits.heldout, *splits.evaluation]


def pattern(template: Template) -> re.Pattern[str]:
    """What the questions of a template look like."""
    parts = re.split(r"\{\w+\}", template.story)
    story = r"\w[\w ]*".join(re.escape(part) for part in parts)
    return re.compile(re.escape(INSTRUCTION + "\n") + story)


def test_sizes_groups_and_ids(splits: Splits) -> None:
    assert (len(splits.train), len(splits.heldout), len(splits.evaluation)) == (4000, 300, 1500)
    assert Counter(q.group for q in splits.evaluation) == {"": 1000, UNSEEN_GROUP: 500}
    assert {q.group for q in splits.train + splits.heldout} == {""}
    assert splits.evaluation[17].id == "wordmath-eval-0-17"
    assert splits.evaluation[1003].id == "wordmath-unseen-0-3"
    assert splits.train[5].id == "wordmath-train-0-5"
    assert splits.heldout[5].id == "wordmath-heldout-0-5"
    assert len({q.id for q in everything(splits)}) == 5800


def test_same_seed_same_questions() -> None:
    sizes = TaskSettings(train=50, heldout=10, evaluation=20, unseen=10)
    assert make(sizes, 3) == make(sizes, 3)
    assert make(sizes, 3) != make(sizes, 4)


def test_golden_first_questions() -> None:
    """Changing any of these makes earlier runs' scores incomparable: do it knowingly."""
    splits = make(TaskSettings(train=40, heldout=40, evaluation=40, unseen=40), seed=0)
    text = repr([astuple(question)[:5] for question in everything(splits)])
    assert sha256(text.encode()).hexdigest()[:16] == "04cfd8dfc52eaa77"


def test_other_sizes_leave_the_evaluation_alone(splits: Splits) -> None:
    small = make(TaskSettings(train=7, heldout=0, evaluation=100, unseen=30), seed=0)
    assert small.evaluation[:100] == splits.evaluation[:100]
    assert small.evaluation[100:] == splits.evaluation[1000:1030]
    assert small.train == splits.train[:7]
    assert small.heldout == []


def test_no_question_twice(splits: Splits) -> None:
    assert len({normalized(q.question) for q in everything(splits)}) == 5800


def test_evaluation_disjoint_across_seeds(splits: Splits) -> None:
    trained = {normalized(q.question) for q in splits.train}
    held = {normalized(q.question) for q in splits.heldout}
    for seed in range(1, 6):
        other = make(TaskSettings(train=0, heldout=0, evaluation=1000, unseen=300), seed)
        evaluated = {normalized(q.question) for q in other.evaluation}
        assert not evaluated & trained
        assert not evaluated & held


def test_other_names_do_not_leak(splits: Splits) -> None:
    """No evaluation question is a training question under other names and things."""

    def bare(question: Question) -> tuple[Template, tuple[str, ...]]:
        (template,) = (t for t in TRAIN if pattern(t).fullmatch(question.question))
        return template, tuple(re.findall(r"\d+", question.question))

    trained = {bare(q) for q in splits.train}
    assert not trained & {bare(q) for q in splits.evaluation[:1000]}


def test_unseen_questions_use_unseen_templates_only(splits: Splits) -> None:
    seen = [pattern(t) for t in TRAIN]
    unseen = [pattern(t) for t in UNSEEN]
    for question in everything(splits):
        hidden = question.group == UNSEEN_GROUP
        assert any(p.fullmatch(question.question) for p in unseen) == hidden
        assert any(p.fullmatch(question.question) for p in seen) == (not hidden)


def test_templates_are_different() -> None:
    assert len(TRAIN) >= 30
    assert len(UNSEEN) >= 8
    assert len({t.story for t in TRAIN + UNSEEN}) == len(TRAIN + UNSEEN)
    for one, other in combinations((pattern(t).pattern for t in TRAIN + UNSEEN), 2):
        assert one != other


def test_every_template_is_used_alike(splits: Splits) -> None:
    used = Counter(next(t for t in TRAIN if pattern(t).fullmatch(q.question)) for q in splits.train)
    assert len(used) == len(TRAIN)
    assert max(used.values()) - min(used.values()) <= 1


def test_arithmetic_and_reading(splits: Splits) -> None:
    steps: Counter[int] = Counter()
    for question in everything(splits):
        work, _, answer = question.solution.rpartition("\n#### ")
        assert answer == question.answer == read_number(question.solution)
        equations = EQUATION.findall(work)
        assert work.count("=") == len(equations)
        steps[len(equations)] += 1
        known = re.findall(r"\d+", question.question)
        for left, sign, right, result in equations:
            a, b = int(left), int(right)
            exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
            assert exact == int(result), question
            assert left in known and right in known, question
            known.append(result)
        assert equations[-1][3] == answer
        assert all(0 < int(e[3]) <= HIGHEST for e in equations)
        # Every number of the story is used.
        operands = {n for e in equations for n in (e[0], e[2])}
        assert set(re.findall(r"\d+", question.question)) <= operands, question
    assert set(steps) == {1, 2}


def test_stories_read_well(splits: Splits) -> None:
    for question in everything(splits):
        assert question.question.startswith(INSTRUCTION + "\n")
        assert not re.search(r"[{}\[\]]|  |None", question.question + question.solution)
        assert len(question.question.split()) <= 40


def test_too_many() -> None:
    with pytest.raises(UserError, match="at most 1,000,000"):
        make(TaskSettings(train=10**9, heldout=0, evaluation=0), 0)
    with pytest.raises(ValueError, match="train must not be negative"):
        TaskSettings(train=-1)
    few = Template("What is {a} and {b}?", "In all: [a + b].", ((1, 5), (1, 5)))
    assert len(draw([few], "unseen", 25, 0)) == 25
    with pytest.raises(UserError, match=r"only about 25 .*'unseen', 26"):
        draw([few], "unseen", 26, 0)


def test_one_template_running_out_leaves_the_others() -> None:
    few = Template("What is {a} and {b}?", "In all: [a + b].", ((1, 2), (1, 2)))
    many = Template("How much is {a} and {b}?", "In all: [a + b].", ((1, 90), (1, 90)))
    questions = draw([few, many], "unseen", 100, 0)
    assert Counter(q.question.splitlines()[1].split()[0] for q in questions) == {
        "What": 4,
        "How": 96,
    }
