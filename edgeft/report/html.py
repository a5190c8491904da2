"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import re
from html import escape

from edgeft.report import plots
from edgeft.report.build import Report
from edgeft.report.device import THROTTLED, device_title
from edgeft.report.figures import Table, percent
from edgeft.report.ship import decode
from edgeft.report.tables import WAY, lead, remarks, tables, worst
from edgeft.report.variant import Variant, place

VERDICTS = (
    "survives",
    "partial",
    "lost",
    "reversed",
    "inconclusive",
    "no-benefit",
    "negative-transfer",
)
_MANY = 7  # columns
_STYLE = """
:root { color-scheme: light dark;
  --page: #fcfcfb; --card: #ffffff; --ink: #1d2126; --muted: #5c6570; --grid: #e4e6e9;
  --base: #b35c00; --tuned: #0067a8; --survives: #00785a; --partial: #9a6700;
  --lost: #b4232c; --inconclusive: #5c6570; }
@media (prefers-color-scheme: dark) { :root {
  --page: #15181c; --card: #1c2025; --ink: #e8eaed; --muted: #a3abb5; --grid: #333941;
  --base: #e69f00; --tuned: #56b4e9; --survives: #3ecfa3; --partial: #f0c252;
  --lost: #ff8a80; --inconclusive: #a3abb5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 940px; margin: 0 auto; padding: 40px 24px 72px; }
.name { color: var(--muted); font-size: 14px; margin: 0 0 10px; }
h1 { font-size: 28px; line-height: 1.3; font-weight: 650; letter-spacing: -0.01em;
  margin: 0 0 14px; text-wrap: balance; }
h2 { font-size: 19px; font-weight: 650; margin: 0 0 4px; }
section { margin-top: 44px; }
.lead { font-size: 17px; margin: 0; max-width: 44em; }
ul.remarks { margin: 12px 0 0; padding-left: 20px; color: var(--muted); }
.note { color: var(--muted); font-size: 14px; margin: 0 0 12px; max-width: 52em; }
figure { margin: 8px 0 14px; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 560px; height: auto; }
svg text { font-family: inherit !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--muted); vertical-align: bottom; }
th, td { padding: 7px 18px 7px 0; border-bottom: 1px solid var(--grid); }
th:last-child, td:last-child { padding-right: 0; }
td { vertical-align: top; }
.figure { text-align: right; white-space: nowrap; }
td:first-child { font-weight: 500; white-space: nowrap; }
.many th { white-space: normal; } .many th, .many td { padding-right: 10px; }
.many td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8em; }
.survives { color: var(--survives); } .partial { color: var(--partial); }
.lost, .reversed, .no-benefit, .negative-transfer { color: var(--lost); }
.inconclusive { color: var(--inconclusive); }
td.verdict, h1 b { font-weight: 650; } h1 span { white-space: nowrap; }
details { border-top: 1px solid var(--grid); padding: 10px 0; }
summary { cursor: pointer; font-weight: 500; }
summary span { color: var(--muted); font-weight: 400; }
.pair { background: var(--card); border: 1px solid var(--grid); border-radius: 8px;
  padding: 12px 16px; margin: 12px 0; font-size: 14px; }
.pair p { margin: 0 0 8px; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
.sides h4 { margin: 0 0 2px; font-size: 13px; font-weight: 500; color: var(--muted); }
.right h4 i { color: var(--survives); } .wrong h4 i { color: var(--lost); }
h4 i { font-style: normal; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 640px) { .sides { grid-template-columns: 1fr; gap: 10px; }
  h1 { font-size: 23px; } main { padding-top: 24px; } }
@media (min-width: 940px) { .wide:has(.many) { width: max-content; min-width: 100%;
  max-width: calc(50vw + 422px); } }
@media print { details > * { display: block; } section { break-inside: avoid; } }
"""


def render(report: Report) -> str:
    """The whole page."""
    drawn = {"Accuracy": plots.accuracy(report)}
    if any(v.survival.retention is not None for v in report.variants):
        drawn["Retention"] = plots.retention(report)
    for device in dict.fromkeys(v.device for v in report.variants):
        if sum(decode(v) is not None for v in report.variants if v.device == device) > 1:
            drawn[device_title(device)] = plots.speed(report, device)
    found = tables(report)
    late = [
        table for table in found if table.title in ("Held-out questions", "Verification", "Run")
    ]
    parts = []
    for table in found:
        if table is late[0]:  # what the curious look at comes after the examples
            parts += [_differences(report), _training(report)]
        body = as_table(table)
        if table.title == WAY:
            body = _ways(report) + body
        parts.append(section(table.title, table.note, drawn.get(table.title, ""), body))
        if table.title == "Retention" and any(v.bytes for v in report.variants):
            note = "Tuned accuracy with 95% interval; the band is the tuned model's on the host."
            parts.append(section("Size against accuracy", note, plots.size(report), ""))
    said = "".join(f"<li>{escape(remark)}</li>" for remark in remarks(report))
    return page(
        f"edgeft: {report.name}",
        f'<p class="name">edgeft report · {escape(report.name)}</p>\n'
        f"<h1>{_verdict(report.verdict)}</h1>\n"
        f'<p class="lead">{escape(lead(report))}</p>\n'
        + (f'<ul class="remarks">{said}</ul>\n' if said else "")
        + "\n".join(parts),
    )


