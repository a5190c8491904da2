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
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from edgeft.errors import UserError

Event = dict[str, Any]
_PATIENCE_S = 10.0
# For children on a device, in their environment. A connection may die without a word, so they end
# after so many seconds without a beat; and only one works at a time.
BEAT, LOCK = "EDGEFT_BEAT_S", "EDGEFT_LOCK"
BEAT_LIMIT_S, _BEAT_EVERY_S = 45, 10.0
_LOCK_PATIENCE_S = 60.0
_interrupted = threading.Event()


def interrupt(*_: Any) -> None:
    """The handler of Ctrl-C: Python drops an exception that comes while it cleans something up."""
    _interrupted.set()
    raise KeyboardInterrupt


class ChildDied(UserError):
    """The child ended without an answer; the text names the signal or the library's last words.

    Attributes:
        code: as :class:`subprocess.Popen` has it.
        log: all that was on its standard error.
    """

    def __init__(self, text: str, code: int, log: str) -> None:
        super().__init__(text)
        self.code, self.log = code, log


def call(
    module: str,
    request: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
    python: Path | None = None,
    *,
    command: Sequence[str] | None = None,
    beat: bool = False,
) -> Iterator[Event]:
    """Run ``python -m module`` on ``request`` and yield its events as they come.

    Args:
        module: a module that ends in ``child.serve(...)``.
        request: JSON-serialisable.
        env: environment variables to add to ours.
        python: the interpreter of another environment that has edgeft, instead of ours.
        command: what starts the child, instead of all that.
        beat: tell the child now and then that we are there.

    Raises:
        UserError: the child raised one, with the same text.
        ChildDied: the child crashed, was killed, or raised something else.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command or [str(python or sys.executable), "-m", module],
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
            if beat:
                threading.Thread(target=_beat, args=(process.stdin,), daemon=True).start()
            for line in process.stdout:
                if _interrupted.is_set():
                    raise KeyboardInterrupt
                try:
                    event: Event = json.loads(line)
                except ValueError:  # torn by a kill, or a login script that talks
                    continue
                if event["event"] == "error":
                    raise UserError(event["message"])
                if event["event"] == "end":
                    finished = True
                    break
                yield event
        except BrokenPipeError:
            pass
        finally:
            with contextlib.suppress(BrokenPipeError, ValueError):
                process.stdin.close()  # a child that is still at work ends now
            try:
                code = process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        if _interrupted.is_set():
            raise KeyboardInterrupt
        if not finished:
            log.seek(0)
            said = log.read()
            text = f"{module.removeprefix('edgeft.')} stopped: {_cause(code, said)}"
            raise ChildDied(text, code, said)


def _beat(stdin: IO[str]) -> None:
    """Until the pipe is closed."""
    while True:
        time.sleep(_BEAT_EVERY_S)
        try:
            stdin.write("\n")
            stdin.flush()
        except (OSError, ValueError):
            return


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
        with _alone():
            work(request, emit)
    except UserError as error:
        emit("error", message=str(error))
    else:
        emit("end")


def _end_with_parent() -> None:
    limit = float(os.environ[BEAT]) if BEAT in os.environ else None
    while select.select([0], [], [], limit)[0] and os.read(0, 4096):
        pass
    os._exit(1)


def _alone() -> contextlib.AbstractContextManager[None]:
    if LOCK not in os.environ:
        return contextlib.nullcontext()
    from edgeft import run

    busy = "the device is at work for another edgeft: wait for it"
    return run.locked(Path(os.environ[LOCK]).expanduser(), _LOCK_PATIENCE_S, busy)


def _cause(code: int, log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    if code < 0 or 128 < code < 128 + signal.NSIG:  # a shell in between adds 128
        return f"killed by {signal.Signals(-code if code < 0 else code - 128).name}; last words: {last}"
    return last
