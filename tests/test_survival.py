"""Statistics against hand-computed cases, against scipy and against simulated runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeft.errors import UserError
from edgeft.survival import (
    Result,
    benefit,
    benefit_interval,
    mcnemar,
    retention_interval,
    score,
    survival,
    wilson,
)


def results(right: Sequence[int], answers: Sequence[str | None] | None = None) -> list[Result]:
    answers = answers or [str(r) for r in right]
    return [
        Result(f"q{i}", "", f"so {a}", a, bool(r), -3.0, 4)
        for i, (r, a) in enumerate(zip(right, answers, strict=True))
    ]


def runs(*parts: tuple[int, int]) -> list[int]:
    """``runs((1, 3), (0, 2))`` is ``[1, 1, 1, 0, 0]``."""
    return [value for value, times in parts for _ in range(times)]


def test_score_by_hand() -> None:
    s = score([Result("a", "", "", "1", True, -2.0, 4), Result("b", "", "", None, False, -7.0, 5)])
    assert (s.accuracy, s.n, s.nll) == (0.5, 2, 1.0)


def test_a_likelihood_that_is_not_finite_is_none() -> None:
    assert score([Result("a", "", "", "1", True, -math.inf, 4)]).nll is None
    assert score([Result("a", "", "", "1", True, 0.0, 0)]).nll is None


@given(st.integers(1, 2000), st.data())
def test_wilson_is_scipys(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    theirs = scipy.stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@given(st.integers(0, 800), st.integers(0, 800))
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int) -> None:
    n = gained + lost
    theirs = scipy.stats.binomtest(gained, n).pvalue if n else 1.0
    assert mcnemar(gained, lost) == pytest.approx(theirs, rel=1e-9, abs=1e-300)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(5, 0) == 2 / 32
    assert mcnemar(2, 1) == 1.0
    assert 0 < mcnemar(400, 2) < 1e-100


def test_benefit_by_hand() -> None:
    b = benefit(results([0, 0, 1, 1, 0]), results([1, 1, 1, 0, 0]))
    assert (b.base.accuracy, b.tuned.accuracy) == (0.4, 0.6)
    assert b.benefit == pytest.approx(0.2)
    assert b.mcnemar_p == 1.0
    assert b.verdict == "no-benefit"


def test_benefit_pairs_by_id_whatever_the_order() -> None:
    base, tuned = results([0, 0, 1, 0] * 20), results([1, 1, 0, 1] * 20)
    assert benefit(base, tuned[::-1]) == benefit(base, tuned)


def test_retention_by_hand() -> None:
    # Host: 10 -> 90 of 100. Target: 10 -> 50. Retention 40 / 80.
    s = survival(
        results(runs((1, 10), (0, 90))),
        results(runs((1, 90), (0, 10))),
        results(runs((1, 10), (0, 90))),
        results(runs((1, 50), (0, 50))),
    )
    assert s.here.benefit == pytest.approx(0.4)
    assert s.retention == 0.5
    assert s.retention_ci and s.retention_ci[0] < 0.5 < s.retention_ci[1]
    assert (s.gained, s.lost, s.agreement) == (0, 40, 0.6)
    assert s.verdict == "partial" and s.needed_questions is None


HOST = (runs((1, 40), (0, 160)), runs((1, 160), (0, 40)))


@pytest.mark.parametrize(
    ("base", "tuned", "verdict"),
    [
        (*HOST, "survives"),
        (runs((1, 40), (0, 160)), runs((1, 130), (0, 70)), "partial"),
        (runs((1, 40), (0, 160)), runs((0, 160), (1, 40)), "lost"),
        (runs((1, 40), (0, 160)), runs((1, 10), (0, 190)), "reversed"),
    ],
)
def test_verdicts_at_a_target(base: list[int], tuned: list[int], verdict: str) -> None:
    s = survival(*map(results, (*HOST, base, tuned)))
    assert s.verdict == verdict
    assert s.needed_questions is None


def test_keep_decides_between_survives_and_partial() -> None:
    four = [results(r) for r in (*HOST, HOST[0], runs((1, 130), (0, 70)))]
    low = survival(*four).retention_ci
    assert low is not None
    assert survival(*four, keep=low[0]).verdict == "survives"
    assert survival(*four, keep=low[0] + 1e-9).verdict == "partial"


def test_lost_needs_a_retention_that_is_clearly_under_a_half() -> None:
    # 12 questions cannot tell: the benefit's interval holds 0, retention's reaches over 0.5.
    host = [runs((1, 2), (0, 10)), runs((1, 11), (0, 1))]
    s = survival(*map(results, (*host, host[0], runs((1, 4), (0, 8)))))
    assert s.verdict == "inconclusive"
    assert s.needed_questions is not None


def test_needed_questions_do_decide() -> None:
    # The same shares on that many questions must not be inconclusive any more.
    def at(times: int) -> list[list[Result]]:
        host = [runs((1, 2 * times), (0, 10 * times)), runs((1, 11 * times), (0, times))]
        return [results(r) for r in (*host, host[0], runs((1, 4 * times), (0, 8 * times)))]

    needed = survival(*at(1)).needed_questions
    assert needed is not None and 12 < needed < 60
    assert survival(*at(math.ceil(1.2 * needed / 12))).verdict != "inconclusive"


@pytest.mark.parametrize(
    ("base", "tuned", "verdict"),
    [
        (runs((1, 100), (0, 100)), runs((1, 102), (0, 98)), "no-benefit"),
        (runs((1, 100), (0, 100)), runs((1, 40), (0, 160)), "negative-transfer"),
    ],
)
def test_without_a_benefit_on_the_host_its_verdict_is_the_targets(
    base: list[int], tuned: list[int], verdict: str
) -> None:
    s = survival(*map(results, (base, tuned, *HOST)))
    assert s.verdict == verdict
    assert s.retention is None and s.retention_ci is None and s.needed_questions is None


def test_agreement_is_on_the_answer_not_on_being_right() -> None:
    right = [0, 0, 0, 1]
    host = results(right, ["7", None, None, "2"])
    here = results(right, ["8", None, "3", "2"])
    assert survival(host, host, here, here).agreement == 0.5


def test_identical_answers_do_not_claim_certainty() -> None:
    s = survival(*map(results, (*HOST, *HOST)))
    assert s.retention == 1.0 and s.agreement == 1.0
    assert s.retention_ci is not None
    low, high = s.retention_ci
    assert 0.95 < low < 0.999 < 1.001 < high < 1.05


def test_different_questions_are_refused() -> None:
    with pytest.raises(UserError, match="differ in 1 questions"):
        benefit(results([0, 1]), results([0, 1, 1]))
    with pytest.raises(UserError, match="differ in 1 questions"):
        survival(results([0, 1]), results([0, 1]), results([0, 1]), results([1]))
    with pytest.raises(UserError, match="two results"):
        benefit(results([0, 1]), results([0, 1]) + results([1]))
    with pytest.raises(UserError, match="no questions"):
        benefit([], [])


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 4), min_size=1, max_size=60))
def test_any_four_sets_give_finite_ordered_figures(rows: list[tuple[int, ...]]) -> None:
    s = survival(*(results(column) for column in zip(*rows, strict=True)))
    intervals = [s.here.benefit_ci, s.here.base.ci, s.here.tuned.ci]
    if s.retention_ci is not None:
        intervals.append(s.retention_ci)
    assert all(math.isfinite(low) and low <= high < math.inf for low, high in intervals)
    assert 0 <= s.agreement <= 1
    assert (s.verdict == "inconclusive") == (s.needed_questions is not None)
    assert s.needed_questions is None or s.needed_questions >= len(rows)


def test_figures_do_not_change_from_call_to_call() -> None:
    assert benefit_interval(50, 9, 200) == benefit_interval(50, 9, 200)


Kinds = NDArray[np.float64]


def population(base: float, tuned: float, retention: float, noise: float, gain: float) -> Kinds:
    """Probability of each pair of changes by tuning, (host + 1) * 3 + target + 1, shape (9,).

    Args:
        base: the base model's accuracy, on the host and at the target.
        tuned: the tuned model's accuracy on the host.
        retention: the true one.
        noise: chance that the base model's right answer is wrong at the target; as many gains.
        gain: chance that the tuned model's wrong answer is right at the target.
    """
    keeps = 0.95  # a right answer stays right under tuning
    learns = (tuned - keeps * base) / (1 - base)
    loss = (tuned + (1 - tuned) * gain - base - retention * (tuned - base)) / tuned
    assert 0 <= loss <= 1
    kinds = np.zeros(9)
    for hb, ht, tb, tt in itertools.product((0, 1), repeat=4):
        p = base if hb else 1 - base
        for outcome, chance in (
            (ht, keeps if hb else learns),
            (tb, 1 - noise if hb else noise * base / (1 - base)),
            (tt, 1 - loss if ht else gain),
        ):
            p *= chance if outcome else 1 - chance
        kinds[3 * (ht - hb + 1) + tt - tb + 1] += p
    change = np.array([-1, 0, 1])
    there = kinds.reshape(3, 3).sum(0) @ change
    assert there / (tuned - base) == pytest.approx(retention)
    return kinds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "retention", "tuned", "noise", "gain"),
    [
        (200, 0.83, 0.78, 0.06, 0.05),
        (250, 0.83, 0.78, 0.06, 0.05),
        (60, 0.83, 0.78, 0.06, 0.05),
        (200, 0.5, 0.78, 0.06, 0.05),
        (200, 0.0, 0.78, 0.06, 0.05),
        (200, 0.97, 0.78, 0.01, 0.01),
        (200, 1.0, 0.78, 0.05, 0.02),
        (200, 1.0, 0.78, 0.04, 0.12),
        (200, 0.7, 0.33, 0.06, 0.05),
    ],
)
def test_the_intervals_cover_the_truth(
    n: int, retention: float, tuned: float, noise: float, gain: float
) -> None:
    base = 0.18
    kinds = population(base, tuned, retention, noise, gain)
    rng = np.random.default_rng(20261)
    pairs = np.array(list(itertools.product((-1, 0, 1), repeat=2)))
    simulated, of_retention, of_benefit = 1000, 0, 0
    for _ in range(simulated):
        drawn = pairs[rng.choice(9, size=n, p=kinds)]
        low, high = retention_interval(drawn[:, 0], drawn[:, 1])
        of_retention += low <= retention <= high
        gained, lost = int((drawn[:, 0] > 0).sum()), int((drawn[:, 0] < 0).sum())
        low, high = benefit_interval(gained, lost, n)
        of_benefit += low <= tuned - base <= high
    print(f"{n=} {retention=}: {of_retention / simulated:.3f}, {of_benefit / simulated:.3f}")
    assert 0.93 <= of_retention / simulated <= 0.97
    assert 0.93 <= of_benefit / simulated <= 0.97
