"""Export targets and devices, one TOML each, and recipes, one YAML each.

The user's own come first, then the shipped ones: they lie in ``export/``, ``devices/`` and
``recipes/`` of the working folder, or of ``~/.config/edgeft`` (``$XDG_CONFIG_HOME/edgeft``).
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from edgeft.errors import UserError, near


@dataclass(frozen=True)
class Target:
    """What is exported.

    Attributes:
        settings: the table named after the format.
        repair: how the tuned weights are trained further for it; see :mod:`edgeft.repair`.
    """

    name: str
    format: str
    runtime: str
    about: str
    settings: dict[str, Any]
    repair: dict[str, Any] | None = None

    @property
    def adapter(self) -> bool:
        """Whether it ships the base with an adapter, which not every run has."""
        return self.settings.get("lora") is True

    @property
    def plain(self) -> bool:
        """Whether any run has it at once: without an adapter, further training or measuring."""
        return not self.adapter and self.repair is None and "auto" not in self.settings


@dataclass(frozen=True)
class Device:
    """Where it executes.

    Attributes:
        transport: a name in :data:`edgeft.transports.TRANSPORTS`.
        host: a name or address, or a ``Host`` of the user's ssh configuration.
        port: 0: what ssh would take.
        identity: a private key file; empty: what ssh would take.
        known_hosts: a file of host keys; empty: what ssh would take.
        threads: CPU threads; 0: every core that the process may use, ``"auto"``: the fastest.
        python: the interpreter that edgeft's environment on the device is made with.
        folder: what edgeft keeps there, absolute or from the login folder.
        architecture: as ``uname -m`` prints it; empty: any.
        features: CPU features that the runtime's kernels are fast with.
        memory_gb: of the board, 10^9 bytes.
        memory_bandwidth_gb_s: of its memory, as its maker says.
        limit: at most so many questions are scored there; None: all.
        timed: whether times taken there mean anything; an emulator's do not.
    """

    name: str
    transport: str
    about: str = ""
    host: str = ""
    port: int = 0
    user: str = ""
    identity: str = ""
    known_hosts: str = ""
    threads: int | str = 0
    python: str = "python3"
    folder: str = "edgeft"
    architecture: str = ""
    features: tuple[str, ...] = ()
    memory_gb: float | None = None
    memory_bandwidth_gb_s: float | None = None
    limit: int | None = None
    timed: bool = True


_RESERVED = ("host", "general")  # folders beside the devices' in a run
# What may stand in a command line there without a meaning of its own.
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+-]*")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./+-]*")
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
    paths = _files("devices")
    return {name: _device(path, paths) for name, path in paths.items()}


def find_targets(names: list[str], *, every: bool = False) -> list[Target]:
    """The targets of those names; the name of a format stands for all plain ones (or for ``every``).

    Raises:
        UserError: there is no such target.
    """
    known = targets()
    formats = {target.format for target in known.values()}
    found: dict[str, Target] = {}
    for name in names:
        if name in formats:
            found |= {n: t for n, t in known.items() if t.format == name and (every or t.plain)}
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


def _device(path: Path, paths: dict[str, Path]) -> Device:
    """A profile, on top of the one that it is ``like``."""
    settings = _load(path)
    if "like" in settings:
        like = str(settings.pop("like"))
        if like not in paths or like == path.stem:
            raise UserError(f"{path}: like = '{like}'{near(like, list(paths))}")
        settings = {**_load(paths[like]), **settings}
    settings["features"] = tuple(settings.get("features", ()))
    device = _build(path, Device, settings)
    plain = (("host", _PLAIN), ("user", _PLAIN), ("python", _PLAIN_PATH), ("folder", _PLAIN_PATH))
    for key, form in plain:
        value = getattr(device, key)
        if value and not form.fullmatch(str(value)):
            raise UserError(f"{path}: {key} = {value!r} has characters that do not belong there")
    if device.name in _RESERVED:
        raise UserError(
            f"{path}: no device can be called {device.name}: runs keep other things there"
        )
    threads = device.threads
    if threads != "auto" and not (type(threads) is int and threads >= 0):
        raise UserError(f"{path}: threads = {threads!r} is neither a number nor 'auto'")
    return device


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
