"""What a machine tells of itself while it works: CPU, temperature, clock, load, energy.

Only the standard library, and nothing newer than Python 3.8: this file is also sent as it is to
devices that have nothing of edgeft yet. What a machine does not tell is None.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path("/")
_SAMPLE_EVERY_S = 0.5

# include/uapi: arch/arm64/include/uapi/asm/hwcap.h
_HWCAP = {"asimd": 1, "atomics": 8, "fphp": 9, "asimdhp": 10, "asimddp": 20, "sve": 22}
_HWCAP2 = {"sve2": 1, "i8mm": 13, "bf16": 14}
_X86 = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
_AT_HWCAP, _AT_HWCAP2 = 16, 26

# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
_THROTTLED = {
    0: "under-voltage",
    1: "clock capped",
    2: "throttled",
    3: "soft temperature limit",
}
_SINCE_BOOT = 16


def facts(root: Path = ROOT) -> dict[str, Any]:
    """CPU, cores, features that matter here, memory, temperature, clock, governor."""
    info = _cpuinfo(root)
    memory = _meminfo(root)
    return {
        "cpu": _cpu_name(root, info),
        "board": _text(root / "proc/device-tree/model").strip("\0 \n") or None,
        "architecture": platform.machine(),
        "emulated": emulated(root),
        "cores": cores(),
        "cpu_features": " ".join(features(root)),
        "memory_gb": _gigabytes(memory.get("MemTotal")),
        "memory_available_gb": _gigabytes(memory.get("MemAvailable")),
        "system": f"{platform.system()} {platform.release()}",
        "temperature_c": temperature(root),
        "clock_mhz": clock(root),
        "governor": governor(root),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "throttled": sorted(throttled_now(root)),
        "energy_from": energy_source(root),
    }


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def features(root: Path = ROOT) -> list[str]:
    """The CPU's features that the runtimes' kernels look for."""
    if platform.machine() in ("aarch64", "arm64"):
        found = _auxiliary(root)
        known = [(_HWCAP, found.get(_AT_HWCAP, 0)), (_HWCAP2, found.get(_AT_HWCAP2, 0))]
        return [name for bits, value in known for name, bit in bits.items() if value >> bit & 1]
    flags = set(_cpuinfo(root).get("flags", "").split())
    return [name for name in _X86 if name in flags]


def emulated(root: Path = ROOT) -> bool:
    """Whether another machine's CPU stands behind this one's: qemu-user shows its host's cpuinfo."""
    return platform.machine() in ("aarch64", "arm64") and "vendor_id" in _cpuinfo(root)


def temperature(root: Path = ROOT) -> float | None:
    """The CPU's temperature, degrees Celsius."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    named = {zone: _text(zone / "type").strip() for zone in zones}
    cpu = [z for z in zones if re.search("cpu|x86_pkg|soc", named[z])] or zones
    values = [_number(zone / "temp") for zone in cpu]
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")) if not zones else []:
        if _text(chip / "name").strip() in ("coretemp", "k10temp", "cpu_thermal", "zenpower"):
            values += [_number(path) for path in sorted(chip.glob("temp*_input"))]
    known = [value for value in values if value is not None]
    return max(known) / 1000 if known else None


def clock(root: Path = ROOT) -> float | None:
    """Mean clock of the cores, MHz."""
    paths = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    values = [value / 1000 for value in map(_number, sorted(paths)) if value is not None]
    if not values:
        pattern = r"^cpu MHz\s*:\s*([\d.]+)"
        values = [float(v) for v in re.findall(pattern, _text(root / "proc/cpuinfo"), re.M)]
    return round(sum(values) / len(values), 1) if values else None


def governor(root: Path = ROOT) -> str | None:
    """The clock's governor, the first core's."""
    path = root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    return _text(path).strip() or None


def throttled_now(root: Path = ROOT) -> set[str]:
    """Reasons for which the clock is held down at this moment."""
    bits = _firmware_bits()
    said = {word for bit, word in _THROTTLED.items() if bits >> bit & 1}
    for device in (root / "sys/class/thermal").glob("cooling_device*"):
        kind = _text(device / "type").strip()
        if re.search("cpufreq|Processor", kind) and (_number(device / "cur_state") or 0) > 0:
            said.add("cooled by " + kind)
    return said


def throttle_count(root: Path = ROOT) -> int:
    """How often the machine says that it has throttled; only the difference means anything."""
    counters = (root / "sys/devices/system/cpu").glob("cpu*/thermal_throttle/*_throttle_count")
    total = sum(_number(path) or 0 for path in counters)
    return int(total) + bin(_firmware_bits() >> _SINCE_BOOT & 0xF).count("1")


def energy_source(root: Path = ROOT) -> str | None:
    """Which meter there is: ``RAPL``, ``hwmon``, ``PMIC`` (a Raspberry Pi 5), or None."""
    if _rapl(root):
        return "RAPL"
    if _hwmon_power(root) is not None:
        return "hwmon"
    return "PMIC" if _pmic_watts(_vcgencmd("pmic_read_adc")) is not None else None


class Watch:
    """``with Watch() as watch:`` looks at the machine before, during and after; then ``facts()``."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._during: list[dict[str, Any]] = []

    def __enter__(self) -> Watch:
        self._source = energy_source(self._root)
        self._before = self._look()
        self._count = throttle_count(self._root)
        self._joules = _rapl_joules(self._root)
        self._busy, self._own, self._start = _busy(self._root), time.process_time(), time.time()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = time.time() - self._start
        own, busy = time.process_time() - self._own, _busy(self._root)
        self._stop.set()
        self._thread.join()
        self._joules_after = _rapl_joules(self._root)
        self._after = self._look()
        self._others = None
        if busy is not None and self._busy is not None and self._seconds > 0:
            self._others = max(0.0, (busy - self._busy - own) / self._seconds)

    def facts(self) -> dict[str, Any]:
        """Temperatures and clocks [before, during (its extreme), after], and what else was."""
        during = self._during or [self._after]
        hot = [s["temperature_c"] for s in during if s["temperature_c"] is not None]
        clocks = [s["clock_mhz"] for s in during if s["clock_mhz"] is not None]
        middle = {
            "temperature_c": max(hot) if hot else None,
            "clock_mhz": min(clocks) if clocks else None,
        }
        reasons = {reason for s in [*during, self._after] for reason in s["throttled"]}
        if throttle_count(self._root) > self._count:
            reasons.add("throttled")
        found: dict[str, Any] = {
            name: [self._before[name], middle[name], self._after[name]]
            for name in ("temperature_c", "clock_mhz")
            if self._before[name] is not None
        }
        found["governor"] = governor(self._root)
        found["throttled"] = sorted(reasons)
        found["other_load"] = None if self._others is None else round(self._others, 2)
        joules = self._energy(during)
        if joules is not None:
            found["energy_j"], found["energy_from"] = joules, self._source
        return found

    def _energy(self, during: list[dict[str, Any]]) -> float | None:
        if self._joules is not None and self._joules_after is not None:
            wraps = _rapl_range(self._root) if self._joules_after < self._joules else 0.0
            return self._joules_after - self._joules + wraps
        watts = [s["watts"] for s in during if s["watts"] is not None]
        return sum(watts) / len(watts) * self._seconds if watts else None

    def _look(self) -> dict[str, Any]:
        watts = None
        if self._source == "hwmon":
            watts = _hwmon_power(self._root)
        elif self._source == "PMIC":
            watts = _pmic_watts(_vcgencmd("pmic_read_adc"))
        return {
            "temperature_c": temperature(self._root),
            "clock_mhz": clock(self._root),
            "throttled": throttled_now(self._root),
            "watts": watts,
        }

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_EVERY_S):
            self._during.append(self._look())


