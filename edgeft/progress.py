"""Progress of long work: a bar on a terminal, plain lines when piped; always on standard error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Update = Callable[[int, int, str], None]
"""``update(done, total, text)``"""

console = Console(stderr=True, highlight=False)
_LINE_EVERY_S = 10.0


def say(text: str) -> None:
    """One line about what was done or found up to date."""
    console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def shown(title: str) -> Iterator[Update]:
    """Show the work inside; when it ends well, one line with the time it took stays."""
    start = time.monotonic()
    with _bar(title) if console.is_terminal else _lines(title) as (update, last):
        yield update
    took = time.monotonic() - start
    say(f"✓ {title}  {took:.0f} s{'  ' + last[0] if last[0] else ''}")


@contextlib.contextmanager
def _bar(title: str) -> Iterator[tuple[Update, list[str]]]:
    last = [""]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", style="dim"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(title, total=1, text="")

        def update(done: int, total: int, text: str) -> None:
            last[0] = text
            bars.update(bar, completed=done, total=max(total, 1), text=text)

        yield update, last


@contextlib.contextmanager
def _lines(title: str) -> Iterator[tuple[Update, list[str]]]:
    last, printed = [""], time.monotonic()

    def update(done: int, total: int, text: str) -> None:
        nonlocal printed
        last[0] = text
        if time.monotonic() - printed >= _LINE_EVERY_S:
            printed = time.monotonic()
            say(f"  {title}  {done}/{total}  {text}".rstrip())

    yield update, last


def byte_size(size: float) -> str:
    """Bytes as people read them, 10^6 to the MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
