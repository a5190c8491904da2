"""Work that may abort or that needs a process of its own runs in a child (DESIGN, decision 4).

A child is a module with ``work(request, emit)`` and, at its end::

    if __name__ == "__main__":
        child.serve(work)

The parent sends the request as one JSON line on standard input and leaves that open: its end means
that the parent is gone, and the child stops at once. Events come back as JSON lines on the child's
original standard output; whatever a library prints there goes to standard error instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeft.errors import UserError

Event = dict[str, Any]
_PATIENCE_S = 10.0
_interrupted = threading.Event()


def interrupt(*_: Any) -> None:
    """The handler of Ctrl-C: Python drops an exception that comes while it cleans something up."""
    _interrupted.set()
    raise KeyboardInterrupt


class ChildDied(UserError):
    """The child ended without an answer; the text names the signal or the library's last words."""


def call(
    module: str,
    request: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
    python: Path | None = None,
) -> Iterator[Event]:
    """Run ``python -m module`` on ``request`` and yield its events as they come.

    Args:
        module: a module that ends in ``child.serve(...)``.
        request: JSON-serialisable.
        env: environment variables to add to ours.
        python: the interpreter of another environment that has edgeft, instead of ours.

    Raises:
        UserError: the child raised one, with the same text.
        ChildDied: the child crashed, was killed, or raised something else.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [python or sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        )
        assert process.stdin and process.stdout
        finished = False
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if _interrupted.is_set():
                    raise KeyboardInterrupt
                event: Event = json.loads(line)
                if event["event"] == "error":
                    raise UserError(event["message"])
                if event["event"] == "end":
                    finished = True
                    break
                yield event
        except BrokenPipeError:
            pass
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # a child that is still at work ends now
            try:
                code = process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        if not finished:
            log.seek(0)
            raise ChildDied(f"{module.removeprefix('edgeft.')} stopped: {_cause(code, log.read())}")


def run(
    module: str,
    request: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
    python: Path | None = None,
) -> list[Event]:
    """All events of :func:`call`, for work that needs no progress."""
    return list(call(module, request, env, python))


def serve(work: Callable[[Any, Callable[..., None]], None]) -> None:
    """The child's side: read the request, call ``work(request, emit)``, report how it ended."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def emit(event: str, **fields: Any) -> None:
        with lock:
            out.write(json.dumps({"event": event, **fields}) + "\n")

    try:
        work(request, emit)
    except UserError as error:
        emit("error", message=str(error))
    else:
        emit("end")


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _cause(code: int, log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; last words: {last}"
    return last
