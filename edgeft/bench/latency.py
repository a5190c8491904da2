"""One stream alone: load, time to first token, prefill and decode speed, peak memory, energy.

Timed in a child of its own, so that the peak is this artifact's and nobody else's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.bench import board
from edgeft.bench.job import HERE, Job, Place, job_of_request
from edgeft.bench.machine import peak_rss_mb
from edgeft.run import write_json
from edgeft.runtimes import Session, open_session, thread_count
from edgeft.transports import patiently

NOT_MEASURED = "not_measured"
_SWEEP = {"prompt_tokens": 16, "new_tokens": 24}
_SWEEP_REPETITIONS = 3
_AS_FAST = 0.97  # fewer threads are taken when they are this close to the fastest


def latency(
    job: Job,
    out: Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repetitions: int = 5,
    sweep: bool = False,
    place: Place = HERE,
) -> None:
    """Write ``out/latency.json``: medians over ``repetitions``, after one that does not count.

    Args:
        sweep: find the fastest number of threads first, instead of the job's.
        place: where it is done.

    Raises:
        UserError: the artifact does not open, or the runtime failed.
    """
    shape = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repetitions": repetitions}
    found: list[dict[str, Any]] = []

    def work() -> None:
        found[:] = place.call("edgeft.bench.latency", job, {**shape, "sweep": sweep})

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
    start = time.perf_counter()
    session = _open(job, prompt_tokens + new_tokens)
    load = time.perf_counter() - start
    session.time(prompt_tokens, new_tokens)
    with board.Watch() as watch:
        repetitions = range(request["repetitions"])
        timings = [session.time(prompt_tokens, new_tokens) for _ in repetitions]
    session.close()
    first = [timing.ttft_s for timing in timings]
    each = [statistics.fmean(timing.token_s) for timing in timings]
    around = watch.facts()
    energy = around.pop("energy_j", None)
    if energy is not None:
        around["energy_j"] = round(energy / len(timings), 3)  # of one prompt and its answer
    emit(
        "latency",
        load_s=round(load, 3),
        ttft_ms=round(1000 * statistics.median(first), 2),
        ttft_ms_range=[round(1000 * end, 2) for end in (min(first), max(first))],
        prefill_tok_s=round(prompt_tokens / statistics.median(first), 1),
        decode_tok_s=round(1 / statistics.median(each), 1),
        decode_tok_s_range=[round(1 / end, 1) for end in (max(each), min(each))],
        peak_rss_mb=round(peak_rss_mb(), 1),
        threads=thread_count(job.threads),
        threads_tried={str(count): round(speed, 1) for count, speed in tried.items()},
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=request["repetitions"],
        **around,
    )


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
