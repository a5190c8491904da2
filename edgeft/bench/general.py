"""The general questions: log-likelihoods of their answers, in a child process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.bench.accuracy import environment
from edgeft.prompts import read_items
from edgeft.runtimes import open_session

FILE = "general.jsonl"


def general(runtime: str, artifact: Path, items: Path, out: Path) -> None:
    """Write ``out/general.jsonl``: for each item its id, log-likelihood in nats, tokens and bytes.

    Args:
        runtime: a name in :data:`edgeft.runtimes.RUNTIMES`.
        artifact: what it opens.
        items: the questions as :mod:`edgeft.tasks.general` makes them, one line a choice.

    Raises:
        UserError: the model does not open, or the runtime failed.
    """
    request = {"runtime": runtime, "artifact": str(artifact), "items": str(items)}
    rows = child.run("edgeft.bench.general", request, environment(runtime))[-1]["rows"]
    (out / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _work(request: Any, emit: Callable[..., None]) -> None:
    items = read_items(Path(request["items"]))
    pairs = [(item.prompt, item.gold) for item in items]
    context = max(len(p) for p, _ in pairs) + max(len(g) for _, g in pairs)
    session = open_session(
        request["runtime"], Path(request["artifact"]), threads=0, context=context, parallel=32
    )
    scores = session.score(pairs)
    rows = [
        {
            "id": item.id,
            "logprob": score,
            "tokens": len(item.gold),
            "bytes": len(item.answer.encode()),
        }
        for item, score in zip(items, scores, strict=True)
    ]
    session.close()
    emit("scored", rows=rows)


if __name__ == "__main__":
    child.serve(_work)
