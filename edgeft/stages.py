"""The stages of a run, in the order in which data flows: data, train, merge, export, bench, report.

Each says what its result depends on; :func:`edgeft.run.stage` decides whether it must be done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft import __version__, catalog, child, exporters, model, recipe, run, tasks
from edgeft.allocator import allocator
from edgeft.bench import divergence
from edgeft.errors import UserError
from edgeft.exporters import gguf_lora, merge
from edgeft.progress import Update, say, shown
from edgeft.prompts import read_items
from edgeft.recipe import Recipe
from edgeft.tasks import general
from edgeft.train import ranks
from edgeft.transports import open_transport

WEIGHTS = ("base", "tuned")
HOST = "host"
Hashes = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A locked run directory, its recipe, and the hashes of files seen so far."""

    path: Path
    recipe: Recipe
    hashes: Hashes

    def folder(self, weights: str) -> Path:
        """The model folder of base or tuned."""
        return self.path / "merged" if weights == "tuned" else base_folder(self)

    @property
    def adapter(self) -> Path:
        """The PEFT adapter's folder: the recipe's, or what training leaves if it leaves one."""
        return Path(self.recipe.adapter) if self.recipe.adapter else self.path / "train" / "adapter"

    def adapter_files(self) -> list[Path]:
        """What makes the adapter what it is."""
        return [
            self.adapter / name for name in ("adapter_model.safetensors", "adapter_config.json")
        ]

    def weights_id(self, weights: str) -> str:
        """A fingerprint of that folder's weights and tokenizer."""
        return run.fingerprint(self.sha256(model.weight_files(self.folder(weights))))

    def sha256(self, paths: Iterable[Path]) -> dict[str, str]:
        """File name to SHA-256."""
        return {path.name: run.sha256(path, self.hashes) for path in paths}


@contextmanager
def opened(path: Path, settings: Recipe | None = None) -> Iterator[Run]:
    """Lock a run directory. With settings it is made, or given these; without, it must exist.

    Raises:
        UserError: it is no run, cannot be written, or another process works on it.
    """
    run.create(path) if settings else run.check(path)
    with run.locked(path), run.hash_cache(path) as hashes:
        if settings:
            (path / "recipe.yaml").write_text(recipe.dump(settings), encoding="utf-8")
        yield Run(path, settings or recipe.load(path / "recipe.yaml"), hashes)


def prepare(this: Run) -> None:
    """The base model's folder and the questions as token ids; refuses what could not be exported."""
    from edgeft import repair

    place = model.source(this.recipe.model)
    if isinstance(place, Path) and place.is_file():
        cached(
            f"model {this.recipe.model}: dequantize",
            this.path / "base",
            {"gguf": run.sha256(place, this.hashes)},
            lambda out, _: model.resolve(this.recipe.model, out),
        )
    base = base_folder(this)
    targets = catalog.find_targets(this.recipe.export.targets)
    for name in this.recipe.bench.devices:
        open_transport(catalog.find_device(name))
    exporters.check_supported(base, targets, checkout(this))
    for target in targets:
        if target.repair is not None:
            repair.settings_of(target)
    if this.recipe.adapter:
        merge.check_adapter(this.adapter, this.recipe.model, this.weights_id("base"))
    gguf_lora.check_supported(targets, this.recipe, this.adapter if this.recipe.adapter else None)
    room = {
        "context": model.config(base).get("max_position_embeddings"),
        "new": new_tokens(this),
    }
    inputs = {
        "edgeft": __version__,
        "task": {k: v for k, v in asdict(this.recipe.task).items() if (k, v) != ("seed", None)},
        "sources": _data_files(this),
        "general": run.fingerprint({general.SPLIT: [asdict(q) for q in general.questions()]}),
        "seed": this.recipe.question_seed,
        "room": room,
        "tokenizer": this.sha256(p for p in model.weight_files(base) if "token" in p.name),
        "template": this.sha256(base.glob("chat_template.jinja")),
    }
    data = this.path / "data"
    cached("questions", data, inputs, lambda out, _: _encode(this, base, room, out))
    for reason, count in json.loads((data / "data.json").read_text()).get("left_out", {}).items():
        say(f"· {count:,} questions left out: {reason}")


def _data_files(this: Run) -> dict[str, str]:
    """SHA-256 of the files that the questions come from, if they are local ones."""
    path = Path(this.recipe.task.data or "")
    if not this.recipe.task.data or not path.exists():
        return {}
    if path.is_file():
        return this.sha256([path])
    names = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
    return {
        str(name): run.sha256(path / name, this.hashes)
        for name in names
        if not any(part.startswith(".") for part in name.parts)  # what a download leaves
    }


def train(this: Run) -> None:
    """Train, unless the recipe brings an adapter."""
    if this.recipe.adapter:
        say(f"· train: the adapter is {this.recipe.adapter}")
        ranks.release()
        return
    from edgeft import repair
    from edgeft import train as training

    settings = this.recipe.train
    tracker = training.tracker(this.recipe.track, this.path)
    data = this.path / "data"
    facts = training_facts(this)
    plan = None
    if settings.target:
        [target] = catalog.find_targets([settings.target])
        if "auto" in target.settings:
            raise UserError(
                f"{target.name} chooses types by the tuned weights: train without --for, then "
                "repair a target with its table and a table [repair]"
            )
        plan = repair.plan_of(this, target)
    said = {k: v for k, v in asdict(settings).items() if (k, v) != ("target", None)}
    inputs = {
        "base": this.weights_id("base"),
        "data": this.sha256([data / "train.jsonl", data / "heldout.jsonl"]),
        "settings": said,
        "seed": this.recipe.seed,
        **({"plan": plan} if plan else {}),
    }

    def work(out: Path, update: Update) -> None:
        seed = this.recipe.seed
        training.train(base_folder(this), data, out, settings, facts, seed, update, tracker, plan)
        if (out / "adapter").is_dir():
            run.write_json(
                out / "adapter" / "edgeft.json", {"base_sha256": this.weights_id("base")}
            )

    if not cached(f"train {settings.method}", this.path / "train", inputs, work):
        ranks.release()


