"""What a study shows, in sentences that its figures bear out, beside what the paper says."""

from __future__ import annotations

from itertools import groupby

from edgeft.report.figures import points, points_interval
from edgeft.study.cell import DONE
from edgeft.study.results import ON_HOST, Row, Score, StudyResult
from edgeft.study.statistics import difference
from edgeft.study.tables import place_name
from edgeft.survival import Interval

# "The Fine-Tuning Trap" (arXiv 2606.06920): full fine-tuning below this ends worse than zero-shot.
HURTS_BELOW = 300e6
PAPER = "the paper (arXiv 2606.06920)"


def lead(found: StudyResult) -> str:
    """What was done, in one sentence."""
    done = f"{sum(o.state == DONE for o in found.outcomes)} of {len(found.outcomes)} cells done."
    if not found.rows:
        return f"Nothing is scored yet: {done}"
    models = len({row.model for row in found.rows})
    methods = list(dict.fromkeys(row.method for row in found.rows))
    asked = max((s.n for row in found.rows for s in row.scores), default=0)
    devices = {device for _, device in found.places if device}
    return (
        f"{_count(models, 'model')}, {_count(len(methods), 'method')} ({', '.join(methods)}), "
        f"{_count(len(found.places) - 1, 'place')} after deployment on "
        f"{_count(len(devices), 'device')}, up to {asked} questions: {done}"
    )


def findings(found: StudyResult) -> list[str]:
    """One sentence a fact, the host's first."""
    said = []
    for (model, task), rows in groupby(found.rows, key=lambda r: (r.model, r.task)):
        by_method = {row.method: row for row in rows}
        where = f"{model} on {task}: "
        said += [where + line for line in _on_host(by_method)]
        said += [where + line for line in _deployed(found, by_method)]
    return said


def _on_host(rows: dict[str, Row]) -> list[str]:
    said = []
    full = rows.get("full")
    if full and (score := full.at(ON_HOST)) and score.benefit is not None:
        said.append(
            f"full fine-tuning {_change(score)} over zero-shot{_beside_paper(full, score)}."
        )
    for method, row in rows.items():
        score = row.at(ON_HOST)
        if method not in ("full", "zero-shot") and score and score.benefit is not None:
            said.append(f"{method} {_change(score)} over zero-shot.")
    if "lora" in rows:
        for other in ("dora", "full", "qlora"):
            if other in rows:
                said += _against(rows["lora"], rows[other])
    return said


def _change(score: Score) -> str:
    assert score.benefit is not None and score.benefit_ci is not None
    low, high = score.benefit_ci
    word = "brings" if low > 0 else "hurts:" if high < 0 else "changes nothing for sure:"
    return f"{word} {points(score.benefit)} points ({points_interval(score.benefit_ci)})"


def _beside_paper(row: Row, score: Score) -> str:
    if row.parameters is None or row.parameters >= HURTS_BELOW:
        return ""
    low, high = score.benefit_ci or (0.0, 0.0)
    size = f"{row.parameters / 1e6:.0f}M"
    if high < 0:
        return f": negative transfer at {size}, as {PAPER} finds below 300M"
    if low > 0:
        return f": no negative transfer at {size} here, unlike what {PAPER} finds below 300M"
    return (
        f"; {PAPER} finds it worse than zero-shot below 300M, which this neither shows nor excludes"
    )


def _against(lora: Row, other: Row) -> list[str]:
    ours, theirs = lora.at(ON_HOST), other.at(ON_HOST)
    if ours is None or theirs is None or ours.answers is None or theirs.answers is None:
        return []
    try:
        gap = difference(ours.answers, theirs.answers)
    except ValueError:
        return []
    if gap.ci[0] <= 0 <= gap.ci[1]:
        how = "cannot be told apart"
    else:
        how = "lora is ahead" if gap.value > 0 else f"{other.method} is ahead"
    return [f"lora against {other.method}: {how}, {points(gap.value)} ({points_interval(gap.ci)})."]


def _deployed(found: StudyResult, rows: dict[str, Row]) -> list[str]:
    """A sentence a place: which methods' benefit survives there."""
    said = []
    for place in found.places:
        if place == ON_HOST:
            continue
        words: dict[str, list[str]] = {}
        for method, row in rows.items():
            score = row.at(place)
            if score and score.verdict:
                kept = "" if score.retention is None else f" {_kept(score.retention_ci, score)}"
                words.setdefault(score.verdict, []).append(method + kept)
        if words:
            parts = [f"{word}: {', '.join(methods)}" for word, methods in words.items()]
            said.append(f"at {place_name(place)}, {'; '.join(parts)}.")
    return said


def _kept(ci: Interval | None, score: Score) -> str:
    return "" if ci is None else f"{score.retention:z.2f} ({ci[0]:z.2f} to {ci[1]:z.2f})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
