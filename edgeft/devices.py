"""edgeft devices: what a device really is, and making it ready to bench."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeft import run, wheel
from edgeft.catalog import Device
from edgeft.errors import UserError
from edgeft.progress import Update, say, shown
from edgeft.transports import open_transport
from edgeft.transports.local import Local
from edgeft.transports.ssh import Agent, check_architecture, send

_PYTHON = (3, 11)
_ROOM_GB = 1.0  # the environment, and llama.cpp while it is compiled
# The device gets the runtimes that this machine has: another version would answer otherwise.
_RUNTIMES = ("llama-cpp-python", "onnxruntime", "onnxruntime-genai")
_LLAMA = "llama_cpp_python"
_CHECK = "import llama_cpp.llama_cpp, onnxruntime_genai"


def probe(device: Device) -> dict[str, Any]:
    """What the device tells of itself, nothing of edgeft need be there.

    Raises:
        UserError: it cannot be reached.
    """
    if isinstance(open_transport(device), Local):
        from edgeft.bench import board, machine_facts

        return {**board.facts(), **machine_facts()}
    with Agent(device) as there:
        facts = there.facts()
    del facts["event"]
    return facts


def missing(device: Device, facts: dict[str, Any]) -> list[str]:
    """What the profile expects and the device lacks, what edgeft needs and is not there."""
    said = []
    if device.architecture and facts["architecture"] != device.architecture:
        said.append(f"it is {facts['architecture']}, the profile says {device.architecture}")
    lacking = [name for name in device.features if name not in facts["cpu_features"].split()]
    if lacking:
        said.append(f"CPU features that the profile expects: {', '.join(lacking)}")
    memory = facts.get("memory_gb")
    if device.memory_gb and memory and memory < 0.85 * device.memory_gb:
        said.append(f"memory: {memory} GB, the profile says {device.memory_gb:g} GB")
    if facts.get("throttled"):
        said.append(f"full speed: {', '.join(facts['throttled'])}")
    if device.transport == "local":
        return said
    said += _unfit(device, facts)
    if not facts["setup"]:
        said.append(f"edgeft: edgeft devices setup {device.name}")
    elif facts["setup"]["edgeft"] != wheel.sha256():
        said.append(f"this edgeft, there is another: edgeft devices setup {device.name}")
    return said


def _unfit(device: Device, facts: dict[str, Any]) -> Iterator[str]:
    """Why an environment cannot be made there."""
    version = tuple(map(int, facts["python"].split(".")[:2]))
    if version < _PYTHON:
        yield (
            f"Python 3.11: its {device.python} is {facts['python']}; name a newer one as 'python' "
            "in the profile"
        )
    if not facts["venv"]:
        yield f"{device.python}'s venv: sudo apt install python3-venv"
    if facts["disk_free_gb"] < _ROOM_GB and not facts["setup"]:
        yield f"disk: {facts['disk_free_gb']} GB free, about {_ROOM_GB:g} GB are needed"


def shown_value(value: Any) -> str:
    """A fact as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown_value(v)}" for name, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def clean(device: Device) -> int:
    """Remove the bundles that were sent there; bytes freed.

    Raises:
        UserError: it cannot be reached, or is at work.
    """
    _remote(device)
    with Agent(device) as there:
        there.ask("lock")
        return int(there.ask("clean")[-1]["bytes"])


@dataclass(frozen=True)
class Plan:
    """What is to be set up.

    Attributes:
        folder: the wheels to send, edgeft's own among them.
        pins: requirements as pip takes them.
    """

    device: Device
    folder: Path
    pins: list[str]
    no_index: bool

    @property
    def wheels(self) -> dict[str, Path]:
        """By file name."""
        return {path.name: path for path in sorted(self.folder.iterdir())}

    @property
    def llama_wheels(self) -> list[str]:
        """Wheels of llama-cpp-python: with one nothing is compiled."""
        return [name for name in self.wheels if name.startswith(_LLAMA)]


