"""The commands about many runs: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeft.errors import UserError
from edgeft.options import Json, MaxMemory, MinTokS


def study(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY", help="A YAML file.")],
    out: Annotated[Path | None, typer.Option(help="The study's folder; else runs/<name>.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and what it takes.")
    ] = False,
    executor: Annotated[
        str, typer.Option(help="local: one cell after the other here; ray: on a cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="Of the Ray cluster; else $RAY_ADDRESS, else one is started here."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Many runs from one file (models, tasks, methods, seeds, targets, devices), and one page."""
    from edgeft.study import estimate, page, settings, stage

    if executor not in stage.EXECUTORS:
        raise UserError(f"--executor is {' or '.join(stage.EXECUTORS)}, not '{executor}'")
    given = settings.load(study_file)
    path = out or Path("runs") / study_file.stem
    plan = stage.plan(path, given)  # what is wrong is said before anything is written
    if dry_run:
        estimate.show(plan, estimate.estimate(plan), as_json)
        return
    with stage.opened(path, given):
        plan = stage.plan(path, given)
        outcomes = stage.execute(plan, executor, address)
        page.show(path, page.write(path, plan.cells), as_json)
    failed = [found.id for found in outcomes if found.state != "done"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(outcomes)} cells failed ({', '.join(failed)}): "
            "the same command tries them again"
        )


def recommend(
    study_folder: Annotated[
        list[Path] | None, typer.Argument(metavar="STUDY...", help="Folders or study.json files.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where it is to run.")] = "local",
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Only this task.")] = None,
    max_memory: MaxMemory = None,
    min_tok_s: MinTokS = None,
    parameters: Annotated[
        str | None,
        typer.Option(help="Of your model, as 360M: for the rule where nothing is known."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Which method and which target, what to expect, and on what evidence."""
    from edgeft import recommend as recommending
    from edgeft.report.ship import Limits, megabytes

    limits = Limits(None if max_memory is None else megabytes(max_memory), min_tok_s, None)
    found = recommending.recommend(
        study_folder or [], device, limits, model=model, task=task, parameters=parameters
    )
    recommending.show(found, as_json)
