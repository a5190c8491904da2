"""Where the benefit went: what each step on the way to the device did to the same questions.

Pure functions of per-question results, as :mod:`edgeft.survival`. The way is a chain of places: the
adapter on the host, merged, exported in full precision, quantized, on the device. A step is from one
place to the next, over the questions that were asked at all of them. Intervals are 95%, from a
paired Bayesian bootstrap over questions (Rubin 1981, Ann. Stat. 9:130); accuracy's and the benefit's
hold half a made-up question each way, for the reason that survival.py gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgeft.survival import RESAMPLES, SEED, TAILS, Interval, Result, benefit_interval, mcnemar

MERGE, EXPORT, QUANTIZE, REPAIR, DEVICE = "merge", "export", "quantize", "repair", "device"
# A loss of likelihood that is sure but smaller than this is rounding, nothing to look into.
WORTH_NATS = 0.01
_EACH_WAY = 0.5


@dataclass(frozen=True)
class Place:
    """Where both weights were scored.

    Attributes:
        kind: how the tuned weights came here from the place before: one of the words above.
        base: None where base is what it was at the place before (a merge changes tuned only).
    """

    name: str
    kind: str
    base: Sequence[Result] | None
    tuned: Sequence[Result]


@dataclass(frozen=True)
class Step:
    """From one place to the next, tuned on the same ``n`` questions.

    Attributes:
        kind: what was done: ``merge``, ``export``, ``quantize``, ``repair`` or ``device``.
        accuracy: before and after.
        change: in accuracy, after minus before.
        fixed: questions wrong before and right after; ``broken``: the other way.
        mcnemar_p: exact two-sided McNemar test of the two.
        benefit_change: change of tuned minus base.
        nats: change of the negative log-likelihood a gold token: positive is a loss. None where a
            likelihood is not finite.
        kl: mean KL(host's merged weights || after) a gold token, nats, over ``kl_questions``; of a
            merge, whose ``after`` these weights are, || before. None where it was not taken or is
            not finite.
    """

    kind: str
    before: str
    after: str
    n: int
    accuracy: tuple[float, float]
    change: float
    change_ci: Interval
    fixed: int
    broken: int
    mcnemar_p: float
    benefit_change: float
    benefit_change_ci: Interval
    nats: float | None
    nats_ci: Interval | None
    kl: float | None
    kl_ci: Interval | None
    kl_questions: int

    @property
    def costs(self) -> bool:
        """Whether something was lost for sure, more than rounding loses."""
        unlikelier = self.nats_ci is not None and self.nats_ci[0] > WORTH_NATS
        return self.change_ci[1] < 0 or unlikelier


def steps(places: Sequence[Place]) -> list[Step]:
    """The steps between the places, over the questions that all of them have.

    The last place's questions are few where a device was asked few.
    """
    scored = [r for place in places for r in (place.base, place.tuned) if r is not None]
    shared = set.intersection(*({r.id for r in results} for results in scored))
    ids = [r.id for r in places[0].tuned if r.id in shared]
    if not ids:
        return []
    return [_step(before, after, ids, _base(places, i)) for i, (before, after) in _pairs(places)]


def _pairs(places: Sequence[Place]) -> list[tuple[int, tuple[Place, Place]]]:
    return list(enumerate(pairwise(places)))


def _base(places: Sequence[Place], at: int) -> tuple[Sequence[Result] | None, ...]:
    """Base before and after step ``at``, each the last that was scored."""
    found: list[Sequence[Result] | None] = []
    for end in (at + 1, at + 2):
        known = [place.base for place in places[:end] if place.base is not None]
        found.append(known[-1] if known else None)
    return tuple(found)


def _step(
    before: Place, after: Place, ids: Sequence[str], base: tuple[Sequence[Result] | None, ...]
) -> Step:
    old, new = _by_id(before.tuned, ids), _by_id(after.tuned, ids)
    change = _right(new) - _right(old)
    fixed, broken = int((change > 0).sum()), int((change < 0).sum())
    base_change = np.zeros_like(change)
    if base[0] is not None and base[1] is not None:
        base_change = _right(_by_id(base[1], ids)) - _right(_by_id(base[0], ids))
    tokens = np.array([r.gold_tokens for r in new], float)
    nats = np.array([a.gold_logprob - b.gold_logprob for a, b in zip(old, new, strict=True)])
    finite = bool(np.isfinite(nats).all() and tokens.sum() > 0)
    taken = [r for r in (old if after.kind == MERGE else new) if r.kl is not None]
    kl = np.array([r.kl for r in taken], float)
    kl_tokens = np.array([r.gold_tokens for r in taken], float)
    compared = bool(taken and np.isfinite(kl).all() and kl_tokens.sum() > 0)
    return Step(
        kind=after.kind,
        before=before.name,
        after=after.name,
        n=len(ids),
        accuracy=(float(_right(old).mean()), float(_right(new).mean())),
        change=float(change.mean()),
        change_ci=benefit_interval(fixed, broken, len(ids)),
        fixed=fixed,
        broken=broken,
        mcnemar_p=mcnemar(fixed, broken),
        benefit_change=float((change - base_change).mean()),
        benefit_change_ci=change_interval(change - base_change),
        nats=float(nats.sum() / tokens.sum()) if finite else None,
        nats_ci=ratio_interval(nats, tokens) if finite else None,
        kl=float((kl * kl_tokens).sum() / kl_tokens.sum()) if compared else None,
        kl_ci=ratio_interval(kl * kl_tokens, kl_tokens) if compared else None,
        kl_questions=len(kl) if compared else 0,
    )


def change_interval(changes: NDArray[np.int64]) -> Interval:
    """The mean's 95% interval, for changes of -2 to 2 a question, (questions,)."""
    kinds = np.arange(-2, 3)
    counts = np.array([(changes == kind).sum() for kind in kinds], float)
    counts[kinds == 1] += _EACH_WAY
    counts[kinds == -1] += _EACH_WAY
    weights = np.random.default_rng(SEED).standard_gamma(counts, size=(RESAMPLES, len(kinds)))
    return _ends(weights @ kinds / weights.sum(axis=1))


def ratio_interval(sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> Interval:
    """The 95% interval of sum(sums) / sum(sizes), both a question's, (questions,)."""
    weights = np.random.default_rng(SEED).standard_exponential((RESAMPLES, len(sums)))
    return _ends((weights @ sums) / (weights @ sizes))


def _ends(draws: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(draws, TAILS)
    return float(low), float(high)


def _by_id(results: Sequence[Result], ids: Sequence[str]) -> list[Result]:
    known = {r.id: r for r in results}
    return [known[i] for i in ids]


def _right(results: Sequence[Result]) -> NDArray[np.int64]:
    return np.array([int(r.correct) for r in results])
