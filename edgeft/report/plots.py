"""The report's plots as inline SVG. Colours become CSS variables, so that the page's theme rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from io import StringIO
from typing import Any

from edgeft.errors import UserError
from edgeft.report.build import Report, Training
from edgeft.report.results import LOCAL
from edgeft.report.ship import decode, front
from edgeft.report.variant import Variant, place
from edgeft.survival import Score

# Stand-ins that no other part of the drawing has; the page defines the variables.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--grid)",
    "#040404": "var(--base)",
    "#050505": "var(--tuned)",
    "#060606": "var(--survives)",
    "#070707": "var(--partial)",
    "#080808": "var(--lost)",
    "#090909": "var(--inconclusive)",
    "#0a0a0a": "var(--page)",
}
_BY_VARIABLE = {name: colour for colour, name in _COLOURS.items()}
_WIDTH = 8.6  # inches; the page shows it about 860 px wide
_ROW = 0.42
_FONT = 10.5


def verdict_colour(verdict: str) -> str:
    """The CSS variable of a verdict."""
    known = {"survives", "partial", "inconclusive"}
    return f"var(--{verdict})" if verdict in known else "var(--lost)"


def accuracy(report: Report) -> str:
    """Base and tuned accuracy with intervals, the host first."""
    names = ["host"] + [place(v, report.variants) for v in report.variants]
    scores = [report.host, *(v.survival.here for v in report.variants)]

    def draw(axes: Any) -> None:
        axes.axvline(100 * report.host.tuned.accuracy, color=colour_of("--tuned"), lw=1, ls=":")
        for y, found in enumerate(scores):
            ends = [100 * found.base.accuracy, 100 * found.tuned.accuracy]
            axes.plot(
                ends, [y, y], color=colour_of("--grid"), lw=5, zorder=1, solid_capstyle="round"
            )
            _point(axes, found.base, y + 0.13, "--base", "s", "base" if y == 0 else None)
            _point(axes, found.tuned, y - 0.13, "--tuned", "o", "tuned" if y == 0 else None)
        rows_of(axes, names)
        axes.set_xlim(0, 100)
        axes.set_xlabel("questions answered correctly, %")
        _legend(axes)

    return svg(draw, len(names) * _ROW * 1.15 + 1.0, "Accuracy of base and tuned with intervals")


def retention(report: Report) -> str:
    """Retention with intervals against the line that survival has to reach."""
    shown = [v for v in report.variants if v.survival.retention is not None]

    def draw(axes: Any) -> None:
        for y, variant in enumerate(shown):
            s = variant.survival
            assert s.retention is not None and s.retention_ci is not None
            colour = _BY_VARIABLE[verdict_colour(s.verdict)]
            axes.plot(s.retention_ci, [y, y], color=colour, lw=2.2, solid_capstyle="round")
            axes.plot(s.retention, y, "o", color=colour, ms=7)
            axes.annotate(
                s.verdict,
                (1, y),
                xycoords=("axes fraction", "data"),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=colour,
            )
        axes.axvline(report.keep, color=colour_of("--ink"), lw=1.2, ls="--")
        axes.axvline(1, color=colour_of("--muted"), lw=1, ls=":")
        _above(axes, report.keep, f"keep {report.keep:g} ", "right")
        _above(axes, 1, " all of it", "left")
        rows_of(axes, [place(v, report.variants) for v in shown])
        ends = [e for v in shown for e in v.survival.retention_ci or ()]
        axes.set_xlim(max(-1.0, min(0.0, *ends) - 0.03), min(2.0, max(1.1, *ends) + 0.03))
        axes.set_xlabel("retention: benefit here ÷ benefit on the host")

    return svg(draw, len(shown) * _ROW + 1.1, "Retention of each target with intervals")


def waterfall(variant: Variant, name: str) -> str:
    """Accuracy of the tuned weights from place to place, and what each step changed."""
    steps = variant.steps
    places = [steps[0].before, *(s.after for s in steps)]
    levels = [100 * steps[0].accuracy[0], *(100 * s.accuracy[1] for s in steps)]

    def draw(axes: Any) -> None:
        axes.barh(0, levels[0], color=colour_of("--tuned"), height=0.55)
        _beside(axes, f"{levels[0]:.1f}", levels[0], 0, "--muted")
        for y, s in enumerate(steps, 1):
            before, after = levels[y - 1], levels[y]
            colour = colour_of("--lost" if after < before else "--survives")
            axes.plot([before, before], [y - 1, y], color=colour_of("--muted"), lw=0.8)
            axes.barh(y, after - before, left=before, color=colour, height=0.55)
            ends = [min(100, max(0, before + 100 * end)) for end in s.change_ci]
            axes.plot(ends, [y, y], color=colour_of("--ink"), lw=1.4, solid_capstyle="round")
            text = f"{100 * s.change:+z.1f}" + ("" if s.nats is None else f", {s.nats:+z.3f} nats")
            _beside(axes, text, max(before, after, ends[1]), y, "--lost" if s.costs else "--muted")
        rows_of(axes, places)
        axes.set_xlim(0, max(levels) + 32)  # room for what is said beside the bars
        axes.set_xticks(range(0, 101 if max(levels) > 68 else 61, 20))
        axes.set_xlabel(f"{steps[-1].n} questions answered correctly, %")

    return svg(draw, len(places) * _ROW + 0.9, f"The way of {name}, step by step")


def size(report: Report) -> str:
    """Size of the artifact against tuned accuracy, on the device with the most questions."""
    sized = [v for v in report.variants if v.bytes is not None]
    most = max(sized, key=lambda v: (v.survival.here.tuned.n, v.device == LOCAL))
    shown = [v for v in sized if v.device == most.device]

    def draw(axes: Any) -> None:
        _dots(axes, report, shown, [(v.bytes or 0) / 1e6 for v in shown])
        axes.set_xlabel("size, MB" if len(shown) == len(sized) else f"size, MB, on {most.device}")

    return svg(draw, 3.9, "Size of each target against its accuracy")


def speed(report: Report, device: str) -> str:
    """Decode speed on a device against tuned accuracy, with the Pareto front."""
    shown = [v for v in report.variants if v.device == device and decode(v)]

    def draw(axes: Any) -> None:
        best = [(decode(v) or 0, 100 * v.survival.here.tuned.accuracy) for v in front(shown)]
        # From the left edge to the most accurate, then down the steps to the fastest.
        steps = [(0, best[0][1]), *best, (best[-1][0], 0)]
        xs, ys = zip(*steps, strict=True)
        axes.step(xs, ys, where="pre", color=colour_of("--muted"), lw=1.1, ls="--", zorder=1)
        _dots(axes, report, shown, [decode(v) or 0 for v in shown])
        axes.set_xlabel(f"decoding on {device}, tok/s")

    return svg(draw, 3.9, f"Decode speed on {device} against accuracy")


def loss(training: Training) -> str:
    """Training and held-out loss."""

    def draw(axes: Any) -> None:
        if training.loss:
            steps, losses = zip(*training.loss, strict=True)
            axes.plot(steps, losses, color=colour_of("--base"), lw=1.4, label="training batch")
        if training.heldout:
            steps, losses = zip(*training.heldout, strict=True)
            axes.plot(
                steps, losses, "o-", color=colour_of("--tuned"), lw=1.8, ms=5, label="held out"
            )
            kept = [
                point for point in training.heldout if point[0] == training.facts.get("kept_step")
            ]
            for step, lowest in kept:
                axes.plot(
                    step, lowest, "o", color=colour_of("--tuned"), ms=10, mfc="none", label="kept"
                )
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=colour_of("--grid"), lw=0.7)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a token")
        _legend(axes)

    return svg(draw, 3.2, "Training and held-out loss by step")


def _dots(axes: Any, report: Report, shown: Sequence[Variant], xs: Sequence[float]) -> None:
    """Tuned accuracy with its interval at each x, named, and the host's as a band."""
    host = report.host.tuned
    axes.axhspan(*(100 * e for e in host.ci), color=colour_of("--tuned"), alpha=0.1, lw=0)
    axes.axhline(100 * host.accuracy, color=colour_of("--tuned"), lw=1, ls=":")
    for x, variant in zip(xs, shown, strict=True):
        found = variant.survival.here.tuned
        colour = _BY_VARIABLE[verdict_colour(variant.survival.verdict)]
        ends = [100 * e for e in found.ci]
        axes.plot([x, x], ends, color=colour, lw=1.6, alpha=0.55, solid_capstyle="round")
        axes.plot(x, 100 * found.accuracy, "o", color=colour, ms=7)
    axes.set_xlim(0, 1.18 * max(xs))
    lowest = min([host.ci[0], *(v.survival.here.tuned.ci[0] for v in shown)])
    axes.set_ylim(max(0, 100 * lowest - 6), min(102, 100 * host.ci[1] + 12))
    axes.text(
        0.005,
        100 * host.accuracy,
        " tuned on the host",
        transform=axes.get_yaxis_transform(),
        va="bottom",
        color=colour_of("--tuned"),
    )
    axes.grid(axis="both", color=colour_of("--grid"), lw=0.7)
    axes.set_ylabel("accuracy, %")
    scores = [v.survival.here.tuned for v in shown]
    _labels(axes, xs, scores, [place(v, shown) for v in shown], 100 * host.accuracy)


