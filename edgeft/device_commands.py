"""The commands under edgeft devices: parse, call, print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from edgeft.options import Json

devices = typer.Typer(help="Where artifacts are scored.", invoke_without_command=True)
DeviceName = Annotated[str, typer.Argument(metavar="NAME", help="A device of edgeft devices.")]


@devices.callback()
def _devices(context: typer.Context, as_json: Json = False) -> None:
    """Where artifacts are scored; without a command: the list."""
    from edgeft import catalog

    if context.invoked_subcommand is None:
        rows = [
            (d.name, d.transport, f"{d.user}@{d.host}".lstrip("@"), d.about)
            for d in catalog.devices().values()
        ]
        table(("device", "transport", "host", "about"), rows, as_json)


@devices.command()
def probe(name: DeviceName, as_json: Json = False) -> None:
    """What the device really is, and what is missing there."""
    from edgeft import catalog
    from edgeft import devices as there

    device = catalog.find_device(name)
    facts = there.probe(device)
    missing = there.missing(device, facts)
    if as_json:
        print(json.dumps({**facts, "missing": missing}, indent=2))
        return
    for key, value in facts.items():
        print(f"{key.replace('_', ' '):>20}  {there.shown_value(value)}")
    for line in missing or ["nothing"]:
        print(f"{'missing':>20}  {line}")


@devices.command()
def setup(
    name: DeviceName,
    wheelhouse: Annotated[
        Path | None, typer.Option(help="A folder of wheels to take before the package index's.")
    ] = None,
    no_index: Annotated[
        bool, typer.Option("--no-index", help="Take nothing from a package index.")
    ] = False,
) -> None:
    """Make the device ready: edgeft and the runtimes, without torch; llama.cpp is compiled once."""
    from edgeft import catalog
    from edgeft import devices as there

    there.setup(catalog.find_device(name), wheelhouse, no_index)


@devices.command()
def clean(name: DeviceName) -> None:
    """Remove the bundles that were sent to the device; what was set up stays."""
    from edgeft import catalog, progress
    from edgeft import devices as there

    print(f"{progress.byte_size(there.clean(catalog.find_device(name)))} freed")


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], as_json: bool) -> None:
    """Print rows under their heads."""
    if as_json:
        print(json.dumps([dict(zip(head, row, strict=True)) for row in rows], indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table(*head, box=None, pad_edge=False)
    for row in rows:
        grid.add_row(*map(escape, row))
    Console().print(grid)
