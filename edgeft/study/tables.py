"""The study's tables as text, so that every view shows the same figures."""

from __future__ import annotations

from edgeft.report.figures import NONE, Table, megabytes, number, points, ratio_interval
from edgeft.study.results import ON_HOST, Place, Row, Score, StudyResult, median
from edgeft.study.statistics import Estimate, pooled

NEGATIVE, REVERSED = "negative-transfer", "reversed"
MARK = "▼"
# The sizes about which the paper speaks (arXiv 2606.06920), millions of parameters.
BANDS = ((0, 300e6, "below 300M"), (300e6, 500e6, "300M to 500M"), (500e6, 1e12, "500M and more"))
_ORDER = ("zero-shot", "full", "lora", "dora", "qlora")


def tables(found: StudyResult) -> list[Table]:
    """Every table that has rows."""
    made = [accuracy(found), benefit(found), *retention(found), by_size(found), speed(found)]
    made.append(cells(found))
    return [table for table in made if table.rows]


def place_name(place: Place) -> str:
    """``host``, the target, or the target and its device."""
    target, device = place
    if target is None:
        return "host"
    return target if device == "local" else f"{target} on {device}"


def accuracy(found: StudyResult) -> Table:
    """The paper's table, and what it lacks: the same after deployment."""
    rows = []
    for row in found.rows:
        cells = [_accuracy(row.at(place)) for place in found.places]
        rows.append([*_names(row), str(len(row.seeds) or 1), *cells])
    return Table(
        "Accuracy",
        "Share of questions answered correctly, %, mean over seeds, 95% intervals over questions "
        f"and seeds. {MARK}: worse than zero-shot at the same place, for sure.",
        ["model", "task", "method", "seeds", *map(place_name, found.places)],
        rows,
        (3, 0),
    )


def benefit(found: StudyResult) -> Table:
    """What each method adds to zero-shot at the same place."""
    rows = []
    for row in found.rows:
        scores = [row.at(place) for place in found.places]
        if any(s and s.benefit is not None for s in scores):
            rows.append([*_names(row), *map(_benefit, scores)])
    return Table(
        "Benefit",
        "Accuracy minus zero-shot's at the same place and on the same questions, in points, paired; "
        "95% intervals over questions and seeds.",
        ["model", "task", "method", *map(place_name, found.places)],
        rows,
        (3, 0),
    )


def retention(found: StudyResult) -> list[Table]:
    """What is left of the host's benefit, and the verdict."""
    places = [place for place in found.places if place != ON_HOST]
    rows = []
    for row in found.rows:
        scores = [row.at(place) for place in places]
        if any(s and s.verdict for s in scores):
            rows.append([*_names(row), *map(_retention, scores)])
    table = Table(
        "Retention",
        f"Benefit there over benefit on the host, 95% interval; it survives where the interval's "
        f"lower end reaches {found.keep:g}.",
        ["model", "task", "method", *map(place_name, places)],
        rows,
        (3, 0),
    )
    return [table]


def by_size(found: StudyResult) -> Table:
    """All models and tasks together, by the sizes of which the paper speaks."""
    places = found.places
    rows = []
    for low, high, band in BANDS:
        here = [r for r in found.rows if r.parameters is not None and low <= r.parameters < high]
        for method in _methods(here):
            own = [row for row in here if row.method == method]
            cells = []
            for place in places:
                draws = [s.draws["benefit"] for s in _scores(own, place) if "benefit" in s.draws]
                cells.append(_pooled(draws))
            if any(cell != NONE for cell in cells):
                models = len({row.model for row in own})
                rows.append([band, method, f"{models}", f"{len(own)}", *cells])
    return Table(
        "By model size",
        "Benefit in points, all models and tasks of a size together, each counting the same; 95% "
        "interval.",
        ["parameters", "method", "models", "model and task", *map(place_name, places)],
        rows,
        (2, 0),
    )


def speed(found: StudyResult) -> Table:
    """What the files take."""
    rows = []
    for place in found.places:
        for model in dict.fromkeys(row.model for row in found.rows):
            own = _scores([row for row in found.rows if row.model == model], place)
            size = median(score.bytes for score in own)
            if size is not None:
                rows.append(
                    [
                        model,
                        place_name(place),
                        megabytes(round(size)),
                        number(median(score.tok_s for score in own), "{:.1f}"),
                        number(median(score.memory_mb for score in own), "{:.0f}"),
                    ]
                )
    return Table(
        "Size and speed",
        "Decoding one stream; medians over methods and seeds.",
        ["model", "", "size", "tok/s", "memory, MB"],
        rows,
        (2, 0),
    )


def cells(found: StudyResult) -> Table:
    """Every run, those that failed with the reason."""
    rows = [
        [o.id, o.state, number(o.seconds or None, "{:.0f}"), str(o.attempts or ""), o.error or ""]
        for o in found.outcomes
    ]
    note = "Seconds: of work since what the cell depends on last changed; finished stages are kept."
    return Table("Cells", note, ["", "state", "seconds", "attempts", ""], rows, (2, 1))


def _names(row: Row) -> list[str]:
    return [row.model, row.task, row.method]


def _methods(rows: list[Row]) -> list[str]:
    names = dict.fromkeys(row.method for row in rows)
    return sorted(names, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))


def _scores(rows: list[Row], place: Place) -> list[Score]:
    return [s for row in rows if (s := row.at(place))]


def _accuracy(score: Score | None) -> str:
    if score is None:
        return NONE
    low, high = score.accuracy_ci
    worse = score.benefit_ci is not None and score.benefit_ci[1] < 0
    mark = f" {MARK}" if worse else ""
    return f"{100 * score.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f}){mark}"


def _benefit(score: Score | None) -> str:
    if score is None or score.benefit is None or score.benefit_ci is None:
        return NONE
    low, high = score.benefit_ci
    mark = f" {MARK}" if high < 0 else ""
    return f"{points(score.benefit)} ({points(low)} to {points(high)}){mark}"


def _retention(score: Score | None) -> str:
    if score is None or score.verdict is None:
        return NONE
    if score.retention is None or score.retention_ci is None:
        return score.verdict
    return f"{score.retention:z.2f} ({ratio_interval(score.retention_ci)}) {score.verdict}"


def _pooled(parts: list[Estimate]) -> str:
    if not parts:
        return NONE
    found = pooled(parts)
    mark = f" {MARK}" if found.ci[1] < 0 else ""
    return f"{points(found.value)} ({points(found.ci[0])} to {points(found.ci[1])}){mark}"