def colour_of(variable: str) -> str:
    """What stands for one of the page's colours, such as ``--tuned``, while drawing."""
    return _BY_VARIABLE[f"var({variable})"]


def _point(
    axes: Any, found: Score, y: float, variable: str, marker: str, label: str | None
) -> None:
    colour = colour_of(variable)
    ends = [100 * end for end in found.ci]
    axes.plot(ends, [y, y], color=colour, lw=1.8, zorder=2, solid_capstyle="round")
    axes.plot(
        100 * found.accuracy, y, marker, color=colour, ms=6.5, zorder=3, label=label, ls="none"
    )


def rows_of(axes: Any, names: Sequence[str]) -> None:
    """Names from top to bottom, one a unit."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=colour_of("--grid"), lw=0.7)


def _beside(axes: Any, text: str, x: float, y: float, variable: str) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        color=colour_of(variable),
    )


def _above(axes: Any, x: float, text: str, side: str) -> None:
    axes.annotate(
        text,
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha=side,
        color=colour_of("--muted"),
    )


def _legend(axes: Any) -> None:
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
        borderaxespad=0.2,
        handlelength=1.4,
    )


def _labels(
    axes: Any, xs: Sequence[float], scores: Sequence[Score], names: Sequence[str], line: float
) -> None:
    """Name the points; each name takes the first place around its point that is still free.

    Args:
        line: where a horizontal line runs that no name should cross.
    """
    from matplotlib.transforms import Bbox

    places = [(x, y) for y in (0, 13, -13, 26, -26) for x in (9, -9)]  # points from the dot
    renderer = axes.figure.canvas.get_renderer()
    height = axes.transData.transform((0, line))[1]
    taken = [Bbox.from_extents(axes.bbox.x0, height - 1, axes.bbox.x1, height + 1)]
    for x, found in zip(xs, scores, strict=True):
        low, high = (axes.transData.transform((x, 100 * end)) for end in found.ci)
        taken.append(Bbox.from_extents(low[0] - 6, low[1], high[0] + 6, high[1]))
    for x, found, name in zip(xs, scores, names, strict=True):
        label = axes.annotate(
            name, (x, 100 * found.accuracy), (9, 0), textcoords="offset points", va="center"
        )
        for offset in places:
            label.set(position=offset, ha="left" if offset[0] > 0 else "right")
            box = label.get_window_extent(renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def svg(draw: Callable[[Any], None], height: float, about: str) -> str:
    """What ``draw`` puts on matplotlib's axes, as inline SVG in the page's colours.

    Args:
        height: inches; a page's whole width is 8.6.
        about: what it shows, for those who cannot see it.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the report's plots need matplotlib: pip install matplotlib") from error

    ink, muted = colour_of("--ink"), colour_of("--muted")
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": about,
        "text.parse_math": False,  # a name may have two dollar signs
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": _FONT,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": muted,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": muted,
        "xtick.labelcolor": muted,
        "ytick.color": muted,
        "ytick.labelcolor": ink,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="none")
        FigureCanvasAgg(figure)  # measures the labels
        axes = figure.add_subplot(facecolor="none")
        figure.canvas.draw()
        draw(axes)
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _inline(out.getvalue(), about)


def _inline(drawn: str, about: str) -> str:
    """Without what only a file of its own needs, and in the page's colours."""
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.S)
    drawn = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", drawn)
    drawn = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", drawn)
    drawn = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", drawn)
    drawn = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", drawn)
    for colour, variable in _COLOURS.items():
        drawn = drawn.replace(colour, variable)
    return drawn.replace("<svg", f'<svg role="img" aria-label="{escape(about)}"', 1).strip()
