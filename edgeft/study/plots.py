"""The study's plots, as the report's."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from edgeft.report.plots import colour_of, rows_of, svg
from edgeft.study.results import ON_HOST, Row, StudyResult
from edgeft.study.tables import place_name

_COLOURS = ("--tuned", "--base", "--survives", "--lost", "--partial", "--muted", "--ink")
_MARKERS = "osD^vP*"


def drawings(found: StudyResult) -> list[tuple[str, str, str]]:
    """Title, note and SVG of each plot."""
    made = []
    for (model, task), group in groupby(found.rows, key=lambda r: (r.model, r.task)):
        rows = list(group)
        note = (
            "Accuracy by method, on the host and after deployment, 95% intervals over questions and "
            "seeds. Dotted: zero-shot on the host."
        )
        made.append((f"{model} on {task}", note, _methods(found, rows)))
    if len({row.parameters for row in found.rows if row.parameters}) > 1:
        note = (
            "Benefit over zero-shot by model size; filled: on the host, hollow: after deployment."
        )
        made.append(("By model size", note, _sizes(found)))
    return made


def _methods(found: StudyResult, rows: list[Row]) -> str:
    places = [p for p in found.places if any(row.at(p) for row in rows)]
    zero = next((row.at(ON_HOST) for row in rows if row.method == "zero-shot"), None)
    step = 0.8 / max(1, len(places))

    def draw(axes: Any) -> None:
        if zero:
            axes.axvline(100 * zero.accuracy, color=colour_of("--muted"), lw=1, ls=":")
        for i, place in enumerate(places):
            colour = colour_of(_COLOURS[i % len(_COLOURS)])
            seen = False
            for y, row in enumerate(rows):
                if score := row.at(place):
                    at = y + (i - (len(places) - 1) / 2) * step
                    ends = [100 * end for end in score.accuracy_ci]
                    axes.plot(ends, [at, at], color=colour, lw=1.6, solid_capstyle="round")
                    label = None if seen else place_name(place)
                    marker = _MARKERS[i % len(_MARKERS)]
                    axes.plot(
                        *(100 * score.accuracy, at, marker),
                        color=colour,
                        ms=5.5,
                        label=label,
                        ls="none",
                    )
                    seen = True
        rows_of(axes, [row.method for row in rows])
        axes.set_xlim(0, 100)
        axes.set_xlabel("questions answered correctly, %")
        columns = min(3, len(places))
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, handlelength=1.2
        )

    height = len(rows) * (0.26 + 0.13 * len(places)) + 1.0 + 0.25 * -(-len(places) // 3)
    return svg(draw, height, "Accuracy by method and place with intervals")


def _sizes(found: StudyResult) -> str:
    methods = list(dict.fromkeys(r.method for r in found.rows if r.method != "zero-shot"))

    def draw(axes: Any) -> None:
        axes.axhline(0, color=colour_of("--muted"), lw=1)
        axes.set_xscale("log")
        for i, method in enumerate(methods):
            colour, seen = colour_of(_COLOURS[i % len(_COLOURS)]), False
            for row in (r for r in found.rows if r.method == method and r.parameters):
                for score in row.scores:
                    if score.benefit is None or score.benefit_ci is None:
                        continue
                    x = (row.parameters or 0) / 1e6 * (1 + 0.02 * i)
                    on_host = score.target is None
                    fill = colour if on_host else "none"
                    ends = [100 * end for end in score.benefit_ci]
                    axes.plot([x, x], ends, color=colour, lw=1.4 if on_host else 0.6)
                    label = None if seen else method
                    axes.plot(
                        x, 100 * score.benefit, "o", color=colour, mfc=fill, ms=6, label=label
                    )
                    seen = True
        axes.set_xlabel("parameters, millions")
        axes.set_ylabel("benefit, points")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(methods), frameon=False)

    return svg(draw, 4.2, "Benefit by model size")
