"""Decode speed of one model in several quantizations, in turns, so that a drifting machine is fair."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.exporters.quantize import quantize
from edgeft.runtimes import open_session

_SHAPE = {"prompt_tokens": 16, "new_tokens": 33}
_ALONE = {"threads": 0, "context": sum(_SHAPE.values()), "parallel": 1}
_ROUNDS = 5


def seconds_per_token(
    source: Path, ftype: str, plans: Mapping[str, Mapping[str, str]], scratch: Path
) -> dict[str, float]:
    """Median seconds that one stream takes for a token, on every core.

    Args:
        source: the GGUF in 16 bits.
        plans: by a name, types as :func:`edgeft.exporters.quantize.quantize` takes them.
        scratch: a folder for the files, made here and removed again.
    """
    taken: dict[str, list[float]] = {name: [] for name in plans}
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed call left
    scratch.mkdir()
    files = {name: scratch / f"{i}.gguf" for i, name in enumerate(plans)}
    for name, path in files.items():
        quantize(source, path, ftype, types=plans[name])
    for _ in range(_ROUNDS):
        for name, path in files.items():
            session = open_session("llama.cpp", path, **_ALONE)
            taken[name].append(statistics.median(session.time(**_SHAPE).token_s))
            session.close()
    shutil.rmtree(scratch)
    return {name: statistics.median(each) for name, each in taken.items()}


def _work(request: Any, emit: Callable[..., None]) -> None:
    source, scratch = Path(request["source"]), Path(request["scratch"])
    seconds = seconds_per_token(source, request["ftype"], request["plans"], scratch)
    emit("timed", seconds=seconds)


if __name__ == "__main__":
    child.serve(_work)
