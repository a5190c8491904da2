"""Intervals over questions and seeds, against survival.py's and against simulated studies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeft import survival
from edgeft.study import results as study_results
from edgeft.study.statistics import Answers, answers, difference, estimates, pooled
from edgeft.survival import Result

Right = Sequence[int] | NDArray[np.bool_]
NAMES = ("base", "tuned", "host_base", "host_tuned")


def results(right: Right) -> list[Result]:
    return [Result(f"q{i}", "", "", None, bool(r), -1.0, 1) for i, r in enumerate(right)]


def lined_up(*seeds: tuple[Right, Right, Right, Right]) -> Answers:
    """From each seed's base, tuned, and the same on the host."""
    found = answers(
        [dict(zip(NAMES, map(results, four), strict=True)) for four in seeds],
    )
    assert found is not None
    return found


def on_host(base: Right, *tuned: Right) -> Answers:
    return lined_up(*((base, one, base, one) for one in tuned))


def draw(chances: Sequence[float], n: int, seed: int) -> list[NDArray[np.bool_]]:
    """For each chance, whether each of n questions is right; hard ones are hard for all."""
    random = np.random.default_rng(seed)
    hard = random.random(n)
    return [hard + 0.3 * random.standard_normal(n) < chance for chance in chances]


HOST_BASE, HOST_TUNED, BASE, TUNED = draw([0.2, 0.7, 0.15, 0.6], 200, 1)


def test_with_one_seed_it_is_the_reports_interval() -> None:
    found = estimates(lined_up((BASE, TUNED, HOST_BASE, HOST_TUNED)))
    four = map(results, (HOST_BASE, HOST_TUNED, BASE, TUNED))
    theirs = survival.survival(*four)
    assert found.benefit.value == pytest.approx(theirs.here.benefit)
    assert found.benefit.ci == pytest.approx(theirs.here.benefit_ci, abs=0.006)
    assert found.retention is not None and theirs.retention_ci is not None
    assert found.retention.value == pytest.approx(theirs.retention)
    assert found.retention.ci == pytest.approx(theirs.retention_ci, abs=0.015)
    host = survival.benefit(results(HOST_BASE), results(HOST_TUNED))
    assert found.host_benefit.ci == pytest.approx(host.benefit_ci, abs=0.006)
    assert found.accuracy.value == TUNED.mean()
    assert found.accuracy.ci == pytest.approx(theirs.here.tuned.ci, abs=0.012)
    assert found.n == 200


def test_identical_answers_do_not_claim_certainty() -> None:
    same = estimates(lined_up((HOST_BASE, HOST_TUNED, HOST_BASE, HOST_TUNED)))
    theirs = survival.survival(*map(results, (HOST_BASE, HOST_TUNED) * 2))
    assert same.retention is not None and theirs.retention_ci is not None
    assert same.retention.ci == pytest.approx(theirs.retention_ci, abs=0.004)
    assert same.retention.ci[0] < 0.999 < 1.001 < same.retention.ci[1]


def test_the_same_seed_twice_tells_no_more_than_once() -> None:
    four = (BASE, TUNED, HOST_BASE, HOST_TUNED)
    once, twice, thrice = (estimates(lined_up(*[four] * count)) for count in (1, 2, 3))
    for name in ("accuracy", "benefit", "retention"):
        width = np.ptp(getattr(once, name).ci)
        for more in (twice, thrice):
            assert np.ptp(getattr(more, name).ci) == pytest.approx(width, rel=0.07)
            assert getattr(more, name).value == pytest.approx(getattr(once, name).value)
            assert more.n == 200


def test_seeds_that_differ_widen_the_interval() -> None:
    low, high = TUNED & (np.arange(200) % 4 != 0), TUNED | (np.arange(200) % 4 == 0)
    agreed = estimates(on_host(HOST_BASE, TUNED, TUNED, TUNED))
    apart = estimates(on_host(HOST_BASE, low, TUNED, high))
    assert np.ptp(apart.benefit.ci) > 1.3 * np.ptp(agreed.benefit.ci)
    two = estimates(on_host(HOST_BASE, low, high))
    ends = [float(np.mean(one)) - HOST_BASE.mean() for one in (low, high)]
    assert two.benefit.ci[0] < ends[0] < ends[1] < two.benefit.ci[1], "each seed alone is possible"


