"""STUDY.yaml: what is compared with what, and the cells that it expands to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from edgeft import catalog, model, recipe
from edgeft.bench import stage as benching
from edgeft.catalog import Target
from edgeft.errors import UserError, near
from edgeft.exporters import gguf_lora
from edgeft.recipe import Recipe
from edgeft.stages import WEIGHTS
from edgeft.train.settings import METHODS

ZERO_SHOT = "zero-shot"
_SHOTS = re.compile(r"([1-9]\d*)-shot")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# What a study says itself, so that its ``recipe`` cannot.
_OURS = (
    *(("model",), ("adapter",), ("seed",), ("task", "name"), ("task", "shots")),
    *(("train", "method"), ("export", "targets"), ("bench", "devices")),
)


@dataclass(frozen=True)
class Resources:
    """What one cell takes of a cluster: CPU cores, GPUs."""

    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if self.cpus < 0 or self.gpus < 0:
            raise ValueError("cpus and gpus must not be negative")


@dataclass(frozen=True)
class There:
    """A device of a study. ``limit``: questions; ``targets``: only these."""

    name: str
    limit: int | None = None
    threads: int | str | None = None
    targets: list[str] | None = None


@dataclass(frozen=True)
class Study:
    """What STUDY.yaml says.

    Attributes:
        models: references as ``--model`` takes them.
        tasks: names, or a recipe's ``task`` settings, perhaps with a ``label`` of their own.
        methods: ``zero-shot``, ``N-shot``, ``full``, ``lora``, ``dora``, ``qlora``, or a recipe's
            ``train`` settings with a ``name`` of their own.
        seeds: of training; the questions are the same for all of them (``task.seed``).
        targets: what is exported.
        devices: names, or a ``name`` with ``limit`` (questions), ``targets`` and ``threads``.
        recipe: what all cells share, as a recipe has it.
        resources: of a cell, where a cluster hands them out.
        retries: how often a failed cell is tried again in the same call.
    """

    models: list[str]
    tasks: list[str | dict[str, Any]] = field(default_factory=lambda: ["wordmath"])
    methods: list[str | dict[str, Any]] = field(default_factory=lambda: [ZERO_SHOT, "lora"])
    seeds: list[int] = field(default_factory=lambda: [0])
    targets: list[str] = field(default_factory=lambda: ["gguf-q8_0", "gguf-q4_k_m", "gguf-q4_0"])
    devices: list[str | dict[str, Any]] = field(default_factory=lambda: ["local"])
    recipe: dict[str, Any] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    retries: int = 1

    def __post_init__(self) -> None:
        for name in ("models", "tasks", "methods", "seeds", "targets", "devices"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} is empty")
            twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
            if twice is not None:
                raise ValueError(f"{name} has {twice} twice")
        if min(self.seeds) < 0:
            raise ValueError("seeds must not be negative")
        if self.retries < 0:
            raise ValueError("retries must not be negative")


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        id: its folder below ``runs``.
        method: as the study calls it.
        seed: None where nothing is trained.
        recipe: with the targets that the method can have.
        devices: as :func:`edgeft.pipeline.run` takes them; ``targets`` is always given.
        weights: what is scored: ``("base",)`` where nothing is trained.
        shares: the cell whose base this one takes over; it is done first.
    """

    id: str
    model: str
    task: str
    method: str
    seed: int | None
    recipe: Recipe
    devices: list[dict[str, Any]]
    weights: tuple[str, ...]
    shares: str | None


