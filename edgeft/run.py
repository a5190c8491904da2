"""The run directory: what makes a folder a run, one writer at a time, stages that are cached.

A stage works in ``<name>.partial`` and is renamed to ``<name>`` when it is done, so nothing
half-written stands under a final name. ``stage.json`` holds the fingerprint of all its inputs; a
killed stage finds its partial folder again as long as that fingerprint is the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeft import __version__
from edgeft.errors import UserError

MARK = "run.json"
_LOCK_PATIENCE_S = 3.0  # a killed run's children need a moment to notice that it is gone


def create(path: Path) -> Path:
    """Make ``path`` a run directory, or find that it is one.

    Raises:
        UserError: it holds other things, or cannot be written.
    """
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; give a folder for the run")
        if path.is_dir() and not (path / MARK).is_file() and any(path.iterdir()):
            raise UserError(
                f"{path} is not an edgeft run and not empty: give another folder with --out"
            )
        path.mkdir(parents=True, exist_ok=True)
        if not (path / MARK).is_file():
            write_json(path / MARK, {"schema": 1, "edgeft": __version__})
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from error
    return path


def check(path: Path) -> Path:
    """``path``, if it is a run directory.

    Raises:
        UserError: it is not.
    """
    if not (path / MARK).is_file():
        raise UserError(f"{path} is not an edgeft run (no {MARK}): make one with edgeft run --out")
    return path


@contextlib.contextmanager
def locked(run: Path, patience_s: float = _LOCK_PATIENCE_S, busy: str = "") -> Iterator[None]:
    """Hold the run for one process at a time. The kernel lets go of it however the process ends.

    Args:
        busy: what to say when another process holds it.

    Raises:
        UserError: another process holds it.
    """
    with (run / ".lock").open("a+") as handle:
        give_up = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    handle.seek(0)
                    holder = handle.read().strip() or "unknown"
                    raise UserError(
                        busy
                        or f"another edgeft (process {holder}) is working on {run}: wait for it, or "
                        "give another folder with --out"
                    ) from None
                time.sleep(0.1)
        handle.seek(0)
        handle.truncate()
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def stage(out: Path, inputs: Mapping[str, Any], work: Callable[[Path], object]) -> bool:
    """Do ``work`` into the folder ``out`` unless it was done for the same ``inputs``.

    Args:
        inputs: everything the result depends on, JSON-serialisable; see :func:`sha256`.
        work: gets the partial folder, which may hold what a killed call left for these inputs.

    Returns:
        Whether anything was done.

    Raises:
        UserError: the disk is full, besides what ``work`` raises.
    """
    print_ = fingerprint(inputs)
    if is_done(out, print_):
        return False
    partial = out.with_name(out.name + ".partial")
    try:
        if partial.exists() and mark(partial) != print_:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        write_json(partial / "stage.json", {"fingerprint": print_, "done": False})
        work(partial)
        write_json(partial / "stage.json", {"fingerprint": print_, "done": True, **inputs})
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {disk_reason(error)}") from error
    return True


def is_done(out: Path, print_: str) -> bool:
    """Whether a stage's folder holds a finished result for this fingerprint."""
    return mark(out) == print_


def mark(folder: Path) -> str | None:
    """The fingerprint that a stage's folder was made for; None where it is no stage's."""
    try:
        found = json.loads((folder / "stage.json").read_text())
    except (OSError, ValueError):
        return None
    return str(found.get("fingerprint"))


def disk_reason(error: OSError) -> str:
    """What an operating system error means to a user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and give the same command again"
    return error.strerror or str(error)


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the inputs as canonical JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def sha256(path: Path, cache: dict[str, Any] | None = None) -> str:
    """SHA-256 of a file, hexadecimal.

    Args:
        cache: remembers hashes by path, size and time of change, since weights are large.
    """
    status = path.stat()
    key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    if cache is not None and key in cache:
        return str(cache[key])
    with path.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    if cache is not None:
        cache[key] = digest
    return digest


@contextlib.contextmanager
def hash_cache(run: Path) -> Iterator[dict[str, Any]]:
    """The hashes that this run remembers, kept in ``.hashes.json``."""
    path = run / ".hashes.json"
    try:
        cache: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        cache = {}
    before = len(cache)
    try:
        yield cache
    finally:
        if len(cache) != before:
            with contextlib.suppress(OSError):
                write_json(path, cache)


def write_json(path: Path, data: Any) -> None:
    """Write through a temporary name, so that the file is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