def test_what_is_never_right_has_no_width_of_zero() -> None:
    never = [0] * 50
    found = estimates(on_host(never, never, never))
    assert found.accuracy.value == 0 and 0 < found.accuracy.ci[1] < 0.15
    assert found.benefit.ci[0] < 0 < found.benefit.ci[1]


def test_without_a_sure_benefit_on_the_host_there_is_no_retention() -> None:
    assert estimates(on_host(HOST_BASE, HOST_TUNED)).retention is not None
    assert estimates(on_host(HOST_BASE, HOST_BASE)).retention is None
    assert estimates(on_host(HOST_TUNED, HOST_BASE)).retention is None, "negative transfer"
    # Sure with one seed, unsure when another brings nothing.
    assert estimates(on_host(HOST_BASE, HOST_TUNED, HOST_BASE)).retention is None


def test_a_limited_device_is_compared_on_its_own_questions() -> None:
    host = results(HOST_BASE), results(HOST_TUNED)
    here = results(BASE)[:24], results(TUNED)[:24]
    seed = dict(zip(NAMES, (*here, *host), strict=True))
    found = answers([seed, seed])
    assert found is not None
    whole = lined_up(*[(BASE[:24], TUNED[:24], HOST_BASE[:24], HOST_TUNED[:24])] * 2)
    assert estimates(found).n == 24
    assert estimates(found).benefit.ci == estimates(whole).benefit.ci
    assert estimates(found).host_benefit.value == estimates(whole).host_benefit.value


def test_questions_are_paired_by_id_whatever_their_order() -> None:
    seed = dict(zip(NAMES, map(results, (BASE, TUNED, HOST_BASE, HOST_TUNED)), strict=True))
    turned = {**seed, "base": seed["base"][::-1], "host_tuned": seed["host_tuned"][::-1]}
    first, second = answers([seed, seed]), answers([seed, turned])
    assert first is not None and second is not None
    assert estimates(first).benefit.ci == estimates(second).benefit.ci
    ours, theirs = estimates(first).retention, estimates(second).retention
    assert ours is not None and theirs is not None and ours.ci == theirs.ci


def test_nothing_in_common_is_nothing() -> None:
    seed = dict.fromkeys(NAMES, results([1, 0]))
    other = [Result("z", "", "", None, True, -1.0, 1)]
    assert answers([{**seed, "tuned": other}]) is None
    found = answers([{**seed, "tuned": other}, seed, seed])
    assert found is not None and math.isfinite(estimates(found).benefit.ci[0])


def test_figures_do_not_change_from_call_to_call() -> None:
    given = on_host(HOST_BASE, HOST_TUNED, TUNED)
    assert estimates(given).benefit.ci == estimates(given).benefit.ci
    assert difference(given, given).ci == difference(given, given).ci


def test_a_difference_turns_round_and_holds_0_for_the_same_method() -> None:
    first, second = on_host(HOST_BASE, HOST_TUNED, TUNED), on_host(HOST_BASE, TUNED, BASE)
    ahead, behind = difference(first, second), difference(second, first)
    assert ahead.value == -behind.value > 0
    assert ahead.ci == pytest.approx([-end for end in reversed(behind.ci)], abs=0.03)
    same = difference(first, first)
    assert same.value == 0 and same.ci[0] < 0 < same.ci[1]


def test_a_difference_is_paired_by_question() -> None:
    """Two methods that differ in few questions are told apart, however hard the questions are."""
    few = TUNED.copy()
    few[np.flatnonzero(TUNED)[:12]] = False
    gap = difference(on_host(BASE, TUNED), on_host(BASE, few))
    assert gap.value == pytest.approx(12 / 200) and gap.ci[0] > 0.02
    # As another order of the results has it, too.
    seed = dict(zip(NAMES, map(results, (BASE, few, BASE, few)), strict=True))
    turned = answers([{name: rows[::-1] for name, rows in seed.items()}])
    assert turned is not None
    assert difference(on_host(BASE, TUNED), turned).ci == pytest.approx(gap.ci)