def training_facts(this: Run) -> dict[str, Any]:
    """What training needs to answer held-out questions."""
    known = json.loads((this.path / "data" / "data.json").read_text())
    return {
        "task": known["task"],
        "pattern": known.get("pattern"),
        "stop": known["stop"],
        "max_new_tokens": new_tokens(this),
    }


def merged(this: Run) -> None:
    """The tuned model's folder: the adapter in the base's weights, or what full training left."""
    if trained_whole(this):
        trained = model.weight_files(this.path / "train" / "model")
        model_files = {"model": this.sha256(trained)}
        cached("merge", this.path / "merged", model_files, lambda out, _: _take_model(this, out))
        return
    if not this.adapter_files()[0].is_file():
        raise UserError(f"{this.path} is not trained yet: edgeft train --out {this.path}")
    qlora = this.recipe.train.method == "qlora"
    both = [merge.ORIGINAL, merge.DEQUANTIZED] if qlora else [merge.ORIGINAL]
    kinds = both if this.recipe.export.merge == "auto" else [this.recipe.export.merge]
    heldout = this.path / "data" / "heldout.jsonl"
    dtype = this.recipe.train.dtype
    inputs = {
        "base": this.weights_id("base"),
        "adapter": this.sha256(this.adapter_files()),
        "kinds": kinds,
        "dtype": dtype if merge.DEQUANTIZED in kinds else None,
        "heldout": this.sha256([heldout]),
    }

    def work(out: Path, update: Update) -> None:
        paths = {"base": base_folder(this), "adapter": this.adapter, "heldout": heldout, "out": out}
        request = {name: str(path) for name, path in paths.items()}
        child.run(
            "edgeft.exporters.merge", {**request, "kinds": kinds, "dtype": dtype}, allocator()
        )

    cached("merge", this.path / "merged", inputs, work)


def _take_model(this: Run, out: Path) -> None:
    for path in (this.path / "train" / "model").iterdir():
        (out / path.name).unlink(missing_ok=True)
        try:
            (out / path.name).hardlink_to(path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, out / path.name)
    merge.copy_tokenizer(base_folder(this), out)


def reference(this: Run) -> Path:
    """The host's next-token distributions, which travel with every bundle of tuned weights."""
    evaluation = this.path / "data" / "evaluation.jsonl"
    out = this.path / "bench" / HOST / "reference"
    inputs = {
        "made_from": this.weights_id("tuned"),
        "evaluation": this.sha256([evaluation]),
        "questions": divergence.QUESTIONS,
        "top": divergence.TOP,
    }

    def work(partial: Path, _: Update) -> None:
        divergence.make(this.folder("tuned"), evaluation, partial / divergence.FILE)

    if not run.is_done(out, run.fingerprint(inputs)):  # every target asks; said once is enough
        cached("reference distributions", out, inputs, work)
    return out / divergence.FILE


def trained_whole(this: Run) -> bool:
    """Whether training left a model and no adapter."""
    return not this.recipe.adapter and (this.path / "train" / "model").is_dir()


def bundles(this: Run) -> list[Path]:
    """What is exported."""
    return sorted(path.parent for path in (this.path / "export").glob("*/*/manifest.json"))


def cached(title: str, out: Path, inputs: dict[str, Any], work: Any) -> bool:
    """Do ``work(partial folder, update)`` into ``out`` with progress, unless it is up to date.

    Returns:
        Whether anything was done.
    """
    if run.is_done(out, run.fingerprint(inputs)):
        say(f"· {title}: up to date")
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with shown(title) as update:
        return run.stage(out, inputs, lambda partial: work(partial, update))


def base_folder(this: Run) -> Path:
    """Where the base model is, or will be when it is dequantized."""
    place = model.source(this.recipe.model)
    if isinstance(place, Path) and place.is_file():
        return this.path / "base"
    return model.resolve(this.recipe.model, this.path / "base")


def checkout(this: Run) -> Path | None:
    """The llama.cpp checkout whose converter replaces ours, if the recipe names one."""
    return Path(this.recipe.export.llama_cpp) if this.recipe.export.llama_cpp else None


def _encode(this: Run, base: Path, room: dict[str, Any], out: Path) -> None:
    settings = this.recipe.task
    request = {
        "folder": str(base),
        "out": str(out),
        "task": asdict(settings),
        "seed": this.recipe.question_seed,
        "room": room,
    }
    encoded = child.run("edgeft.prompts", request)[-1]
    run.write_json(
        out / "data.json",
        {
            "task": settings.name,
            "pattern": settings.pattern,
            "stop": encoded["stop"],
            "chat_template": encoded["chat"],
            "questions": encoded["counts"],
            "left_out": encoded["left_out"],
        },
    )


def new_tokens(this: Run) -> int:
    """Tokens that an answer may take."""
    return this.recipe.bench.max_new_tokens or tasks.find(this.recipe.task.name).max_new_tokens


def context(this: Run) -> int:
    """Tokens that any question can need: the longest prompt and the longest continuation."""
    items = read_items(this.path / "data" / "evaluation.jsonl")
    longest_gold = max((len(item.gold) for item in items), default=0)
    new = max(new_tokens(this), longest_gold)
    return max((len(item.prompt) for item in items), default=0) + new
