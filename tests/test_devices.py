"""Profiles, and the wheel that goes to a device."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from test_cli import edgeft, refused

from edgeft import catalog, wheel

SHIPPED = {
    *("local", "raspberry-pi-5", "raspberry-pi-4", "jetson-orin-nano"),
    *("generic-ssh", "emulated-arm64"),
}


def test_devices_are_listed_with_or_without_a_command() -> None:
    rows = json.loads(edgeft("devices", "--json").stdout)
    assert {row["device"] for row in rows} == SHIPPED
    hosts = {row["device"]: row["host"] for row in rows}
    assert hosts["raspberry-pi-5"] == "pi@raspberrypi.local" and hosts["local"] == ""
    assert "probe" in edgeft("devices", "--help").stdout
    local = json.loads(edgeft("devices", "probe", "local", "--json").stdout)
    assert local["cores"] >= 1 and local["missing"] == []


def profile(folder: Path, text: str, name: str = "mine") -> Path:
    (folder / "devices").mkdir(exist_ok=True)
    (folder / "devices" / f"{name}.toml").write_text(text)
    return folder


def test_a_profile_like_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'like = "raspberry-pi-5"\nhost = "10.0.0.7"\nuser = "ann"\nthreads = 3\n'
    monkeypatch.chdir(profile(tmp_path, text))
    mine, theirs = (catalog.find_device(name) for name in ("mine", "raspberry-pi-5"))
    assert (mine.host, mine.user, mine.threads) == ("10.0.0.7", "ann", 3)
    assert (theirs.threads, mine.architecture) == ("auto", "aarch64")
    assert mine.features == theirs.features and "asimddp" in mine.features


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('like = "raspberry-pi-6"\n', "like = 'raspberry-pi-6'; did you mean 'raspberry-pi-5'"),
        ('transport = "ssh"\nhosts = "x"\n', "unknown key 'hosts'; did you mean 'host'"),
        ('transport = "ssh"\nhost = "-oProxyCommand=id"\n', "host = '-oProxyCommand=id' has char"),
        ('transport = "ssh"\nhost = "a"\nuser = "x y"\n', "user = 'x y' has characters"),
        ('transport = "ssh"\nhost = "a"\npython = "python3;id"\n', "python = 'python3;id' has"),
        ('transport = "ssh"\nhost = "a"\nfolder = "$HOME/x"\n', "folder = '$HOME/x' has"),
        ('transport = "ssh"\nthreads = "all"\n', "threads = 'all' is neither a number nor 'auto'"),
        ('transport = "ssh"\nthreads = -1\n', "threads = -1 is neither a number nor 'auto'"),
        ('transport = "local"\nthreads = true\n', "threads = True is neither"),
        ("about = 'x'\n", "missing 1 required positional argument: 'transport'"),
    ],
)
def test_a_wrong_profile_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    line = refused("devices", cwd=profile(tmp_path, text))
    assert "mine.toml: " in line and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", ".", "--threads", "many"], "--threads takes a number or auto, not 'many'"),
        (["bench", ".", "--limit", "0"], "--limit must be at least 1"),
        (["devices", "setup", "local"], "local is this machine: there is nothing to set up"),
        (["devices", "setup", "mine"], "device mine: its profile lacks 'host'"),
        (["devices", "probe", "pi"], "unknown device 'pi'"),
        (["devices", "clean", "far"], "device far: unknown transport 'telnet'"),
    ],
)
def test_a_mistake_about_devices_is_one_line(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    profile(tmp_path, 'transport = "ssh"\n')
    profile(tmp_path, 'transport = "telnet"\n', "far")
    assert message in refused(*arguments, cwd=tmp_path)


@pytest.mark.parametrize("name", ["host", "general"])
def test_a_device_takes_no_place_of_the_runs_own(name: str, tmp_path: Path) -> None:
    profile(tmp_path, 'transport = "local"\n', name)
    assert f"no device can be called {name}" in refused("devices", cwd=tmp_path)


def test_the_wheel_is_this_edgeft(tmp_path: Path) -> None:
    """pip installs it, it has the catalogues, and the same files make the same wheel."""
    made = wheel.build()
    assert wheel.build() == made
    code = "from edgeft import wheel; print(wheel.sha256())"
    for cwd in (Path(__file__).parent.parent, tmp_path):  # a checkout has metadata of its own
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd
        )
        assert found.stdout.strip() == wheel.sha256()
    with zipfile.ZipFile(BytesIO(made)) as archive:
        names = set(archive.namelist())
    assert {"edgeft/bench/worker.py", "edgeft/_export/gguf-q4_0.toml"} <= names
    assert {"edgeft/_devices/local.toml", "edgeft/tasks/general.toml"} <= names
    assert not any("__pycache__" in name or name.endswith(".sh") for name in names)
    (tmp_path / wheel.NAME).write_bytes(made)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    into = ["--target", str(tmp_path / "there"), str(tmp_path / wheel.NAME)]
    subprocess.run([*pip, *into], check=True)
    code = "import edgeft; from edgeft import catalog; print(edgeft.__file__, *catalog.devices())"
    env = {"PYTHONPATH": str(tmp_path / "there"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=env,
        cwd=tmp_path,
    )
    assert done.stdout.startswith(str(tmp_path / "there"))
    assert set(done.stdout.split()[1:]) == SHIPPED
