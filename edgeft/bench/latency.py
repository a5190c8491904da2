"""One stream alone: load, time to first token, prefill and decode speed, peak memory.

Timed in a child of its own, so that the peak is this artifact's and nobody else's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.bench.job import Job, job_of_request
from edgeft.bench.machine import peak_rss_mb
from edgeft.run import write_json
from edgeft.runtimes import open_session, thread_count


def latency(
    job: Job, out: Path, *, prompt_tokens: int = 128, new_tokens: int = 64, repetitions: int = 5
) -> None:
    """Write ``out/latency.json``: medians over ``repetitions``, after one that does not count.

    Raises:
        UserError: the artifact does not open, or the runtime failed.
    """
    shape = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repetitions": repetitions}
    [timing] = child.run("edgeft.bench.latency", {"job": job.request(), **shape})
    del timing["event"]
    write_json(out / "latency.json", timing)


def measure(request: dict[str, Any], emit: Callable[..., None]) -> None:
    """The child's work."""
    job = job_of_request(request["job"])
    prompt_tokens, new_tokens = request["prompt_tokens"], request["new_tokens"]
    start = time.perf_counter()
    session = open_session(
        job.runtime,
        job.artifact,
        threads=job.threads,
        context=prompt_tokens + new_tokens,
        parallel=1,
    )
    load = time.perf_counter() - start
    session.time(prompt_tokens, new_tokens)
    timings = [session.time(prompt_tokens, new_tokens) for _ in range(request["repetitions"])]
    session.close()
    first = statistics.median(timing.ttft_s for timing in timings)
    each = statistics.median(statistics.fmean(timing.token_s) for timing in timings)
    emit(
        "latency",
        load_s=round(load, 3),
        ttft_ms=round(1000 * first, 2),
        prefill_tok_s=round(prompt_tokens / first, 1),
        decode_tok_s=round(1 / each, 1),
        peak_rss_mb=round(peak_rss_mb(), 1),
        threads=thread_count(job.threads),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=request["repetitions"],
    )


if __name__ == "__main__":
    child.serve(measure)
