"""STUDY.yaml: what is compared with what, and the cells that it expands to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from edgeft import catalog, model, recipe
from edgeft.bench import stage as benching
from edgeft.errors import UserError, near
from edgeft.recipe import Recipe
from edgeft.stages import WEIGHTS
from edgeft.train.settings import METHODS

ZERO_SHOT = "zero-shot"
_SHOTS = re.compile(r"([1-9]\d*)-shot")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Resources:
    """What one cell takes of a cluster: CPU cores, GPUs."""

    cpus: float = 1
    gpus: float = 0


@dataclass(frozen=True)
class Study:
    """What STUDY.yaml says.

    Attributes:
        models: references as ``--model`` takes them.
        tasks: names, or a recipe's ``task`` settings.
        methods: ``zero-shot``, ``N-shot``, ``full``, ``lora``, ``dora``, ``qlora``, or a recipe's
            ``train`` settings with a ``name`` of their own.
        seeds: of training; the questions are the same for all of them (``task.seed``).
        targets: what is exported.
        devices: names, or a ``name`` with ``limit`` (questions), ``targets`` and ``threads``.
        recipe: what all cells share, as a recipe has it.
        resources: of a cell that trains, where a cluster hands them out.
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
        if self.retries < 0:
            raise ValueError("retries must not be negative")


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        id: its folder below ``runs``.
        method: as the study calls it.
        seed: None where nothing is trained.
        weights: what is scored: ``("base",)`` where nothing is trained.
        shares: the cell whose base this one takes over; it is done first.
    """

    id: str
    model: str
    task: str
    method: str
    seed: int | None
    recipe: Recipe
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
    return study


def cells(study: Study) -> list[Cell]:
    """Every run of the study, those whose base others share first.

    Raises:
        UserError: a method, model, task, target, device or setting is wrong.
    """
    catalog.find_targets(study.targets)
    for device in devices(study):
        benching.there(device["name"], device["said"])
        catalog.find_targets(device["targets"] or [])
    found: list[Cell] = []
    for reference in study.models:
        model.source(reference)
        for task in study.tasks:
            found += _group(study, reference, task)
    ids = [cell.id for cell in found]
    twice = next((i for n, i in enumerate(ids) if i in ids[:n]), None)
    if twice:
        raise UserError(f"two runs of the study are called {twice}: give one a name of its own")
    return found


def devices(study: Study) -> list[dict[str, Any]]:
    """As :func:`edgeft.pipeline.run` takes them: ``name``, ``said``, ``targets``."""
    found = []
    for device in study.devices:
        given: dict[str, Any] = {"name": device} if isinstance(device, str) else dict(device)
        unknown = given.keys() - {"name", "limit", "threads", "targets"}
        if unknown or "name" not in given:
            key = min(unknown, default="name")
            raise UserError(
                f"study: devices: {'unknown key' if unknown else 'missing'} '{key}' "
                "(name, limit, threads, targets)"
            )
        threads = given.get("threads")
        said = benching.overrides(None if threads is None else str(threads), given.get("limit"))
        found.append({"name": given["name"], "said": said, "targets": given.get("targets")})
    return found


def _group(study: Study, reference: str, task: str | dict[str, Any]) -> list[Cell]:
    """The cells of one model on one task: zero-shot first, whose base all others have."""
    settings = _mapping_of(task, "name")
    name = _label(settings.pop("label", None) or Path(str(settings["name"])).stem)
    short = _label(model.name_of(reference))
    place = f"{short}/{name}"
    base = Cell(
        f"{place}/{ZERO_SHOT}",
        *(short, name, ZERO_SHOT, None),
        _recipe(study, reference, settings, {}, study.seeds[0]),
        ("base",),
        None,
    )
    found = [base]
    for given in study.methods:
        train = _mapping_of(given, "name")
        method = _label(str(train.pop("name")))
        if method == ZERO_SHOT:
            continue
        if match := _SHOTS.fullmatch(method):
            asked = {**settings, "shots": int(match[1])}
            made = _recipe(study, reference, asked, {}, study.seeds[0])
            found.append(
                Cell(f"{place}/{method}", short, name, method, None, made, base.weights, base.id)
            )
            continue
        train.setdefault("method", method)
        if train["method"] not in METHODS:
            known = [ZERO_SHOT, "5-shot", *METHODS]
            raise UserError(f"study: methods: unknown method '{method}'{near(method, known)}")
        for seed in study.seeds:
            made = _recipe(study, reference, settings, train, seed)
            label = f"{place}/{method}-s{seed}"
            found.append(Cell(label, short, name, method, seed, made, WEIGHTS, base.id))
    return found


def _recipe(
    study: Study, reference: str, task: Mapping[str, Any], train: Mapping[str, Any], seed: int
) -> Recipe:
    shared = study.recipe
    for key in ("model", "adapter", "seed"):
        if key in shared:
            raise UserError(f"study: recipe.{key}: a study says that for every cell")
    data = {
        **shared,
        "model": reference,
        "task": {"seed": study.seeds[0], **_table(shared, "task"), **task},
        "train": {**_table(shared, "train"), **train},
        "export": {**_table(shared, "export"), "targets": study.targets},
        "bench": {**_table(shared, "bench"), "devices": [d["name"] for d in devices(study)]},
        "seed": seed,
    }
    return recipe.completed(recipe.parse(yaml.safe_dump(data), name="study, as a recipe"))


def _table(shared: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = shared.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"study: recipe.{key} is a mapping, as in a recipe")
    return found


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
