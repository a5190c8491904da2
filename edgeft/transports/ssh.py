"""A device behind the system's OpenSSH: the user's configuration, agent and known hosts count.

No password is ever asked for or typed. Nothing of edgeft need be there for :class:`Agent`;
:meth:`Ssh.call` runs our children in the environment that ``edgeft devices setup`` made. A child
ends when its connection does, and what it had answered is here by then, so nothing is lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from edgeft import child
from edgeft.bench import board
from edgeft.catalog import Device
from edgeft.errors import UserError
from edgeft.progress import byte_size
from edgeft.transports import ConnectionLost, agent

_SSH_FAILED = 255
_PIECE = 1 << 18
_SPARE_DISK = 200e6  # bytes to leave free
_SPARE_MEMORY = 150e6  # a runtime without a model
_OPTIONS = {
    "BatchMode": "yes",  # never ask
    "ConnectTimeout": "15",
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
}
# Makes modules of the sources in the first line, then serves. No value of the user's is in it.
_BOOT = (
    "import json,sys,types;"
    "[exec(compile(t,n,'exec'),sys.modules.setdefault(n,types.ModuleType(n)).__dict__)"
    " for n,t in json.loads(sys.stdin.buffer.readline()).items()];"
    "sys.modules['edgeft.transports.agent'].main()"
)


class Ssh:
    """See :class:`edgeft.transports.Transport`."""

    def __init__(self, device: Device) -> None:
        if not device.host:
            raise UserError(f"device {device.name}: its profile lacks 'host'")
        self.device = device

    def place(self, folder: Path, files: Mapping[str, Any], update: Callable[..., None]) -> Path:
        with Agent(self.device) as there:
            _check_set_up(self.device, there.facts())
            there.ask("lock")
            return send(there, folder, files, update, in_memory=True)

    def call(
        self, module: str, request: Mapping[str, Any], env: Mapping[str, str] | None = None
    ) -> Iterator[child.Event]:
        folder = self.device.folder
        settings = {
            child.BEAT: str(child.BEAT_LIMIT_S),
            child.LOCK: folder,
            "PYTHONUNBUFFERED": "1",
            **(env or {}),
        }
        there = [
            "env",
            *(f"{name}={value}" for name, value in settings.items()),
            f"{folder}/venv/bin/python",
            "-m",
            module,
        ]
        try:
            yield from child.call(module, request, command=command(self.device, there), beat=True)
        except child.ChildDied as died:
            if died.code == _SSH_FAILED:
                raise failure(self.device, died.log) from died
            raise


def command(device: Device, there: Sequence[str]) -> list[str]:
    """The argument vector that runs ``there`` on the device."""
    options = dict(_OPTIONS)
    if device.identity:
        options["IdentitiesOnly"] = "yes"
    if device.known_hosts:
        options["UserKnownHostsFile"] = f'"{_local(device.known_hosts)}"'
    found = ["ssh", "-T"]
    found += [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    found += ["-i", _local(device.identity)] if device.identity else []
    found += ["-p", str(device.port)] if device.port else []
    found += ["-l", device.user] if device.user else []
    # ssh says 255 for a program killed by a signal too; through another shell it is 128 + signal.
    line = shlex.join(["sh", "-c", shlex.join(there) + "; exit $?"])
    return [*found, "--", device.host, line]


def _local(path: str) -> str:
    return str(Path(path).expanduser())


class Agent:
    """A connection to :mod:`edgeft.transports.agent` on the device.

    Raises:
        ConnectionLost: the device cannot be reached, or no longer.
        UserError: what the agent says was wrong.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def __enter__(self) -> Agent:
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        program = command(self.device, [self.device.python, "-u", "-c", _BOOT])
        try:
            self._process = subprocess.Popen(
                program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
            )
        except FileNotFoundError:
            raise UserError("there is no ssh on this machine: install OpenSSH's client") from None
        try:
            self._send(json.dumps(_sources()).encode() + b"\n")
        except UserError:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def facts(self) -> dict[str, Any]:
        """What the device tells of itself."""
        return self.ask("facts")[-1]

    def ask(self, verb: str, **fields: Any) -> list[child.Event]:
        """The events of one request."""
        return list(self.events(verb, **fields))

    def events(
        self, verb: str, data: Iterator[bytes] | None = None, **fields: Any
    ) -> Iterator[child.Event]:
        """The same, as they come; ``data`` follows the request."""
        request = {"verb": verb, "folder": self.device.folder, **fields}
        self._send(json.dumps(request).encode() + b"\n")
        for piece in data or ():
            self._send(piece)
        assert self._process.stdout
        for line in self._process.stdout:
            try:
                event: child.Event = json.loads(line)
            except ValueError:  # a login script that talks
                continue
            if event["event"] == "error":
                raise UserError(f"{self.device.name}: {event['message']}")
            if event["event"] == "end":
                return
            yield event
        raise self._failure()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin
        return self._process.stdin

    def _send(self, data: bytes) -> None:
        try:
            self._stdin.write(data)
            self._stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _failure(self) -> UserError:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            code = _SSH_FAILED
        self._log.seek(0)
        said = self._log.read()
        if code == _SSH_FAILED:
            return failure(self.device, said)
        last = (said.strip().splitlines() or ["no message"])[-1]
        name, python = self.device.name, self.device.python
        if code == 127:
            return UserError(f"{name}: there is no {python} on the device: install Python 3.11")
        return ConnectionLost(f"{name}: {python} on the device stopped: {last}")


