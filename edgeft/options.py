"""The options that several commands share, and the recipe that they add up to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edgeft.recipe import Recipe

RecipeFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or a name of edgeft recipes; none: defaults."
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Out = Annotated[Path | None, typer.Option(help="The run directory.")]
Model = Annotated[str | None, typer.Option(help="Hub id, model folder, GGUF file or smollm2-135m.")]
TaskName = Annotated[
    str | None, typer.Option("--task", help="A task of edgeft tasks, or your own as a YAML file.")
]
Data = Annotated[
    str | None, typer.Option(help="Where the questions are: a file, a folder or a hub id.")
]
Limit = Annotated[int | None, typer.Option(help="At most so many questions of each split.")]
Batch = Annotated[
    int | None, typer.Option(help="Sequences in one batch; 1 leaves nothing to rounding.")
]
Method = Annotated[str | None, typer.Option(help="How to train: full, lora, dora or qlora.")]
Keep = Annotated[str | None, typer.Option(help="Weights to keep: best (held-out loss) or last.")]
Shots = Annotated[int | None, typer.Option(help="Worked examples before each evaluation question.")]
Track = Annotated[
    str | None, typer.Option(help="Follow training in tensorboard, wandb or trackio too.")
]
Adapter = Annotated[Path | None, typer.Option(help="A PEFT adapter, instead of training.")]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="A target or a format; see edgeft targets. Repeatable."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of questions and training.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as train.lr=1e-4."),
]
LlamaCpp = Annotated[
    Path | None, typer.Option("--llama-cpp", help="A llama.cpp checkout: use its converter.")
]
Threads = Annotated[
    str | None, typer.Option(metavar="N|auto", help="CPU threads; auto: the fastest number.")
]
MaxMemory = Annotated[
    str | None, typer.Option(metavar="MB", help="What to ship: peak memory, as 300 or 1.5GB.")
]
MinTokS = Annotated[float | None, typer.Option(help="What to ship: tokens a second in decoding.")]
MinRetention = Annotated[float | None, typer.Option(help="What to ship: retention.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")]


def flags(
    model: str | None = None,
    task: str | None = None,
    seed: int | None = None,
    *,
    adapter: Path | None = None,
    batch: int | None = None,
    data: str | None = None,
    for_: str | None = None,
    keep: str | None = None,
    limit: int | None = None,
    llama_cpp: Path | None = None,
    method: str | None = None,
    shots: int | None = None,
    targets: list[str] | None = None,
    track: str | None = None,
) -> dict[str, Any]:
    """What options say, by the recipe's keys; those that were not given are left out."""
    said = {
        "model": model,
        "task.name": task,
        "task.data": data,
        "task.limit": limit,
        "task.shots": shots,
        "adapter": str(adapter) if adapter else None,
        "train.method": method,
        "train.keep": keep,
        "train.target": for_,
        "track": track,
        "export.targets": targets,
        "export.llama_cpp": str(llama_cpp) if llama_cpp else None,
        "bench.parallel": batch,
        "bench.host_parallel": batch,
        "seed": seed,
    }
    return {key: value for key, value in said.items() if value is not None}


def recipe_of(file: Path | None, said: dict[str, Any], overrides: list[str] | None) -> Recipe:
    """A recipe file or the default recipe, with what options and ``--set`` say, checked.

    Raises:
        UserError: something in it is wrong.
    """
    from edgeft import catalog, recipe

    settings = [f"{key}={json.dumps(value)}" for key, value in said.items()] + (overrides or [])
    path = catalog.find_recipe(file) if file else None
    given = recipe.completed(recipe.load(path, settings) if path else recipe.parse("", settings))
    catalog.find_targets([*given.export.targets, *filter(None, [given.train.target])])
    return given


def default_out(file: Path | None) -> Path:
    """The run directory of a recipe, if none is named."""
    from edgeft import catalog

    if file is None:
        return Path("runs/default")
    return Path("runs") / (file.stem if file.suffix in catalog.YAML else file.name)
