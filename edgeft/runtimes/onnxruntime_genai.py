"""ONNX Runtime GenAI: folders of its model builder, on the CPU.

Texts of one batch are padded on the right: GenAI takes a row's length from its last token that is
not padding, and the attention kernel counts a row's cache from its first cell. Padded on the left,
rows would attend to their padding. Models with a sliding window take no padding at all: there a
batch has texts of one length.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import UserError
from edgeft.runtimes import Completion, Timing, check_fits, thread_count, wanted_rows
from edgeft.runtimes.likelihood import Logits, log_likelihood

try:
    import onnxruntime_genai as genai
except ImportError as error:
    raise UserError(
        f"onnxruntime-genai is not installed ({error}): pip install 'edgeft[runtime]'"
    ) from error

_LOGITS_BYTES = 512 * 2**20  # of one batch: the graph computes them at every position


class GenaiSession:
    """One folder with a ``genai_config.json``; see :class:`edgeft.runtimes.Session`."""

    def __init__(self, artifact: Path, threads: int, context: int, parallel: int) -> None:
        settings = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))["model"]
        eos = settings["eos_token_id"]
        self._eos = set(eos) if isinstance(eos, list) else {eos}
        self._vocab_size: int = settings["vocab_size"]
        self._artifact, self._threads, self._context = artifact, threads, context
        self._parallel = max(1, parallel)
        self._one_length = "sliding_window" in settings["decoder"]
        self._pad: int = settings["pad_token_id"]
        self.model = self._open()

    def _open(self) -> Any:
        config = genai.Config(os.fspath(self._artifact))
        # Threads that wait spin within a step only: as fast, and others get the cores in between.
        session = {
            "intra_op_num_threads": self._threads,
            "session.force_spinning_stop": "1",
        }
        overlay = {"pad_token_id": self._pad, "decoder": {"session_options": session}}
        config.overlay(json.dumps({"model": overlay}))
        return genai.Model(config)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Set[int]
    ) -> Iterator[Completion]:
        """Greedy continuations, as they finish; the EOS ids of ``genai_config.json`` stop too."""
        if not prompts:
            return
        check_fits(prompts, max_new_tokens, self._context)
        self._pad_with_none_of({prompt[-1] for prompt in prompts})
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for batch in self._batches(order, prompts):
            texts = [prompts[i] for i in batch]
            yield from self._generate(batch, texts, max_new_tokens, stop | self._eos)

    def _generate(
        self, indices: list[int], prompts: list[Sequence[int]], max_new_tokens: int, stop: Set[int]
    ) -> Iterator[Completion]:
        start = time.perf_counter()
        generator = self._read(prompts, max_new_tokens)
        new: dict[int, list[int]] = {row: [] for row in range(len(prompts))}
        while new:
            generator.generate_next_token()
            tokens = generator.get_next_tokens()
            for row in list(new):
                token = int(tokens[row])
                if token not in stop:
                    new[row].append(token)
                if token in stop or len(new[row]) == max_new_tokens:
                    seconds = time.perf_counter() - start
                    finish = "stop" if token in stop else "length"
                    yield Completion(indices[row], new.pop(row), finish, seconds)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[float]:
        """sum log p(continuation | prompt) in nats, in order."""
        if not pairs:
            return
        check_fits([prompt for prompt, _ in pairs], max(len(c) for _, c in pairs), self._context)
        texts = [[*prompt, *continuation[:-1]] for prompt, continuation in pairs]
        for i, logits in self._forward(texts):
            continuation = pairs[i][1]
            behind = logits[len(logits) - len(continuation) :]
            yield log_likelihood(behind, continuation)

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
        _, rows = wanted_rows(prompts, last)
        for i, logits in self._forward(prompts):
            yield logits[-rows[i] :]

    def _forward(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Logits]]:
        """i and the logits at every position of ``texts[i]``, in order."""
        self._pad_with_none_of({text[-1] for text in texts})
        for batch in self._batches(range(len(texts)), texts):
            rows = self._read([texts[i] for i in batch], 0).get_output("logits")
            for i, row in zip(batch, rows, strict=True):
                yield i, row[: len(texts[i])]

    def time(self, prompt_tokens: int, new_tokens: int) -> Timing:
        """One stream: pseudo-random ids, and the most likely token that does not end it."""
        check_fits([range(prompt_tokens)], new_tokens, self._context)
        self._pad_with_none_of(set())
        prompt = np.random.default_rng(0).integers(0, self._vocab_size, prompt_tokens).tolist()
        prompt[-1] = (self._pad + 1) % self._vocab_size
        generator = self._generator(1, prompt_tokens + new_tokens, min_length=True)
        marks = [time.perf_counter()]
        generator.append_tokens(np.array([prompt], np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            marks.append(time.perf_counter())
        steps = [b - a for a, b in itertools.pairwise(marks)]
        return Timing(steps[0], steps[1:])

    def close(self) -> None:
        """Let go of the model; the session is of no use afterwards."""
        self.model = None

    def _batches(self, order: Sequence[int], texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """``order`` cut so that no batch computes too many logits or pads what must not be."""
        batch: list[int] = []
        longest = 0
        for i in order:
            length = len(texts[i])
            fit = _LOGITS_BYTES // (4 * self._vocab_size * max(longest, length))
            uneven = self._one_length and length != longest
            if batch and (uneven or len(batch) >= min(self._parallel, fit)):
                yield batch
                batch, longest = [], 0
            batch.append(i)
            longest = max(longest, length)
        yield batch

    def _read(self, texts: Sequence[Sequence[int]], new_tokens: int) -> Any:
        """A generator that has read the texts, which are the rows of its batch."""
        longest = max(map(len, texts))
        ids = np.full((len(texts), longest), self._pad, np.int32)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
        generator = self._generator(len(texts), longest + max(1, new_tokens))
        generator.append_tokens(ids)
        return generator

    def _generator(self, rows: int, length: int, *, min_length: bool = False) -> Any:
        parameters = genai.GeneratorParams(self.model)
        parameters.set_search_options(
            batch_size=rows,
            max_length=length,
            min_length=length if min_length else 0,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        return genai.Generator(self.model, parameters)

    def _pad_with_none_of(self, last: Set[int]) -> None:
        """Have a padding id that ends no text; a row that ended in one would lose it."""
        if self._pad in last:
            self._pad = next(i for i in range(self._vocab_size) if i not in last | self._eos)
            self.model = self._open()


def open_session(artifact: Path, *, threads: int, context: int, parallel: int) -> GenaiSession:
    """Open a folder; the arguments are those of :func:`edgeft.runtimes.open_session`.

    Raises:
        UserError: there is no such folder, or ONNX Runtime does not open what is in it.
    """
    if not (artifact / "genai_config.json").is_file():
        raise UserError(f"{artifact} has no genai_config.json: export it again")
    try:
        return GenaiSession(artifact, thread_count(threads), context, parallel)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{artifact} does not open in onnxruntime-genai: {reason}; export it again"
        ) from error


def tokenize(session: GenaiSession, texts: Sequence[str]) -> list[list[int]]:
    """The ids that GenAI's own tokenizer makes of each text; none where it does not open."""
    try:
        tokenizer = genai.Tokenizer(session.model)
    except RuntimeError:
        return [[] for _ in texts]
    return [[int(i) for i in tokenizer.encode(text)] for text in texts]
