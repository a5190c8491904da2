"""transformers on the host: the full-precision reference that every other runtime is held against."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from edgeft.errors import UserError
from edgeft.runtimes import Completion, Timing, check_fits, common_prefix, thread_count

try:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
except ImportError as error:
    raise UserError(
        f"transformers is not installed ({error}): pip install 'edgeft[train]'"
    ) from error

_LOGITS_BYTES = 96 * 2**20  # of one batch


class TransformersSession:
    """One model folder in float32; see :class:`edgeft.runtimes.Session`.

    The prompts' common prefix is computed once and every batch continues it. Rows are padded on the
    left, between prefix and prompt, where attention does not look.
    """

    def __init__(self, model: Any, context: int, parallel: int) -> None:
        self.model, self._context, self._parallel = model, context, parallel
        self._vocab: int = model.config.get_text_config().vocab_size

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Set[int]
    ) -> Iterator[Completion]:
        """Greedy continuations, batch by batch of similar length, as they finish."""
        if not prompts:
            return
        check_fits(prompts, max_new_tokens, self._context)
        prefix = self._prefix(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for at in range(0, len(order), self._parallel):
            rows = order[at : at + self._parallel]
            yield from self._batch(rows, [prompts[i] for i in rows], prefix, max_new_tokens, stop)

    def _batch(
        self,
        rows: list[int],
        prompts: list[Sequence[int]],
        prefix: tuple[int, Any],
        max_new_tokens: int,
        stop: Set[int],
    ) -> Iterator[Completion]:
        start = time.perf_counter()
        new: dict[int, list[int]] = {row: [] for row in rows}
        ids, mask, cache = self._begin(prompts, prefix)
        while rows:
            token = self._forward(ids, mask, cache, 1)[:, -1].argmax(-1)
            alive = []
            for place, (row, id_) in enumerate(zip(rows, token.tolist(), strict=True)):
                if id_ not in stop:
                    new[row].append(id_)
                    if len(new[row]) < max_new_tokens:
                        alive.append(place)
                        continue
                finish = "stop" if id_ in stop else "length"
                yield Completion(row, new[row], finish, time.perf_counter() - start)
            if len(alive) < len(rows):  # finished rows leave the batch
                rows = [rows[place] for place in alive]
                kept = torch.tensor(alive, dtype=torch.int64, device=ids.device)
                token, mask = token[kept], mask[kept]
                if rows:
                    cache.batch_select_indices(kept)
            ids = token[:, None]
            mask = torch.cat([mask, mask.new_ones((len(rows), 1))], dim=1)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[float]:
        """sum log p(continuation | prompt) in nats, in order."""
        if not pairs:
            return
        longest = max(len(continuation) for _, continuation in pairs)
        check_fits([prompt for prompt, _ in pairs], longest, self._context)
        prefix = self._prefix([prompt for prompt, _ in pairs])
        size = self._rows(longest)
        for at in range(0, len(pairs), size):
            part = pairs[at : at + size]
            keep = max(len(continuation) for _, continuation in part)
            logits = self._forward(
                *self._begin([[*p, *c[:-1]] for p, c in part], prefix), keep
            )
            for row, (_, continuation) in zip(logits, part, strict=True):
                here = row[keep - len(continuation) :].log_softmax(-1)
                targets = torch.tensor(continuation, device=here.device)
                yield float(here.gather(1, targets[:, None]).sum(dtype=torch.float64))

    def logits(self, prompts: Sequence[Sequence[int]]) -> Iterator[Any]:
        """Next-token logits behind the common prefix.

        Yields:
            For each prompt, in order, float32 [len(prompt) - common prefix, vocabulary].
        """
        if not prompts:
            return
        check_fits(prompts, 0, self._context)
        prefix = self._prefix(prompts)
        size = self._rows(max(map(len, prompts)) - prefix[0])
        for at in range(0, len(prompts), size):
            part = prompts[at : at + size]
            keep = max(map(len, part)) - prefix[0]
            logits = self._forward(*self._begin(part, prefix), keep)
            for row, prompt in zip(logits, part, strict=True):
                yield row[keep - len(prompt) + prefix[0] :].cpu().numpy()

    def time(self, prompt_tokens: int, new_tokens: int) -> Timing:
        """One stream: pseudo-random ids, and the most likely token."""
        check_fits([range(prompt_tokens)], new_tokens, self._context)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self._vocab, (1, prompt_tokens), generator=generator)
        ids, cache, seconds = ids.to(self.model.device), DynamicCache(), []
        for _ in range(new_tokens):
            start = time.perf_counter()
            with torch.inference_mode():
                logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            ids.tolist()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
        return Timing(seconds[0], seconds[1:])

    def close(self) -> None:
        """Drop the model."""
        del self.model

    def _rows(self, positions: int) -> int:
        fit = _LOGITS_BYTES // (4 * self._vocab * max(positions, 1))
        return max(1, min(self._parallel, fit))

    def _prefix(self, prompts: Sequence[Sequence[int]]) -> tuple[int, Any]:
        """Length of the common prefix, and its keys and values for one row."""
        shared, cache = common_prefix(prompts), DynamicCache()
        if shared:
            ids = torch.tensor([prompts[0][:shared]], device=self.model.device)
            with torch.inference_mode():
                self.model(ids, past_key_values=cache, logits_to_keep=1)
        return shared, cache

    def _begin(
        self, texts: Sequence[Sequence[int]], prefix: tuple[int, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Ids behind the prefix padded on the left, the mask with the prefix, a cache of rows."""
        shared, one = prefix
        longest = max(map(len, texts)) - shared
        ids = torch.zeros((len(texts), longest), dtype=torch.int64)
        mask = torch.ones((len(texts), shared + longest), dtype=torch.int64)
        for row, text in enumerate(texts):
            pad = longest - len(text) + shared
            ids[row, pad:] = torch.tensor(text[shared:])
            mask[row, shared : shared + pad] = 0
        cache = DynamicCache()
        for number, layer in enumerate(one.layers if shared else []):
            expand = (len(texts), -1, -1, -1)
            cache.update(layer.keys.expand(expand), layer.values.expand(expand), number)
        device = self.model.device
        return ids.to(device), mask.to(device), cache

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, keep: int) -> torch.Tensor:
        """Float32 logits [rows, keep, vocabulary] of the last ``keep`` positions."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.inference_mode():
            logits: torch.Tensor = self.model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=keep,
            ).logits
        return logits


def open_session(
    artifact: Path, *, threads: int, context: int, parallel: int
) -> TransformersSession:
    """Open a model folder; the arguments are those of :func:`edgeft.runtimes.open_session`.

    Raises:
        UserError: the folder does not load.
    """
    torch.set_num_threads(thread_count(threads))
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            artifact, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{artifact} does not load: {str(error).splitlines()[0]}") from error
    return TransformersSession(model.to(device).eval(), context, parallel)