def test_a_difference_takes_any_number_of_seeds() -> None:
    one, three = on_host(BASE, TUNED), on_host(BASE, TUNED, TUNED, HOST_TUNED)
    gap = difference(one, three)
    assert gap.value == pytest.approx(TUNED.mean() - (2 * TUNED.mean() + HOST_TUNED.mean()) / 3)
    assert gap.ci[0] < gap.value < gap.ci[1]


def test_a_question_that_one_seed_lacks_does_not_count_as_wrong() -> None:
    seed = dict.fromkeys(NAMES, results([1] * 40))
    part = {**seed, "tuned": seed["tuned"][:30]}
    ours, theirs = answers([seed, part]), answers([seed, seed])
    assert ours is not None and theirs is not None
    assert difference(ours, theirs).value == 0


def test_other_questions_cannot_be_told_apart() -> None:
    with pytest.raises(ValueError, match="other questions"):
        difference(on_host(BASE, TUNED), on_host(BASE[:24], TUNED[:24]))


def test_pooling_is_the_mean_and_narrows() -> None:
    parts = [estimates(on_host(*draw([0.2, 0.5], 150, seed))).benefit for seed in (2, 3, 4, 5)]
    found = pooled(parts)
    assert found.value == pytest.approx(np.mean([part.value for part in parts]))
    widths = [np.ptp(part.ci) for part in parts]
    assert np.ptp(found.ci) == pytest.approx(math.hypot(*widths) / 4, rel=0.1)
    # Figures that were drawn alike are not the same figure.
    assert np.ptp(pooled([parts[0]] * 4).ci) == pytest.approx(widths[0] / 2, rel=0.1)
    assert pooled(parts[:1]).ci == pytest.approx(parts[0].ci)


def simulated(n: int, seeds: int, spread: float, studies: int) -> tuple[float, float]:
    """Share of studies whose interval of the benefit holds the truth, and how wide it is.

    Args:
        spread: standard deviation of the seeds' effect, in logits.
    """

    def chance(logits: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1 / (1 + np.exp(-logits))

    random = np.random.default_rng(20261)
    hard, effect = random.normal(0, 1.5, 200_000), random.normal(0, spread, 200_000)
    truth = float(np.mean(chance(0.5 + hard + effect)) - np.mean(chance(-1.0 + hard)))
    held, width = 0, 0.0
    for _ in range(studies):
        hard, effect = random.normal(0, 1.5, n), random.normal(0, spread, seeds)
        base = random.random(n) < chance(-1.0 + hard)
        tuned = random.random((seeds, n)) < chance(0.5 + hard + effect[:, None])
        low, high = estimates(on_host(base, *tuned)).benefit.ci
        held += low <= truth <= high
        width += high - low
    return held / studies, width / studies


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "spread", "least"),
    [
        (1, 0.0, 0.93),
        (2, 0.2, 0.93),
        (3, 0.2, 0.94),
        (5, 0.2, 0.94),
        (8, 0.2, 0.94),
        # Seeds that move accuracy by about 8 points. Two cannot tell how far a third may lie.
        (2, 0.5, 0.85),
        (3, 0.5, 0.89),
        (5, 0.5, 0.93),
        (8, 0.5, 0.93),
    ],
)
def test_the_benefits_interval_covers_the_truth(seeds: int, spread: float, least: float) -> None:
    held, width = simulated(120, seeds, spread, 300)
    print(f"{seeds=} {spread=}: {held:.3f}, {width:.3f} wide")
    assert held >= least


def test_a_benefit_that_a_devices_few_questions_do_not_show_is_undecided() -> None:
    def score(target: str | None, verdict: str) -> study_results.Score:
        interval = (0.0, 1.0)
        return study_results.Score(
            *(target, target and "board", 6, 0.5, interval),
            *(0.2, interval, None, None, verdict),
        )

    def verdicts(*given: study_results.Score) -> list[str | None]:
        return [s.verdict for s in study_results._with_few(list(given))]

    host, few = score(None, "benefit"), score("gguf-q4_0", "no-benefit")
    assert verdicts(host, few) == ["benefit", "inconclusive"]
    none = score(None, "no-benefit")
    assert verdicts(none, few) == ["no-benefit", "no-benefit"]
