"""What fine-tuning did to questions that it was not about."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeft import survival
from edgeft.bench.general import FILE
from edgeft.errors import UserError
from edgeft.survival import Interval


@dataclass(frozen=True)
class General:
    """One model on the general questions.

    Attributes:
        nll: mean over questions of -log p a token of the right answer, nats.
        accuracy: share of questions whose right answer has the highest log-likelihood a byte, as
            lm-evaluation-harness's ``acc_norm``.
        ci: Wilson's 95% interval of the accuracy.
    """

    nll: float
    accuracy: float
    ci: Interval


@dataclass(frozen=True)
class Forgetting:
    """Tuned against base on the same ``n`` questions, with paired 95% intervals."""

    n: int
    base: General
    tuned: General
    nll_change: float
    nll_change_ci: Interval
    accuracy_change: float
    accuracy_change_ci: Interval


def forgetting(run: Path, target: str | None = None) -> Forgetting | None:
    """On the host, or at a target on this machine; None where these weights were not scored.

    Raises:
        UserError: the scores are damaged.
    """
    place, same = ("host", "made_from") if target is None else (target, "manifest")
    other = Path("host") if target is None else Path("local", target)
    rows = []
    for weights in ("base", "tuned"):
        folder = run / "bench" / "general" / place / weights
        if not (folder / FILE).is_file():
            return None
        try:
            marks = [
                json.loads((path / "stage.json").read_text())
                for path in (folder, run / "bench" / other / weights)
            ]
            if marks[0].get(same) != marks[1].get(same):
                return None
            rows.append([json.loads(line) for line in (folder / FILE).read_text().splitlines()])
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is damaged ({error}): delete it and bench again") from error
    if not all(math.isfinite(row["logprob"]) for part in rows for row in part):
        return None  # a broken model: its accuracy says so
    return compare(*rows)


def compare(base: list[dict[str, Any]], tuned: list[dict[str, Any]]) -> Forgetting:
    """Compare two models' rows of ``general.jsonl``.

    The interval of the change in nats is a paired Bayesian bootstrap over questions (Rubin 1981),
    that of the change in accuracy :func:`edgeft.survival.benefit_interval`.

    Raises:
        UserError: they are not of the same questions.
    """
    before, after = _nats_and_right(base), _nats_and_right(tuned)
    if before.keys() != after.keys():
        raise UserError("base and tuned answered other general questions: bench again")
    change = np.array([after[q][0] - before[q][0] for q in before])
    weights = np.random.default_rng(survival.SEED).dirichlet(
        np.ones(len(change)), survival.RESAMPLES
    )
    low, high = np.quantile(weights @ change, (0.025, 0.975))
    gained = sum(after[q][1] and not before[q][1] for q in before)
    lost = sum(before[q][1] and not after[q][1] for q in before)
    return Forgetting(
        n=len(change),
        base=_general(before),
        tuned=_general(after),
        nll_change=float(change.mean()),
        nll_change_ci=(float(low), float(high)),
        accuracy_change=(gained - lost) / len(change),
        accuracy_change_ci=survival.benefit_interval(gained, lost, len(change)),
    )


def sentence(found: Forgetting) -> str:
    """The comparison in words."""
    low, high = found.nll_change_ci
    worse = low > 0 or found.accuracy_change_ci[1] < 0
    seen = "forgetting is visible" if worse else "no forgetting is visible"
    return (
        f"{found.n} general questions, a smoke test without mathematics: the right answer costs "
        f"{found.nll_change:+.2f} nats a token ({low:+.2f} to {high:+.2f}) and is the likeliest in "
        f"{100 * found.base.accuracy:.0f}% -> {100 * found.tuned.accuracy:.0f}%: {seen}."
    )


def _nats_and_right(rows: list[dict[str, Any]]) -> dict[str, tuple[float, bool]]:
    choices: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        question, _, choice = row["id"].rpartition("/")
        choices[question][choice] = row
    found = {}
    for question, rows_by_choice in choices.items():
        right = rows_by_choice.pop("0")
        others = [row["logprob"] / row["bytes"] for row in rows_by_choice.values()]
        likeliest = right["logprob"] / right["bytes"] > max(others)
        found[question] = (-right["logprob"] / right["tokens"], likeliest)
    return found


def _general(found: dict[str, tuple[float, bool]]) -> General:
    right = sum(is_right for _, is_right in found.values())
    nll = sum(nats for nats, _ in found.values()) / len(found)
    return General(nll, right / len(found), survival.wilson(right, len(found)))
