"""transformers in float32: the host's reference, on CPU or CUDA."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Iterator, Sequence, Set
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
    import torch
    import transformers
except ImportError as error:
    raise UserError(
        f"transformers is not installed ({error}): pip install 'edgeft[train]'"
    ) from error

_LOGITS_BYTES = 64 * 2**20  # of one batch
_SORTED_AT_ONCE = 64  # score: pairs sorted by length within so many, so that results still flow


class TransformersSession:
    """One Hugging Face folder; see :class:`edgeft.runtimes.Session`.

    The prompts' common prefix is computed once and its cache copied. What follows is padded on the
    left and masked, with true positions, so a row computes what it would compute alone.
    """

    def __init__(self, model: Any, context: int, parallel: int) -> None:
        self.model = model
        self._context = context
        # A recurrent state can neither skip padding nor go on from a prefix in every model.
        layers = transformers.DynamicCache(config=model.config).layers
        self._recurrent = not all(hasattr(layer, "batch_repeat_interleave") for layer in layers)
        # A window counts places, and so would the padding between the prefix and a shorter row.
        windows = [x.sliding_window for x in layers if getattr(x, "is_sliding", False)]
        self._shares = not self._recurrent and context <= min(windows, default=context)
        self._parallel = 1 if self._recurrent else max(1, parallel)
        self._vocab_size: int = model.get_output_embeddings().weight.shape[0]

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Set[int]
    ) -> Iterator[Completion]:
        """Greedy continuations, as they finish; finished ones leave the batch."""
        if not prompts:
            return
        check_fits(prompts, max_new_tokens, self._context)
        shared, prefix = self._prefix(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for at in range(0, len(order), self._parallel):
            batch = order[at : at + self._parallel]
            yield from self._generate(
                prefix, shared, batch, [prompts[i] for i in batch], max_new_tokens, stop
            )

    def _generate(
        self,
        prefix: Any,
        shared: int,
        indices: list[int],
        prompts: list[Sequence[int]],
        max_new_tokens: int,
        stop: Set[int],
    ) -> Iterator[Completion]:
        start = time.perf_counter()
        cache = self._copies(prefix, len(prompts))
        logits, mask, positions = self._suffixes(cache, prompts, shared, 1)
        positions = positions[:, -1:]
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
                kept = torch.tensor(stay, device=self.model.device)
                cache.batch_select_indices(kept)
                tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
                rows = [rows[row] for row in stay]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            positions = positions + 1
            logits = self._run(tokens[:, None], mask, positions, cache, 1)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[float]:
        """sum log p(continuation | prompt) in nats, in order."""
        if not pairs:
            return
        check_fits([prompt for prompt, _ in pairs], max(len(c) for _, c in pairs), self._context)
        shared, prefix = self._prefix([prompt for prompt, _ in pairs])
        longest = max(len(continuation) for _, continuation in pairs)
        width = self._width(longest)
        for at in range(0, len(pairs), _SORTED_AT_ONCE):
            window = range(at, min(at + _SORTED_AT_ONCE, len(pairs)))
            order = sorted(window, key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
            totals: dict[int, float] = {}
            for first in range(0, len(order), width):
                batch = order[first : first + width]
                totals |= self._score(prefix, shared, batch, [pairs[i] for i in batch])
            yield from (totals[i] for i in window)

    def _score(
        self,
        prefix: Any,
        shared: int,
        indices: list[int],
        pairs: list[tuple[Sequence[int], Sequence[int]]],
    ) -> dict[int, float]:
        texts = [[*prompt, *continuation[:-1]] for prompt, continuation in pairs]
        keep = max(len(continuation) for _, continuation in pairs)
        logits, _, _ = self._suffixes(self._copies(prefix, len(pairs)), texts, shared, keep)
        totals: dict[int, float] = {}
        for index, row, (_, continuation) in zip(indices, logits, pairs, strict=True):
            if not continuation:
                totals[index] = 0.0
                continue
            targets = torch.tensor(continuation, device=row.device)
            row = row[-len(continuation) :].log_softmax(-1)
            totals[index] = row.gather(1, targets[:, None]).sum(dtype=torch.float64).item()
        return totals

    def logits(
        self, prompts: Sequence[Sequence[int]], last: Sequence[int] | None = None
    ) -> Iterator[Any]:
        """Next-token logits behind the common prefix, or of the ``last`` so many tokens of each.

        Yields:
            For each prompt, in order, a numpy float32 [len(prompt) - common prefix, vocabulary].
        """
        if not prompts:
            return
        check_fits(prompts, 0, self._context)
        heads, rows = wanted_rows(prompts, last)
        shared, prefix = self._prefix(heads)
        width = self._width(max(rows))
        for at in range(0, len(prompts), width):
            batch, wanted = prompts[at : at + width], rows[at : at + width]
            cache = self._copies(prefix, len(batch))
            logits, _, _ = self._suffixes(cache, batch, shared, max(wanted))
            for row, n in zip(logits, wanted, strict=True):
                yield row[-n:].cpu().numpy()

    def time(self, prompt_tokens: int, new_tokens: int) -> Timing:
        """One stream: pseudo-random ids, and the most likely token each time."""
        check_fits([range(prompt_tokens)], new_tokens, self._context)
        random = torch.Generator().manual_seed(0)
        prompt = torch.randint(self._vocab_size, (prompt_tokens,), generator=random).tolist()
        marks = [time.perf_counter()]
        cache = self._copies(None, 1)
        logits, mask, positions = self._suffixes(cache, [prompt], 0, 1)
        positions = positions[:, -1:]
        for _ in range(new_tokens - 1):
            token = logits[:, -1].argmax(-1)
            token.item()  # waits for the device
            marks.append(time.perf_counter())
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            positions = positions + 1
            logits = self._run(token[:, None], mask, positions, cache, 1)
        logits[:, -1].argmax(-1).item()
        marks.append(time.perf_counter())
        steps = [b - a for a, b in itertools.pairwise(marks)]
        return Timing(steps[0], steps[1:])

    def close(self) -> None:
        """Let go of the model; the session is of no use afterwards."""
        self.model = None

    def _width(self, rows: int) -> int:
        """Sequences in one batch when each asks for so many rows of logits."""
        fit = _LOGITS_BYTES // (4 * self._vocab_size * max(1, rows))
        return max(1, min(self._parallel, fit))

    def _prefix(self, prompts: Sequence[Sequence[int]]) -> tuple[int, Any]:
        """Length and cache of what all prompts begin with, as far as it can be shared."""
        shared = common_prefix(prompts) if self._shares else 0
        if not shared:
            return 0, None
        cache = self._copies(None, 1)
        self._suffixes(cache, [prompts[0][:shared]], 0, 1)
        return shared, cache

    def _copies(self, prefix: Any, count: int) -> Any:
        if prefix is None:
            return transformers.DynamicCache(config=self.model.config)
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(count)
        return cache

    def _suffixes(
        self, cache: Any, texts: Sequence[Sequence[int]], shared: int, keep: int
    ) -> tuple[Any, Any, Any]:
        """Logits [texts, keep, vocabulary], mask [texts, shared + longest], positions."""
        longest = max(map(len, texts)) - shared
        tokens, mask, positions = [], [], []
        for text in texts:
            pad = longest - (len(text) - shared)
            tokens.append([0] * pad + list(text[shared:]))
            mask.append([1] * shared + [0] * pad + [1] * (len(text) - shared))
            positions.append([0] * pad + list(range(shared, len(text))))
        put = [torch.tensor(rows, device=self.model.device) for rows in (tokens, mask, positions)]
        return self._run(put[0], put[1], put[2], cache, keep), put[1], put[2]

    def _run(self, tokens: Any, mask: Any, positions: Any, cache: Any, keep: int) -> Any:
        with torch.inference_mode():
            return self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits.float()


def open_session(
    artifact: Path, *, threads: int, context: int, parallel: int
) -> TransformersSession:
    """Open a model folder; the arguments are those of :func:`edgeft.runtimes.open_session`.

    Args:
        artifact: the folder, or a JSON file that names a ``base`` and the PEFT ``adapter`` to put on
            it unmerged, the ``kind`` of base and ``dtype``, as :mod:`edgeft.exporters.merge` has
            them.

    Raises:
        UserError: the folder holds no causal language model that transformers opens.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(thread_count(threads))
    torch.set_float32_matmul_precision("highest")  # no TF32: this is the reference
    try:
        if artifact.suffix == ".json":
            model = _adapted(json.loads(artifact.read_text()))
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                artifact, dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{artifact} does not open in transformers: {reason}") from error
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return TransformersSession(model, context, parallel)


def _adapted(named: dict[str, str]) -> Any:
    from peft import PeftModel

    from edgeft.exporters.merge import base_model

    base = base_model(Path(named["base"]), named["kind"], named["dtype"])
    return PeftModel.from_pretrained(base, named["adapter"]).get_base_model()
