"""How each kind of artifact is made of a model folder or of what was made of it, and verified."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import child, model, run
from edgeft.allocator import allocator
from edgeft.catalog import Target
from edgeft.exporters import foreign, gguf_settings, imatrix, merge, onnx, portable
from edgeft.exporters.faults import WEIGHTS as WRONG_WEIGHTS
from edgeft.exporters.gguf_settings import GgufSettings
from edgeft.progress import Update
from edgeft.stages import Run, cached


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


def gguf_file(this: Run, order: Order, artifact: Path) -> dict[str, Any]:
    """Quantized from the 16-bit file; what is F16 is that file itself."""
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
    if order.gguf.ftype != "F16":
        expected = artifact.with_name("expected.gguf")
        _quantize(this, order, expected)
    found = foreign.diagnose(artifact, tuned, base, expected)
    if expected != tuned:
        expected.unlink()
    verified = _verify(order, artifact, exact=exact, strict=False)
    # That the logits differ says less than why they do.
    seen = [f for f in verified["faults"] if not (found["faults"] and f["kind"] == WRONG_WEIGHTS)]
    return {**verified, "faults": [*found["faults"], *seen], "tensors": found["tensors"]}


def gguf_inputs(this: Run, order: Order) -> dict[str, Any]:
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


def measure(this: Run, order: Order, out: Path) -> None:
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


def gguf_with_lora(this: Run, order: Order, artifact: Path) -> dict[str, Any]:
    """A folder of the quantized base and, for tuned, the adapter."""
    shutil.rmtree(artifact, ignore_errors=True)
    artifact.mkdir()
    if not order.adapted:
        return gguf_file(this, order, artifact / "model.gguf")
    for part in parts(this, order):
        _link(part, artifact / part.name)
    exact = order.target.settings["ftype"] in gguf_settings.UNQUANTIZED and _into_original(this)
    return _verify(order, artifact, exact=exact)


def parts(this: Run, order: Order) -> list[Path]:
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


def onnx_folder(this: Run, order: Order, artifact: Path) -> dict[str, Any]:
    """By onnxruntime-genai's builder."""
    shutil.rmtree(artifact, ignore_errors=True)
    settings = onnx.settings_of(order.target.name, order.target.settings)
    onnx.export(order.folder, artifact, settings, order.stop)
    return _verify(order, artifact, exact=settings.precision == "fp32")


def portable_inputs(order: Order) -> dict[str, Any]:
    """So that bundles of signed weights are made again: no x86 CPU without VNNI can run them."""
    precision = portable.precision_of(order.target.name, order.target.settings)
    return {"weights": "uint8"} if precision == "int8" else {}


def portable_folder(this: Run, order: Order, artifact: Path) -> dict[str, Any]:
    """By optimum, in its own environment."""
    shutil.rmtree(artifact, ignore_errors=True)
    precision = portable.precision_of(order.target.name, order.target.settings)
    portable.convert(order.folder, artifact, precision)
    return _verify(order, artifact, exact=precision == "fp32")


def sixteen_bit(this: Run, order: Order, out: Path) -> None:
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


def adapter(this: Run, order: Order, out: Path) -> None:
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