def load(path: Path) -> Study:
    """Read a study's file.

    Raises:
        UserError: it cannot be read, or a key or value is wrong; the line is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the study {path}: {error.strerror}") from error
    return parse(text, str(path))


def parse(text: str, name: str = "study") -> Study:
    """A study from YAML text; ``name`` is what errors call it."""
    data, where = recipe.mapping(
        text, name, "a study is a mapping such as 'models: [smollm2-135m]'"
    )
    if "models" not in data:
        raise UserError(f"{name}: models is missing, such as models: [smollm2-135m]")
    study: Study = recipe.build(Study, data, where, name)
    _check_shared(study.recipe, {p[1:]: at for p, at in where.items() if p[0] == "recipe"}, name)
    return study


def _check_shared(shared: dict[str, Any], where: Mapping[tuple[str, ...], str], name: str) -> None:
    """What all cells share is a part of a recipe, and nothing that the study says itself."""
    recipe.build(Recipe, shared, where, name)
    for path in _OURS:
        table = shared if len(path) == 1 else shared.get(path[0], {})
        if path[-1] in table:
            key = ".".join(("recipe", *path))
            raise UserError(f"{where.get(path, name)}: {key}: the study says that for every cell")


def cells(study: Study) -> list[Cell]:
    """Every run of the study, those whose base others share first.

    Raises:
        UserError: a method, model, task, target, device or setting is wrong.
    """
    targets, there = catalog.find_targets(study.targets), devices(study)
    found: list[Cell] = []
    for reference in study.models:
        model.source(reference)
        for task in study.tasks:
            found += _group(study, reference, task, targets, there)
    ids = [cell.id for cell in found]
    twice = next((i for n, i in enumerate(ids) if i in ids[:n]), None)
    if twice:
        raise UserError(
            f"two runs of the study are called {twice}: give a task a label, a method a name or a "
            "model another folder"
        )
    return found


def devices(study: Study) -> list[dict[str, Any]]:
    """As :func:`edgeft.pipeline.run` takes them: ``name``, ``said``, ``targets``.

    Raises:
        UserError: one is wrong.
    """
    exported = [target.name for target in catalog.find_targets(study.targets)]
    found: list[dict[str, Any]] = []
    for device in study.devices:
        data = {"name": device} if isinstance(device, str) else device
        given: There = recipe.build(There, data, {}, "study: devices")
        threads = None if given.threads is None else str(given.threads)
        said = benching.overrides(threads, given.limit)
        benching.there(given.name, said)
        if given.name in [other["name"] for other in found]:
            raise UserError(f"study: devices: {given.name} is there twice")
        chosen = exported
        if given.targets is not None:
            chosen = [target.name for target in catalog.find_targets(given.targets)]
            missing = [name for name in chosen if name not in exported]
            if missing or not chosen:
                what = missing[0] if missing else "nothing"
                raise UserError(
                    f"study: devices: {given.name} is to run {what}, the study's targets are: "
                    + ", ".join(exported)
                )
        found.append({"name": given.name, "said": said, "targets": chosen})
    return found


def _group(
    study: Study,
    reference: str,
    task: str | dict[str, Any],
    targets: list[Target],
    there: list[dict[str, Any]],
) -> list[Cell]:
    """The cells of one model on one task: zero-shot first, whose base all others have."""
    settings = _mapping_of(task, "name")
    name = _label(str(settings.pop("label", None) or Path(str(settings["name"])).stem))
    short = _label(model.name_of(reference))

    def cell(method: str, seed: int | None, more: dict[str, Any], train: dict[str, Any]) -> Cell:
        trained = seed is not None
        place = f"{short}/{name}/{method}" + (f"-s{seed}" if trained else "")
        fitting = _fitting(targets, str(train["method"]) if trained else None)
        if not fitting:
            raise UserError(f"study: {method} can have none of the targets")
        said = {
            "model": reference,
            "task": {**settings, **more},
            "export": {"targets": fitting},
            "bench": {"devices": [device["name"] for device in there]},
            "seed": study.seeds[0] if seed is None else seed,
            **({"train": train} if trained else {}),
        }
        made = _recipe(study, said, f"study: {place}")
        own = [{**d, "targets": [t for t in d["targets"] if t in fitting]} for d in there]
        own = [device for device in own if device["targets"]]
        weights = WEIGHTS if trained else WEIGHTS[:1]
        shares = None if method == ZERO_SHOT else f"{short}/{name}/{ZERO_SHOT}"
        return Cell(place, short, name, method, seed, made, own, weights, shares)

    found = [cell(ZERO_SHOT, None, {}, {})]
    if found[0].recipe.task.shots:
        raise UserError(f"study: tasks: {name} has shots: give methods as 5-shot instead")
    for given in study.methods:
        train = _mapping_of(given, "name")
        method = _label(str(train.pop("name")))
        shots = _SHOTS.fullmatch(method)
        if (method == ZERO_SHOT or shots) and train:
            raise UserError(
                f"study: methods: {method} trains nothing, so '{min(train)}' is not for it"
            )
        if method == ZERO_SHOT:
            continue
        if shots:
            found.append(cell(method, None, {"shots": int(shots[1])}, {}))
            continue
        kind = str(train.setdefault("method", method))
        if kind not in METHODS:
            known = [ZERO_SHOT, "5-shot", *METHODS]
            raise UserError(f"study: methods: unknown method '{kind}'{near(kind, known)}")
        found += [cell(method, seed, {}, train) for seed in study.seeds]
    return found


def _fitting(targets: Iterable[Target], method: str | None) -> list[str]:
    """The targets that a method can have; None: nothing is trained, so nothing chooses types."""
    return [
        target.name
        for target in targets
        if not (target.adapter and method and method not in gguf_lora.METHODS)
        and not ("auto" in target.settings and method is None)
    ]


def _recipe(study: Study, said: Mapping[str, Any], name: str) -> Recipe:
    """What all cells share, and on top what is ``said`` of one; ``name`` is what errors call it."""
    data = {key: value for key, value in study.recipe.items() if key != "train" or key in said}
    for key, value in said.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
    data["task"].setdefault("seed", study.seeds[0])
    made: Recipe = recipe.build(Recipe, data, {}, name)
    return recipe.completed(made)


def _mapping_of(given: str | dict[str, Any], key: str) -> dict[str, Any]:
    if isinstance(given, str):
        return {key: given}
    if key not in given:
        raise UserError(f"study: {given}: '{key}' is missing")
    return dict(given)


def _label(name: str) -> str:
    """A name that can be a folder's.

    Raises:
        UserError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"study: '{name}' cannot name a folder: letters, digits, . _ + -")
    return name


def described(study: Study) -> dict[str, Any]:
    """The study as JSON."""
    return {f.name: getattr(study, f.name) for f in fields(study) if f.name != "resources"} | {
        "resources": asdict(study.resources)
    }
