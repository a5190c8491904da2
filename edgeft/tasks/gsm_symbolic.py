"""``gsm-symbolic``: GSM8K's templates with new names and numbers (arXiv 2410.05229), made offline.

reasoning-gym makes question ``i`` of a seed from ``seed + i``; the splits' seeds lie so far apart
that they never meet, and a question that comes twice all the same is taken once.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgeft.errors import UserError
from edgeft.tasks import Question, Splits, Task, TaskSettings, normalized
from edgeft.tasks.answers import read

MOST = 1_000_000  # questions of one split
_SPLITS = ("evaluation", "heldout", "train")
_SUFFIX = " Give the result as your final answer. Do not include units."


def make(settings: TaskSettings, seed: int) -> Splits:
    """The questions of each split; the first ones stay the same when more are asked for.

    Raises:
        UserError: reasoning-gym is not installed, or too many are asked for.
    """
    seen: set[str] = set()
    made: dict[str, list[Question]] = {}
    for k, split in enumerate(_SPLITS):
        count = getattr(settings, split) or 0
        if count > MOST:
            raise UserError(f"gsm-symbolic makes at most {MOST:,} questions of a split")
        made[split] = []
        for question in _questions(split, (len(_SPLITS) * seed + k) * 2 * MOST, count):
            key = normalized(question.question)
            if key not in seen and len(made[split]) < count:
                seen.add(key)
                made[split].append(question)
    return Splits(made["train"], made["heldout"], made["evaluation"])


def _questions(split: str, seed: int, count: int) -> Iterator[Question]:
    """A few more than ``count``, for those that come twice."""
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise UserError("gsm-symbolic needs reasoning-gym: pip install 'edgeft[symbolic]'") from (
            error
        )
    for i, entry in enumerate(create_dataset("gsm_symbolic", seed=seed, size=count + count // 4)):
        solution = entry["metadata"]["answer_cot"]
        answer = read(f"#### {entry['answer']}").answer
        if answer is not None and read(solution).answer == answer:
            question = entry["question"].removesuffix(_SUFFIX)
            yield Question(f"gsm-symbolic-{split}-{seed}-{i}", question, solution, answer)


TASK = Task(
    "gsm-symbolic",
    "GSM8K's templates with new numbers, generated (offline; pip install 'edgeft[symbolic]')",
    make,
    defaults=TaskSettings(train=2000, heldout=64, evaluation=500),
)
