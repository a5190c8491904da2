"""The export stage: every target for base and tuned, verified, as bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeft import model, repair, run
from edgeft.catalog import Target
from edgeft.errors import UserError
from edgeft.exporters import auto, check_supported, foreign, gguf_lora, makers
from edgeft.exporters.makers import Order
from edgeft.exporters.weights import bytes_per_token
from edgeft.progress import Update, say
from edgeft.stages import WEIGHTS, Run, cached, checkout, context, new_tokens, reference


def export(this: Run, targets: list[Target], weights: Sequence[str] = WEIGHTS) -> None:
    """Every target for base and tuned; a target that fails does not keep the others.

    Raises:
        UserError: at the end, if any target failed.
    """
    check_supported(this.folder("base"), targets, checkout(this))
    gguf_lora.check_supported(targets, this.recipe, this.adapter)
    foreign.check_names(targets)
    failed: dict[str, str] = {}
    for name in weights:
        ready: set[Path] = set()
        for target in targets:
            if target.name in failed:
                continue
            try:
                _export(this, target, name, ready)
            except UserError as error:
                failed[target.name] = str(error)
                say(f"✗ export {target.name} {name}: {error}")
    if len(failed) == 1:
        [(name, reason)] = failed.items()
        raise UserError(f"{name} was not exported: {reason}")
    if failed:
        raise UserError(f"not exported: {', '.join(failed)}; the reasons are above")


def bundle_of(this: Run, target: Target, weights: str) -> Path:
    """Export one target for base or tuned, if it is not yet; the artifact's path."""
    return _export(this, target, weights, set())


def _export(this: Run, target: Target, weights: str, ready: set[Path]) -> Path:
    """``ready``: what several targets are made of (16-bit GGUF, importance matrix), once done."""
    order = _order(this, target, weights)
    if target.format == "gguf" and order.gguf.auto:
        order = _with_types(this, order, ready)
    if order.adapted:
        needed = {this.path / "gguf" / "lora": makers.adapter}
    elif target.format == "gguf":
        needed = {this.path / "gguf" / order.source: makers.sixteen_bit}
        if order.gguf.imatrix is True:
            needed[this.path / "imatrix" / order.source] = makers.measure
    else:
        needed = {}
    for place, make in needed.items():
        if place not in ready:
            make(this, order, place)
            ready.add(place)
    return _bundle(this, order)


def _order(this: Run, target: Target, weights: str) -> Order:
    data = this.path / "data"
    stop = json.loads((data / "data.json").read_text())["stop"]
    own = weights == "tuned" and target.repair is not None
    folder = repair.repaired(this, target) if own else this.folder(weights)
    source = target.name if own else weights
    return Order(target, weights, folder, source, data / "evaluation.jsonl", stop)


def _with_types(this: Run, order: Order, ready: set[Path]) -> Order:
    """The order with the types that were chosen by the tuned weights, for base and tuned alike."""
    if not this.folder("tuned").is_dir():
        raise UserError(f"{order.target.name} chooses types by the tuned weights: train first")
    tuned = _order(this, replace(order.target, repair=None), "tuned")
    place = this.path / "gguf" / tuned.source
    if place not in ready:
        makers.sixteen_bit(this, tuned, place)
        ready.add(place)
    name, source = order.target.name, place / "model.gguf"
    return replace(order, auto=auto.choose(this, name, order.gguf, tuned.folder, source))


def _bundle(this: Run, order: Order) -> Path:
    target, weights, evaluation = order.target, order.weights, order.evaluation
    words = this.path / "data" / "tokenizer" / "tokenizer.json"
    make = {
        "gguf": makers.gguf_file,
        "onnx": makers.onnx_folder,
        "onnx-portable": makers.portable_folder,
    }[target.format]
    if target.adapter:
        make = makers.gguf_with_lora
    artifact = "model.gguf" if target.format == "gguf" and not target.adapter else "model"
    manifest = {
        "schema": 1,
        "model": this.recipe.model,
        "weights": weights,
        "made_from": this.weights_id(weights),
        "target": target.name,
        "runtime": target.runtime,
        "artifact": artifact,
        "task": this.recipe.task.name,
        "pattern": this.recipe.task.pattern,
        "max_new_tokens": new_tokens(this),
        "stop": order.stop,
        "context": context(this),
    }
    if order.folder != this.folder(weights):
        manifest["repair"] = repair.facts(this, target)
    if target.format == "gguf" and order.gguf.file and weights == "tuned":
        manifest["elsewhere"] = Path(order.gguf.file).name
    if order.auto:
        manifest["auto"] = {name: order.auto[name] for name in ("groups", "loss")}
    if order.adapted:
        source = makers.parts(this, order)
    elif target.format == "gguf":
        source = [this.path / "gguf" / order.source / "model.gguf"]
    else:
        source = model.weight_files(order.folder)
    compared = reference(this) if weights == "tuned" else None
    inputs = {
        "source": this.sha256([*source, evaluation, words, *([compared] if compared else [])]),
        "settings": target.settings,
        "manifest": manifest,
    }
    if target.format == "gguf":
        inputs |= makers.gguf_inputs(this, order)
    if target.format == "onnx-portable":
        inputs |= makers.portable_inputs(order)

    def work(out: Path, _: Update) -> None:
        verified = make(this, order, out / artifact)
        shutil.copyfile(evaluation, out / "evaluation.jsonl")
        shutil.copyfile(words, out / "tokenizer.json")
        if compared:
            shutil.copyfile(compared, out / compared.name)
        files = {
            str(path.relative_to(out)): {"bytes": path.stat().st_size, "sha256": run.sha256(path)}
            for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != "stage.json"
        }
        found = {
            "files": files,
            "verify": verified,
            "bytes_per_token": bytes_per_token(out / artifact),
        }
        run.write_json(out / "manifest.json", {**manifest, **found})

    out = this.path / "export" / target.name / weights
    try:
        cached(f"export {target.name} {weights}", out, inputs, work)
    except UserError:
        shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
        raise
    return out / artifact
