"""What is to be scored: an artifact, a runtime, and the questions as token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import run
from edgeft.errors import UserError


@dataclass(frozen=True)
class Job:
    """One artifact to score.

    Attributes:
        runtime: a name in :data:`edgeft.runtimes.RUNTIMES`.
        artifact: the file or folder that the runtime opens.
        evaluation: the questions, JSON lines of :class:`edgeft.prompts.Item`.
        tokenizer: ``tokenizer.json``, to make text of the output ids.
        task: whose reader finds the answer in the text, unless there is a ``pattern``.
        stop: ids that end a completion.
        context: tokens that one question may need, prompt and continuation together.
        threads: CPU threads, 0 for every core that the process may use.
        parallel: sequences in one batch.
    """

    runtime: str
    artifact: Path
    evaluation: Path
    tokenizer: Path
    task: str
    max_new_tokens: int
    stop: list[int]
    context: int
    threads: int = 0
    parallel: int = 32
    pattern: str | None = None

    def request(self) -> dict[str, Any]:
        """As JSON for a child."""
        paths = {name: str(getattr(self, name)) for name in _PATHS}
        return {**self.__dict__, **paths}


_PATHS = ("artifact", "evaluation", "tokenizer")


def job_of_request(request: Mapping[str, Any]) -> Job:
    """The inverse of :meth:`Job.request`."""
    return Job(**{**request, **{name: Path(request[name]) for name in _PATHS}})


def job_of_bundle(bundle: Path, *, threads: int = 0, parallel: int = 32) -> Job:
    """The job that a bundle's manifest describes; every file is checked by its SHA-256.

    Raises:
        UserError: it is no bundle, or a file is missing or not the one that was exported.
    """
    try:
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{bundle} is not a bundle: its manifest.json cannot be read") from error
    for name, facts in files:
        path = bundle / name
        if not path.is_file():
            raise UserError(f"{path} is missing from the bundle: export or copy it again")
        if path.stat().st_size != facts["bytes"] or run.sha256(path) != facts["sha256"]:
            raise UserError(
                f"{path} is not the file that was exported (SHA-256): export or copy it again"
            )
    return Job(
        runtime=manifest["runtime"],
        artifact=bundle / manifest["artifact"],
        evaluation=bundle / "evaluation.jsonl",
        tokenizer=bundle / "tokenizer.json",
        task=manifest["task"],
        max_new_tokens=manifest["max_new_tokens"],
        stop=manifest["stop"],
        context=manifest["context"],
        threads=threads,
        parallel=parallel,
        pattern=manifest.get("pattern"),
    )
