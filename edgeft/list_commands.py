"""The commands that show what there is: parse, call, print."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from edgeft.device_commands import table
from edgeft.options import (
    Data,
    Json,
    Model,
    RecipeFile,
    Seed,
    Set,
    Shots,
    TaskName,
    flags,
    recipe_of,
)


def targets(as_json: Json = False) -> None:
    """What can be exported."""
    from edgeft import catalog

    rows = [(t.name, t.runtime, t.about) for t in catalog.targets().values()]
    table(("target", "runtime", "about"), rows, as_json)


def tasks(as_json: Json = False) -> None:
    """Where questions come from."""
    from edgeft import tasks as known

    table(("task", "about"), [(t.name, t.about) for t in known.tasks().values()], as_json)


def recipes(as_json: Json = False) -> None:
    """The recipes that come with edgeft, by the name that edgeft run takes."""
    from edgeft import catalog

    rows = [(name, catalog.about(path)) for name, path in catalog.recipes().items()]
    table(("recipe", "about"), rows, as_json)


def prompt(
    recipe_file: RecipeFile = None,
    model: Model = None,
    task: TaskName = None,
    data: Data = None,
    shots: Shots = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="Questions of each split.")
    ] = 1,
    seed: Seed = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Exactly what the model sees: text, token ids, and in colour what training learns from."""
    from edgeft import preview

    said = flags(model, task, seed, data=data, shots=shots)
    shown = preview.preview(recipe_of(recipe_file, said, set_), count)
    if as_json:
        print(json.dumps(shown, indent=2, ensure_ascii=False))
    else:
        preview.show(shown)