def page(title: str, body: str) -> str:
    """A whole document in edgeft's style."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _ways(report: Report) -> str:
    """A waterfall for each target, that of the one that agrees least with the host open."""
    most = worst(report)
    shown = []
    for variant in report.variants:
        if not variant.steps:
            continue
        name = place(variant, report.variants)
        causes = "".join(
            f"<li>{escape(c.text)}. <b>To try:</b> {escape(c.remedy)}.</li>" for c in variant.causes
        )
        shown.append(
            f"<details{' open' if variant is most else ''}><summary>{escape(name)} "
            f"<span>{escape(variant.survival.verdict)}</span></summary>\n"
            f"<figure>{plots.waterfall(variant, name)}</figure>\n"
            + (f'<ul class="remarks">{causes}</ul>' if causes else "")
            + "</details>\n"
        )
    return "".join(shown)


def _verdict(verdict: str) -> str:
    """The verdict's words in their colours, and no name broken at its hyphen."""
    said = []
    for part in verdict.split("; "):
        word, space, rest = part.partition(" ")
        names = re.sub(r"\S+-[^\s,]+", r"<span>\g<0></span>", escape(rest))
        said.append(f'<b class="{escape(word)}">{escape(word)}</b>{space}{names}')
    return "; ".join(said)


def section(title: str, note: str, drawing: str, body: str) -> str:
    """A part of a page; ``drawing`` (SVG) and ``body`` are HTML."""
    return (
        f"<section>\n<h2>{escape(title)}</h2>\n"
        + (f'<p class="note">{escape(note)}</p>\n' if note else "")
        + (f"<figure>{drawing}</figure>\n" if drawing else "")
        + body
        + "</section>"
    )


def as_table(table: Table) -> str:
    """A table, its title and note apart."""
    left, right = table.words
    last = len(table.header) - right
    many = len(table.header) > _MANY

    def text(cell: str) -> str:
        # Of many columns intervals go below their figures, or the last ones would be out of sight.
        return escape(cell).replace(" (", "<br>(") if many else escape(cell)

    def cells(tag: str, row: list[str]) -> str:
        kinds = [
            "figure" if left <= i < last else _kind(cell) if i >= last else ""
            for i, cell in enumerate(row)
        ]
        return "".join(
            f'<{tag} class="{escape(kind)}">{text(cell)}</{tag}>'
            if kind
            else f"<{tag}>{text(cell)}</{tag}>"
            for kind, cell in zip(kinds, row, strict=True)
        )

    head = f"<thead><tr>{cells('th', table.header)}</tr></thead>" if any(table.header) else ""
    rows = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    kind = ' class="many"' if many else ""
    return f'<div class="wide"><table{kind}>{head}<tbody>\n{rows}\n</tbody></table></div>\n'


def _kind(cell: str) -> str:
    """How a cell of words at the right looks: a verdict in its colour, or a warning."""
    if cell.startswith(THROTTLED):
        return "lost"
    return f"verdict {cell}" if cell in VERDICTS else ""


def _differences(report: Report) -> str:
    most = worst(report)
    shown = [_differing(v, report, v is most) for v in report.variants if v.differences]
    note = (
        "Questions that the tuned model answers differently on the host and at a target, "
        "those that it only gets right on the host first."
    )
    return section("Where host and target differ", note, "", "".join(shown)) if shown else ""


def _differing(variant: Variant, report: Report, is_open: bool) -> str:
    name = place(variant, report.variants)
    share = percent(1 - variant.survival.agreement)
    pairs = "".join(
        f'<div class="pair"><p>{escape(d.question)}</p><p>Answer: <b>{escape(d.gold)}</b></p>'
        f'<div class="sides">{_side("host", d.host, d.host_correct)}'
        f"{_side(name, d.target, d.target_correct)}</div></div>\n"
        for d in variant.differences
    )
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(name)} "
        f"<span>{share} of the questions, {len(variant.differences)} shown</span></summary>\n"
        f"{pairs}</details>\n"
    )


def _side(name: str, text: str, correct: bool) -> str:
    kind, mark = ("right", "✓ right") if correct else ("wrong", "✗ wrong")
    return (
        f'<div class="{kind}"><h4>{escape(name)} <i>{mark}</i></h4><pre>{escape(text)}</pre></div>'
    )


def _training(report: Report) -> str:
    train = report.train
    if train is None or not (train.loss or train.heldout):
        return ""
    note = "Mean negative log-likelihood of a gold token; held-out questions are never trained on."
    return section("Training", note, plots.loss(train), "")
