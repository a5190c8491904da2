"""Latency in llama-bench's own JSON fields, so that tools that read those read ours.

Field names and defaults: ``tools/llama-bench/llama-bench.cpp`` of llama.cpp.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeft.errors import UserError
from edgeft.report.build import Report, build
from edgeft.report.variant import Variant

_DEFAULTS: dict[str, Any] = {
    "build_commit": "unknown",
    "build_number": 0,
    "gpu_info": "",
    "n_batch": 512,
    "n_ubatch": 512,
    "cpu_mask": "0x0",
    "cpu_strict": False,
    "poll": 0,
    "type_k": "f16",
    "type_v": "f16",
    "n_gpu_layers": 0,
    "n_cpu_moe": 0,
    "split_mode": "none",
    "main_gpu": 0,
    "no_kv_offload": False,
    "flash_attn": -1,
    "devices": "none",
    "tensor_split": "0.00",
    "tensor_buft_overrides": "none",
    "embeddings": False,
    "no_op_offload": 0,
}


def write(run: Path, out: Path) -> None:
    """Write the rows of a run's report as a JSON list.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        out.write_text(json.dumps(rows(build(run)), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error


def rows(report: Report) -> list[dict[str, Any]]:
    """Two tests for each variant that was timed: its prompt (pp), and new tokens behind it (tg)."""
    return [row for variant in report.variants for row in _rows(report, variant)]


def _rows(report: Report, variant: Variant) -> list[dict[str, Any]]:
    latency = variant.latency or {}
    if "decode_s" not in latency:
        return []
    prompt, new = latency["prompt_tokens"], latency["new_tokens"] - 1
    machine = report.machine.get(variant.device) or {}
    common = {
        **_DEFAULTS,
        "cpu_info": machine.get("cpu", ""),
        "backends": "CPU" if variant.runtime == "llama.cpp" else str(variant.runtime),
        "model_filename": f"{variant.target}/tuned",
        "model_type": f"{report.recipe.get('model')} {variant.target}",
        "model_size": variant.bytes or 0,
        "model_n_params": 0,
        "n_threads": latency["threads"],
        "test_time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    first = {"n_prompt": prompt, "n_gen": 0, "n_depth": 0}
    then = {"n_prompt": 0, "n_gen": new, "n_depth": prompt}
    return [
        {**common, **first, **_samples(latency["prefill_s"], prompt)},
        {**common, **then, **_samples(latency["decode_s"], new)},
    ]


def _samples(seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    nanoseconds = [round(1e9 * s) for s in seconds]
    rates = [tokens / s for s in seconds]
    return {
        "avg_ns": round(statistics.fmean(nanoseconds)),
        "stddev_ns": round(_deviation(nanoseconds)),
        "avg_ts": statistics.fmean(rates),
        "stddev_ts": _deviation(rates),
        "samples_ns": nanoseconds,
        "samples_ts": rates,
    }


def _deviation(values: Sequence[float]) -> float:
    """Of the sample, as llama-bench has it; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
