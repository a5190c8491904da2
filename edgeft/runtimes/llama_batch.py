"""Sequences in one llama.cpp context that all continue one shared prefix, decoded in batches.

Each sequence has a stream of cells of its own (``kv_unified`` off), and no stream gets more than
``PIECE`` tokens in one batch. Then a sequence computes the same numbers whatever else is in the
batch: with unified cells the order in which attention adds up, and from 64 tokens on its kernel,
would follow the neighbours, and every second answer of a quantized model with them.

From 512 cells on one thing is left: where a token is computed without any other, llama.cpp cuts its
attention into a part a thread (and adds up in 16 bits), so some answers of long prompts do differ
from those of a batch of another size. ``benchmarks/score.py`` counts them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from edgeft.errors import UserError
from edgeft.runtimes.likelihood import Logits

MAX_SEQUENCES = 255  # llama.cpp's LLAMA_MAX_SEQ, less the one that keeps the prefix
PIECE = 63  # from 64 tokens of one stream on, llama.cpp's CPU attention takes another kernel
_BATCH = 512  # tokens in one call: as fast as more, and its activations stay small
_PAGE = 256  # llama.cpp rounds a stream's cells up to this


class Sequences:
    """``count`` sequences over one model; free with :meth:`close`.

    Fill a batch with :meth:`begin` and :meth:`feed` while :attr:`room` lasts, then :meth:`decode`.

    Args:
        model: a ``llama_model *``.
        prefix: token ids that every sequence begins with; computed once, here.
        count: how many sequences live at the same time.
        own: tokens that one sequence may hold behind the prefix.
        outputs: rows of logits that one batch may ask for.
        threads: CPU threads.
        adapter: a ``llama_adapter_lora *`` to apply; None: the model as it is.

    Raises:
        UserError: there is no memory for it, or the adapter is not taken.
    """

    def __init__(
        self,
        model: Any,
        prefix: Sequence[int],
        count: int,
        own: int,
        outputs: int,
        threads: int,
        adapter: Any = None,
    ) -> None:
        self.batch_size = max(_BATCH, count)
        settings = llama.llama_context_default_params()
        settings.n_seq_max = count + 1
        stream = -(-(len(prefix) + own) // _PAGE) * _PAGE
        settings.n_ctx = (count + 1) * stream
        settings.kv_unified = False
        settings.n_batch = settings.n_ubatch = self.batch_size
        settings.n_outputs_max = max(outputs, count + 1)
        settings.n_outputs_max_per_seq = 0
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama.llama_init_from_model(model, settings)
        if not self._context:
            raise UserError("llama.cpp cannot make a context: out of memory?")
        if adapter is not None:
            self._apply(adapter)
        self._memory = llama.llama_get_memory(self._context)
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._prefix_sequence, self._prefix = count, len(prefix)
        self._arrays()
        for at in range(0, len(prefix), PIECE):
            self.feed(count, at, prefix[at : at + PIECE], 0)
            self.decode()

    def _apply(self, adapter: Any) -> None:
        adapters = (llama.llama_adapter_lora_p_ctypes * 1)(adapter)
        code = llama.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0))
        if code:
            self.close()
            raise UserError(f"llama.cpp does not apply the adapter (code {code})")

    def _arrays(self) -> None:
        size = self.batch_size
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._sequence_counts = np.ones(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        self._sequence_pointers = self._sequences.ctypes.data + 4 * np.arange(size, dtype=np.uintp)
        self._wanted = np.zeros(size, np.int8)
        self._batch = llama.llama_batch()
        self._batch.token = _pointer(self._tokens, ctypes.c_int32)
        self._batch.pos = _pointer(self._positions, ctypes.c_int32)
        self._batch.n_seq_id = _pointer(self._sequence_counts, ctypes.c_int32)
        self._batch.seq_id = _pointer(self._sequence_pointers, ctypes.POINTER(ctypes.c_int32))
        self._batch.logits = _pointer(self._wanted, ctypes.c_int8)
        self._used = 0
        self._view: tuple[int | None, Logits] = (None, np.empty((0, 0), np.float32))

    @property
    def room(self) -> int:
        """Tokens that the batch still takes."""
        return self.batch_size - self._used

    def begin(self, sequence: int) -> None:
        """Make ``sequence`` the prefix alone. None of its tokens may wait in the batch."""
        llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        if self._prefix:
            llama.llama_memory_seq_cp(self._memory, self._prefix_sequence, sequence, -1, -1)

    def feed(self, sequence: int, position: int, tokens: Sequence[int], wanted: int) -> None:
        """Put tokens into the batch, and ask for logits after the last ``wanted`` of them."""
        here = slice(self._used, self._used + len(tokens))
        self._tokens[here] = tokens
        self._positions[here] = np.arange(position, position + len(tokens))
        self._sequences[here] = sequence
        self._wanted[here] = 0
        self._wanted[here.stop - wanted : here.stop] = 1
        self._used = here.stop

    def decode(self) -> Logits:
        """Run the batch and empty it.

        Returns:
            float32 [wanted tokens, vocabulary], in the order fed; a view until the next call.
        """
        self._batch.n_tokens = self._used
        rows = int(self._wanted[: self._used].sum())
        self._used = 0
        code = llama.llama_decode(self._context, self._batch)
        if code:
            raise UserError(f"llama.cpp could not compute a batch (code {code})")
        if not rows:
            llama.llama_synchronize(self._context)
            return np.empty((0, self._vocab), np.float32)
        return self._logits(rows)

    def again(self, position: int, token: int) -> None:
        """Compute one token where the last batch was one token of the same sequence.

        Nothing but llama.cpp works meanwhile, so that it can be timed.
        """
        self._tokens[0], self._positions[0] = token, position
        code = llama.llama_decode(self._context, self._batch)
        llama.llama_synchronize(self._context)
        if code:
            raise UserError(f"llama.cpp could not compute a batch (code {code})")

    def _logits(self, rows: int) -> Logits:
        """A view of llama.cpp's memory, made anew only where that has moved: it takes a while."""
        pointer = llama.llama_get_logits(self._context)
        place = ctypes.cast(pointer, ctypes.c_void_p).value
        if (place, rows) != (self._view[0], len(self._view[1])):
            self._view = place, np.ctypeslib.as_array(pointer, (rows, self._vocab))
        return self._view[1]

    def close(self) -> None:
        llama.llama_free(self._context)


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
