"""The export stage: every target for base and tuned, verified, as bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeft import child, model, repair, run
from edgeft.allocator import allocator
from edgeft.catalog import Target
from edgeft.errors import UserError
from edgeft.exporters import (
    auto,
    check_supported,
    foreign,
    gguf_lora,
    gguf_settings,
    imatrix,
    merge,
    onnx,
    portable,
)
from edgeft.exporters.faults import WEIGHTS as WRONG_WEIGHTS
from edgeft.exporters.gguf_settings import GgufSettings
from edgeft.exporters.weights import bytes_per_token
from edgeft.progress import Update, say
from edgeft.stages import WEIGHTS, Run, cached, checkout, context, new_tokens, reference


@dataclass(frozen=True)
class Order:
    """One artifact to make.

    Attributes:
        weights: ``base`` or ``tuned``.
        folder: the model folder with these weights.
        evaluation: the questions as token ids.
        stop: ids that end a completion.
        source: the folder in ``gguf/`` with these weights in 16 bits.
        auto: what :func:`edgeft.exporters.auto.choose` returned, if the target asks for it.
    """

    target: Target
    weights: str
    folder: Path
    source: str
    evaluation: Path
    stop: list[int]
    auto: dict[str, Any] | None = None

    @property
    def types(self) -> dict[str, str]:
        """Of a GGUF target: given, or chosen."""
        return dict(self.auto["types"] if self.auto else self.gguf.types)

    @property
    def gguf(self) -> GgufSettings:
        """Of a GGUF target."""
        return gguf_settings.settings_of(self.target.name, self.target.settings)

    @property
    def adapted(self) -> bool:
        """Whether it is base's weights with the adapter beside them."""
        return self.target.adapter and self.weights == "tuned"


def export(this: Run, targets: list[Target], weights: Sequence[str] = WEIGHTS) -> None:
    """Every target for base and tuned; a target that fails does not keep the others.

    Raises:
        UserError: at the end, if any target failed.
    """
    check_supported(this.folder("base"), targets, checkout(this))
    gguf_lora.check_supported(targets, this.recipe, this.adapter)
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
        needed = {this.path / "gguf" / "lora": _adapter}
    elif target.format == "gguf":
        needed = {this.path / "gguf" / order.source: _sixteen_bit}
        if order.gguf.imatrix is True:
            needed[this.path / "imatrix" / order.source] = _measure
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
        _sixteen_bit(this, tuned, place)
        ready.add(place)
    name, source = order.target.name, place / "model.gguf"
    return replace(order, auto=auto.choose(this, name, order.gguf, tuned.folder, source))


def _bundle(this: Run, order: Order) -> Path:
    target, weights, evaluation = order.target, order.weights, order.evaluation
    words = this.path / "data" / "tokenizer" / "tokenizer.json"
    make = {"gguf": _gguf, "onnx": _onnx, "onnx-portable": _portable}[target.format]
    if target.adapter:
        make = _gguf_lora
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
        source = _parts(this, order)
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
        inputs |= _gguf_inputs(this, order)

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


def _gguf(this: Run, order: Order, artifact: Path) -> dict[str, Any]:
    source = this.path / "gguf" / order.source / "model.gguf"
    ftype = order.gguf.ftype
    if order.gguf.file and order.weights == "tuned":
        return _elsewhere(this, order, artifact)
    if ftype == "F16":
        _link(source, artifact)
        verified: dict[str, Any] = json.loads((source.parent / "verify.json").read_text())
        return verified
    _quantize(this, order, artifact)
    exact = ftype in gguf_settings.UNQUANTIZED
    return _verify(order, artifact, exact=exact, reference=None if exact else source)


def _quantize(this: Run, order: Order, out: Path) -> None:
    matrix = _matrix(this, order)
    request = {
        "source": str(this.path / "gguf" / order.source / "model.gguf"),
        "out": str(out),
        "ftype": order.gguf.ftype,
        "imatrix": str(matrix) if matrix else None,
        "types": order.types,
    }
    child.run("edgeft.exporters.quantize", request)


def _elsewhere(this: Run, order: Order, artifact: Path) -> dict[str, Any]:
    """A file made elsewhere, with all that is wrong with it: that is what is to be found out."""
    shutil.copyfile(Path(order.gguf.file or ""), artifact)
    tuned, base = (this.path / "gguf" / name / "model.gguf" for name in ("tuned", "base"))
    exact = order.gguf.ftype in gguf_settings.UNQUANTIZED
    expected = tuned
    if not exact:
        expected = artifact.with_name("expected.gguf")
        _quantize(this, order, expected)
    found = foreign.diagnose(artifact, tuned, base, expected)
    if expected != tuned:
        expected.unlink()
    verified = _verify(order, artifact, exact=exact, strict=False)
    # That the logits differ says less than why they do.
    seen = [f for f in verified["faults"] if not (found["faults"] and f["kind"] == WRONG_WEIGHTS)]
    return {**verified, "faults": [*found["faults"], *seen], "tensors": found["tensors"]}


def _gguf_inputs(this: Run, order: Order) -> dict[str, Any]:
    """What a bundle depends on besides its source; nothing, so that old bundles stay valid."""
    inputs: dict[str, Any] = {}
    if matrix := _matrix(this, order):
        inputs["imatrix"] = this.sha256([matrix])
    if order.gguf.file:
        inputs["file"] = this.sha256([Path(order.gguf.file)])
    if order.types:  # their order counts, which the settings' fingerprint does not see
        inputs["types"] = list(order.types.items()) if order.auto else list(order.types)
    return inputs


