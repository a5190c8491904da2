"""A device behind a real sshd: what is sent, what is cut, and what every failure says."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
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
