"""llama.cpp, through llama-cpp-python's C bindings: GGUF files, on every CPU.

An artifact is a file, or a folder of ``model.gguf`` and perhaps ``adapter.gguf``, a LoRA that is
applied to it at full strength.

One context serves one call and is as large as that call needs, so memory follows the work.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.errors import UserError
from edgeft.runtimes import (
    Completion,
    Timing,
    check_fits,
    common_prefix,
    thread_count,
    wanted_rows,
)

try:
    import llama_cpp.llama_cpp as llama
except ImportError as error:
    raise UserError(
        f"llama.cpp is not installed ({error}): pip install 'edgeft[runtime]'"
    ) from error

import numpy as np

from edgeft.runtimes.likelihood import Logits, log_likelihood
from edgeft.runtimes.llama_batch import MAX_SEQUENCES, PIECE, Sequences

_LOGITS_BYTES = 48 * 2**20  # of one batch; numpy's temporaries stay far below it
_WHOLE_AT_ONCE = 8  # prompts whose logits are all kept until their turn,
_WHOLE_BYTES = 256 * 2**20  # or as many as take no more than this
_WARNING, _ERROR, _CONTINUED = 3, 4, 5  # ggml_log_level


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _: Any) -> None:
    """Warnings and errors go to standard error, errors are remembered too."""
    line = text.decode(errors="replace")
    if level == _CONTINUED:
        level = _log_state["level"]
    _log_state["level"] = level
    if level in (_WARNING, _ERROR):
        sys.stderr.write(line)
    if level == _ERROR:
        _errors.append(line.strip())


_log_state = {"level": 0}
_errors: deque[str] = deque(maxlen=8)
llama.llama_log_set(_log, ctypes.c_void_p(0))


@dataclass
class _Slot:
    """A sequence at work on the text ``index``.

    Attributes:
        pending: ids not fed yet.
        position: where they stand.
        first: position from which logits are wanted.
        new: ids generated so far.
    """

    index: int
    pending: Sequence[int]
    position: int
    first: int
    new: list[int] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)


class LlamaSession:
    """One model, with its adapter if it has one; see :class:`edgeft.runtimes.Session`."""

    def __init__(
        self, model: Any, threads: int, context: int, parallel: int, adapter: Any = None
    ) -> None:
        self.model, self._adapter = model, adapter
        self.vocab = llama.llama_model_get_vocab(model)
        self._vocab_size = llama.llama_vocab_n_tokens(self.vocab)
        self._threads, self._context = threads, context
        self._parallel = max(1, min(parallel, MAX_SEQUENCES))

    @contextlib.contextmanager
    def _sequences(
        self, prefix: Sequence[int], count: int, own: int, outputs: int
    ) -> Iterator[Sequences]:
        sequences = Sequences(self.model, prefix, count, own, outputs, self._threads, self._adapter)
        try:
            yield sequences
        finally:
            sequences.close()

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Set[int]
    ) -> Iterator[Completion]:
        """Greedy continuations, as they finish; a finished one makes room for the next prompt."""
        if not prompts:
            return
        check_fits(prompts, max_new_tokens, self._context)
        shared = common_prefix(prompts)
        own = max(map(len, prompts)) - shared + max_new_tokens
        count = min(self._parallel, len(prompts))
        waiting = deque(range(len(prompts)))
        slots: dict[int, _Slot] = {}
        with self._sequences(prompts[0][:shared], count, own, count) as sequences:
            while waiting or slots:
                for sequence in _free(slots, count, waiting):
                    prompt = prompts[i := waiting.popleft()]
                    sequences.begin(sequence)
                    slots[sequence] = _Slot(i, prompt[shared:], shared, len(prompt) - 1)
                asked = [sequence for sequence, rows in _feed(sequences, slots, count) if rows]
                tokens = sequences.decode().argmax(-1).tolist()
                for sequence, token in zip(asked, tokens, strict=True):
                    slot = slots[sequence]
                    if token not in stop:
                        slot.new.append(token)
                        slot.pending = [token]
                    if token in stop or len(slot.new) == max_new_tokens:
                        del slots[sequence]
                        seconds = time.perf_counter() - slot.start
                        finish = "stop" if token in stop else "length"
                        yield Completion(slot.index, slot.new, finish, seconds)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[float]:
        """sum log p(continuation | prompt) in nats, in order."""
        if not pairs:
            return
        check_fits([prompt for prompt, _ in pairs], max(len(c) for _, c in pairs), self._context)
        texts = [[*prompt, *continuation[:-1]] for prompt, continuation in pairs]
        first = [len(prompt) - 1 for prompt, _ in pairs]
        shared = common_prefix([prompt for prompt, _ in pairs])
        totals, seen = [0.0] * len(pairs), [0] * len(pairs)
        following, ended = 0, set()
        for i, last, logits in self._forward(texts, first, shared, self._parallel):
            targets = pairs[i][1][seen[i] : seen[i] + len(logits)]
            totals[i] += log_likelihood(logits, targets)
            seen[i] += len(logits)
            if last:
                ended.add(i)
            while following in ended:
                yield totals[following]
                following += 1

    def logits(
        self, prompts: Sequence[Sequence[int]], last: Sequence[int] | None = None
    ) -> Iterator[Logits]:
        """Next-token logits behind the common prefix, or of the ``last`` so many tokens of each.

        Yields:
            For each prompt, in order, float32 [len(prompt) - common prefix, vocabulary].
        """
        if not prompts:
            return
        check_fits(prompts, 0, self._context)
        heads, rows = wanted_rows(prompts, last)
        first = [len(prompt) - n for prompt, n in zip(prompts, rows, strict=True)]
        at_once = max(1, min(_WHOLE_AT_ONCE, _WHOLE_BYTES // (4 * self._vocab_size * max(rows))))
        parts: dict[int, list[Logits]] = {}
        following, ended = 0, set()
        for i, is_last, logits in self._forward(prompts, first, common_prefix(heads), at_once):
            parts.setdefault(i, []).append(logits.copy())
            if is_last:
                ended.add(i)
            while following in ended:
                yield np.concatenate(parts.pop(following))
                following += 1

    def _forward(
        self, texts: Sequence[Sequence[int]], first: Sequence[int], shared: int, parallel: int
    ) -> Iterator[tuple[int, bool, Logits]]:
        """Logits of ``texts[i]`` from position ``first[i]``, in parts, about in order.

        Yields:
            i, whether this part ends it, and a view that the next step overwrites.
        """
        rows = max(1, _LOGITS_BYTES // (4 * self._vocab_size))
        count = min(parallel, self._parallel, len(texts))
        own = max(map(len, texts)) - shared
        waiting = deque(range(len(texts)))
        slots: dict[int, _Slot] = {}
        with self._sequences(texts[0][:shared], count, own, rows) as sequences:
            while waiting or slots:
                for sequence in _free(slots, count, waiting):
                    i = waiting.popleft()
                    sequences.begin(sequence)
                    slots[sequence] = _Slot(i, texts[i][shared:], shared, first[i])
                asked = _feed(sequences, slots, rows)
                logits, at = sequences.decode(), 0
                for sequence, wanted in asked:
                    slot = slots[sequence]
                    if not slot.pending:
                        del slots[sequence]
                    yield slot.index, not slot.pending, logits[at : at + wanted]
                    at += wanted

    def time(self, prompt_tokens: int, new_tokens: int) -> Timing:
        """One stream as llama-bench has it: pseudo-random ids, a context that is warm.

        Choosing the next token is part of the first one's time and, as there, not of the others'.
        """
        check_fits([range(prompt_tokens)], new_tokens, self._context)
        random = np.random.default_rng(0)
        prompt = random.integers(0, self._vocab_size, prompt_tokens).tolist()
        new = random.integers(0, self._vocab_size, new_tokens - 1).tolist()
        seconds = []
        with self._sequences([], 1, prompt_tokens + new_tokens, 1) as sequences:
            first = prompt[: sequences.batch_size]
            _prefill(sequences, first)  # the context's memory is touched for the first time
            _decode(sequences, len(first), first[-1])
            sequences.begin(0)
            start = time.perf_counter()
            _prefill(sequences, prompt).argmax()
            ttft = time.perf_counter() - start
            for position, token in enumerate(new, prompt_tokens):
                start = time.perf_counter()
                if position == prompt_tokens:
                    _decode(sequences, position, token)
                else:
                    sequences.again(position, token)
                seconds.append(time.perf_counter() - start)
        return Timing(ttft, seconds)

    def close(self) -> None:
        """Free the model and the adapter; the session is of no use afterwards."""
        if self._adapter is not None:
            llama.llama_adapter_lora_free(self._adapter)
        llama.llama_model_free(self.model)


def _prefill(sequences: Sequences, prompt: Sequence[int]) -> Logits:
    """Compute a prompt alone, in whole batches: logits of what follows it, [1, vocabulary]."""
    for at in range(0, len(prompt), sequences.batch_size):
        part = prompt[at : at + sequences.batch_size]
        sequences.feed(0, at, part, int(at + len(part) == len(prompt)))
        logits = sequences.decode()
    return logits


def _decode(sequences: Sequences, position: int, token: int) -> Logits:
    """Compute one token: logits of what follows it, [1, vocabulary]."""
    sequences.feed(0, position, [token], 1)
    return sequences.decode()


def _free(slots: dict[int, _Slot], count: int, waiting: deque[int]) -> list[int]:
    """Sequences that the waiting texts may take."""
    return [sequence for sequence in range(count) if sequence not in slots][: len(waiting)]


def _feed(sequences: Sequences, slots: dict[int, _Slot], rows: int) -> list[tuple[int, int]]:
    """Fill the batch with what is pending; each sequence fed, and its rows of logits to come."""
    asked = []
    for sequence, slot in sorted(slots.items()):  # streams that follow each other run as one
        before = max(0, slot.first - slot.position)
        part = slot.pending[: min(PIECE, sequences.room, before + rows)]
        if not part:
            continue
        wanted = max(0, len(part) - before)
        sequences.feed(sequence, slot.position, part, wanted)
        slot.pending = slot.pending[len(part) :]
        slot.position += len(part)
        rows -= wanted
        asked.append((sequence, wanted))
    return asked


def open_session(artifact: Path, *, threads: int, context: int, parallel: int) -> LlamaSession:
    """Open a GGUF; the arguments are those of :func:`edgeft.runtimes.open_session`.

    Raises:
        UserError: there is no such file, llama.cpp does not open it, or the adapter beside it is
            of another model.
    """
    path, beside = artifact, None
    if artifact.is_dir():
        path, beside = artifact / "model.gguf", artifact / "adapter.gguf"
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    llama.llama_backend_init()
    _errors.clear()
    model = llama.llama_model_load_from_file(os.fsencode(path), llama.llama_model_default_params())
    if not model:
        reason = _reason("error loading model: ")
        raise UserError(f"{path} does not open in llama.cpp: {reason}; export it again")
    adapter = None
    if beside and beside.is_file():
        adapter = llama.llama_adapter_lora_init(model, os.fsencode(beside))
        if not adapter:
            llama.llama_model_free(model)
            reason = _reason("failed to apply lora adapter: ")
            raise UserError(f"{beside} does not go with {path.name}: {reason}; export it again")
    return LlamaSession(model, thread_count(threads), context, parallel, adapter)


def _reason(mark: str) -> str:
    """What llama.cpp said behind ``mark``, else the first thing that it said."""
    said = next((line for line in _errors if mark in line), [*_errors, "no reason"][0])
    return said.rpartition(mark)[2]


def tokenize(session: LlamaSession, text: str, special: bool) -> list[int]:
    """The ids that a user's llama.cpp makes of a text; the file decides about BOS and EOS.

    Args:
        special: read ``<|im_start|>`` and the like as the tokens they name.
    """
    data = text.encode()
    size = len(data) + 8
    while True:
        ids = (llama.llama_token * size)()
        count = llama.llama_tokenize(session.vocab, data, len(data), ids, size, True, special)
        if count >= 0:
            return list(ids[:count])
        size = -count


def chat_template(session: LlamaSession) -> str | None:
    """The chat template in the file."""
    template = llama.llama_model_chat_template(session.model, None)
    return template.decode() if template else None


def ends(session: LlamaSession, token: int) -> bool:
    """Whether llama.cpp's programs end an answer at this token."""
    return bool(llama.llama_vocab_is_eog(session.vocab, token))
