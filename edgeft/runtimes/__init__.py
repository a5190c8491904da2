"""Runtimes: what executes an artifact. All speak token ids, none knows what a task is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgeft.errors import UserError, near


@dataclass(frozen=True)
class Completion:
    """One greedy continuation.

    Attributes:
        index: which of the prompts it continues; completions arrive in the order they finish.
        tokens: the new ids, without the stop token.
        finish: ``"stop"`` or ``"length"``.
        seconds: from admission to the batch until the last token.
    """

    index: int
    tokens: list[int]
    finish: str
    seconds: float


@dataclass(frozen=True)
class Timing:
    """One stream: ``ttft_s`` to the first token, then ``token_s`` seconds for each further one."""

    ttft_s: float
    token_s: list[float]


class Session(Protocol):
    """What a runtime opens for one artifact."""

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Set[int]
    ) -> Iterator[Completion]:
        """Greedy continuations of every prompt, as they finish."""
        ...

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[float]:
        """sum log p(continuation | prompt) in nats, one a pair, in order."""
        ...

    def time(self, prompt_tokens: int, new_tokens: int) -> Timing:
        """One stream alone on the machine."""
        ...

    def close(self) -> None: ...


def _llama_cpp(artifact: Path, *, threads: int, context: int, parallel: int) -> Session:
    from edgeft.runtimes import llama_cpp

    return llama_cpp.open_session(artifact, threads=threads, context=context, parallel=parallel)


def _transformers(artifact: Path, *, threads: int, context: int, parallel: int) -> Session:
    from edgeft.runtimes import transformers

    return transformers.open_session(artifact, threads=threads, context=context, parallel=parallel)


RUNTIMES: dict[str, Callable[..., Session]] = {
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
}


def open_session(
    runtime: str, artifact: Path, *, threads: int, context: int, parallel: int
) -> Session:
    """Open ``artifact`` in the named runtime.

    Args:
        threads: CPU threads, 0 for every core that this process may use.
        context: tokens one sequence may hold, prompt and continuation together.
        parallel: sequences in one batch.

    Raises:
        UserError: the runtime is unknown or not installed, or the artifact does not open.
    """
    if runtime not in RUNTIMES:
        raise UserError(f"unknown runtime '{runtime}'{near(runtime, tuple(RUNTIMES))}")
    return RUNTIMES[runtime](artifact, threads=threads, context=context, parallel=parallel)
