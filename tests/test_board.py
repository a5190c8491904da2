"""What a machine tells of itself, read from the files that real boards have."""

from __future__ import annotations

import ast
import platform
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeft.bench import board
from edgeft.transports import agent

PI_5 = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0b\n\n",
    "proc/meminfo": "MemTotal:        8256000 kB\nMemAvailable:    7000000 kB\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "61750\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "3\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2400000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1500000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
}
LAPTOP = {
    "proc/cpuinfo": "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Core i7\n"
    "flags\t\t: fpu avx2 f16c\ncpu MHz\t\t: 1800.0\n\nprocessor\t: 1\ncpu MHz\t\t: 2600.0\n\n",
    "sys/class/thermal/thermal_zone0/type": "acpitz\n",
    "sys/class/thermal/thermal_zone0/temp": "27800\n",
    "sys/class/thermal/thermal_zone1/type": "x86_pkg_temp\n",
    "sys/class/thermal/thermal_zone1/temp": "55000\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "262000000000\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "999\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "4\n",
}
JETSON = {
    "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon1/in1_input": "4968\n",
    "sys/class/hwmon/hwmon1/curr1_input": "1200\n",
}
PMIC = """ 3V7_WL_SW_A current(0)=0.50000000A
 VDD_CORE_A current(7)=2.00000000A
 3V7_WL_SW_V volt(8)=3.70000000V
 VDD_CORE_V volt(15)=0.75000000V
 EXT5V_V volt(24)=5.15398600V
 BATT_V volt(25)=0.00000000V
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vcgencmd that answers from files."""
    program = tmp_path / "bin" / "vcgencmd"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncat "{tmp_path}/bin/$1"\n')
    program.chmod(0o755)
    (program.parent / "get_throttled").write_text("throttled=0x0\n")
    (program.parent / "pmic_read_adc").write_text(PMIC)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return program.parent


def test_a_raspberry_pi(tmp_path: Path, firmware: Path) -> None:
    facts = board.facts(write(tmp_path, PI_5))
    expected = {
        "cpu": "Cortex-A76",
        "board": "Raspberry Pi 5 Model B Rev 1.0",
        "memory_gb": 8.45,
        "memory_available_gb": 7.17,
        "temperature_c": 61.75,
        "clock_mhz": 1950.0,
        "governor": "ondemand",
        "throttled": [],  # its fan runs, which slows nothing
        "energy_from": "PMIC",
    }
    assert facts.items() >= expected.items()
    (firmware / "get_throttled").write_text("throttled=0x50005\n")
    assert board.facts(tmp_path)["throttled"] == ["throttled", "under-voltage"]


def test_a_laptop(tmp_path: Path) -> None:
    root = write(tmp_path, LAPTOP)
    assert board.temperature(root) == 55.0
    assert board.clock(root) == 2200.0
    assert board.governor(root) is None
    assert board.energy_source(root) == "RAPL"
    if platform.machine() == "x86_64":
        assert board.facts(root)["cpu"] == "Core i7"
        assert board.features(root) == ["avx2", "f16c"]


def test_arms_features_are_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the auxiliary vector, which an emulator has right; its cpuinfo is its host's."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    words = [16, 1 << 1 | 1 << 20 | 1 << 22, 26, 1 << 13, 0, 0]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc/self/auxv").write_bytes(struct.pack("@6L", *words))
    assert board.features(tmp_path) == ["asimd", "asimddp", "sve", "i8mm"]
    assert not board.emulated(write(tmp_path, PI_5))
    assert board.emulated(write(tmp_path, LAPTOP))
    assert board.facts(tmp_path)["cpu"] == "aarch64 emulated by qemu-user"


def test_a_watch_sees_heat_and_counts_energy(tmp_path: Path) -> None:
    root = write(tmp_path, LAPTOP)
    zone = root / "sys/class/thermal/thermal_zone1/temp"
    counter = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    with board.Watch(root) as watch:
        zone.write_text("97000\n")
        time.sleep(0.7)
        zone.write_text("80000\n")
        counter.write_text("56671150\n")  # it began anew at its largest value
        (root / "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count").write_text(
            "5"
        )
    facts = watch.facts()
    assert facts["temperature_c"] == [55.0, 97.0, 80.0]
    assert facts["throttled"] == ["throttled"]
    assert facts["energy_j"] == pytest.approx(200.0)
    assert facts["energy_from"] == "RAPL"


def test_a_watch_notices_a_clock_that_is_held_down(tmp_path: Path) -> None:
    root = write(tmp_path, PI_5)
    write(root, {"sys/class/thermal/cooling_device1/type": "cpufreq-cpu0\n"})
    state = write(root, {"sys/class/thermal/cooling_device1/cur_state": "0\n"})
    with board.Watch(root) as watch:
        (state / "sys/class/thermal/cooling_device1/cur_state").write_text("2\n")
        (root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq").write_text("1500000\n")
        time.sleep(0.7)
        (state / "sys/class/thermal/cooling_device1/cur_state").write_text("0\n")
    facts = watch.facts()
    assert facts["throttled"] == ["cooled by cpufreq-cpu0"]
    assert facts["clock_mhz"] == [1950.0, 1500.0, 1500.0]
    assert "energy_j" not in facts


def test_power_is_watched_where_there_is_no_counter(tmp_path: Path, firmware: Path) -> None:
    """The Raspberry Pi's rails: 0.5 A at 3.7 V and 2 A at 0.75 V."""
    with board.Watch(tmp_path) as watch:
        start = time.monotonic()
        time.sleep(0.8)
        seconds = time.monotonic() - start
    facts = watch.facts()
    assert facts["energy_from"] == "PMIC"
    assert facts["energy_j"] == pytest.approx(3.35 * seconds, rel=0.2)
    (firmware / "pmic_read_adc").write_text("error=1\n")
    assert board.energy_source(write(tmp_path, JETSON)) == "hwmon"
    with board.Watch(tmp_path) as watch:
        time.sleep(0.7)
    assert watch.facts()["energy_j"] == pytest.approx(4.968 * 1.2 * 0.7, rel=0.3)


def test_others_work_is_told_from_ours() -> None:
    """On this machine: another process burns a core, then we do."""
    burn = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(burn) as other:
        with board.Watch() as watch:
            time.sleep(1.5)
        other.kill()
    theirs = watch.facts()["other_load"]
    assert theirs > 0.4
    with board.Watch() as watch:
        give_up = time.process_time() + 1
        while time.process_time() < give_up:
            pass
    assert watch.facts()["other_load"] < theirs


def test_an_empty_machine_tells_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    with board.Watch(tmp_path) as watch:
        pass
    assert watch.facts() == {"governor": None, "throttled": [], "other_load": None}


@pytest.mark.parametrize("module", [board, agent])
def test_what_is_sent_runs_on_a_bare_old_python(module: object) -> None:
    text = Path(str(module.__file__)).read_text()  # type: ignore[attr-defined]
    tree = ast.parse(text, feature_version=(3, 8))
    names = [
        name
        for node in ast.walk(tree)
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    roots = {name.partition(".")[0] for name in names} - {"edgeft"}
    assert roots <= sys.stdlib_module_names
