"""Accuracy, benefit and retention over questions and seeds. Pure functions of right and wrong.

Intervals are 95%, from a Bayesian bootstrap of the crossed design: a resample draws one weight a
question and one a seed, and each answer counts with their product (Owen & Eckles 2012, Ann. Appl.
Stat. 6:895, for data that are crossed in two ways; they find it mildly conservative). With one
seed this is the bootstrap over questions of survival.py, made-up half questions included. Two seeds
tell little about further ones, and the interval then is about as wide as they lie apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeft.survival import SEED, TAILS, Interval, Result

RESAMPLES = 4_000
_AT_ONCE = 500
_EACH_WAY = 0.5
Draws = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """What one method did at one place and on the host, an entry for each question and seed.

    Attributes:
        question, seed: numbers of the two.
        base, tuned: right (1) or wrong (0) at the place.
        host_base, host_tuned: the same on the host.
    """

    question: NDArray[np.int64]
    seed: NDArray[np.int64]
    base: NDArray[np.int64]
    tuned: NDArray[np.int64]
    host_base: NDArray[np.int64]
    host_tuned: NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95% interval, and the resamples (not part of any report)."""

    value: float
    ci: Interval
    draws: Draws


@dataclass(frozen=True)
class Estimates:
    """Of one method at one place. ``retention``: None where the host has no sure benefit."""

    n: int
    accuracy: Estimate
    benefit: Estimate
    host_benefit: Estimate
    retention: Estimate | None


Scores = Sequence[Result]


def answers(seeds: Sequence[Mapping[str, Scores]]) -> Answers | None:
    """Line up the questions; those not asked everywhere in a seed are left out.

    Args:
        seeds: for each seed the results ``base``, ``tuned``, ``host_base`` and ``host_tuned``.

    Returns:
        None where nothing is left.
    """
    names = ("base", "tuned", "host_base", "host_tuned")
    numbers: dict[str, int] = {}
    rows: list[tuple[int, ...]] = []
    for seed, results in enumerate(seeds):
        right = {name: {r.id: int(r.correct) for r in results[name]} for name in names}
        for i in right["tuned"]:
            if all(i in right[name] for name in names):
                number = numbers.setdefault(i, len(numbers))
                rows.append((number, seed, *(right[name][i] for name in names)))
    if not rows:
        return None
    return Answers(*np.array(rows, np.int64).T)


def estimates(given: Answers) -> Estimates:
    """Accuracy, benefit and retention with their intervals."""
    change, host = given.tuned - given.base, given.host_tuned - given.host_base
    # What a made-up question adds, and how much of a question it is: to accuracy and benefits half
    # a question each way, to retention as survival.retention_interval has it.
    kinds = ((1, 0), (0, -1), (0, 1), (-1, 0))
    made_up = np.full(2, _EACH_WAY), np.full(len(kinds), _EACH_WAY / 2)
    random = np.random.default_rng(SEED)
    parts = []
    for _ in range(RESAMPLES // _AT_ONCE):
        questions = random.standard_exponential((_AT_ONCE, int(given.question.max()) + 1))
        seeds = random.standard_exponential((_AT_ONCE, int(given.seed.max()) + 1))
        weights = questions[:, given.question] * seeds[:, given.seed]
        every = seeds.sum(1, keepdims=True)
        two = random.standard_gamma(made_up[0], (_AT_ONCE, 2)) * every
        four = random.standard_gamma(made_up[1], (_AT_ONCE, len(kinds))) * every
        size = weights.sum(1)
        accuracy = (weights @ given.tuned + two[:, 0]) / (size + two.sum(1))
        both = (two[:, 0] - two[:, 1]) / (size + two.sum(1))
        shrink = size / (size + two.sum(1))
        benefit = (weights @ change) / size * shrink + both
        on_host = (weights @ host) / size * shrink + both
        host_sum = weights @ host + four @ np.array([h for h, _ in kinds])
        here_sum = weights @ change + four @ np.array([t for _, t in kinds])
        parts.append(np.stack([accuracy, benefit, on_host, host_sum, here_sum]))
    accuracy, benefit, on_host, host_sum, here_sum = np.concatenate(parts, axis=1)
    host_benefit = _estimate(float(host.mean()), on_host)
    retention = None
    if host_benefit.ci[0] > 0:
        kept = host_sum > 0
        ratio = np.where(kept, here_sum, np.nan) / np.where(kept, host_sum, np.nan)
        retention = _estimate(float(change.sum() / host.sum()), ratio)
    return Estimates(
        n=len(set(given.question.tolist())),
        accuracy=_estimate(float(given.tuned.mean()), accuracy),
        benefit=_estimate(float(change.mean()), benefit),
        host_benefit=host_benefit,
        retention=retention,
    )


def pooled(parts: Sequence[Estimate]) -> Estimate:
    """The mean of independent figures (other models, other tasks), each counting the same."""
    rng = np.random.default_rng(SEED)
    shuffled = [rng.permutation(part.draws) for part in parts]  # drawn with one seed, so related
    return _estimate(float(np.mean([p.value for p in parts])), np.nanmean(shuffled, axis=0))


def difference(first: Answers, second: Answers) -> Estimate:
    """Accuracy of the first minus the second's, on the same questions; seeds are others.

    Raises:
        ValueError: they were asked different questions.
    """
    ours, theirs = (_by_question(a) for a in (first, second))
    if ours.shape[0] != theirs.shape[0]:
        raise ValueError("other questions")
    random = np.random.default_rng(SEED)
    count = ours.shape[0]
    questions = random.standard_exponential((RESAMPLES, count))
    made_up = random.standard_gamma(_EACH_WAY, (RESAMPLES, 2))
    sides = []
    for table in (ours, theirs):
        seeds = random.dirichlet(np.ones(table.shape[1]), RESAMPLES)
        sides.append(((questions @ table) * seeds).sum(1))
    size = questions.sum(1) + made_up.sum(1)
    draws = (sides[0] - sides[1] + made_up[:, 0] - made_up[:, 1]) / size
    return _estimate(float(ours.mean() - theirs.mean()), draws)


def _by_question(given: Answers) -> NDArray[np.float64]:
    """Right or wrong (questions, seeds)."""
    table = np.zeros((int(given.question.max()) + 1, int(given.seed.max()) + 1))
    table[given.question, given.seed] = given.tuned
    return table


def _estimate(value: float, draws: Draws) -> Estimate:
    low, high = np.nanquantile(draws, TAILS)
    return Estimate(value, (float(low), float(high)), draws)
