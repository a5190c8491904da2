"""Repair: train the tuned weights a little further for one target, as its quantizer rounds them.

A target with a ``[repair]`` table gets weights of its own. They are good there and not elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgeft import catalog, child, model, stages
from edgeft.allocator import allocator
from edgeft.catalog import Target
from edgeft.errors import UserError, near
from edgeft.exporters import merge, onnx
from edgeft.exporters.storage import Storage, gguf_storage, onnx_storage
from edgeft.progress import Update
from edgeft.stages import Run, cached
from edgeft.train.settings import TrainSettings

# What a [repair] table need not say; any key of a recipe's train settings may stand there.
DEFAULTS: dict[str, Any] = {
    "max_steps": 50,
    "batch_size": 16,
    "lr": 5e-4,
    "heldout_points": 3,
    "heldout_answers": 0,
}
ROUNDED = "rounded"  # false: as many ordinary steps, to compare with
_ALONE = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "-1"}  # whatever torchrun said


def settings_of(target: Target) -> TrainSettings:
    """How a target is repaired.

    Raises:
        UserError: its ``[repair]`` table has an unknown key or value.
    """
    table = dict(target.repair or {})
    rounded = table.pop(ROUNDED, True)
    for key in ("lora", "imatrix"):
        if target.settings.get(key) and (rounded or key == "lora"):
            raise UserError(f"target {target.name}: [repair] does not go with {key}")
    known = [*vars(TrainSettings()), ROUNDED]
    for key in table:
        if key not in known:
            raise UserError(f"target {target.name}: unknown key 'repair.{key}'{near(key, known)}")
    try:
        said = {**DEFAULTS, **table, "target": target.name if rounded else None}
        return TrainSettings(**said)
    except (TypeError, ValueError) as error:
        raise UserError(f"target {target.name}: repair: {error}") from error


def find(name: str) -> Target:
    """The target that repairs the one of that name: itself, or ``<name>-repaired``.

    Raises:
        UserError: there is none.
    """
    known = catalog.targets()
    found = [known[n] for n in (name, f"{name}-repaired") if n in known]
    if not found:
        raise UserError(f"unknown target '{name}'{near(name, list(known))}")
    if found[-1].repair is None:
        raise UserError(
            f"nothing says how to repair {name}: give export/{name}-repaired.toml, {name} with a "
            "table [repair]"
        )
    return found[-1]


def repaired(this: Run, target: Target) -> Path:
    """The tuned weights, trained further for the target: a model folder.

    Raises:
        UserError: training failed.
    """
    from edgeft import train as training

    place = this.path / "repair" / target.name
    settings = settings_of(target)
    plan = plan_of(this, target) if settings.target else None
    tuned, data = this.folder("tuned"), this.path / "data"
    facts = stages.training_facts(this)
    seed = this.recipe.seed + 1  # other batches than the last ones
    inputs = {
        "base": this.weights_id("tuned"),
        "data": this.sha256([data / "train.jsonl", data / "heldout.jsonl"]),
        "settings": asdict(settings),
        "plan": plan,
        "seed": seed,
    }

    def train(out: Path, update: Update) -> None:
        training.train(tuned, data, out, settings, facts, seed, update, _ALONE, plan)

    cached(f"repair for {target.name}", place / "train", inputs, train)
    adapter = place / "train" / "adapter"
    files = [adapter / "adapter_model.safetensors", adapter / "adapter_config.json"]

    def merged(out: Path, _: Update) -> None:
        paths = {"base": tuned, "adapter": adapter, "heldout": data / "heldout.jsonl", "out": out}
        request: dict[str, Any] = {name: str(path) for name, path in paths.items()}
        request |= {"kinds": [merge.ORIGINAL], "dtype": "auto"}
        child.run("edgeft.exporters.merge", request, allocator())

    inputs = {"base": this.weights_id("tuned"), "adapter": this.sha256(files)}
    cached(f"merge for {target.name}", place / "merged", inputs, merged)
    return place / "merged"


def facts(this: Run, target: Target) -> dict[str, Any]:
    """What a bundle says of its weights: steps, whether rounded, held-out loss by step."""
    known = json.loads((this.path / "repair" / target.name / "train" / "train.json").read_text())
    names = ("steps", "kept_step", "examples", "seconds", "tokens_per_s", "heldout")
    return {"rounded": bool(settings_of(target).target), **{name: known[name] for name in names}}


def plan_of(this: Run, target: Target) -> dict[str, Storage]:
    """How the target's exported base stores each matrix, by the model's own names.

    Raises:
        UserError: it cannot be exported, or stores nothing rounded.
    """
    from edgeft.exporters import stage

    plain = replace(target, repair=None)
    artifact = stage.bundle_of(this, plain, "base")
    keys = model.matrices(this.folder("base"))
    if target.format == "gguf":
        layers = model.config(this.folder("base"))["num_hidden_layers"]
        plan = gguf_storage(artifact, layers, keys)
        plan = {key: how for key, how in plan.items() if how["ggml"] not in ("F16", "F32")}
    elif target.format == "onnx":
        given = onnx.settings_of(target.name, target.settings)
        plan = onnx_storage(artifact, onnx.rounding_of(given), keys)
    else:
        plan = {}
    if not plan:
        raise UserError(f"{target.name} rounds no weights to train for")
    return plan
