"""Do a device's answers differ by more than another kernel of this machine makes them differ?

    python benchmarks/rounding.py runs/demo --device emulated-arm64

For every GGUF file that was benched here and there: the questions answered alike, and by how much
the gold solutions' likelihood moves. Beside it the same file on this machine with llama.cpp's flash
attention off, and without its repacked weights: other kernels, which add up in another order.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeft import bench, child
from edgeft.bench.accuracy import read_rows
from edgeft.bench.worker import score

Rows = dict[str, dict[str, Any]]


def no_flash_attention(llama: Any) -> None:
    """From now on in this process."""
    defaults = llama.llama_context_default_params

    def changed() -> Any:
        settings = defaults()
        settings.flash_attn_type = 0
        return settings

    llama.llama_context_default_params = changed


def no_repacking(llama: Any) -> None:
    """From now on in this process."""
    settings = llama.llama_model_default_params()
    settings.use_extra_bufts = False
    llama.llama_model_default_params = lambda: settings


OTHERS: dict[str, Callable[[Any], None]] = {
    "no flash attention": no_flash_attention,
    "no repacked weights": no_repacking,
}


def work(request: Any, emit: Callable[..., None]) -> None:
    """The child: the questions of a job with another kernel."""
    import llama_cpp.llama_cpp as llama

    OTHERS[request["kernel"]](llama)
    score(request, emit)


def with_kernel(kernel: str, bundle: Path, count: int) -> Rows:
    """The first questions on this machine."""
    job = bench.job_of_bundle(bundle)
    request = {"job": job.request(), "kernel": kernel, "limit": count}
    rows: Rows = {}
    for event in child.call("benchmarks.rounding", {**request, "scored": [], "answered": []}):
        rows.setdefault(event["id"], {}).update(event)
    return rows


def compared(name: str, these: Rows, here: Rows) -> None:
    """One line."""
    alike = sum(row["answer"] == here[i]["answer"] for i, row in these.items())
    right = [sum(rows[i]["correct"] for i in these) for rows in (these, here)]
    nats = [
        abs(row["gold_logprob"] - here[i]["gold_logprob"]) / row["gold_tokens"]
        for i, row in these.items()
    ]
    print(
        f"{name:>44}: {alike} of {len(these)} answers alike, {right[0]} right (here {right[1]}), "
        f"{sum(nats) / len(nats):.4f} nats a gold token apart",
        flush=True,
    )


def main() -> None:
    """Parse, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--device", required=True)
    given = parser.parse_args()
    for path in sorted((given.run / "bench" / given.device).glob("*/*/results.jsonl")):
        target, weights = path.parent.parent.name, path.parent.name
        there = {row["id"]: row for row in read_rows(path)}
        local = given.run / "bench" / "local" / target / weights / "results.jsonl"
        here = {row["id"]: row for row in read_rows(local)}
        name = f"{target} {weights}"
        compared(f"{name}, {given.device}", there, here)
        bundle = given.run / "export" / target / weights
        if json.loads((bundle / "manifest.json").read_text())["runtime"] == "llama.cpp":
            for kernel in OTHERS:
                compared(f"{name}, {kernel}", with_kernel(kernel, bundle, len(there)), here)


if __name__ == "__main__":
    import sys

    if len(sys.argv) > 1:
        main()
    else:
        child.serve(work)
