"""Export targets and devices, one TOML each, and recipes, one YAML each.

The user's own come first, then the shipped ones: they lie in ``export/``, ``devices/`` and
``recipes/`` of the working folder, or of ``~/.config/edgeft`` (``$XDG_CONFIG_HOME/edgeft``).
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from edgeft.errors import UserError, near


@dataclass(frozen=True)
class Target:
    """What is exported. ``settings`` is the table named after the format."""

    name: str
    format: str
    runtime: str
    about: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Device:
    """Where it executes. ``threads`` 0 stands for every core that the process may use."""

    name: str
    transport: str
    about: str = ""
    threads: int = 0


YAML = (".yaml", ".yml")
Entry = TypeVar("Entry", Target, Device)


def folders(kind: str) -> list[Path]:
    """Where entries of a kind (the name of its folder) are looked for, first wins."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    package = Path(__file__).parent
    shipped = package / f"_{kind}"  # in a wheel; beside the package in a checkout
    return [
        Path.cwd() / kind,
        config / "edgeft" / kind,
        shipped if shipped.is_dir() else package.parent / kind,
    ]


def targets() -> dict[str, Target]:
    """Every export target by name."""
    return {name: _target(path) for name, path in _files("export").items()}


def devices() -> dict[str, Device]:
    """Every device by name."""
    return {name: _build(path, Device, _load(path)) for name, path in _files("devices").items()}


def find_targets(names: list[str]) -> list[Target]:
    """The targets of those names; the name of a format stands for all of its targets.

    Raises:
        UserError: there is no such target.
    """
    known = targets()
    formats = {target.format for target in known.values()}
    found: dict[str, Target] = {}
    for name in names:
        if name in formats:
            found |= {n: t for n, t in known.items() if t.format == name}
        elif name in known:
            found[name] = known[name]
        else:
            raise UserError(f"unknown target '{name}'{near(name, [*known, *formats])}")
    return list(found.values())


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        UserError: there is none.
    """
    known = devices()
    if name not in known:
        raise UserError(f"unknown device '{name}'{near(name, list(known))}")
    return known[name]


def recipes() -> dict[str, Path]:
    """Every recipe file by name."""
    return _files("recipes", "*.yaml")


def find_recipe(reference: Path) -> Path:
    """The recipe file that is meant: by its path, or by its name in the catalogue.

    Raises:
        UserError: there is none.
    """
    if reference.suffix in YAML or reference.exists() or len(reference.parts) > 1:
        return reference
    known = recipes()
    if reference.name not in known:
        raise UserError(f"unknown recipe '{reference}'{near(reference.name, list(known))}")
    return known[reference.name]


def about(path: Path) -> str:
    """What a recipe file says about itself: the comment in its first line."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _files(kind: str, pattern: str = "*.toml") -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in reversed(folders(kind)):
        found |= {path.stem: path for path in sorted(folder.glob(pattern))}
    return found


def _target(path: Path) -> Target:
    settings = _load(path)
    table = settings.pop(str(settings.get("format")), {})
    return _build(path, Target, {**settings, "settings": table})


def _build(path: Path, kind: type[Entry], values: dict[str, Any]) -> Entry:
    known = [field.name for field in fields(kind)]
    for key in values:
        if key not in known:
            raise UserError(f"{path}: unknown key '{key}'{near(key, known)}")
    try:
        return kind(name=path.stem, **values)
    except TypeError as error:
        raise UserError(f"{path}: {str(error).partition('() ')[2]}") from error


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise UserError(f"{path}: {error}") from error
