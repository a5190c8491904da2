"""Every question scored once: answered greedily, and the gold solution's likelihood taken.

One line a question is on disk as soon as it is done; a benchmark that was cut off goes on from the
next question.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeft.allocator import allocator
from edgeft.bench.job import HERE, Job, Place
from edgeft.errors import UserError
from edgeft.prompts import first, read_items
from edgeft.transports import patiently

Row = dict[str, Any]


def accuracy(
    job: Job,
    out: Path,
    progress: Callable[[int, int, str], None],
    *,
    limit: int | None = None,
    place: Place = HERE,
) -> None:
    """Fill ``out/results.jsonl`` with one line for every question of the job.

    Args:
        out: an existing folder; lines that it holds for this job are kept.
        limit: only so many questions, the first of the headline group.
        place: where it is done.

    Raises:
        UserError: the artifact does not open, or the runtime failed.
    """
    results, scores = out / "results.jsonl", out / "scores.jsonl"
    done = {row["id"]: row for row in read_rows(results)}
    scored = {row["id"]: row for row in read_rows(scores)}
    total = len(first(read_items(job.evaluation), limit))

    def rest() -> None:
        if len(done) == total:
            return
        request = {"scored": list(scored), "answered": list(done), "limit": limit}
        right = sum(row["correct"] for row in done.values())
        with appending(results) as keep, appending(scores) as keep_score:
            for event in place.call("edgeft.bench.worker", job, request, environment(job.runtime)):
                kind = event.pop("event")
                if kind == "score":
                    scored[event["id"]] = event
                    keep_score(event)
                elif kind == "answer":
                    keep({**event, **scored[event["id"]]})
                    done[event["id"]] = event
                    right += event["correct"]
                both = len(scored) + len(done)
                text = f"{right / len(done):.1%} of {len(done)} correct" if done else "likelihood"
                progress(both, 2 * total, text)

    patiently(
        rest,
        lambda: len(scored) + len(done),
        lambda why: progress(len(scored) + len(done), 2 * total, why),
    )
    if len(done) != total:
        raise UserError(f"{results} holds {len(done)} of {total} questions: give the command again")
    scores.unlink(missing_ok=True)


def environment(runtime: str) -> dict[str, str]:
    """Environment variables with which a child scores in this runtime."""
    if runtime == "transformers":
        return allocator()
    # Threads that wait spin only briefly: as fast on an idle machine, several times as fast on one
    # that does other work too. Answers are the same; latency is timed without this.
    return {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000")}


def read_rows(path: Path) -> list[Row]:
    """The whole lines of a JSON-lines file; what a kill left of the last one is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    return [json.loads(line) for line in data[:whole].splitlines()]


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Row], None]]:
    """Each row is one write, so a kill leaves at most one half line, at the end."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(row: Row) -> None:
        os.write(descriptor, (json.dumps(row, ensure_ascii=False) + "\n").encode())

    try:
        yield append
    finally:
        os.close(descriptor)
