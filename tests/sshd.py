"""A real sshd on the loopback, and devices behind it."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edgeft import wheel
from edgeft.catalog import Device

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")


@dataclass
class Sshd:
    """A server of its own, with its keys in ``place``."""

    place: Path
    process: subprocess.Popen[bytes]
    port: int

    def device(self, name: str = "board", **changes: Any) -> Device:
        """A profile that reaches it; its folder is ``place/name``."""
        known = {
            "transport": "ssh",
            "host": "127.0.0.1",
            "port": self.port,
            "user": getpass.getuser(),
            "identity": str(self.place / "key"),
            "known_hosts": str(self.place / "known_hosts"),
            "folder": str(self.place / name),
            "python": sys.executable,
        }
        return Device(name, **{**known, **changes})

    def set_up(self, name: str = "board", **changes: Any) -> Device:
        """The same, as ``edgeft devices setup`` leaves it, with this environment for its own."""
        device = self.device(name, **changes)
        python = Path(device.folder) / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        setup = {"edgeft": wheel.sha256(), "pins": []}
        (Path(device.folder) / "setup.json").write_text(json.dumps(setup))
        return device

    def profile(self, folder: Path, device: Device) -> None:
        """Write it to ``folder/devices``, where edgeft called from ``folder`` finds it."""
        (folder / "devices").mkdir(exist_ok=True)
        lines = [
            f"{key} = {json.dumps(value)}"
            for key, value in vars(device).items()
            if key != "name" and value is not None
        ]
        (folder / "devices" / f"{device.name}.toml").write_text("\n".join(lines) + "\n")

    def cut(self) -> int:
        """Cut every connection, as a router would; how many there were."""
        sessions = psutil.Process(self.process.pid).children(recursive=True)
        servers = [p for p in sessions if "sshd" in p.name()]
        for process in servers:
            process.kill()
        return len(servers)

    def reboot(self) -> int:
        """Everything is gone for a few seconds; how many connections there were."""
        sessions = self.cut()
        self.process.kill()
        self.process.wait()
        time.sleep(3)
        self.process = _listen(self.place, self.port)
        return sessions


def start(place: Path) -> Sshd:
    """Start one that only our own key opens."""
    for name in ("key", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)]
        subprocess.run(command, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key = (place / "host_key.pub").read_text()
    (place / "known_hosts").write_text(f"[127.0.0.1]:{port} {key}")
    (place / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {place}/host_key\nPidFile none\n"
        f"AuthorizedKeysFile {place}/key.pub\nPermitRootLogin prohibit-password\n"
        "PasswordAuthentication no\nStrictModes no\nUsePAM no\n"
    )
    return Sshd(place, _listen(place, port), port)


def _listen(place: Path, port: int) -> subprocess.Popen[bytes]:
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    assert SSHD
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(place / "sshd_config")])
    give_up = time.monotonic() + 10
    while time.monotonic() < give_up:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    raise AssertionError("sshd does not answer")
