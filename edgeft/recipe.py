"""The recipe: one YAML file that says everything a run does, as validated dataclasses.

``edgeft run`` without a recipe runs these defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from edgeft.catalog import YAML
from edgeft.errors import UserError, near
from edgeft.tasks import filled, find
from edgeft.tasks.settings import TaskSettings
from edgeft.train.settings import TrainSettings

TRACKERS = ("tensorboard", "wandb", "trackio")
DEPTHS = (128, 512, 1024, 1536)  # of edgeft bench --latency; every model here holds 2,048 tokens
MERGES = ("auto", "original", "dequantized")


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
    """How artifacts are scored and timed.

    Attributes:
        max_new_tokens: tokens that an answer may take; None: what the task says.
        parallel: sequences in one batch; 1 leaves nothing to rounding.
        host_parallel: the same on the host.
        latency_depths: time decoding behind so many tokens too.
    """

    devices: list[str] = field(default_factory=lambda: ["local"])
    max_new_tokens: int | None = None
    parallel: int = 32
    host_parallel: int = 96
    latency_prompt_tokens: int = 128
    latency_new_tokens: int = 64
    latency_repetitions: int = 3
    latency_depths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be at least 1")


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

    @property
    def question_seed(self) -> int:
        """The seed that questions are drawn by."""
        return self.seed if self.task.seed is None else self.task.seed


def load(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply ``--set`` overrides such as ``train.lr=1e-4``.

    Raises:
        UserError: the file, a key or a value is wrong; the line is named.
    """
    return parse(_text(path, "recipe"), overrides, str(path))


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error


def parse(text: str, overrides: Iterable[str] = (), name: str = "recipe") -> Recipe:
    """A recipe from YAML text; ``name`` is what errors call it."""
    data, where = mapping(text, name, "a recipe is a mapping such as 'model: smollm2-135m'")
    for override in overrides:
        path, value = _override(override)
        where[path] = f"--set {override}"
        _put(data, path, value, override)
    recipe: Recipe = build(Recipe, data, where, name)
    return recipe


def mapping(text: str, name: str, hint: str) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """A YAML mapping, and where each of its keys stands.

    Args:
        name: what errors call the text.
        hint: what to write instead of what is no mapping.

    Raises:
        UserError: it is no YAML, or no mapping.
    """
    try:
        data = yaml.safe_load(text) or {}
        lines = _lines(yaml.compose(text))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{name}, line {line}: {error.problem}") from error
    if not isinstance(data, dict):
        raise UserError(f"{name}: {hint}")
    return data, {path: f"{name}, line {line}" for path, line in lines.items()}


def completed(recipe: Recipe) -> Recipe:
    """The recipe with its task's file read, its data's path absolute and the task's own numbers.

    Raises:
        UserError: there is no such task, or its file is wrong.
    """
    task = recipe.task
    if Path(task.name).suffix in YAML:
        task = _task_file(Path(task.name), task)
    if task.data and (path := Path(task.data).expanduser()).exists():
        task = replace(task, data=str(path.resolve()))
    new = recipe.bench.max_new_tokens or find(task.name).max_new_tokens
    return replace(recipe, task=filled(task), bench=replace(recipe.bench, max_new_tokens=new))


def _task_file(path: Path, given: TaskSettings) -> TaskSettings:
    """A task's settings from its own file; what the recipe says besides goes first."""
    data, where = mapping(
        _text(path, "task"), str(path), "a task is a mapping such as 'data: my.jsonl'"
    )
    found: TaskSettings = build(TaskSettings, {"name": "jsonl", **data}, where, str(path))
    if found.data and (beside := path.parent / found.data).exists():
        found = replace(found, data=str(beside))
    said = {
        f.name: value
        for f in fields(given)
        if f.name != "name" and (value := getattr(given, f.name)) != getattr(TaskSettings(), f.name)
    }
    return replace(found, **said)


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


def build(kind: Any, data: dict[str, Any], where: Mapping[tuple[str, ...], str], name: str) -> Any:
    """A dataclass from a mapping, nested ones too, validated.

    Args:
        where: what :func:`mapping` said of the keys' places.

    Raises:
        UserError: an unknown key or a wrong value; its place is named.
    """
    from pydantic import ValidationError

    _check_keys(kind, data, where, name, ())
    try:
        return _adapter(kind).validate_python(data)
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
def _adapter(kind: Any) -> Any:
    # YAML 1.1 reads 1e-4 as text; pydantic makes the number of it.
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
