"""The tables that are about a device: what decides on the file to ship, and its latency."""

from __future__ import annotations

from collections.abc import Sequence

from edgeft.report.build import Report
from edgeft.report.figures import NONE, Table, megabytes, number, percent
from edgeft.report.ship import front
from edgeft.report.variant import Facts, Variant, place

THROTTLED = "THROTTLED"
_BY_DEPTH = "decode_tok_s_by_depth"
OTHER_LOAD = 0.1  # cores of other work that are worth a word


def device_title(name: str) -> str:
    """The title of a device's table."""
    return f"On {name}"


def device(report: Report, name: str) -> Table:
    """All that decides which file to ship to a device."""
    here = [v for v in report.variants if v.device == name]
    ahead = front(here)
    beside = any(v.same_as_local for v in here)
    metered = any((v.latency or {}).get("energy_j") for v in here)
    rows = []
    for v in here:
        s, latency = v.survival, v.latency or {}
        same = v.same_as_local
        rows.append(
            [
                v.target,
                percent(s.here.tuned.accuracy),
                number(s.retention, "{:z.2f}"),
                *([f"{same[0]} of {same[1]}" if same else NONE] if beside else []),
                *_timed(v, "decode_tok_s", "{:.1f}"),
                *_timed(v, "ttft_ms", "{:.0f}"),
                *_timed(v, "peak_rss_mb", "{:.0f}"),
                *([number(latency.get("energy_j"), "{:.2f}")] if metered else []),
                "front" if v in ahead and len(here) > 1 else "",
                s.verdict,
            ]
        )
    header = ["", "tuned", "retention", *(["as on local"] if beside else [])]
    header += ["tok/s", "first token, ms", "memory, MB"]
    header += [*(["energy, J"] if metered else []), "", "verdict"]
    note = "Front: no other file here is both faster and more accurate. tok/s: decoding one stream."
    if metered:
        note += " Energy: of one prompt and its answer."
    if beside:
        note += " As on local: questions that this file answers as it does on this machine."
    if why := dict.fromkeys(v.not_measured for v in here if v.not_measured):
        note += f" Not measured: {'; '.join(why)}."
    return Table(device_title(name), note, header, rows, (1, 2))


def _timed(variant: Variant, key: str, form: str) -> list[str]:
    found = (variant.latency or {}).get(key)
    return ["not measured" if found is None and variant.not_measured else number(found, form)]


_LATENCY = {
    "threads": ("threads", "{}"),
    "load, s": ("load_s", "{:.2f}"),
    "first token, ms": ("ttft_ms", "{:.0f}"),
    "prefill, tok/s": ("prefill_tok_s", "{:.0f}"),
    "decode, tok/s": ("decode_tok_s", "{:.1f}"),
}


def latency(report: Report) -> Table:
    """One stream alone on the device; medians, their range, and how the machine was."""
    timed = [(v, v.latency) for v in report.variants if v.latency]
    rows = [
        [place(v, report.variants)]
        + [
            number(found.get(key), form) + _range(found.get(f"{key}_range"), form)
            for key, form in _LATENCY.values()
        ]
        + [conditions(found)]
        for v, found in timed
    ]
    shape = timed[0][1] if timed else {}
    note = (
        f"One stream, {shape.get('prompt_tokens')} prompt tokens and {shape.get('new_tokens')} new "
        f"ones, median of {shape.get('repetitions')} and their range. Temperature and clock: before, "
        "at worst, after."
    )
    return Table("Latency", note, ["", *_LATENCY, "machine"], rows, (1, 1))


def memory_limit(report: Report) -> Table:
    """How close decoding comes to what the machine's memory can do, and what a deep context costs."""
    timed = [(v, v.latency) for v in report.variants if (v.latency or {}).get(_BY_DEPTH)]
    depths = list(dict.fromkeys(d for _, found in timed if found for d in found[_BY_DEPTH]))
    rows = [
        [
            place(v, report.variants),
            number(found.get("load_cold_s"), "{:.2f}"),
            number(found.get("load_s"), "{:.2f}"),
            f"{found['token_ms_p50']:.2f}, {found['token_ms_p95']:.2f}",
            *(number(found[_BY_DEPTH].get(depth), "{:.1f}") for depth in depths),
            number(found.get("steady_rss_mb"), "{:.0f}"),
            megabytes(found.get("bytes_per_token")),
            number(found.get("bandwidth_share"), "{:.0%}"),
        ]
        for v, found in timed
        if found
    ]
    header = ["", "load cold, s", "warm", "token p50, p95, ms"]
    header += [f"tok/s at {depth}" for depth in depths]
    note = (
        "Decoding behind so many tokens. Weights: bytes that one token reads; share: of the memory's "
        "bandwidth, as measured on the spot, that reading them at this speed takes."
    )
    return Table("Close to the limit", note, [*header, "steady, MB", "weights", "share"], rows)


def _range(ends: Sequence[float] | None, form: str) -> str:
    return f" ({form.format(ends[0])} to {form.format(ends[1])})" if ends else ""


def conditions(latency: Facts) -> str:
    """How the machine was while it was timed; what it does not tell is left out."""
    said = []
    if latency.get("throttled"):
        said.append(f"{THROTTLED} ({', '.join(latency['throttled'])})")
    for key, form, unit in (("temperature_c", "{:.0f}", "°C"), ("clock_mhz", "{:.0f}", "MHz")):
        if key in latency:
            said.append(f"{'/'.join(form.format(value) for value in latency[key])} {unit}")
    if latency.get("governor"):
        said.append(f"governor {latency['governor']}")
    if (latency.get("other_load") or 0) >= OTHER_LOAD:
        said.append(f"{latency['other_load']:.1f} cores of other load")
    if tried := latency.get("threads_tried"):
        speeds = ", ".join(f"{speed:.0f} with {count}" for count, speed in tried.items())
        said.append(f"threads tried, tok/s: {speeds}")
    return "; ".join(said) or NONE
