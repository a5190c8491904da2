"""Which file to ship to a device: what meets the limits, and of that the most accurate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgeft.errors import UserError
from edgeft.report.variant import Variant

_GONE = ("lost", "reversed")


@dataclass(frozen=True)
class Limits:
    """What a device or a user asks for; None: nothing.

    Attributes:
        max_memory_mb: peak resident memory, 10^6 bytes.
        min_tok_s: decoding one stream.
        min_retention: the estimate; its interval is shown beside it.
    """

    max_memory_mb: float | None = None
    min_tok_s: float | None = None
    min_retention: float | None = None


@dataclass(frozen=True)
class Choice:
    """The answer for one device.

    Attributes:
        target: None where nothing meets the limits.
        unmet: by target, the limits that it does not meet.
    """

    device: str
    target: str | None
    sentence: str
    unmet: dict[str, list[str]]


def megabytes(text: str) -> float:
    """``300``, ``300MB`` or ``1.5GB`` in MB.

    Raises:
        UserError: it is none of these.
    """
    found = re.fullmatch(r"([\d.]+)\s*(MB?|GB?)?", text.strip(), re.I)
    try:
        assert found
        return float(found[1]) * (1000 if (found[2] or "").upper().startswith("G") else 1)
    except (AssertionError, ValueError):
        raise UserError(f"--max-memory takes a size as 300, 300MB or 1.5GB, not '{text}'") from None


def choices(variants: Sequence[Variant], limits: Limits) -> list[Choice]:
    """One answer a device: among what meets the limits the highest tuned accuracy, then the speed.

    A file that something is wrong with meets none, nor does one whose benefit is gone or not seen.
    Without a limit on retention, only what survives is considered if anything does.
    """
    return [
        _choice(device, [v for v in variants if v.device == device], limits)
        for device in dict.fromkeys(v.device for v in variants)
    ]


def _choice(device: str, variants: Sequence[Variant], limits: Limits) -> Choice:
    unmet = {v.target: _unmet(v, limits) for v in variants}
    fit = [v for v in variants if not unmet[v.target]]
    surviving = [v for v in fit if v.survival.verdict == "survives"]
    if limits.min_retention is None and surviving:
        fit = surviving
    unmet = {target: why for target, why in unmet.items() if why}
    if not fit:
        closest = min(unmet.items(), key=lambda item: len(item[1]), default=None)
        nearest = f"; {closest[0]} comes closest: {', '.join(closest[1])}" if closest else ""
        nothing = "nothing can be recommended" if limits == Limits() else "nothing meets the limits"
        return Choice(device, None, f"On {device}, {nothing}{nearest}.", unmet)
    best = max(fit, key=lambda v: (v.survival.here.tuned.accuracy, decode(v) or 0, -(v.bytes or 0)))
    return Choice(device, best.target, f"On {device}, ship {best.target}: {_why(best)}.", unmet)


def _unmet(variant: Variant, limits: Limits) -> list[str]:
    said = []
    latency = variant.latency or {}
    memory, speed = latency.get("peak_rss_mb"), decode(variant)
    kept = variant.survival.retention
    if limits.max_memory_mb is not None and not (memory and memory <= limits.max_memory_mb):
        said.append(f"{memory:.0f} MB of memory" if memory else "its memory was not measured")
    if limits.min_tok_s is not None and not (speed and speed >= limits.min_tok_s):
        said.append(f"{speed:.1f} tok/s" if speed else "its speed was not measured")
    if kept is None:
        said.append(f"{variant.survival.here.tuned.n} questions show no benefit on the host")
    elif limits.min_retention is not None and kept < limits.min_retention:
        said.append(f"retention {kept:.2f}")
    if variant.survival.verdict in _GONE:
        said.append(f"the benefit is {variant.survival.verdict}")
    # The scores cannot show these: every runtime is given token ids.
    return [*said, *(str(fault["text"]) for fault in variant.faults)]


def _why(variant: Variant) -> str:
    survival = variant.survival
    said = [f"{100 * survival.here.tuned.accuracy:.1f}% correct"]
    if survival.retention is not None and survival.retention_ci is not None:
        low, high = survival.retention_ci
        said.append(f"retention {survival.retention:z.2f} ({low:z.2f} to {high:z.2f})")
    said.append(survival.verdict)
    latency: dict[str, Any] = variant.latency or {}
    if speed := decode(variant):
        said.append(f"{speed:.1f} tok/s")
    if memory := latency.get("peak_rss_mb"):
        said.append(f"{memory:.0f} MB of memory")
    return ", ".join(said)


def decode(variant: Variant) -> float | None:
    """Tokens a second, if it was timed."""
    speed = (variant.latency or {}).get("decode_tok_s")
    return None if speed is None else float(speed)


def front(variants: Sequence[Variant]) -> list[Variant]:
    """The Pareto front of decode speed and tuned accuracy: nothing else is better in both.

    Returns:
        From the slowest to the fastest; only what was timed.
    """
    timed = [v for v in variants if decode(v)]
    timed.sort(key=lambda v: (-(decode(v) or 0), -v.survival.here.tuned.accuracy))
    found: list[Variant] = []
    for variant in timed:
        if (
            not found
            or variant.survival.here.tuned.accuracy > found[-1].survival.here.tuned.accuracy
        ):
            found.append(variant)
    return found[::-1]
