"""All stages of a run, one after the other: what ``edgeft run`` and a study's cells do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgeft import stages
from edgeft.bench import host
from edgeft.bench import stage as benching
from edgeft.catalog import Target
from edgeft.errors import UserError
from edgeft.exporters import stage as exporting
from edgeft.progress import say
from edgeft.stages import WEIGHTS, Run


def run(
    this: Run,
    targets: list[Target],
    devices: Sequence[Mapping[str, Any]],
    weights: Sequence[str] = WEIGHTS,
) -> UserError | None:
    """Train, merge, export and bench; a target or device that fails does not keep the others.

    Args:
        devices: ``name``, and perhaps ``said`` (see :func:`edgeft.bench.stage.overrides`) and
            ``targets`` (only these).
        weights: ``("base",)`` trains nothing.

    Returns:
        What failed first after the host's scores were there.

    Raises:
        UserError: what failed before; there is nothing to report then.
    """
    stages.prepare(this)
    if "tuned" in weights:
        stages.train(this)
        stages.merged(this)
    host.score(this, weights)
    failed = failure(lambda: exporting.export(this, targets, weights))
    if failed and not stages.bundles(this):
        raise failed
    for device in devices:
        said, only = device.get("said") or {}, device.get("targets")
        error = benching.bench_devices(this, [device["name"]], said, only)
        if error and len(devices) > 1:
            say(f"✗ {device['name']}: {error}")
        failed = failed or error
    return failed


def failure(work: Callable[[], None]) -> UserError | None:
    """What went wrong in work whose failure must not keep the rest from being done."""
    try:
        work()
    except UserError as error:
        return error
    return None
