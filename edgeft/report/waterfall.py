"""Each target's way from the adapter on the host to the device, and what explains a loss on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeft import attribution
from edgeft.attribution import DEVICE, EXPORT, MERGE, QUANTIZE, REPAIR, Place
from edgeft.report.causes import causes
from edgeft.report.results import (
    HOST,
    LOCAL,
    adapter_results,
    benched,
    of_group,
    read_json,
    read_results,
)
from edgeft.report.variant import Variant
from edgeft.survival import Result

ADAPTER, MERGED = "adapter on the host", "merged on the host"
Scored = dict[tuple[str, str], tuple[list[Result], list[Result]]]


def attributed(run: Path, variants: Sequence[Variant]) -> list[Variant]:
    """The variants with their steps and causes."""
    scored = {
        (target, device): (of_group(base), of_group(tuned))
        for device, target, base, tuned in benched(run)
    }
    start = _host(run)
    scored_on = (read_json(run / "bench" / HOST / "adapter.json") or {}).get("kind")
    merge = {**(read_json(run / "merged" / "merge.json") or {}), "scored_on": scored_on}
    machines = {
        path.parent.name: read_json(path) or {} for path in (run / "bench").glob("*/machine.json")
    }
    found = []
    for variant in variants:
        steps = attribution.steps([*start, *_way(run, variant, variants, scored)])
        with_steps = replace(variant, steps=steps)
        found.append(replace(with_steps, causes=causes(with_steps, variants, merge, machines)))
    return found


def _host(run: Path) -> list[Place]:
    """The adapter before it was merged, where there is one, and the merged weights."""
    host = run / "bench" / HOST
    base, tuned = read_results(host / "base") or [], read_results(host / "tuned") or []
    merged = Place(MERGED, MERGE, of_group(base), of_group(tuned))
    adapter = adapter_results(run)
    if adapter is None:
        return [merged]
    return [Place(ADAPTER, "", merged.base, of_group(adapter)), merged]


def _way(run: Path, variant: Variant, variants: Sequence[Variant], scored: Scored) -> list[Place]:
    """The places behind the host; those that were not scored are left out."""
    names: list[tuple[str, str, str]] = []  # target, device, kind
    exact = _full_precision(variant, variants)
    if exact and not _is_exact(variant) and variant.repair is None:
        names.append((exact, LOCAL, EXPORT))
    kind = EXPORT if _is_exact(variant) else REPAIR if variant.repair else QUANTIZE
    if variant.device == LOCAL:
        names.append((variant.target, LOCAL, kind))
    elif _same_file(run, variant):
        names += [(variant.target, LOCAL, kind), (variant.target, variant.device, DEVICE)]
    else:
        names.append((variant.target, variant.device, kind))
    places = []
    for target, device, how in names:
        if (target, device) in scored:
            base, tuned = scored[target, device]
            name = target if device == LOCAL else f"{target} on {device}"
            places.append(Place(name, how, base, tuned))
    return places


def _same_file(run: Path, variant: Variant) -> bool:
    """Whether this machine scored the very bundle that the device did, by its SHA-256."""
    marks = [
        (read_json(run / "bench" / device / variant.target / "tuned" / "stage.json") or {}).get(
            "manifest"
        )
        for device in (LOCAL, variant.device)
    ]
    return marks[0] is not None and marks[0] == marks[1]


def _full_precision(variant: Variant, variants: Sequence[Variant]) -> str | None:
    """The target of the same runtime that rounds the least, if it was scored on this machine."""
    found = [
        v
        for v in variants
        if v.device == LOCAL and v.runtime == variant.runtime and _is_exact(v) and not v.elsewhere
    ]
    least = min(found, key=lambda v: (v.verify or {}).get("mean_kl") or 0.0, default=None)
    return least.target if least else None


def _is_exact(variant: Variant) -> bool:
    return bool((variant.verify or {}).get("exact")) and variant.repair is None
