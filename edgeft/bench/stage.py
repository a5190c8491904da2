"""The stage bench on devices: every bundle is sent, scored and timed where the profile says."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeft import bench, catalog, recipe, run
from edgeft.bench.job import Place
from edgeft.bench.latency import NOT_MEASURED
from edgeft.catalog import Device
from edgeft.errors import UserError
from edgeft.progress import Update, say
from edgeft.stages import Run, bundles, cached
from edgeft.transports import ConnectionLost, Transport, open_transport, patiently

AUTO, LOCAL = "auto", "local"


@dataclass(frozen=True)
class There:
    """A device and the way to it."""

    device: Device
    transport: Transport


def overrides(threads: str | None, limit: int | None) -> dict[str, Any]:
    """What options say in place of a device's profile.

    Raises:
        UserError: a value cannot be.
    """
    said: dict[str, Any] = {}
    if threads is not None:
        if threads != AUTO and not (threads.isdecimal() and int(threads)):
            raise UserError(f"--threads takes a number or auto, not '{threads}'")
        said["threads"] = threads if threads == AUTO else int(threads)
    if limit is not None:
        if limit < 1:
            raise UserError("--limit must be at least 1")
        said["limit"] = limit
    return said


def there(name: str, said: dict[str, Any]) -> There:
    """The device of that name; see :func:`overrides`."""
    device = replace(catalog.find_device(name), **said)
    return There(device, open_transport(device))


def bench_devices(
    this: Run,
    names: list[str],
    said: dict[str, Any] | None = None,
    targets: list[str] | None = None,
) -> UserError | None:
    """Bench the run on each device.

    Args:
        said: see :func:`overrides`.
        targets: only these; None: all that is exported.

    Returns:
        What failed first; the rest was done all the same.
    """
    failed: UserError | None = None
    for found in [there(name, said or {}) for name in names]:
        try:
            bench_device(this, found, targets)
        except UserError as error:
            if len(names) > 1:
                say(f"✗ {found.device.name}: {error}")
            failed = failed or error
    return failed


def bench_device(this: Run, there: There, targets: list[str] | None = None) -> None:
    """Score and time every bundle of the run; one that fails does not keep the rest from it.

    Raises:
        UserError: what failed first, after the rest was done.
    """
    found = [b for b in bundles(this) if targets is None or b.parent.name in targets]
    if not found:
        wanted = " ".join(f"--target {name}" for name in targets or ["gguf"])
        raise UserError(f"nothing of it is exported yet: edgeft export {this.path} {wanted}")
    place = this.path / "bench" / there.device.name
    failed: UserError | None = None
    done = False
    for bundle in found:
        title = f"{bundle.parent.name} {bundle.name}"
        if _stale(this, bundle):
            say(f"· bench {title}: of other weights, export it again")
            continue
        out = place / bundle.parent.name / bundle.name
        timed = bundle.name == "tuned"  # base has the same shape and bytes
        try:
            done |= bench_bundle(bundle, out, this.recipe.bench, there, timed=timed)
            if there.device.name == LOCAL:
                _bench_general(this, bundle)
        except ConnectionLost:
            raise
        except UserError as error:
            say(f"✗ bench {title}: {error}")
            failed = failed or error
    if done or not (place / "machine.json").is_file():
        place.mkdir(parents=True, exist_ok=True)
        [facts] = there.transport.call("edgeft.bench.machine", {})
        del facts["event"]
        run.write_json(place / "machine.json", facts)
    if failed:
        raise failed


def _bench_general(this: Run, bundle: Path) -> None:
    """Likelihoods of the general questions, where the file is."""
    items = this.path / "data" / "general.jsonl"
    if not items.is_file():  # made before there were any
        return
    target, weights = bundle.parent.name, bundle.name
    manifest = json.loads((bundle / "manifest.json").read_text())
    inputs = {"manifest": run.sha256(bundle / "manifest.json"), "items": this.sha256([items])}

    def work(out: Path, _: Update) -> None:
        bench.general(manifest["runtime"], bundle / manifest["artifact"], items, out)

    out = this.path / "bench" / "general" / target / weights
    cached(f"general questions, {target} {weights}", out, inputs, work)


def _stale(this: Run, bundle: Path) -> bool:
    """Whether a bundle holds other weights or questions than the run does now."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    questions = this.sha256([this.path / "data" / "evaluation.jsonl"])["evaluation.jsonl"]
    return bool(
        manifest.get("made_from") != this.weights_id(manifest["weights"])
        or manifest["files"]["evaluation.jsonl"]["sha256"] != questions
    )


