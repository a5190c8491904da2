"""Stages are done once, only for the same inputs; a run belongs to one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from edgeft import run
from edgeft.errors import UserError


def test_a_stage_is_done_once_per_inputs(tmp_path: Path) -> None:
    out, calls = tmp_path / "stage", []

    def work(folder: Path) -> None:
        calls.append(1)
        (folder / "x").write_text(str(len(calls)))

    assert run.stage(out, {"a": 1}, work)
    assert not run.stage(out, {"a": 1}, work)
    assert run.stage(out, {"a": 2}, work)
    assert (out / "x").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["stage"]


def test_a_failed_stage_keeps_what_was_finished_before(tmp_path: Path) -> None:
    out = tmp_path / "stage"
    run.stage(out, {"a": 1}, lambda folder: (folder / "x").write_text("good"))

    def fail(folder: Path) -> None:
        (folder / "x").write_text("half")
        raise UserError("no")

    with pytest.raises(UserError):
        run.stage(out, {"a": 2}, fail)
    assert (out / "x").read_text() == "good"


def test_a_stage_goes_on_only_for_the_same_inputs(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise UserError("cut off")

    found: list[bool] = []
    for inputs in ({"a": 1}, {"a": 1}, {"a": 2}):
        with pytest.raises(UserError):
            run.stage(
                tmp_path / "s",
                inputs,
                lambda f: (found.append((f / "half").exists()), fail(f)),
            )
    assert found == [False, True, False]


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(UserError, match="the disk is full"):
        run.stage(tmp_path / "s", {}, lambda _: full.write_text("x"))
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not an edgeft run and not empty"):
        run.create(tmp_path)
    with pytest.raises(UserError, match="not an edgeft run"):
        run.check(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        run.create(tmp_path / "thesis.tex")
    assert run.check(run.create(tmp_path / "new")) == tmp_path / "new"


HOLD = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from edgeft import run
    with run.locked(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
""")


def test_the_second_run_says_so_and_a_killed_one_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_LOCK_PATIENCE_S", 0.3)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    refused = pytest.raises(UserError, match=f"another edgeft .process {holder.pid}.")
    with refused, run.locked(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run.locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    with run.hash_cache(tmp_path) as cache:
        first = run.sha256(path, cache)
    with run.hash_cache(tmp_path) as cache:
        assert list(cache.values()) == [first]
        time.sleep(0.01)
        path.write_bytes(b"abd")
        assert run.sha256(path, cache) != first