def _firmware_bits() -> int:
    found = re.search(r"throttled=0x([0-9a-fA-F]+)", _vcgencmd("get_throttled"))
    return int(found.group(1), 16) if found else 0


def _vcgencmd(*arguments: str) -> str:
    """The Raspberry Pi firmware's answer; nothing elsewhere."""
    program = shutil.which("vcgencmd")
    if not program:
        return ""
    try:
        done = subprocess.run(
            [program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def _pmic_watts(text: str) -> float | None:
    """The power chip's rails, current times voltage, added up. Not what the supply draws."""
    found = dict(re.findall(r"(\w+_[AV]) \w+\(\d+\)=([\d.]+)[AV]", text))
    rails = [name[:-2] for name in found if name.endswith("_A") and name[:-1] + "V" in found]
    if not rails:
        return None
    return sum(float(found[rail + "_A"]) * float(found[rail + "_V"]) for rail in rails)


def _rapl(root: Path) -> list[Path]:
    """Counters of whole packages that we may read."""
    counters = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*/energy_uj"))
    whole = [path for path in counters if path.parent.name.count(":") == 1]
    return [path for path in whole if _number(path) is not None]


def _rapl_joules(root: Path) -> float | None:
    counters = _rapl(root)
    return sum(_number(path) or 0 for path in counters) / 1e6 if counters else None


def _rapl_range(root: Path) -> float:
    return sum(_number(p.with_name("max_energy_range_uj")) or 0 for p in _rapl(root)) / 1e6


def _hwmon_power(root: Path) -> float | None:
    """Watts of the board's own power sensors, such as a Jetson's INA3221 (its VDD_IN)."""
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        values = [_number(path) for path in sorted(chip.glob("power*_input"))]
        known = [value for value in values if value is not None]
        if known:
            return max(known) / 1e6
        label = {_text(p).strip(): p for p in sorted(chip.glob("in*_label"))}
        rail = label.get("VDD_IN")
        if rail is not None:
            number = re.sub(r"\D", "", rail.name)
            volts = _number(chip / f"in{number}_input")
            amperes = _number(chip / f"curr{number}_input")
            if volts is not None and amperes is not None:
                return volts * amperes / 1e6
    return None


def _busy(root: Path) -> float | None:
    """Seconds that all cores have worked since boot."""
    first = _text(root / "proc/stat").partition("\n")[0].split()
    if len(first) < 6 or first[0] != "cpu":
        return None
    ticks = [int(value) for value in first[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / float(os.sysconf("SC_CLK_TCK"))


def _auxiliary(root: Path) -> dict[int, int]:
    try:
        data = (root / "proc/self/auxv").read_bytes()
    except OSError:
        return {}
    size = struct.calcsize("@LL")
    return dict(struct.unpack_from("@LL", data, at) for at in range(0, len(data) - size + 1, size))


def _cpu_name(root: Path, info: dict[str, str]) -> str:
    if emulated(root):
        return platform.machine() + " emulated by qemu-user"
    parts = {0xD03: "Cortex-A53", 0xD08: "Cortex-A72", 0xD0B: "Cortex-A76", 0xD42: "Cortex-A78AE"}
    try:
        part = parts.get(int(info.get("CPU part", "0"), 16))
    except ValueError:
        part = None
    return part or info.get("model name") or platform.processor() or platform.machine()


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's lines."""
    text = _text(root / "proc/cpuinfo")
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _meminfo(root: Path) -> dict[str, int]:
    pairs = re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.M)
    return {name: int(value) * 1024 for name, value in pairs}


def _gigabytes(size: int | None) -> float | None:
    return None if size is None else round(size / 1e9, 2)


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
