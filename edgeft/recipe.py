"""The recipe: one YAML file that says everything a run does, as validated dataclasses.

``edgeft run`` without a recipe runs these defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from edgeft.errors import UserError, near
from edgeft.train.settings import TrainSettings

TRACKERS = ("tensorboard", "wandb", "trackio")
MERGES = ("auto", "original", "dequantized")


@dataclass(frozen=True)
class TaskSettings:
    """How many questions: to train on, held out for the loss, evaluated, and of unseen templates.

    ``shots``: worked training questions in front of each evaluation question (in-context learning).
    """

    name: str = "wordmath"
    train: int = 960
    heldout: int = 48
    evaluation: int = 200
    unseen: int = 24
    shots: int = 0

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError("shots must not be negative")


@dataclass(frozen=True)
class ExportSettings:
    """What is exported.

    Attributes:
        llama_cpp: a llama.cpp checkout whose converter replaces ours.
        merge: what a QLoRA adapter is merged into: the ``original`` weights, the ``dequantized``
            ones that it was trained on, or ``auto``: the one with the lower held-out loss.
    """

    targets: list[str] = field(
        default_factory=lambda: ["gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "gguf-q4_0"]
    )
    llama_cpp: str | None = None
    merge: str = "auto"

    def __post_init__(self) -> None:
        if self.merge not in MERGES:
            raise ValueError(f"merge '{self.merge}' is none of: {', '.join(MERGES)}")


@dataclass(frozen=True)
class BenchSettings:
    """How artifacts are scored and timed. ``parallel``: sequences in one batch, and on the host."""

    devices: list[str] = field(default_factory=lambda: ["local"])
    max_new_tokens: int = 48
    parallel: int = 32
    host_parallel: int = 96
    latency_prompt_tokens: int = 128
    latency_new_tokens: int = 64
    latency_repetitions: int = 3


@dataclass(frozen=True)
class ReportSettings:
    """``keep``: the retention whose interval's lower end must reach it for ``survives``."""

    keep: float = 0.8


@dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        adapter: a PEFT adapter trained elsewhere, which takes the place of training.
        track: where training is followed too: tensorboard, wandb or trackio.
    """

    model: str = "smollm2-135m"
    task: TaskSettings = field(default_factory=TaskSettings)
    adapter: str | None = None
    track: str | None = None
    train: TrainSettings = field(default_factory=TrainSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    bench: BenchSettings = field(default_factory=BenchSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.track is not None and self.track not in TRACKERS:
            raise ValueError(f"track '{self.track}' is none of: {', '.join(TRACKERS)}")


def load(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply ``--set`` overrides such as ``train.lr=1e-4``.

    Raises:
        UserError: the file, a key or a value is wrong; the line is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    return parse(text, overrides, str(path))


def parse(text: str, overrides: Iterable[str] = (), name: str = "recipe") -> Recipe:
    """A recipe from YAML text; ``name`` is what errors call it."""
    try:
        data = yaml.safe_load(text) or {}
        lines = _lines(yaml.compose(text))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{name}, line {line}: {error.problem}") from error
    if not isinstance(data, dict):
        raise UserError(f"{name}: a recipe is a mapping such as 'model: smollm2-135m'")
    where = {path: f"{name}, line {line}" for path, line in lines.items()}
    for override in overrides:
        path, value = _override(override)
        where[path] = f"--set {override}"
        _put(data, path, value, override)
    return _build(data, where, name)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every setting written out."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False)


def _override(text: str) -> tuple[tuple[str, ...], Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes key=value, such as train.lr=1e-4, not '{text}'")
    try:
        return tuple(key.split(".")), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not YAML") from error


def _put(data: dict[str, Any], path: tuple[str, ...], value: Any, override: str) -> None:
    for key in path[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {override}: '{key}' has no settings inside")
    data[path[-1]] = value


def _lines(node: yaml.Node | None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            found[here] = key.start_mark.line + 1
            found |= _lines(value, here)
    return found


def _build(data: dict[str, Any], where: Mapping[tuple[str, ...], str], name: str) -> Recipe:
    from pydantic import ValidationError

    _check_keys(Recipe, data, where, name, ())
    try:
        recipe: Recipe = _adapter().validate_python(data)
        return recipe
    except ValidationError as error:
        first = error.errors()[0]
        path = tuple(str(part) for part in first["loc"])
        place = next((where[path[:n]] for n in range(len(path), 0, -1) if path[:n] in where), name)
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{place}: {'.'.join(path)}: {reason}") from error


def _check_keys(
    kind: Any, data: Any, where: Mapping[tuple[str, ...], str], name: str, path: tuple[str, ...]
) -> None:
    if not isinstance(data, dict):
        return
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    for key, value in data.items():
        here = (*path, str(key))
        if key not in known:
            raise UserError(
                f"{where.get(here, name)}: unknown key '{'.'.join(here)}'{near(str(key), known)}"
            )
        if is_dataclass(hints[key]):
            _check_keys(hints[key], value, where, name, here)


@lru_cache
def _adapter() -> Any:
    # YAML 1.1 reads 1e-4 as text; pydantic makes the number of it.
    from pydantic import TypeAdapter

    return TypeAdapter(Recipe)
