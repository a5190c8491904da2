"""``wordmath``: made-up one- and two-step arithmetic word problems, small enough to teach in minutes.

Everything follows from the seed. Which split a story's numbers may be in is decided by a digest of
the story and the numbers, so whatever the seeds and sizes, no evaluation question is ever trained
on, not even under other names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from hashlib import sha256
from random import Random
from typing import TypeVar

from edgeft.errors import UserError
from edgeft.tasks import Question, Splits, Task, TaskSettings, normalized
from edgeft.tasks.wordmath_templates import INSTRUCTION, PEOPLE, TRAIN, UNSEEN, WORDS, Template

T = TypeVar("T")

UNSEEN_GROUP = "unseen templates"
MOST = 1_000_000  # questions in one go; asking for more is surely a slip
HIGHEST = 200  # result of any step

# Shares of all (story, numbers), in 256ths; the rest is for training.
EVALUATION_SHARE = 64
HELDOUT_SHARE = 32

_TRIES = 5_000  # without a new question: the template has run out
_STEP = re.compile(r"\[(\w) ([-+*/]) (\w)\]")
_FORMS = {"she": ("she", "her"), "he": ("he", "his")}


def make(settings: TaskSettings, seed: int) -> Splits:
    """The questions of each split; ``settings.unseen`` ones follow the others in ``evaluation``.

    Each split has a random stream of its own: its questions depend on the seed, and the first ones
    stay the same when more are asked for.

    Raises:
        UserError: there are not that many different questions.
    """
    sizes = (settings.train, settings.heldout, settings.evaluation, settings.unseen)
    train, heldout, evaluation, unseen = (size or 0 for size in sizes)
    if (total := train + heldout + evaluation + unseen) > MOST:
        raise UserError(f"wordmath makes at most {MOST:,} questions; {total:,} were asked for")
    return Splits(
        train=draw(TRAIN, "train", train, seed),
        heldout=draw(TRAIN, "heldout", heldout, seed),
        evaluation=[
            *draw(TRAIN, "eval", evaluation, seed),
            *draw(UNSEEN, "unseen", unseen, seed),
        ],
    )


def draw(templates: Sequence[Template], split: str, count: int, seed: int) -> list[Question]:
    """``count`` different questions, the templates taking turns in a shuffled order.

    Raises:
        UserError: the templates have fewer different questions for this split.
    """
    rng = Random(f"wordmath {split} {seed}")
    left = list(templates)
    turn: list[Template] = []
    questions: list[Question] = []
    seen: set[str] = set()
    while len(questions) < count:
        if not left:
            raise UserError(
                f"wordmath has only about {len(questions):,} different questions for '{split}', "
                f"{count:,} were asked for; ask for fewer"
            )
        turn = turn or _shuffled(left, rng)
        template = turn.pop()
        name = f"wordmath-{split}-{seed}-{len(questions)}"
        question = _new(template, split, name, seen, rng)
        if question is None:
            left.remove(template)
        else:
            seen.add(normalized(question.question))
            questions.append(question)
    return questions


def _new(
    template: Template, split: str, name: str, seen: Collection[str], rng: Random
) -> Question | None:
    """A question that is not among the seen ones, or None when the template has run out."""
    for _ in range(_TRIES):
        question = _question(template, split, name, rng)
        if question is not None and normalized(question.question) not in seen:
            return question
    return None


def _question(template: Template, split: str, name: str, rng: Random) -> Question | None:
    """A question, or None when the numbers drawn do not fit the story or the split."""
    spans = zip("abc", template.spans, strict=False)
    numbers = {key: _between(low, high, rng) for key, (low, high) in spans}
    if split != "unseen" and _split(template, numbers) != split:
        return None
    worked = _work(template.steps, numbers)
    if worked is None:
        return None
    steps, answer = worked
    story = template.story.format(**_words(rng), **numbers)
    return Question(
        id=name,
        question=f"{INSTRUCTION}\n{story}",
        solution=f"{steps}\n#### {answer}",
        answer=str(answer),
        group=UNSEEN_GROUP if split == "unseen" else "",
    )


def _split(template: Template, numbers: dict[str, int]) -> str:
    text = f"{template.story} {sorted(numbers.values())}"
    place = sha256(text.encode()).digest()[0]
    if place < EVALUATION_SHARE:
        return "eval"
    return "heldout" if place < EVALUATION_SHARE + HELDOUT_SHARE else "train"


def _work(steps: str, numbers: dict[str, int]) -> tuple[str, int] | None:
    """The steps with their numbers and results, and the answer; None when a result is unfit."""
    values = dict(numbers)
    results: list[int] = []

    def step(match: re.Match[str]) -> str:
        left, sign, right = values[match[1]], match[2], values[match[3]]
        result = {
            "+": left + right,
            "-": left - right,
            "*": left * right,
            "/": left // right if left % right == 0 else 0,
        }[sign]
        values["xy"[len(results)]] = result
        results.append(result)
        return f"{left} {sign} {right} = {result}"

    text = _STEP.sub(step, steps)
    # A quotient or remainder of 1 makes a silly story.
    fit = all(2 <= result <= HIGHEST for result in results)
    return (text, results[-1]) if fit else None


def _words(rng: Random) -> dict[str, str]:
    name, pronoun = _pick(PEOPLE, rng)
    other = _pick([person for person, _ in PEOPLE if person != name], rng)
    he, his = _FORMS[pronoun]
    return {
        "name": name,
        "other": other,
        "he": he,
        "He": he.capitalize(),
        "His": his.capitalize(),
        **{kind: _pick(choices, rng) for kind, choices in WORDS.items()},
    }


def _between(low: int, high: int, rng: Random) -> int:
    # random() is the one method whose sequence Python promises to keep for a seed.
    return low + int(rng.random() * (high - low + 1))


def _pick(choices: Sequence[T], rng: Random) -> T:
    return choices[_between(0, len(choices) - 1, rng)]


def _shuffled(items: Sequence[T], rng: Random) -> list[T]:
    rest = list(items)
    return [rest.pop(_between(0, len(rest) - 1, rng)) for _ in items]


TASK = Task(
    "wordmath",
    "made-up one- and two-step word problems (offline)",
    make,
    defaults=TaskSettings(train=960, heldout=48, evaluation=200, unseen=24),
    max_new_tokens=48,
)