def bench_bundle(
    bundle: Path, out: Path, settings: recipe.BenchSettings, there: There, *, timed: bool = True
) -> bool:
    """Score one bundle, and time it, into the folder ``out``.

    Returns:
        Whether anything was done.
    """
    device = there.device
    threads = 0 if isinstance(device.threads, str) else device.threads
    job = bench.job_of_bundle(bundle, threads=threads, parallel=settings.parallel)
    manifest = json.loads((bundle / "manifest.json").read_text())
    evaluation = manifest["files"]["evaluation.jsonl"]["sha256"]
    inputs: dict[str, Any] = {
        "manifest": run.sha256(bundle / "manifest.json"),
        "made_from": manifest.get("made_from"),
        "evaluation": {"evaluation.jsonl": evaluation},
        "parallel": settings.parallel,
        "threads": device.threads,
    }
    shape: dict[str, Any] = {
        "prompt_tokens": settings.latency_prompt_tokens,
        "new_tokens": settings.latency_new_tokens,
        "repetitions": settings.latency_repetitions,
    }
    if settings.latency_depths:
        shape["depths"] = settings.latency_depths
    if timed:
        inputs["latency"] = shape if device.timed else NOT_MEASURED
    if device.limit is not None and not run.is_done(out, run.fingerprint(inputs)):
        inputs["limit"] = device.limit  # all of them are more than some
    files = {**manifest["files"], "manifest.json": _facts(bundle / "manifest.json")}

    def work(partial: Path, update: Update) -> None:
        _take_answers(out, partial, inputs)
        place = Place(there.transport, bundle, _sent(there.transport, bundle, files, update))
        bench.accuracy(job, partial, update, limit=device.limit, place=place)
        if timed and device.timed:
            bench.latency(job, partial, **shape, sweep=device.threads == AUTO, place=place)
        elif timed:
            why = {NOT_MEASURED: f"times taken on {device.name} mean nothing"}
            run.write_json(partial / "latency.json", why)

    name = "" if device.name == "local" else f" on {device.name}"
    return cached(f"bench {bundle.parent.name} {bundle.name}{name}", out, inputs, work)


def _sent(transport: Transport, bundle: Path, files: dict[str, Any], update: Update) -> Path:
    """The bundle's folder on the device; a connection that was lost meanwhile is waited for."""
    place, done = [bundle], [0]

    def count(sent: int, total: int, text: str) -> None:
        done[0] = sent
        update(sent, total, text)

    def send() -> None:
        place[0] = transport.place(bundle, files, count)

    patiently(send, lambda: done[0], lambda why: update(done[0], 1, why), reached=False)
    return place[0]


def _take_answers(before: Path, partial: Path, inputs: dict[str, Any]) -> None:
    """What was answered under another limit stays answered."""
    results = before / "results.jsonl"
    try:
        stage = json.loads((before / "stage.json").read_text())
    except (OSError, ValueError):
        return
    asked = inputs.keys() - {"limit", "latency"}
    if all(stage.get(key) == inputs[key] for key in asked) and results.is_file():
        if "limit" in inputs and stage.get("limit", math.inf) > inputs["limit"]:
            return  # fewer than there were
        if not (partial / "results.jsonl").exists():
            shutil.copyfile(results, partial / "results.jsonl")


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": run.sha256(path)}
