"""The commands that come after a report: a check for CI, a model card. Parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgeft.options import Json, RunFolder, Targets


def check(
    run_folder: RunFolder,
    min_retention: Annotated[
        float | None,
        typer.Option(help="The retention to reach, as 0.9; without it: the verdict is survives."),
    ] = None,
    confident: Annotated[
        bool, typer.Option("--confident", help="Its interval's lower end must reach it.")
    ] = False,
    target: Targets = None,
    device: Annotated[list[str] | None, typer.Option(help="A device. Repeatable.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML there.")] = None,
    as_json: Json = False,
) -> None:
    """For CI: exit code 0 if every target keeps enough of the benefit, 1 if not; nothing is run."""
    from edgeft import check as checking

    wanted = checking.Wanted(min_retention, confident)
    found = checking.check_run(run_folder, wanted, target, device)
    print(json.dumps(checking.as_json(found), indent=2) if as_json else found.line)
    if junit:
        checking.write_junit(found, junit)
    checking.append_summary(found)
    if not found.passed:
        raise typer.Exit(1)


def card(
    run_folder: RunFolder,
    target: Targets = None,
    out: Annotated[Path | None, typer.Option(help="The card's folder; else RUN/card.")] = None,
    repo_id: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Where it will be on the hub.")
    ] = None,
) -> None:
    """A Hugging Face model card and the files it is about, in a folder to upload."""
    from edgeft import card as cards

    print(cards.write(run_folder, target or [], out, repo_id))
