"""The report as Markdown, for a pull request or a model card."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgeft.report.build import Report
from edgeft.report.figures import Table
from edgeft.report.tables import lead, remarks, tables, worst
from edgeft.report.variant import place


def render(report: Report) -> str:
    """The whole report; tables as in every view."""
    parts = page(report.verdict, lead(report), remarks(report), tables(report))
    variant = worst(report)
    if variant and variant.differences:
        name = place(variant, report.variants)
        rows = [
            [d.question, d.gold, _mark(d.host, d.host_correct), _mark(d.target, d.target_correct)]
            for d in variant.differences
        ]
        parts.append(f"## Questions that {escaped(name)} answers differently")
        parts.append(as_table(Table("", "", ["question", "gold", "host", name], rows, (4, 0))))
    return "\n\n".join(parts) + "\n"


def page(title: str, lead: str, remarks: Sequence[str], tables: Sequence[Table]) -> list[str]:
    """The paragraphs of a page, to be joined by empty lines."""
    parts = [f"# {escaped(title)}", escaped(lead)]
    if remarks:
        parts.append("\n".join(f"- {escaped(remark)}" for remark in remarks))
    for table in tables:
        parts.append(f"## {escaped(table.title)}")
        if table.note:
            parts.append(escaped(table.note))
        parts.append(as_table(table))
    return parts


def _mark(text: str, correct: bool) -> str:
    return f"{'✓' if correct else '✗'} {text}"


def as_table(table: Table) -> str:
    """A table, its title and note apart."""
    left, right = table.words
    figures = range(left, len(table.header) - right)
    rule = ["---:" if i in figures else "---" for i in range(len(table.header))]
    header = [escaped(name) or " " for name in table.header]
    rows = [[escaped(cell) for cell in row] for row in table.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def escaped(text: str) -> str:
    """Nothing a model writes may end a cell, become markup or link to an issue."""
    marked = re.sub(r"[\\`*\[\]<>|#~$&]", r"\\\g<0>", text)
    # Inside a word an underscore marks nothing.
    marked = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", marked)
    return " ".join(marked.split())
