"""The general questions on the host: log-likelihoods of their answers, in a child process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.allocator import allocator
from edgeft.prompts import read_items
from edgeft.runtimes import open_session

FILE = "general.jsonl"


def general(folder: Path, items: Path, out: Path) -> None:
    """Write ``out/general.jsonl``: for each item its id, log-likelihood in nats, tokens and bytes.

    Args:
        folder: a model folder.
        items: the questions as :mod:`edgeft.tasks.general` makes them, one line a choice.

    Raises:
        UserError: the model does not open, or the runtime failed.
    """
    request = {"folder": str(folder), "items": str(items)}
    rows = child.run("edgeft.bench.general", request, allocator())[-1]["rows"]
    (out / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _work(request: Any, emit: Callable[..., None]) -> None:
    items = read_items(Path(request["items"]))
    pairs = [(item.prompt, item.gold) for item in items]
    context = max(len(p) for p, _ in pairs) + max(len(g) for _, g in pairs)
    session = open_session(
        "transformers", Path(request["folder"]), threads=0, context=context, parallel=32
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
