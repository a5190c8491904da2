"""The commands: parse, call, print. Heavy libraries are imported inside a command only."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeft import __version__, list_commands, ship_commands, study_commands
from edgeft.device_commands import devices
from edgeft.errors import UserError
from edgeft.options import (
    Adapter,
    Batch,
    Data,
    Json,
    Keep,
    Limit,
    LlamaCpp,
    MaxMemory,
    Method,
    MinRetention,
    MinTokS,
    Model,
    Out,
    RecipeFile,
    RunFolder,
    Seed,
    Set,
    Shots,
    Targets,
    TaskName,
    Threads,
    Track,
    default_out,
    flags,
    recipe_of,
)

if TYPE_CHECKING:
    from edgeft.bench.stage import There
    from edgeft.recipe import BenchSettings
    from edgeft.report.ship import Limits

app = typer.Typer(
    help="Fine-tune a small language model, ship it, and know whether the benefit survived.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(devices, name="devices")

_INTERRUPTED = 130  # what typer makes of Ctrl-C


@app.command()
def run(
    recipe_file: RecipeFile = None,
    out: Out = None,
    model: Model = None,
    task: TaskName = None,
    data: Data = None,
    limit: Limit = None,
    method: Method = None,
    adapter: Adapter = None,
    target: Targets = None,
    shots: Shots = None,
    batch: Batch = None,
    keep: Keep = None,
    track: Track = None,
    seed: Seed = None,
    set_: Set = None,
    llama_cpp: LlamaCpp = None,
    as_json: Json = False,
) -> None:
    """Everything: train, merge, export, bench, report."""
    from edgeft import catalog, pipeline, stages
    from edgeft.train import ranks

    if ranks.is_follower():
        ranks.follow()
        return
    said = flags(model, task, seed, data=data, limit=limit, method=method, keep=keep, shots=shots)
    said |= flags(adapter=adapter, targets=target, llama_cpp=llama_cpp, batch=batch, track=track)
    given = recipe_of(recipe_file, said, set_)
    targets = catalog.find_targets(given.export.targets)
    with stages.opened(out or default_out(recipe_file), given) as this:
        failed = pipeline.run(this, targets, [{"name": name} for name in given.bench.devices])
        _report(this.path, as_json)
        if failed:
            raise failed


@app.command()
def train(
    recipe_file: RecipeFile = None,
    out: Out = None,
    model: Model = None,
    task: TaskName = None,
    data: Data = None,
    limit: Limit = None,
    method: Method = None,
    shots: Shots = None,
    keep: Keep = None,
    track: Track = None,
    seed: Seed = None,
    set_: Set = None,
    for_: Annotated[
        str | None, typer.Option("--for", help="A target: see its rounding in every step.")
    ] = None,
) -> None:
    """Fine-tune, and merge the adapter."""
    from edgeft import stages
    from edgeft.train import ranks

    if ranks.is_follower():
        ranks.follow()
        return
    said = flags(model, task, seed, data=data, limit=limit, method=method, keep=keep, shots=shots)
    given = recipe_of(recipe_file, said | flags(track=track, for_=for_), set_)
    with stages.opened(out or default_out(recipe_file), given) as this:
        stages.prepare(this)
        stages.train(this)
        stages.merged(this)
        print(this.path / "merged")


@app.command()
def export(
    run_folder: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A trained run directory.")
    ] = None,
    target: Targets = None,
    model: Model = None,
    adapter: Adapter = None,
    task: TaskName = None,
    data: Data = None,
    limit: Limit = None,
    shots: Shots = None,
    out: Out = None,
    set_: Set = None,
    llama_cpp: LlamaCpp = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", help="A GGUF of the tuned model made elsewhere: find its faults."),
    ] = None,
) -> None:
    """Export base and tuned, of a run or of any PEFT adapter (--model BASE --adapter DIR)."""
    from edgeft import catalog, stages
    from edgeft.exporters import foreign
    from edgeft.exporters import stage as exporting

    given = None
    if run_folder is None:
        if not (model and adapter):
            raise UserError("give a run directory, or --model BASE --adapter DIR")
        run_folder = out or Path("runs") / adapter.resolve().name
        said = flags(model, task, data=data, limit=limit, shots=shots, adapter=adapter)
        said |= flags(targets=target, llama_cpp=llama_cpp)
        given = recipe_of(None, said, set_)
    elif flags(model, task, data=data, limit=limit, shots=shots, adapter=adapter) or (
        out or set_ or llama_cpp
    ):
        raise UserError("a run directory brings its own model, adapter, task and settings")
    made_elsewhere = [foreign.target_of(path) for path in file or []]
    with stages.opened(run_folder, given) as this:
        wanted = target or ([] if file else this.recipe.export.targets)
        targets = [*catalog.find_targets(wanted), *made_elsewhere]
        stages.prepare(this)
        stages.merged(this)
        exporting.export(this, targets)
        for one in targets:
            print(this.path / "export" / one.name)


@app.command()
def repair(
    run_folder: RunFolder,
    target: Annotated[list[str], typer.Option("--target", help="A GGUF or int4 target.")],
) -> None:
    """Train a little further for a target, as its quantizer will round the weights; export it."""
    from edgeft import repair as repairing
    from edgeft import stages
    from edgeft.exporters import stage as exporting

    with stages.opened(run_folder) as this:
        targets = [repairing.find(name) for name in target]
        stages.prepare(this)
        stages.merged(this)
        exporting.export(this, targets)
        for one in targets:
            print(this.path / "export" / one.name)


@app.command()
def bench(
    folder: Annotated[Path, typer.Argument(metavar="RUN|BUNDLE", help="What to bench.")],
    device: Annotated[
        list[str] | None, typer.Option(help="A device; the run's own ones otherwise.")
    ] = None,
    target: Targets = None,
    out: Annotated[
        Path | None, typer.Option(help="Where a bundle's results go; else BUNDLE/bench.")
    ] = None,
    batch: Batch = None,
    threads: Threads = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions.")] = None,
    in_depth: Annotated[
        bool, typer.Option("--latency", help="Time deep contexts and the memory's bandwidth too.")
    ] = False,
    llama_bench_json: Annotated[
        Path | None, typer.Option(help="Write the times in llama-bench's JSON fields.")
    ] = None,
    max_memory: MaxMemory = None,
    min_tok_s: MinTokS = None,
    min_retention: MinRetention = None,
    as_json: Json = False,
) -> None:
    """Score and time what is exported: every target of a run, or one bundle."""
    from edgeft import catalog, recipe, run, stages
    from edgeft.bench import host
    from edgeft.bench import stage as benching
    from edgeft.report import llama_bench

    sizes = [] if batch is None else [f"{key}={batch}" for key in flags(batch=batch)]
    if in_depth:
        sizes.append(f"bench.latency_depths={list(recipe.DEPTHS)}")
    asked = _limits(max_memory, min_tok_s, min_retention)
    said = benching.overrides(threads, limit)
    if (folder / "manifest.json").is_file():
        settings = recipe.parse("", sizes).bench
        there = benching.there((device or ["local"])[0], said)
        _bench_bundle(folder, out or folder / "bench", there, settings, as_json)
        return
    # The run keeps it, so that the same command without it changes nothing.
    given = recipe.load(run.check(folder) / "recipe.yaml", sizes) if sizes else None
    with stages.opened(folder, given) as this:
        host.score(this)
        exported = {bundle.parent.name for bundle in stages.bundles(this)}
        files = [name for name in target or [] if name in exported]
        unknown = [name for name in target or [] if name not in exported]
        names = [*files, *(one.name for one in catalog.find_targets(unknown, every=True))]
        devices = device or this.recipe.bench.devices
        failed = benching.bench_devices(this, devices, said, names or None)
        _report(this.path, as_json, asked)
        if llama_bench_json:
            llama_bench.write(this.path, llama_bench_json)
        if failed:
            raise failed


def _bench_bundle(
    bundle: Path, out: Path, there: There, settings: BenchSettings, as_json: bool
) -> None:
    from edgeft import survival
    from edgeft.bench import stage as benching
    from edgeft.report import reading
    from edgeft.report.results import read_results

    benching.bench_bundle(bundle, out, settings, there)
    score = survival.score([r for r in read_results(out) or [] if not r.group])
    facts = asdict(score) | {"read": reading.counted(out)}
    facts |= json.loads((out / "latency.json").read_text())
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print("\n".join(f"{name:>16}  {value}" for name, value in facts.items()))


@app.command()
def report(
    run_folder: RunFolder,
    max_memory: MaxMemory = None,
    min_tok_s: MinTokS = None,
    min_retention: MinRetention = None,
    as_json: Json = False,
) -> None:
    """Write report.json, report.md and report.html, print the verdict and what to ship."""
    from edgeft import run as runs

    asked = _limits(max_memory, min_tok_s, min_retention)
    _report(runs.check(run_folder), as_json, asked)


def _limits(memory: str | None, tok_s: float | None, retention: float | None) -> Limits:
    from edgeft.report.ship import Limits, megabytes

    return Limits(None if memory is None else megabytes(memory), tok_s, retention)


def _report(path: Path, as_json: bool, limits: Limits | None = None) -> None:
    from rich.console import Console

    from edgeft import report as reports
    from edgeft.report import terminal

    result = reports.write(path, limits)
    if as_json:
        print((path / "report.json").read_text(), end="")
    else:
        terminal.show(result, Console())
        print(f"{path / 'report.html'}")


for command in (
    study_commands.study,
    study_commands.recommend,
    ship_commands.check,
    ship_commands.card,
    list_commands.targets,
    list_commands.tasks,
    list_commands.recipes,
    list_commands.prompt,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"edgeft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point: a user's mistake is one line and exit code 2."""
    from edgeft import child

    signal.signal(signal.SIGINT, child.interrupt)
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"edgeft: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print("edgeft: stopped; the same command goes on from here", file=sys.stderr)
        raise
