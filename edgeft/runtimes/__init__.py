"""Runtimes: what executes an artifact. All speak token ids, none knows what a task is."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all share and that leaves each at least its last token."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    shared = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        shared += 1
    return max(0, min(shared, min(map(len, prompts)) - 1))


def wanted_rows(
    prompts: Sequence[Sequence[int]], last: Sequence[int] | None
) -> tuple[list[Sequence[int]], list[int]]:
    """Each prompt as far as the token before its first row of logits that is wanted, and its rows.

    Args:
        last: rows of each, those at its end; None: all behind the common prefix.
    """
    if last is None:
        shared = common_prefix(prompts)
        return list(prompts), [len(prompt) - shared for prompt in prompts]
    # A common prefix of these leaves out the token whose logits come first.
    return [p[: len(p) - n + 1] for p, n in zip(prompts, last, strict=True)], list(last)


def check_fits(prompts: Iterable[Sequence[int]], new_tokens: int, context: int) -> None:
    """Refuse prompts that are empty, or too long for the context with what is to come.

    Raises:
        UserError: names the first such prompt by its number.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty: every prompt needs at least one token")
        if len(prompt) + new_tokens > context:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens and {new_tokens} more may follow, "
                f"but the context holds {context}: shorten it or raise the context"
            )


def thread_count(threads: int) -> int:
    """``threads``, where 0 stands for every core that this process may use."""
    if threads:
        return threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Each a module here, imported when it is asked for.
RUNTIMES = {
    "llama.cpp": "llama_cpp",
    "onnxruntime": "onnxruntime",
    "onnxruntime-genai": "onnxruntime_genai",
    "transformers": "transformers",
}


def load(runtime: str) -> Any:
    """The module of a runtime, with the engine's library.

    Raises:
        UserError: the runtime is unknown or not installed.
    """
    if runtime not in RUNTIMES:
        raise UserError(f"unknown runtime '{runtime}'{near(runtime, tuple(RUNTIMES))}")
    return importlib.import_module(f"edgeft.runtimes.{RUNTIMES[runtime]}")


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
    session: Session = load(runtime).open_session(
        artifact, threads=threads, context=context, parallel=parallel
    )
    return session
