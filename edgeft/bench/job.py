"""What is to be scored: an artifact, a runtime, and the questions as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeft import child, run
from edgeft.bench import divergence
from edgeft.errors import UserError
from edgeft.transports import Transport
from edgeft.transports.local import Local


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
        bytes_per_token: of weights that decoding one token reads; None: not known.
        reference: the host's distributions, see :mod:`edgeft.bench.divergence`; None: not compared.
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
    bytes_per_token: int | None = None
    reference: Path | None = None

    def at(self, folder: Path, other: Path) -> Job:
        """The same job where ``other`` is what ``folder`` is here."""
        paths = self._paths().items()
        moved: dict[str, Any] = {name: other / path.relative_to(folder) for name, path in paths}
        return replace(self, **moved)

    def request(self) -> dict[str, Any]:
        """As JSON for a child."""
        return {**self.__dict__, **{name: str(path) for name, path in self._paths().items()}}

    def _paths(self) -> dict[str, Path]:
        return {name: getattr(self, name) for name in _PATHS if getattr(self, name) is not None}


_PATHS = ("artifact", "evaluation", "tokenizer", "reference")


@dataclass(frozen=True)
class Place:
    """Where a job is done.

    Attributes:
        bundle: the bundle's folder here, ``there`` on the device; None: all paths are as they are.
    """

    transport: Transport
    bundle: Path | None = None
    there: Path | None = None

    def call(
        self,
        module: str,
        job: Job,
        request: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
    ) -> Iterator[child.Event]:
        """The events of a child that is given the job and ``request``."""
        if self.bundle and self.there:
            job = job.at(self.bundle, self.there)
        return self.transport.call(module, {"job": job.request(), **request}, env)


HERE = Place(Local())


def job_of_request(request: Mapping[str, Any]) -> Job:
    """The inverse of :meth:`Job.request`."""
    return Job(**{**request, **{name: Path(request[name]) for name in _PATHS if request[name]}})


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
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{bundle} is not a bundle: it names the file {name}")
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
        bytes_per_token=manifest.get("bytes_per_token"),
        reference=bundle / divergence.FILE if divergence.FILE in manifest["files"] else None,
    )
