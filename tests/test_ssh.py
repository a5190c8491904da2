"""A device behind a real sshd: what is sent, what is cut, and what every failure says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sshd

from edgeft import child, transports
from edgeft.errors import UserError
from edgeft.transports import ConnectionLost, open_transport
from edgeft.transports.ssh import Agent, command, send

pytestmark = pytest.mark.skipif(sshd.SSHD is None, reason="there is no sshd (openssh-server)")

MB = 1_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Sshd]:
    running = sshd.start(tmp_path_factory.mktemp("sshd"))
    yield running
    running.process.terminate()
    running.process.wait()


def silent(*_: Any) -> None:
    pass


def described(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A few files as of a bundle, one in a folder, one empty, one large."""
    folder = tmp_path / "gguf-q4_0" / "tuned"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "large").write_bytes(os.urandom(40 * MB))
    (folder / "tokenizer.json").write_text('{"é": 1}')
    (folder / "empty").write_bytes(b"")
    return folder


def test_a_folder_goes_over_once_and_whole(server: sshd.Sshd, files: Path) -> None:
    device = server.set_up("once")
    transport = open_transport(device)
    seen: list[tuple[int, int]] = []
    there = transport.place(
        files, described(files), lambda done, total, _: seen.append((done, total))
    )
    assert described(there) == described(files)
    assert there.is_relative_to(Path(device.folder) / "bundles")
    assert seen[-1][0] == seen[-1][1] == sum(f["bytes"] for f in described(files).values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    seen.clear()
    assert transport.place(files, described(files), lambda *step: seen.append(step[:2])) == there
    assert not seen, "it was sent again"


@pytest.mark.slow
def test_a_file_altered_on_the_device_is_sent_again(server: sshd.Sshd, files: Path) -> None:
    transport = open_transport(server.set_up("altered"))
    there = transport.place(files, described(files), silent)
    with (there / "model" / "large").open("r+b") as large:
        large.seek(20 * MB)
        large.write(b"otherwise")
    assert described(there) != described(files)
    assert transport.place(files, described(files), silent) == there
    assert described(there) == described(files)


@pytest.mark.slow
def test_what_was_cut_goes_on_from_there(server: sshd.Sshd, files: Path) -> None:
    device = server.set_up("cut")
    transport = open_transport(device)
    half = 16 * MB

    def cut(done: int, total: int, _: str) -> None:
        if done >= half:
            server.cut()

    with pytest.raises(ConnectionLost, match="cut: "):
        transport.place(files, described(files), cut)
    [part] = (Path(device.folder) / "files").glob("*.part")
    kept = part.stat().st_size
    assert 0 < kept < 40 * MB
    seen: list[int] = []
    there = transport.place(files, described(files), lambda done, *_: seen.append(done))
    assert min(seen) > kept, "it began anew"
    assert described(there) == described(files)


def test_a_lost_connection_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the work gets on, or for so many tries; a device never reached is not."""
    monkeypatch.setattr(transports, "_WAITS_S", (0, 0, 0))
    told: list[str] = []
    done: list[int] = []

    def work(steps: Iterator[bool]) -> Callable[[], None]:
        def step() -> None:
            for got_on in steps:
                if got_on:
                    done.append(1)
                raise ConnectionLost("gone")

        return step

    transports.patiently(work(iter([False] * 3)), lambda: len(done), told.append)
    assert told == ["gone; trying again in 0 s"] * 3
    with pytest.raises(ConnectionLost):
        transports.patiently(work(iter([False] * 4)), lambda: len(done), told.append)
    transports.patiently(work(iter([True] * 9)), lambda: len(done), told.append, reached=False)
    with pytest.raises(ConnectionLost):
        transports.patiently(work(iter([False])), lambda: len(done), told.append, reached=False)


@pytest.mark.slow
def test_what_arrives_otherwise_is_refused(server: sshd.Sshd, files: Path) -> None:
    """A file that changed after it was described."""
    transport = open_transport(server.set_up("changed"))
    facts = described(files)
    (files / "model" / "large").write_bytes(os.urandom(40 * MB))
    with pytest.raises(UserError, match="arrived otherwise than it was sent"):
        transport.place(files, facts, silent)
    (files / "model" / "large").write_bytes(b"short")
    with pytest.raises(UserError, match="large changed while it was sent"):
        transport.place(files, facts, silent)


def test_too_little_room_is_said_before_anything_is_sent(server: sshd.Sshd, tmp_path: Path) -> None:
    device = server.set_up("small")
    huge = {"model.gguf": {"bytes": 10**15, "sha256": "0" * 64}}
    with Agent(device) as there:
        with pytest.raises(UserError, match=r"small has .* of disk left, but 1000000.0 GB more"):
            send(there, tmp_path, huge, silent)
        with pytest.raises(UserError, match="of memory available, but .* choose a smaller target"):
            send(there, tmp_path, huge, silent, in_memory=True)
    assert not list((Path(device.folder) / "files").iterdir())


@pytest.mark.slow
def test_one_edgeft_at_a_time(server: sshd.Sshd) -> None:
    device = server.set_up("busy")
    with Agent(device) as first, Agent(device) as second:
        first.ask("lock")
        with pytest.raises(UserError, match="at work for another edgeft"):
            second.ask("lock", patience_s=0.5)
    with Agent(device) as third:
        third.ask("lock", patience_s=5)


@pytest.mark.slow
def test_clean_leaves_what_was_set_up(server: sshd.Sshd, files: Path) -> None:
    device = server.set_up("clean")
    open_transport(device).place(files, described(files), silent)
    with Agent(device) as there:
        send(there, files / "model", described(files / "model"), silent, under="setup")
        (files / "tokenizer.json").write_text("{}")
        assert there.ask("clean")[-1]["bytes"] == len('{"é": 1}'.encode())
    left = {path.name for path in (Path(device.folder) / "files").iterdir()}
    assert left == {f["sha256"] for f in described(files / "model").values()}
    assert not (Path(device.folder) / "bundles").exists()


def test_nothing_of_a_profile_is_read_by_a_shell(server: sshd.Sshd, tmp_path: Path) -> None:
    """Arguments arrive as they are, whatever is in them."""
    wild = ["$(touch x)", "a b", "'\"", ";exit 3", "é\n"]
    code = "import json,sys; print(json.dumps(sys.argv[1:]))"
    program = command(server.device(), [sys.executable, "-c", code, *wild])
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == wild


def test_a_child_over_ssh_is_a_child(server: sshd.Sshd) -> None:
    transport = open_transport(server.set_up("child"))
    [facts] = transport.call("edgeft.bench.machine", {})
    assert facts["llama-cpp-python"] and facts["architecture"]
    with pytest.raises(child.ChildDied, match="No module named edgeft.nothing"):
        list(transport.call("edgeft.nothing", {}))


def refused(device: Any) -> str:
    with pytest.raises(UserError) as raised:
        open_transport(device).place(Path(), {}, silent)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_every_failure_is_one_line(server: sshd.Sshd, tmp_path: Path) -> None:
    port = server.port
    assert "cannot be reached: connect to host 127.0.0.1 port 1: Connection refused" in refused(
        server.device(port=1)
    )
    assert "there is no host 'nowhere.invalid'" in refused(server.device(host="nowhere.invalid"))
    (tmp_path / "empty").write_text("")
    unknown = refused(server.device(known_hosts=str(tmp_path / "empty")))
    assert f"host key of [127.0.0.1]:{port} is not known yet: connect once by hand" in unknown
    other = (server.place / "key.pub").read_text()
    (tmp_path / "other").write_text(f"[127.0.0.1]:{port} {other}")
    changed = refused(server.device(known_hosts=str(tmp_path / "other")))
    assert (
        f"is not the one we know. If the device was installed anew, forget the old key with: ssh-keygen -R '[127.0.0.1]:{port}'"
        in changed
    )
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "k"], check=True
    )
    assert "does not take our key: ssh-copy-id" in refused(
        server.device(identity=str(tmp_path / "k"))
    )
    assert "there is no python9 on the device" in refused(server.device(python="python9"))
    wrong = refused(server.device(architecture="riscv64"))
    assert "but the profile says riscv64: take another profile, or correct it" in wrong
    assert "is not set up yet: edgeft devices setup none" in refused(server.device(name="none"))
    old = server.set_up("old")
    (Path(old.folder) / "setup.json").write_text('{"edgeft": "0", "pins": []}')
    assert "old has another edgeft than this one: edgeft devices setup old" in refused(old)


COUNT = 6


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two targets, benched here."""
    out = tmp_path_factory.mktemp("ssh-run") / "run"
    settings = (
        *("task.train=16", "task.heldout=4", "task.evaluation=12", "task.unseen=4"),
        *("train.epochs=1", "bench.max_new_tokens=12", "bench.parallel=2"),
        *("bench.latency_prompt_tokens=16", "bench.latency_new_tokens=4"),
    )
    chosen = [part for setting in settings for part in ("--set", setting)]
    targets = ["--target", "gguf-q8_0", "--target", "gguf-q4_0"]
    done = edgeft("run", "--model", tiny, "--out", out, *targets, *chosen)
    assert done.returncode == 0, done.stderr
    return out


def edgeft(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "edgeft", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, cwd=cwd, check=False)


def answers(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows), "a question twice"
    return {row["id"]: {k: v for k, v in row.items() if k != "seconds"} for row in rows}


def scored(run: Path, device: str) -> dict[str, Any]:
    return {
        f"{target}/{weights}": answers(run / "bench" / device / target / weights)
        for target in ("gguf-q8_0", "gguf-q4_0")
        for weights in ("base", "tuned")
    }


@pytest.mark.slow
def test_a_run_is_benched_on_a_device(server: sshd.Sshd, run: Path, tmp_path: Path) -> None:
    device = server.set_up("bench", threads="auto")
    server.profile(tmp_path, device)
    done = edgeft("bench", run, "--device", "bench", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert scored(run, "bench") == scored(run, "local")
    report = json.loads((run / "report.json").read_text())
    there = [v for v in report["variants"] if v["device"] == "bench"]
    assert {v["target"] for v in there} == {"gguf-q8_0", "gguf-q4_0"}
    for variant in there:
        assert variant["same_as_local"] == [12, 12]
        latency = variant["latency"]
        assert latency["decode_tok_s"] > 0
        tried = {int(count): speed for count, speed in latency["threads_tried"].items()}
        assert list(tried) == list(range(1, len(tried) + 1)) and latency["threads"] in tried
        low, high = latency["decode_tok_s_range"]
        assert low <= latency["decode_tok_s"] <= high
    assert report["machine"]["bench"]["llama-cpp-python"]
    again = edgeft("bench", run, "--device", "bench", cwd=tmp_path)
    assert again.stderr.count("up to date") >= 4 and "✓ bench" not in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("accident", ["cut", "reboot"])
def test_a_lost_connection_loses_nothing(
    server: sshd.Sshd, run: Path, tmp_path: Path, accident: str
) -> None:
    """It goes on by itself; what was answered before is not asked again."""
    name = f"lost-{accident}"
    server.profile(tmp_path, server.set_up(name))
    place = run / "bench" / name
    partial = place / "gguf-q4_0" / "base.partial" / "results.jsonl"
    program = [sys.executable, "-m", "edgeft", "bench", str(run), "--device", name]
    client = subprocess.Popen(program, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (partial.exists() and b"\n" in partial.read_bytes()):
        assert client.poll() is None
        time.sleep(0.002)
    assert getattr(server, accident)() > 0, "there was nothing to cut"
    kept = partial.read_bytes()
    _, said = client.communicate(timeout=120)
    assert client.returncode == 0, said
    results = (place / "gguf-q4_0" / "base" / "results.jsonl").read_bytes()
    assert results.startswith(kept[: kept.rfind(b"\n") + 1])
    assert scored(run, name) == scored(run, "local")


@pytest.mark.slow
def test_a_killed_client_loses_nothing(server: sshd.Sshd, run: Path, tmp_path: Path) -> None:
    server.profile(tmp_path, server.set_up("killed"))
    place = run / "bench" / "killed"
    partial = place / "gguf-q4_0" / "base.partial" / "results.jsonl"
    program = [sys.executable, "-m", "edgeft", "bench", str(run), "--device", "killed"]
    client = subprocess.Popen(program, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (partial.exists() and b"\n" in partial.read_bytes()):
        assert client.poll() is None
        time.sleep(0.002)
    client.kill()
    client.wait()
    kept = partial.read_bytes()
    done = edgeft("bench", run, "--device", "killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = (place / "gguf-q4_0" / "base" / "results.jsonl").read_bytes()
    assert results.startswith(kept[: kept.rfind(b"\n") + 1])
    assert scored(run, "killed") == scored(run, "local")


@pytest.mark.slow
def test_a_device_that_fails_does_not_keep_another(
    server: sshd.Sshd, run: Path, tmp_path: Path
) -> None:
    server.profile(tmp_path, server.set_up("there"))
    server.profile(tmp_path, server.device("gone", port=1))
    done = edgeft(
        "bench",
        run,
        "--device",
        "gone",
        "--device",
        "there",
        "--target",
        "gguf-q4_0",
        "--limit",
        str(COUNT),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "gone: [127.0.0.1]:1 cannot be reached" in done.stderr.splitlines()[-1]
    assert len(answers(run / "bench" / "there" / "gguf-q4_0" / "tuned")) == COUNT
    report = json.loads((run / "report.json").read_text())
    [variant] = [v for v in report["variants"] if v["device"] == "there"]
    assert variant["tuned"]["n"] == COUNT and variant["same_as_local"] == [COUNT, COUNT]
    assert f"On there {COUNT} of 12 questions were asked" in (run / "report.md").read_text()


@pytest.mark.slow
def test_set_up_makes_a_device_of_a_bare_machine(
    server: sshd.Sshd, run: Path, tmp_path: Path
) -> None:
    """A real environment by the real pip, without torch; twice is once."""
    device = server.device("bare")
    server.profile(tmp_path, device)
    probed = edgeft("devices", "probe", "bare", "--json", cwd=tmp_path)
    facts = json.loads(probed.stdout)
    assert facts["missing"] == ["edgeft: edgeft devices setup bare"] and facts["setup"] is None
    done = edgeft("devices", "setup", "bare", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for step in ("virtual environment", "send edgeft", "install", "the runtimes open"):
        assert f"✓ bare: {step}" in done.stderr
    python = Path(device.folder) / "venv" / "bin" / "python"
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 1
    again = edgeft("devices", "setup", "bare", cwd=tmp_path)
    assert again.stderr.strip() == "· bare: up to date"
    facts = json.loads(edgeft("devices", "probe", "bare", "--json", cwd=tmp_path).stdout)
    assert facts["missing"] == [] and facts["runtimes"]["llama-cpp-python"]
    bundle = run / "export" / "gguf-q8_0" / "tuned"
    done = edgeft("bench", bundle, "--device", "bare", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path / "out") == answers(run / "bench" / "local" / "gguf-q8_0" / "tuned")
    # By hand on the device, from the folder that was sent.
    [placed] = (Path(device.folder) / "bundles").iterdir()
    by_hand = [python, "-m", "edgeft", "bench", placed, "--out", tmp_path / "hand", "--json"]
    done = subprocess.run(by_hand, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 12
    assert answers(tmp_path / "hand") == answers(tmp_path / "out")


@pytest.mark.slow
def test_set_up_says_what_is_lacking(server: sshd.Sshd, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "python").write_text(f'#!/bin/sh\nPATH={tmp_path}/bin exec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    server.profile(tmp_path, server.device("poor", python=str(tmp_path / "python")))
    done = edgeft("devices", "setup", "poor", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("edgeft: poor lacks a C++ compiler for llama.cpp: sudo apt")
    (tmp_path / "wheels").mkdir()
    wheels = ["--wheelhouse", tmp_path / "wheels"]
    done = edgeft("devices", "setup", "poor", *wheels, cwd=tmp_path)
    assert done.returncode == 2 and "has no wheel for" in done.stderr
    # A wheel that is none: pip's own words.
    (tmp_path / "wheels" / "llama_cpp_python-0.0.1-py3-none-any.whl").write_bytes(b"")
    done = edgeft("devices", "setup", "poor", *wheels, "--no-index", cwd=tmp_path)
    assert done.returncode == 2
    assert "edgeft: poor: install: ERROR: " in done.stderr.splitlines()[-1]
    shutil.rmtree(server.place / "poor")