def setup(device: Device, wheelhouse: Path | None = None, no_index: bool = False) -> None:
    """Make an environment with ``edgeft[runtime]`` on the device; what is done is not done again.

    Args:
        wheelhouse: wheels to take before the index's, a compiled llama-cpp-python perhaps.
        no_index: take nothing from an index.

    Raises:
        UserError: the device cannot be reached or lacks something, or a step failed there.
    """
    _remote(device)
    with tempfile.TemporaryDirectory() as scratch, Agent(device) as there:
        facts = there.facts()
        check_architecture(device, facts)
        for line in _unfit(device, facts):
            raise UserError(f"{device.name} lacks {line}")
        folder = Path(scratch)
        for path in _usable(wheelhouse, facts["architecture"]) if wheelhouse else ():
            (folder / path.name).symlink_to(path.resolve())
        (folder / wheel.NAME).write_bytes(wheel.build())
        plan = Plan(device, folder, _pins(), no_index)
        installed = f"llama-cpp-python=={facts['runtimes'].get('llama-cpp-python')}"
        compiles = not plan.llama_wheels and plan.pins[0] not in (installed, "llama-cpp-python")
        if compiles and not facts["compiler"]:
            raise UserError(
                f"{device.name} lacks a C++ compiler for llama.cpp: sudo apt install g++ there, or "
                "give a wheel of llama-cpp-python with --wheelhouse"
            )
        wanted = {"edgeft": wheel.sha256(), "pins": plan.pins}
        if wheelhouse:
            wanted["wheels"] = run.fingerprint(
                {name: run.sha256(path) for name, path in plan.wheels.items() if name != wheel.NAME}
            )
        known = facts["setup"] or {}
        if {**known, **wanted} == known:
            say(f"· {device.name}: up to date")
            return
        there.ask("lock")
        there.ask("write", name="setup.json", text="null")  # until all of it is done
        _steps(there, plan, fresh=not facts["runtimes"], compiles=compiles)
        there.ask("write", name="setup.json", text=json.dumps({**known, **wanted}))


def _remote(device: Device) -> None:
    if isinstance(open_transport(device), Local):
        raise UserError(f"{device.name} is this machine: there is nothing to set up or clean")


def _usable(wheelhouse: Path, architecture: str) -> list[Path]:
    """The wheels for any machine and for this one."""
    if not wheelhouse.is_dir():
        raise UserError(f"--wheelhouse {wheelhouse} is no folder")
    found = [
        path
        for path in sorted(wheelhouse.glob("*.whl"))
        if path.stem.endswith(("any", architecture)) and not path.name.startswith("edgeft-")
    ]
    if not found:
        raise UserError(f"--wheelhouse {wheelhouse} has no wheel for {architecture}")
    return found


def _pins() -> list[str]:
    found = []
    for name in _RUNTIMES:
        try:
            found.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(name)
    return found


def _steps(there: Agent, plan: Plan, *, fresh: bool, compiles: bool) -> None:
    pip = ["venv/bin/python", "-m", "pip", "--disable-pip-version-check", "--no-input"]
    offline = ["--no-index"] if plan.no_index else []
    if fresh:
        arguments = [plan.device.python, "-m", "venv", "--clear", "venv"]
        _do(there, "virtual environment", arguments)
    files = {
        name: {"bytes": path.stat().st_size, "sha256": run.sha256(path)}
        for name, path in plan.wheels.items()
    }
    title = "send edgeft" if len(files) == 1 else f"send edgeft and {len(files) - 1} wheels"
    with _step(there, title) as update:
        send(there, plan.folder, files, update, under="setup")
    links = ["--find-links", "setup/wheels", "--find-links", "setup/built"]
    if compiles:  # kept there: what is compiled once is a wheel from then on
        built = ["wheel", "--no-deps", "--wheel-dir", "setup/built", *links, *offline, plan.pins[0]]
        _do(there, "compile llama.cpp", [*pip, *built])
    own = f"setup/wheels/{wheel.NAME}"
    _do(there, "install", [*pip, "install", *links, *offline, *plan.pins, own])
    # pip takes another build of the same version for the same.
    builds = [own, *(f"setup/wheels/{name}" for name in plan.llama_wheels)]
    again = ["install", "--force-reinstall", "--no-deps", "--no-index", *builds]
    _do(there, "edgeft", [*pip, *again])
    _do(there, "the runtimes open", ["venv/bin/python", "-c", _CHECK])


@contextmanager
def _step(there: Agent, title: str) -> Iterator[Update]:
    with shown(f"{there.device.name}: {title}") as update:
        yield update


def _do(there: Agent, title: str, arguments: Sequence[str]) -> None:
    """One program on the device, shown with the time it took.

    Raises:
        UserError: it failed; its own reason is in it.
    """
    lines: list[str] = []
    with _step(there, title) as update:
        for event in there.events("run", arguments=list(arguments)):
            if event["event"] == "line" and event["text"].strip():
                lines.append(event["text"].strip())
                update(0, 1, lines[-1][:60])
            elif event.get("code"):
                raise UserError(f"{there.device.name}: {title}: {_reason(lines)}")
        update(1, 1, "")


def _reason(lines: Sequence[str]) -> str:
    """What a program says went wrong: pip's first error, else its last words."""
    errors = [line for line in lines if re.match(r"(ERROR|error): (?!Exception:)|\w*Error: ", line)]
    return (errors or [*lines[-1:], "no message"])[0]
