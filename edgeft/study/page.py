"""The study's page: study.json, study.md and study.html, views of one result object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console

from edgeft.report import html, markdown, terminal, write_views
from edgeft.study import plots
from edgeft.study.findings import findings, lead
from edgeft.study.results import StudyResult, as_json, collect
from edgeft.study.settings import Cell
from edgeft.study.tables import tables

JSON = "study.json"


def write(study: Path, cells: Sequence[Cell]) -> StudyResult:
    """Collect what is done, and write the three views into the study's folder.

    Raises:
        UserError: results are damaged, or a file cannot be written.
    """
    found = collect(study, cells)
    views = {
        JSON: json.dumps(as_json(found), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "study.md": _markdown(found),
        "study.html": _html(found),
    }
    write_views(study, views)
    return found


def show(study: Path, found: StudyResult, json_only: bool) -> None:
    """Print the page, or its JSON."""
    if json_only:
        print((study / JSON).read_text(), end="")
        return
    console = Console()
    console.print(lead(found), markup=False, highlight=False)
    for said in findings(found):
        console.print(said, markup=False, highlight=False)
    for table in tables(found):
        console.print()
        console.print(terminal.grid(table, console.width))
    print(study / "study.html")


def _markdown(found: StudyResult) -> str:
    parts = markdown.page(found.name, lead(found), findings(found), tables(found))
    return "\n\n".join(parts) + "\n"


def _html(found: StudyResult) -> str:
    said = "".join(f"<li>{escape(line)}</li>" for line in findings(found))
    parts = [
        f'<p class="name">edgeft study · {escape(found.name)}</p>\n'
        f"<h1>{escape(lead(found))}</h1>\n" + (f'<ul class="remarks">{said}</ul>\n' if said else "")
    ]
    parts += [
        html.section(title, note, drawing, "") for title, note, drawing in plots.drawings(found)
    ]
    parts += [html.section(t.title, t.note, "", html.as_table(t)) for t in tables(found)]
    return html.page(f"edgeft: {found.name}", "\n".join(parts))
