"""One stream alone: load, time to first token, prefill and decode speed, peak memory, energy.

Timed in a child of its own, so that the peak is this artifact's and nobody else's.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeft import child
from edgeft.bench import board
from edgeft.bench.bandwidth import read_bandwidth
from edgeft.bench.job import HERE, Job, Place, job_of_request
from edgeft.bench.machine import peak_rss_mb, rss_mb
from edgeft.run import write_json
from edgeft.runtimes import Session, load, open_session, thread_count
from edgeft.transports import patiently

NOT_MEASURED = "not_measured"
_SWEEP = {"prompt_tokens": 16, "new_tokens": 24}
_SWEEP_REPETITIONS = _DEPTH_REPETITIONS = 3
_AS_FAST = 0.97  # fewer threads are taken when they are this close to the fastest


def latency(
    job: Job,
    out: Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repetitions: int = 5,
    depths: Sequence[int] = (),
    sweep: bool = False,
    place: Place = HERE,
) -> None:
    """Write ``out/latency.json``: medians over ``repetitions``, after one that does not count.

    Args:
        depths: decode speed behind so many tokens too, and this machine's memory bandwidth.
        sweep: find the fastest number of threads first, instead of the job's.
        place: where it is done.

    Raises:
        UserError: the artifact does not open, or the runtime failed.
    """
    shape = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repetitions": repetitions}
    found: list[dict[str, Any]] = []

    def work() -> None:
        request = {**shape, "depths": list(depths), "sweep": sweep}
        found[:] = place.call("edgeft.bench.latency", job, request)

    patiently(work, lambda: 0, lambda _: None)
    [timing] = found
    del timing["event"]
    write_json(out / "latency.json", timing)


def measure(request: dict[str, Any], emit: Callable[..., None]) -> None:
    """The child's work."""
    if board.emulated():
        emit("latency", **{NOT_MEASURED: "an emulated CPU"})
        return
    job = job_of_request(request["job"])
    prompt_tokens, new_tokens = request["prompt_tokens"], request["new_tokens"]
    tried = thread_sweep(job) if request["sweep"] else {}
    if tried:
        job = replace(job, threads=fewest_of_the_fastest(tried))
    load(job.runtime)  # the library's own start is no load of a model
    forget(job.artifact)
    cold = _load_s(job)
    start = time.perf_counter()
    session = _open(job, max([prompt_tokens, *request["depths"]]) + new_tokens)
    warm = time.perf_counter() - start
    session.time(prompt_tokens, new_tokens)
    with board.Watch() as watch:
        repetitions = range(request["repetitions"])
        timings = [session.time(prompt_tokens, new_tokens) for _ in repetitions]
    steady, peak = rss_mb(), peak_rss_mb()  # before deeper contexts, which take more
    by_depth = {depth: _decode(session, depth, new_tokens) for depth in request["depths"]}
    session.close()
    first = [timing.ttft_s for timing in timings]
    each = [statistics.fmean(timing.token_s) for timing in timings]
    tokens = [seconds for timing in timings for seconds in timing.token_s]
    around = watch.facts()
    energy = around.pop("energy_j", None)
    if energy is not None:
        around["energy_j"] = round(energy / len(timings), 3)  # of one prompt and its answer
    emit(
        "latency",
        load_cold_s=cold,
        load_s=round(warm, 3),
        ttft_ms=round(1000 * statistics.median(first), 2),
        ttft_ms_range=[round(1000 * end, 2) for end in (min(first), max(first))],
        prefill_tok_s=round(prompt_tokens / statistics.median(first), 1),
        decode_tok_s=round(1 / statistics.median(each), 1),
        decode_tok_s_range=[round(1 / end, 1) for end in (max(each), min(each))],
        token_ms_p50=round(1000 * float(np.percentile(tokens, 50)), 3),
        token_ms_p95=round(1000 * float(np.percentile(tokens, 95)), 3),
        peak_rss_mb=round(peak, 1),
        steady_rss_mb=round(steady, 1),
        threads=thread_count(job.threads),
        threads_tried={str(count): round(speed, 1) for count, speed in tried.items()},
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=request["repetitions"],
        prefill_s=first,
        decode_s=[sum(timing.token_s) for timing in timings],
        **_against_memory(job, by_depth, 1 / statistics.median(each)),
        **around,
    )


def _against_memory(job: Job, by_depth: Mapping[int, float], tok_s: float) -> dict[str, Any]:
    """Decode speed by depth, and the share of the memory's bandwidth that reading weights takes."""
    if not by_depth:
        return {}
    bandwidth = read_bandwidth(thread_count(job.threads))
    found: dict[str, Any] = {
        "decode_tok_s_by_depth": {str(depth): round(v, 1) for depth, v in by_depth.items()},
        "memory_bandwidth_gb_s": round(bandwidth, 1),
    }
    if job.bytes_per_token:
        found["bytes_per_token"] = job.bytes_per_token
        found["bandwidth_share"] = round(job.bytes_per_token * tok_s / (1e9 * bandwidth), 3)
    return found


def _decode(session: Session, depth: int, new_tokens: int) -> float:
    """Tokens a second behind ``depth`` tokens."""
    timings = [session.time(depth, new_tokens) for _ in range(_DEPTH_REPETITIONS)]
    return 1 / statistics.median(statistics.fmean(timing.token_s) for timing in timings)


def forget(artifact: Path) -> None:
    """Put its files out of the system's cache, so that the next load reads the disk (Linux)."""
    files = [artifact] if artifact.is_file() else [p for p in artifact.rglob("*") if p.is_file()]
    for path in files if hasattr(os, "posix_fadvise") else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only what is on the disk can be put out
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _load_s(job: Job) -> float | None:
    """Seconds of a load from the disk; None where the cache cannot be emptied."""
    if not hasattr(os, "posix_fadvise"):
        return None
    start = time.perf_counter()
    session = _open(job, 8)
    seconds = time.perf_counter() - start
    session.close()
    return round(seconds, 3)


def _open(job: Job, context: int) -> Session:
    return open_session(job.runtime, job.artifact, threads=job.threads, context=context, parallel=1)


def thread_sweep(job: Job) -> dict[int, float]:
    """Decode speed, tokens a second, by number of threads: each up to 8 of them, then doubled."""
    cores = thread_count(0)
    counts = [n for n in (*range(1, 9), *(2**i for i in range(4, 10))) if n <= cores]
    found = {}
    for count in sorted({*counts, cores}):
        session = _open(replace(job, threads=count), sum(_SWEEP.values()))
        session.time(**_SWEEP)
        speeds = (session.time(**_SWEEP) for _ in range(_SWEEP_REPETITIONS))
        found[count] = 1 / statistics.median(statistics.fmean(t.token_s) for t in speeds)
        session.close()
    return found


def fewest_of_the_fastest(speeds: dict[int, float]) -> int:
    """The smallest number of threads that is about as fast as the fastest."""
    best = max(speeds.values())
    close: Iterable[int] = (count for count, speed in speeds.items() if speed >= _AS_FAST * best)
    return min(close)


if __name__ == "__main__":
    child.serve(measure)
