"""The far end of a transport: keeps files by their SHA-256, runs programs, tells what it finds.

It is sent to the device as it is, with :mod:`edgeft.bench.board`, so it needs a Python there and
nothing else: only the standard library, nothing newer than Python 3.8. Requests are JSON lines on
standard input, a file's bytes follow theirs; answers are events as in :mod:`edgeft.child`.

In its folder: ``files/<sha256>`` (``.part`` while it comes), ``bundles/<name>`` of links to them,
``venv``, ``wheels``, ``setup.json``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgeft.bench import board

_PIECE = 1 << 20
_PATIENCE_S = 60.0
_COMPILERS = ("c++", "g++", "clang++")


class Refused(Exception):
    """One line for the user."""


def main() -> None:
    """Serve until standard input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def emit(event: str, **fields: Any) -> None:
        out.write(json.dumps(dict(fields, event=event)) + "\n")

    for line in iter(sys.stdin.buffer.readline, b""):
        request = json.loads(line)
        folder = Path(os.path.expanduser(request["folder"])).absolute()  # noqa: PTH111
        try:
            _VERBS[request["verb"]](folder, request, emit)
        except Refused as refused:
            emit("error", message=str(refused))
        except OSError as error:
            emit("error", message=f"{error.filename or folder} on the device: {error.strerror}")
        else:
            emit("end")


def _facts(folder: Path, request: Any, emit: Any) -> None:
    there = folder
    while not there.exists():
        there = there.parent
    emit(
        "facts",
        **board.facts(),
        disk_free_gb=round(shutil.disk_usage(there).free / 1e9, 2),
        python=".".join(map(str, sys.version_info[:3])),
        venv=_has_venv(),
        compiler=next(filter(None, map(shutil.which, _COMPILERS)), None),
        runtimes=_runtimes(folder),
        setup=_setup(folder),
    )


def _has_venv() -> bool:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return False
    return True


def _setup(folder: Path) -> Any:
    try:
        return json.loads((folder / "setup.json").read_text())
    except (OSError, ValueError):
        return None


def _runtimes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("venv/lib/python3*/site-packages/*.dist-info")):
        name, _, version = path.name[: -len(".dist-info")].rpartition("-")
        if name in ("llama_cpp_python", "onnxruntime", "onnxruntime_genai", "edgeft"):
            found[name.replace("_", "-")] = version
    return found


def _lock(folder: Path, request: Any, emit: Any) -> None:
    """One edgeft at a time; held until this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = (folder / ".lock").open("a+")
    give_up = time.monotonic() + float(request.get("patience_s", _PATIENCE_S))
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise Refused("the device is at work for another edgeft: wait for it") from None
            time.sleep(0.2)
    _held.append(handle)


_held: list[Any] = []


def _have(folder: Path, request: Any, emit: Any) -> None:
    """Which of the files are there and whole, how much of the others, and what room there is."""
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    there = {}
    for sha, size in request["files"].items():
        path, part = files / sha, files / (sha + ".part")
        if path.exists() and not (path.stat().st_size == size and _sha256(path, emit) == sha):
            path.unlink()
        there[sha] = path.stat().st_size if path.exists() else 0
        if not path.exists() and part.exists():
            there[sha] = -part.stat().st_size
    memory = board.facts()["memory_available_gb"]
    emit("have", there=there, free=shutil.disk_usage(files).free, memory_gb=memory)


def _sha256(path: Path, emit: Any) -> str:
    digest, told = hashlib.sha256(), time.monotonic()
    with path.open("rb") as data:
        for piece in iter(lambda: data.read(_PIECE), b""):
            digest.update(piece)
            if time.monotonic() - told > 5:  # a sign of life while an SD card is read
                told = time.monotonic()
                emit("reading")
    return digest.hexdigest()


def _receive(folder: Path, request: Any, emit: Any) -> None:
    """The rest of a file, from where it was cut."""
    sha, size, left = request["sha256"], request["bytes"], request["bytes"] - request["offset"]
    part = folder / "files" / (sha + ".part")
    failed = None
    with part.open("r+b" if request["offset"] else "wb") as out:
        out.seek(request["offset"])
        out.truncate()
        while left:
            piece = sys.stdin.buffer.read(min(left, _PIECE))
            if not piece:
                raise SystemExit  # the connection is gone; what came stays
            left -= len(piece)
            if failed is None:
                try:
                    out.write(piece)
                except OSError as error:  # the rest must be read all the same
                    failed = error
    if failed is not None:
        raise failed
    if part.stat().st_size != size or _sha256(part, emit) != sha:
        part.unlink()
        raise Refused("a file arrived otherwise than it was sent: give the command again")
    part.rename(folder / "files" / sha)


def _place(folder: Path, request: Any, emit: Any) -> None:
    """A folder of files by their names, of links to what is kept."""
    out = folder / request["under"] / request["name"]
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, sha in request["files"].items():
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / "files" / sha, path)
        except OSError:  # a file system without links
            shutil.copyfile(folder / "files" / sha, path)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    emit("placed", path=str(out))


def _run(folder: Path, request: Any, emit: Any) -> None:
    """A program, in our folder; its output line by line, then its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        request["arguments"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout
    for line in process.stdout:
        emit("line", text=line.decode(errors="replace").rstrip())
    emit("ended", code=process.wait())


def _write(folder: Path, request: Any, emit: Any) -> None:
    temporary = folder / (request["name"] + ".tmp")
    temporary.write_text(request["text"])
    temporary.replace(folder / request["name"])


def _clean(folder: Path, request: Any, emit: Any) -> None:
    """Remove what was sent to be benched; what was set up stays."""
    keep = {path.stat().st_ino for path in folder.glob("setup/*/*")}
    freed = 0
    shutil.rmtree(folder / "bundles", ignore_errors=True)
    for path in (folder / "files").glob("*"):
        if path.stat().st_ino not in keep:
            freed += path.stat().st_size
            path.unlink()
    emit("cleaned", bytes=freed)


_VERBS = {
    "facts": _facts,
    "lock": _lock,
    "have": _have,
    "receive": _receive,
    "place": _place,
    "run": _run,
    "write": _write,
    "clean": _clean,
}