def _sources() -> dict[str, str]:
    names = ("edgeft", "edgeft.bench", "edgeft.transports")
    modules = {module.__name__: Path(str(module.__file__)) for module in (board, agent)}
    return {name: "" for name in names} | {
        name: path.read_text(encoding="utf-8") for name, path in modules.items()
    }


def failure(device: Device, said: str) -> UserError:
    """What ssh's words mean to a user."""
    name, host = device.name, device.host
    at = f"[{host}]:{device.port}" if device.port else host
    login = f"{device.user}@{host}" if device.user else host
    port = f"-p {device.port} " if device.port else ""
    if "IDENTIFICATION HAS CHANGED" in said:
        return UserError(
            f"{name}: the host key of {at} is not the one we know. If the device was installed anew, "
            f"forget the old key with: ssh-keygen -R '{at}'; if not, somebody is in between"
        )
    if "Host key verification failed" in said:
        return UserError(
            f"{name}: the host key of {at} is not known yet: connect once by hand and accept it: "
            f"ssh {port}{login}"
        )
    if "Permission denied" in said:
        return UserError(
            f"{name}: {at} does not take our key: ssh-copy-id {port}{login} (edgeft types no password)"
        )
    if re.search("Could not resolve|Name or service not known", said):
        return ConnectionLost(  # a name of its own on the local network is gone while it reboots
            f"{name}: there is no host '{host}': set 'host' in a profile of your own "
            f'(./devices/NAME.toml with like = "{name}") or in ~/.ssh/config'
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = lines[-1].removeprefix("ssh: ") if lines else "the connection was lost"
    return ConnectionLost(f"{name}: {at} cannot be reached: {reason.rstrip('.')}")


def _check_set_up(device: Device, facts: Mapping[str, Any]) -> None:
    from edgeft import wheel

    check_architecture(device, facts)
    setup = facts["setup"]
    if not setup:
        raise UserError(f"{device.name} is not set up yet: edgeft devices setup {device.name}")
    if setup["edgeft"] != wheel.sha256():
        raise UserError(
            f"{device.name} has another edgeft than this one: edgeft devices setup {device.name}"
        )


def check_architecture(device: Device, facts: Mapping[str, Any]) -> None:
    """Whether the machine is the one that the profile means.

    Raises:
        UserError: it is not.
    """
    if device.architecture and facts["architecture"] != device.architecture:
        raise UserError(
            f"{device.name}: {device.host} is {facts['architecture']}, but the profile says "
            f"{device.architecture}: take another profile, or correct it"
        )


def send(
    there: Agent,
    folder: Path,
    files: Mapping[str, Any],
    update: Callable[..., None],
    *,
    under: str = "bundles",
    in_memory: bool = False,
) -> Path:
    """Send what is not there yet, go on where it was cut, and link it to a folder there.

    Args:
        files: name in ``folder`` to its ``bytes`` and ``sha256``.
        in_memory: whether the device is to hold all of them in memory.

    Raises:
        UserError: there is too little room.
    """
    sizes = {facts["sha256"]: facts["bytes"] for facts in files.values()}
    state = there.ask("have", files=sizes)[-1]
    held = {sha: abs(size) for sha, size in state["there"].items()}
    missing = sum(size - held[sha] for sha, size in sizes.items())
    total = sum(sizes.values())
    if in_memory:
        _check_memory(there.device.name, folder, total, state["memory_gb"])
    if missing:
        _check_disk(there.device.name, missing, state["free"])
    done, start = total - missing, time.monotonic()

    def sent(count: int) -> None:
        nonlocal done
        done += count
        rate = (done - total + missing) / max(time.monotonic() - start, 1e-3)
        update(done, total, f"{byte_size(rate)}/s")

    whole = {sha for sha, size in state["there"].items() if size == sizes[sha] > 0}
    for name, facts in files.items():
        sha, size = facts["sha256"], facts["bytes"]
        if sha not in whole:
            data = _rest(folder / name, held[sha], size, sent)
            list(there.events("receive", data, sha256=sha, bytes=size, offset=held[sha]))
            whole.add(sha)
    named = {name: facts["sha256"] for name, facts in files.items()}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    label = f"{folder.parent.name}-{folder.name}-{digest[:12]}" if under == "bundles" else "wheels"
    placed = there.ask("place", under=under, name=label, files=named)
    return Path(placed[-1]["path"])


def _check_memory(device: str, folder: Path, size: int, available_gb: float | None) -> None:
    if available_gb is not None and size + _SPARE_MEMORY > 1e9 * available_gb:
        raise UserError(
            f"{device} has {byte_size(1e9 * available_gb)} of memory available, but {folder} needs "
            f"at least {byte_size(size + _SPARE_MEMORY)}: choose a smaller target, or stop "
            "something there"
        )


def _check_disk(device: str, missing: int, free: int) -> None:
    if missing + _SPARE_DISK > free:
        raise UserError(
            f"{device} has {byte_size(free)} of disk left, but {byte_size(missing)} more are to be "
            f"sent and {byte_size(_SPARE_DISK)} to stay free: edgeft devices clean {device}, or "
            "delete something there"
        )


def _rest(path: Path, offset: int, size: int, sent: Callable[[int], None]) -> Iterator[bytes]:
    """The file from ``offset`` on, in pieces."""
    with path.open("rb") as data:
        data.seek(offset)
        while offset < size:
            piece = data.read(min(_PIECE, size - offset))
            if not piece:
                raise UserError(f"{path} changed while it was sent: give the command again")
            yield piece
            offset += len(piece)
            sent(len(piece))
