"""Children: a crash is one clear line, and none outlives its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from edgeft import child
from edgeft.errors import UserError

CHILD = """
import os, signal, sys, time
from edgeft import child
from edgeft.errors import UserError

def work(request, emit):
    emit("progress", done=1, total=2, text="hello")
    print("noise of a library")
    if request == "abort":
        print("terminate called: unordered_map::at", file=sys.stderr, flush=True)
        os.abort()
    if request == "mistake":
        raise UserError("no such thing: do another")
    if request == "bug":
        raise KeyError("x")
    if request == "nap":
        time.sleep(1.5)
    if request == "sleep":
        open("pid", "w").write(str(os.getpid()))
        time.sleep(60)

if __name__ == "__main__":
    child.serve(work)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return "a_child"


def test_events_come_back_and_noise_does_not(module: str) -> None:
    assert child.run(module, "fine") == [
        {"event": "progress", "done": 1, "total": 2, "text": "hello"}
    ]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("mistake", "^no such thing: do another$"),
        ("abort", "killed by SIGABRT; last words: terminate called: unordered_map::at"),
        ("bug", "a_child stopped: KeyError: 'x'"),
    ],
)
def test_every_end_is_one_line(module: str, request_: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        child.run(module, request_)
    assert "\n" not in str(raised.value)


def test_a_child_ends_with_its_parent(module: str, tmp_path: Path) -> None:
    code = f"from edgeft import child; child.run({module!r}, 'sleep')"
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    pid_file = tmp_path / "pid"
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    parent.kill()
    parent.wait()
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def test_a_child_on_a_device_ends_without_a_beat(module: str, tmp_path: Path) -> None:
    """A connection may die without a word."""
    env = {**os.environ, child.BEAT: "0.5"}
    program = [sys.executable, "-m", module]
    silent = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    assert silent.stdin
    silent.stdin.write(b'"sleep"\n')
    silent.stdin.flush()
    start = time.monotonic()
    assert silent.wait(20) == 1
    assert time.monotonic() - start > 0.4


def test_beats_keep_a_child_alive(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_BEAT_EVERY_S", 0.1)
    monkeypatch.setenv(child.BEAT, "0.6")
    start = time.monotonic()
    assert len(list(child.call(module, "nap", beat=True))) == 1
    assert time.monotonic() - start > 1.2


def test_children_on_a_device_wait_for_each_other(module: str, tmp_path: Path) -> None:
    env = {child.LOCK: str(tmp_path)}
    first = child.call(module, "nap", env)
    next(first)
    start = time.monotonic()
    assert len(child.run(module, "fine", env)) == 1
    assert time.monotonic() - start < 20
    with pytest.raises(StopIteration):
        next(first)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a zombie that nobody reaped is dead
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
