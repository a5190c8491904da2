"""The report: one result object, and terminal, Markdown, HTML and JSON views of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from edgeft.errors import UserError
from edgeft.report import html, markdown
from edgeft.report.build import Report, as_json, build
from edgeft.report.ship import Limits

__all__ = ["Limits", "Report", "as_json", "build", "write", "write_views"]


def write(run: Path, limits: Limits | None = None) -> Report:
    """Build the report of a run directory and write report.json, report.md and report.html.

    Args:
        limits: what a file to ship has to meet.

    Raises:
        UserError: see :func:`build`; or a file cannot be written.
    """
    report = build(run, limits)
    views = {
        "report.json": json.dumps(as_json(report), indent=2, ensure_ascii=False, allow_nan=False)
        + "\n",
        "report.md": markdown.render(report),
        "report.html": html.render(report),
    }
    write_views(run, views)
    return report


def write_views(folder: Path, views: Mapping[str, str]) -> None:
    """Write files by name, each whole or not at all.

    Raises:
        UserError: one cannot be written.
    """
    for name, text in views.items():
        path = folder / name
        temporary = path.with_name(name + ".tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
