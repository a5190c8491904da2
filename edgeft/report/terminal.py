"""The report in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from edgeft.report.build import Report
from edgeft.report.figures import Table
from edgeft.report.tables import lead, remarks, tables

STYLES = {
    "survives": "bold green",
    "partial": "bold yellow",
    "lost": "bold red",
    "reversed": "bold red",
    "no-benefit": "bold red",
    "negative-transfer": "bold red",
    "inconclusive": "bold cyan",
}
_WIDE = 100
_MANY = 8  # columns


def show(report: Report, console: Console) -> None:
    """Print the verdict, then every table."""
    console.print(_verdict(report.verdict))
    console.print(lead(report), markup=False, highlight=False)
    for remark in remarks(report):
        console.print(remark, markup=False, highlight=False)
    for table in tables(report):
        console.print()
        console.print(grid(table, console.width))


def _verdict(verdict: str) -> Text:
    text = Text(verdict, style="bold")
    for part in verdict.split("; "):
        word = part.partition(" ")[0]
        if word in STYLES:
            text.highlight_words([word], STYLES[word])
    return text


def grid(table: Table, width: int) -> Grid:
    """A table as rich prints it, for a terminal so wide."""
    rows = table.rows
    if width < _WIDE or len(table.header) > _MANY:  # intervals go below their figures
        rows = [[cell.replace(" (", "\n(") for cell in row] for row in rows]
    if _needed([table.header, *rows]) > width:  # or stay out: the other views have them
        rows = [[cell.partition("\n(")[0] for cell in row] for row in rows]
    fits = _needed([table.header, *rows]) <= width
    made = Grid(
        title=Text(table.title, style="bold"),
        title_justify="left",
        show_header=any(table.header),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    left, right = table.words
    for i, name in enumerate(table.header):
        words = i < left or i >= len(table.header) - right
        made.add_column(
            name, justify="left" if words else "right", overflow="fold", no_wrap=i == 0 and fits
        )
    for row in rows:
        made.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    return made


def _needed(rows: Sequence[Sequence[str]]) -> int:
    """Characters across, two between columns."""
    columns = zip(*rows, strict=True)
    widest = (max(len(line) for cell in cells for line in cell.split("\n")) for cells in columns)
    return sum(width + 2 for width in widest)
