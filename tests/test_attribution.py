"""Steps between places: counts and intervals against independent computation and simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeft import attribution, survival
from edgeft.attribution import Place, Step, change_interval, ratio_interval
from edgeft.survival import Result, benefit_interval

Rights = Sequence[int | bool]


def results(right: Rights, logprob: float = -3.0, kl: float | None = None) -> list[Result]:
    return [
        Result(f"q{i}", "", "", str(r), bool(r), logprob, 4, kl=kl) for i, r in enumerate(right)
    ]


def place(name: str, tuned: Rights, base: Rights | None = None, kind: str = "quantize") -> Place:
    return Place(name, kind, None if base is None else results(base), results(tuned))


def step(before: Rights, after: Rights, *base: Rights) -> Step:
    bases: Sequence[Rights | None] = base or (None, None)
    [found] = attribution.steps(
        [place("a", before, bases[0]), place("b", after, bases[1], "export")]
    )
    return found


two = st.tuples(st.booleans(), st.booleans())


@given(st.lists(two, min_size=1, max_size=50))
def test_counts_are_those_of_a_plain_loop(pairs: list[tuple[bool, bool]]) -> None:
    found = step(*zip(*pairs, strict=True))
    assert found.broken == sum(a and not b for a, b in pairs)
    assert found.fixed == sum(b and not a for a, b in pairs)
    assert found.n == len(pairs)
    assert found.accuracy[0] == pytest.approx(sum(a for a, _ in pairs) / len(pairs))
    assert found.change == pytest.approx(found.accuracy[1] - found.accuracy[0])
    assert found.change == pytest.approx((found.fixed - found.broken) / found.n)
    low, high = found.change_ci
    assert -1 < low < high < 1
    assert found.mcnemar_p == survival.mcnemar(found.fixed, found.broken)


def test_a_step_is_named_by_its_ends() -> None:
    found = step([1, 0], [1, 1])
    assert (found.kind, found.before, found.after) == ("export", "a", "b")


def test_without_base_the_benefit_changes_as_accuracy_does() -> None:
    before, after = [1] * 60 + [0] * 40, [1] * 45 + [0] * 55
    found = step(before, after)
    assert found.change_ci == benefit_interval(0, 15, 100)
    assert found.benefit_change == found.change == pytest.approx(-0.15)
    assert found.benefit_change_ci == pytest.approx(found.change_ci, abs=0.003)


def test_what_base_loses_too_is_no_loss_of_benefit() -> None:
    before, after = [1] * 60 + [0] * 40, [1] * 20 + [0] * 80
    found = step(before, after, before, after)
    assert found.change == pytest.approx(-0.4) and found.benefit_change == 0
    assert found.benefit_change_ci[0] < 0 < found.benefit_change_ci[1] and found.change_ci[1] < 0


def test_base_is_carried_over_a_merge() -> None:
    base = results([0, 0, 0, 0])
    places = [
        Place("adapter", "", base, results([1, 1, 1, 0])),
        Place("merged", "merge", None, results([1, 1, 1, 0])),
        Place("file", "quantize", results([1, 0, 0, 0]), results([1, 1, 1, 0])),
    ]
    merge, quantize = attribution.steps(places)
    assert merge.benefit_change == 0 and quantize.benefit_change == -0.25


def test_all_steps_are_over_the_questions_of_every_place() -> None:
    places = [place("a", [1, 1, 1, 0], [0, 0, 0, 0]), place("b", [1, 1, 0, 0], [0, 0, 0, 0])]
    last = place("c", [1, 0, 0, 0], [0, 0, 0, 0])
    assert last.base is not None
    few = replace(last, base=last.base[:3], tuned=last.tuned[:2])
    found = attribution.steps([*places, few])
    assert [s.n for s in found] == [2, 2]
    assert [s.broken for s in found] == [0, 1]
    shuffled = [replace(p, tuned=p.tuned[::-1]) for p in (*places, few)]
    assert attribution.steps(shuffled)[1].broken == 1


@pytest.mark.parametrize("empty", [0, 1])
def test_nothing_in_common_is_no_step(empty: int) -> None:
    places = [place("a", [1, 1], [0, 0]), place("b", [1, 1], [0, 0])]
    assert len(attribution.steps(places)) == 1
    places[empty] = replace(places[empty], tuned=[])
    assert attribution.steps(places) == []
    assert attribution.steps(places[:1]) == []


def test_nats_are_a_gold_token() -> None:
    before, after = results([1, 1], -2.0), results([1, 1], -2.0)
    after[0] = replace(after[0], gold_logprob=-5.0, gold_tokens=8)
    before[0] = replace(before[0], gold_tokens=8)
    [found] = attribution.steps([Place("a", "", None, before), Place("b", "export", None, after)])
    assert found.nats == pytest.approx(3 / 12)
    assert found.nats_ci is not None and found.nats_ci[0] < 3 / 12 < found.nats_ci[1] <= 3 / 8


@pytest.mark.parametrize("logprob", [-math.inf, math.nan])
def test_a_likelihood_that_is_not_finite_is_none(logprob: float) -> None:
    for pair in ([-3.0, logprob], [logprob, logprob]):
        before, after = (results([1, 1], value) for value in pair)
        [found] = attribution.steps(
            [Place("a", "", None, before), Place("b", "export", None, after)]
        )
        assert found.nats is None and found.nats_ci is None and not found.costs


def test_divergence_is_over_the_questions_that_have_one() -> None:
    after = results([1, 1, 1])
    after[0] = replace(after[0], kl=0.2, gold_tokens=10)
    after[1] = replace(after[1], kl=0.5, gold_tokens=20)
    places = [place("a", [1, 1, 1]), Place("b", "quantize", None, after)]
    [found] = attribution.steps(places)
    assert found.kl == pytest.approx((0.2 * 10 + 0.5 * 20) / 30) and found.kl_questions == 2
    assert found.kl_ci is not None and 0.2 < found.kl_ci[0] < found.kl < found.kl_ci[1] < 0.5


@pytest.mark.parametrize("kl", [None, math.nan, math.inf])
def test_a_divergence_that_is_not_finite_is_none(kl: float | None) -> None:
    after = [*results([1, 1], kl=0.1)[:1], *results([0, 1], kl=kl)[1:]]
    places = [place("a", [1, 1]), Place("b", "quantize", None, after if kl else results([1, 1]))]
    [found] = attribution.steps(places)
    assert (found.kl, found.kl_ci, found.kl_questions) == (None, None, 0)


def test_a_merge_has_the_divergence_of_the_adapter_from_what_it_became() -> None:
    """The merged weights are the reference, so they have none of their own."""
    places = [
        Place("adapter", "", None, results([1, 1], kl=0.3)),
        Place("merged", "merge", None, results([1, 1])),
        Place("file", "export", None, results([1, 1], kl=0.1)),
    ]
    assert [s.kl for s in attribution.steps(places)] == pytest.approx([0.3, 0.1])


@pytest.mark.parametrize(
    ("broken", "nats", "costs"),
    [(0, 0.0, False), (2, 0.0, False), (40, 0.0, True), (0, 0.009, False), (0, 0.011, True)],
)
def test_a_step_costs_what_is_sure_and_more_than_rounding(
    broken: int, nats: float, costs: bool
) -> None:
    before, after = results([1] * 200), results([0] * broken + [1] * (200 - broken), -3 - 4 * nats)
    [found] = attribution.steps([Place("a", "", None, before), Place("b", "export", None, after)])
    assert found.costs is costs


def test_a_gain_is_no_cost() -> None:
    assert not step([0] * 100, [1] * 100).costs


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=80))
def test_an_interval_of_changes_is_finite_and_ordered(changes: list[int]) -> None:
    low, high = change_interval(np.array(changes))
    assert -2 <= low < high <= 2


def test_figures_do_not_change_from_call_to_call() -> None:
    changes = np.array([1, 0, -1, 0, 2])
    assert change_interval(changes) == change_interval(changes)
    assert ratio_interval(changes * 1.0, changes + 3.0) == ratio_interval(
        changes * 1.0, changes + 3.0
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "chances"),  # of -2, -1, 0, 1, 2
    [
        (60, (0.02, 0.14, 0.70, 0.10, 0.04)),
        (200, (0.02, 0.14, 0.70, 0.10, 0.04)),
        (200, (0.0, 0.25, 0.70, 0.05, 0.0)),
        (200, (0.0, 0.03, 0.94, 0.03, 0.0)),
        (250, (0.10, 0.30, 0.55, 0.05, 0.0)),
    ],
)
def test_change_intervals_cover_the_truth(n: int, chances: tuple[float, ...]) -> None:
    rng, kinds = np.random.default_rng(20261), np.arange(-2, 3)
    truth, covered = float(kinds @ chances), 0
    for _ in range(1000):
        low, high = change_interval(rng.choice(kinds, size=n, p=chances))
        covered += low <= truth <= high
    print(f"{n=} {truth=:.3f}: {covered / 1000:.3f}")
    assert 0.93 <= covered / 1000 <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [60, 200])
def test_ratio_intervals_cover_the_truth(n: int) -> None:
    """Nats of solutions of different lengths, some tokens of which lose much."""
    rng, mean, covered, simulated = np.random.default_rng(20261), 0.05, 0, 600
    for _ in range(simulated):
        tokens = rng.integers(10, 60, size=n)
        sums = np.array([(rng.exponential(0.3, k) + mean - 0.3).sum() for k in tokens])
        low, high = ratio_interval(sums, tokens.astype(float))
        covered += low <= mean <= high
    print(f"{n=}: {covered / simulated:.3f}")
    assert 0.93 <= covered / simulated <= 0.97