def _matrix(this: Run, order: Order) -> Path | None:
    """The importance matrix that a target wants: the user's own, the run's, or none."""
    wanted = order.gguf.imatrix
    if isinstance(wanted, str):
        return Path(wanted).expanduser()
    return this.path / "imatrix" / order.source / "imatrix.gguf" if wanted else None


def _measure(this: Run, order: Order, out: Path) -> None:
    """The importance matrix from the training questions, one for all targets."""
    questions = this.path / "data" / "train.jsonl"
    inputs = {
        "model": this.sha256(model.weight_files(order.folder)),
        "data": this.sha256([questions]),
        "questions": imatrix.QUESTIONS,
        "tokens": imatrix.TOKENS,
        "seed": this.recipe.question_seed,
    }

    def work(out: Path, update: Update) -> None:
        request = {
            "folder": str(order.folder),
            "questions": str(questions),
            "seed": this.recipe.question_seed,
            "dataset": f"{this.recipe.task.name}/{questions.name}",
            "out": str(out / "imatrix.gguf"),
        }
        for event in child.call("edgeft.exporters.imatrix", request, allocator()):
            update(event["done"], event["total"], "questions")

    cached(f"importance matrix {order.source}", out, inputs, work)


def _gguf_lora(this: Run, order: Order, artifact: Path) -> dict[str, Any]:
    """A folder of the quantized base and, for tuned, the adapter."""
    shutil.rmtree(artifact, ignore_errors=True)
    artifact.mkdir()
    if not order.adapted:
        return _gguf(this, order, artifact / "model.gguf")
    for part in _parts(this, order):
        _link(part, artifact / part.name)
    exact = order.target.settings["ftype"] in gguf_settings.UNQUANTIZED and _into_original(this)
    return _verify(order, artifact, exact=exact)


def _parts(this: Run, order: Order) -> list[Path]:
    """The very file that base is at this target, exported before tuned, and the adapter."""
    base = this.path / "export" / order.target.name / "base" / "model" / "model.gguf"
    return [base, this.path / "gguf" / "lora" / "adapter.gguf"]


def _link(source: Path, out: Path) -> None:
    out.unlink(missing_ok=True)
    try:
        out.hardlink_to(source)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, out)


def _into_original(this: Run) -> bool:
    """Whether tuned is the base's own weights and the adapter; QLoRA's may be NF4's and it."""
    facts = json.loads((this.path / "merged" / "merge.json").read_text())
    return bool(facts.get("chosen", merge.ORIGINAL) == merge.ORIGINAL)


def _onnx(this: Run, order: Order, artifact: Path) -> dict[str, Any]:
    shutil.rmtree(artifact, ignore_errors=True)
    settings = onnx.settings_of(order.target.name, order.target.settings)
    onnx.export(order.folder, artifact, settings, order.stop)
    return _verify(order, artifact, exact=settings.precision == "fp32")


def _portable(this: Run, order: Order, artifact: Path) -> dict[str, Any]:
    shutil.rmtree(artifact, ignore_errors=True)
    precision = portable.precision_of(order.target.name, order.target.settings)
    portable.convert(order.folder, artifact, precision)
    return _verify(order, artifact, exact=precision == "fp32")


def _sixteen_bit(this: Run, order: Order, out: Path) -> None:
    """The 16-bit GGUF that every GGUF target is quantized from, its logits checked."""
    name = f"{model.name_of(this.recipe.model)}-{order.source}"
    llama_cpp = this.recipe.export.llama_cpp
    inputs = {
        "model": this.sha256(model.weight_files(order.folder)),
        "evaluation": this.sha256([order.evaluation]),
        "llama_cpp": llama_cpp,
        "name": name,
    }

    def work(out: Path, _: Update) -> None:
        artifact = out / "model.gguf"
        request = {"folder": str(order.folder), "name": name, "llama_cpp": llama_cpp}
        child.run("edgeft.exporters.gguf", {**request, "out": str(artifact)})
        run.write_json(out / "verify.json", _verify(order, artifact, exact=True))

    cached(f"export {order.source} in 16 bits, verify", out, inputs, work)


def _adapter(this: Run, order: Order, out: Path) -> None:
    """The adapter as a GGUF LoRA; the logits of the 16-bit base with it are the merged model's."""
    sixteen_bit = this.path / "gguf" / "base" / "model.gguf"
    llama_cpp = this.recipe.export.llama_cpp
    exact = _into_original(this)
    inputs = {
        "adapter": this.sha256(this.adapter_files()),
        "base": this.sha256([sixteen_bit]),
        "model": this.sha256(model.weight_files(order.folder)),
        "evaluation": this.sha256([order.evaluation]),
        "llama_cpp": llama_cpp,
        "exact": exact,
    }

    def work(out: Path, _: Update) -> None:
        paths = {"adapter": this.adapter, "base": this.folder("base"), "out": out / "adapter.gguf"}
        request = {name: str(path) for name, path in paths.items()}
        child.run("edgeft.exporters.gguf_lora", {**request, "llama_cpp": llama_cpp})
        _link(sixteen_bit, out / "model.gguf")
        run.write_json(out / "verify.json", _verify(order, out, exact=exact))

    cached("export the adapter, verify", out, inputs, work)


def _verify(
    order: Order,
    artifact: Path,
    *,
    exact: bool,
    strict: bool = True,
    reference: Path | None = None,
) -> dict[str, Any]:
    """``reference``: the 16-bit GGUF from which each tensor's error is taken."""
    request = {
        "runtime": order.target.runtime,
        "artifact": str(artifact),
        "folder": str(order.folder),
        "evaluation": str(order.evaluation),
        "exact": exact,
        "strict": strict,
        "reference": str(reference) if reference else None,
    }
    verified = child.run("edgeft.exporters.verify", request, allocator())[-1]
    return {name: value for name, value in verified.items() if name != "event"}
