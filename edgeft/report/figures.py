"""A table of text, and figures as text: every view shows the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeft.survival import Interval

NONE = "-"


@dataclass(frozen=True)
class Table:
    """Rows of text. ``words``: how many columns, from the left and at the right, are not figures."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    words: tuple[int, int] = (1, 0)


def percent(share: float) -> str:
    """0.775 as ``77.5%``."""
    return f"{100 * share:.1f}%"


def points(difference: float) -> str:
    """0.6 as ``+60.0``."""
    return f"{100 * difference:+z.1f}"


def points_interval(ci: Interval) -> str:
    """(0.5, 0.69) as ``+50.0 to +69.0``."""
    return f"{points(ci[0])} to {points(ci[1])}"


def ratio_interval(ci: Interval) -> str:
    """(0.72, 0.93) as ``0.72 to 0.93``."""
    return f"{ci[0]:z.2f} to {ci[1]:z.2f}"


def megabytes(size: int | None) -> str:
    """Bytes as ``105.5 MB``, 10^6 bytes to the MB."""
    return NONE if size is None else f"{size / 1e6:.1f} MB"


def number(value: Any, form: str) -> str:
    """A figure, or a dash where there is none."""
    return NONE if value is None else form.format(value)
