"""Plain onnxruntime on CPU: graphs of standard operators with a growing key-value cache.

The cache never passes through Python: a call's ``present`` values are bound as the next one's
``past_key_values``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import UserError
from edgeft.runtimes import (
    Completion,
    Timing,
    check_fits,
    common_prefix,
    thread_count,
    wanted_rows,
)
from edgeft.runtimes.likelihood import Logits, log_likelihood

try:
    import onnxruntime
except ImportError as error:
    raise UserError(
        f"onnxruntime is not installed ({error}): pip install 'edgeft[runtime]'"
    ) from error

Ints = NDArray[np.int64]

_LOGITS_BYTES = 64 * 2**20  # of one batch
_SORTED_AT_ONCE = 64  # score: pairs sorted by length within so many, so that results still flow
_PAST, _PRESENT = "past_key_values.", "present."
_KEEP = "num_logits_to_keep"  # an input with a default, 0 for all
_QUANTIZER = "onnx.quantize"  # the producer that onnxruntime's quantization writes into a graph


@dataclass
class _Batch:
    """Sequences that share one call.

    Attributes:
        cache: an OrtValue [rows, heads, past, head size] for each ``past_key_values`` input.
        mask: [rows, past], 1 where a place in the cache counts.
        positions: [rows], where each row's next token stands.
    """

    cache: dict[str, Any]
    mask: Ints
    positions: Ints

    def keep(self, rows: list[int]) -> None:
        """Drop the other rows."""
        self.cache = {
            name: _value(np.from_dlpack(value)[rows]) for name, value in self.cache.items()
        }
        self.mask, self.positions = self.mask[rows], self.positions[rows]


class OnnxSession:
    """One graph; see :class:`edgeft.runtimes.Session`.

    The prompts' common prefix is computed once and its cache repeated. Rows of unequal length are
    padded on the left of everything, so that a row computes what it would compute alone, in models
    with a sliding window too.

    A dynamically quantized graph scales its activations by what else is in the call. It gets each
    prompt alone and whole, as a user's program gives it: another batch would be other answers.
    """

    def __init__(self, session: Any, context: int, parallel: int) -> None:
        self._session = session
        self._context = context
        self._alone = session.get_modelmeta().producer_name == _QUANTIZER
        self._parallel = 1 if self._alone else max(1, parallel)
        inputs = {value.name: value.shape for value in session.get_inputs()}
        self._past = {name: shape for name, shape in inputs.items() if name.startswith(_PAST)}
        outputs = {value.name: value.shape for value in session.get_outputs()}
        self._vocab_size: int = outputs["logits"][-1]
        self._keeps = _KEEP in {value.name for value in session.get_overridable_initializers()}

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Set[int]
    ) -> Iterator[Completion]:
        """Greedy continuations, as they finish; finished ones leave the batch."""
        if not prompts:
            return
        check_fits(prompts, max_new_tokens, self._context)
        prefix, shared = self._prefix(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for at in range(0, len(order), self._parallel):
            indices = order[at : at + self._parallel]
            texts = [prompts[i] for i in indices]
            yield from self._generate(prefix, shared, indices, texts, max_new_tokens, stop)

    def _generate(
        self,
        prefix: _Batch | None,
        shared: int,
        indices: list[int],
        prompts: list[Sequence[int]],
        max_new_tokens: int,
        stop: Set[int],
    ) -> Iterator[Completion]:
        start = time.perf_counter()
        batch, logits = self._texts(prefix, shared, prompts, 1)
        new: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # the prompt in each row of the batch
        while True:
            tokens = logits[:, -1].argmax(-1)
            stay = []
            for row, token in enumerate(tokens.tolist()):
                done = token in stop
                if not done:
                    new[rows[row]].append(token)
                if done or len(new[rows[row]]) == max_new_tokens:
                    seconds = time.perf_counter() - start
                    finish = "stop" if done else "length"
                    yield Completion(indices[rows[row]], new[rows[row]], finish, seconds)
                else:
                    stay.append(row)
            if not stay:
                return
            if len(stay) < len(rows):
                batch.keep(stay)
                tokens, rows = tokens[stay], [rows[row] for row in stay]
            logits = self._step(batch, tokens)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[float]:
        """sum log p(continuation | prompt) in nats, in order."""
        if not pairs:
            return
        longest = max(len(continuation) for _, continuation in pairs)
        check_fits([prompt for prompt, _ in pairs], longest, self._context)
        if self._alone:
            yield from (self._score_stepwise(*pair) for pair in pairs)
            return
        prefix, shared = self._prefix([prompt for prompt, _ in pairs])
        width = self._width(longest)
        for at in range(0, len(pairs), _SORTED_AT_ONCE):
            window = range(at, min(at + _SORTED_AT_ONCE, len(pairs)))
            order = sorted(window, key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
            totals: dict[int, float] = {}
            for first in range(0, len(order), width):
                indices = order[first : first + width]
                texts = [[*pairs[i][0], *pairs[i][1][:-1]] for i in indices]
                keep = max(1, *(len(pairs[i][1]) for i in indices))
                _, logits = self._texts(prefix, shared, texts, keep)
                for i, rows in zip(indices, logits, strict=True):
                    targets = pairs[i][1]
                    totals[i] = log_likelihood(rows[len(rows) - len(targets) :], targets)
            yield from (totals[i] for i in window)

    def _score_stepwise(self, prompt: Sequence[int], continuation: Sequence[int]) -> float:
        """The continuation token by token, in the calls that would generate it."""
        batch, logits = self._texts(None, 0, [prompt], 1)
        total = 0.0
        for at, token in enumerate(continuation):
            total += log_likelihood(logits[0, -1:], [token])
            if at + 1 < len(continuation):
                logits = self._step(batch, np.array([token], np.int64))
        return total

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
        prefix, shared = self._prefix(heads)
        width = self._width(max(rows))
        for at in range(0, len(prompts), width):
            texts, wanted = prompts[at : at + width], rows[at : at + width]
            _, logits = self._texts(prefix, shared, texts, max(wanted))
            for row, n in zip(logits, wanted, strict=True):
                yield row[-n:]

    def time(self, prompt_tokens: int, new_tokens: int) -> Timing:
        """One stream: pseudo-random ids, and the most likely token each time."""
        check_fits([range(prompt_tokens)], new_tokens, self._context)
        prompt = np.random.default_rng(0).integers(0, self._vocab_size, prompt_tokens).tolist()
        marks = [time.perf_counter()]
        batch, logits = self._texts(None, 0, [prompt], 1)
        tokens = logits[:, -1].argmax(-1)
        marks.append(time.perf_counter())
        for _ in range(new_tokens - 1):
            tokens = self._step(batch, tokens)[:, -1].argmax(-1)
            marks.append(time.perf_counter())
        steps = [b - a for a, b in itertools.pairwise(marks)]
        return Timing(steps[0], steps[1:])

    def close(self) -> None:
        """Let go of the graph; the session is of no use afterwards."""
        self._session = None

    def _width(self, rows: int) -> int:
        """Sequences in one batch when each asks for so many rows of logits."""
        fit = _LOGITS_BYTES // (4 * self._vocab_size * max(1, rows))
        return max(1, min(self._parallel, fit))

    def _prefix(self, prompts: Sequence[Sequence[int]]) -> tuple[_Batch | None, int]:
        """What all prompts begin with, and its length."""
        shared = 0 if self._alone else common_prefix(prompts)
        if not shared:
            return None, 0
        batch = self._repeat(None, 0, [0])
        tokens = np.array([prompts[0][:shared]], np.int64)
        self._run(batch, tokens, np.ones_like(tokens), 1)
        return batch, shared

    def _repeat(self, prefix: _Batch | None, shared: int, missing: list[int]) -> _Batch:
        """A row for each of ``missing``: the prefix but for its last so many tokens.

        What is missing is padded in front, so that cache and text stand without a gap.
        """
        cache = {}
        for name, shape in self._past.items():
            rows = np.zeros((len(missing), shape[1], shared, shape[3]), np.float32)
            if prefix:
                whole = np.from_dlpack(prefix.cache[name])[0]
                for row, count in zip(rows, missing, strict=True):
                    row[:, count:] = whole[:, : shared - count]
            cache[name] = _value(rows)
        gone = np.array(missing, np.int64)
        mask = (np.arange(shared) >= gone[:, None]).astype(np.int64)
        return _Batch(cache, mask, shared - gone)

    def _texts(
        self, prefix: _Batch | None, shared: int, texts: Sequence[Sequence[int]], keep: int
    ) -> tuple[_Batch, Logits]:
        """Feed whole texts.

        Returns:
            The batch, and float32 logits [texts, keep, vocabulary], aligned to the right.
        """
        longest = max(map(len, texts)) - shared
        pads = [longest - (len(text) - shared) for text in texts]
        missing = [min(pad, shared) for pad in pads]  # computed again instead of padding
        batch = self._repeat(prefix, shared, missing)
        tokens = np.zeros((len(texts), longest), np.int64)
        mask = np.zeros((len(texts), longest), np.int64)
        for row, (text, pad, again) in enumerate(zip(texts, pads, missing, strict=True)):
            tokens[row, pad - again :] = text[shared - again :]
            mask[row, pad - again :] = 1
        return batch, self._run(batch, tokens, mask, keep)

    def _step(self, batch: _Batch, tokens: Ints) -> Logits:
        return self._run(batch, tokens[:, None], np.ones((len(tokens), 1), np.int64), 1)

    def _run(self, batch: _Batch, tokens: Ints, mask: Ints, keep: int) -> Logits:
        """One call of the graph; the batch grows by the tokens.

        Returns:
            float32 [rows, keep, vocabulary], of the last positions.
        """
        positions = np.maximum(batch.positions[:, None] + mask.cumsum(1) - 1, 0)
        batch.mask = np.concatenate([batch.mask, mask], 1)
        batch.positions = batch.positions + mask.sum(1)
        fed = {
            "input_ids": _value(tokens),
            "attention_mask": _value(batch.mask),
            "position_ids": _value(positions),
            **batch.cache,
        }
        if self._keeps and not self._alone:
            fed[_KEEP] = _value(np.array(keep, np.int64))
        binding = self._session.io_binding()
        for name, value in fed.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("logits", *(name.replace(_PAST, _PRESENT) for name in self._past)):
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        batch.cache = dict(zip(self._past, present, strict=True))
        kept: Logits = logits.numpy()[:, -keep:]
        return kept


def _value(array: NDArray[Any]) -> Any:
    """An OrtValue over the array's own memory."""
    # asarray: a scalar must stay one.
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))


def open_session(artifact: Path, *, threads: int, context: int, parallel: int) -> OnnxSession:
    """Open a folder with ``model.onnx``; arguments as for :func:`edgeft.runtimes.open_session`.

    Raises:
        UserError: there is no such file, onnxruntime does not open it, or it is not the graph of
            a language model with a key-value cache.
    """
    path = artifact / "model.onnx"
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_count(threads)
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's kinds have no base of their own
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path} does not open in onnxruntime: {reason}; export it again"
        ) from error
    names = {value.name for value in session.get_inputs()}
    needed = {"input_ids", "attention_mask", "position_ids", f"{_PAST}0.key"}
    if missing := needed - names:
        raise UserError(
            f"{path} is not a language model with a key-value cache: it takes no {min(missing)}"
        )
    return OnnxSession(session, context, parallel)
