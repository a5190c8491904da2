"""Batches of similar length, with logits only where the loss needs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from edgeft.prompts import Item
from edgeft.train.kernels import CrossEntropy

IGNORED = -100  # the label, as transformers has it, of a token without a loss


def length(item: Item) -> int:
    """Tokens of prompt and solution together."""
    return len(item.prompt) + len(item.gold)


class SortedBatches(Sampler[int]):  # type: ignore[misc]
    """Indices such that every ``batch_size`` in a row have similar lengths.

    The batches' order, and who of equal length goes with whom, is shuffled by seed and epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch's (accelerate calls it)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        ordered = sorted(shuffled, key=lambda i: self.lengths[i])
        # A smaller last batch stays last: whoever cuts the stream into batches cuts it as we did.
        whole = len(ordered) // self.batch_size
        for batch in torch.randperm(whole, generator=generator).tolist():
            yield from ordered[batch * self.batch_size : (batch + 1) * self.batch_size]
        yield from ordered[whole * self.batch_size :]


def collate(items: Sequence[Item], pad: int) -> dict[str, torch.Tensor]:
    """One batch, padded on the right.

    There is no attention mask: in a causal model nothing that counts sees what is on its right,
    and attention without a mask has the faster kernels.

    Returns:
        ``input_ids`` int64 [n, length]; ``labels`` int64 [n, length], as transformers has them:
        the same ids, -100 but at gold tokens; ``lengths`` int64 [n].
    """
    shape = (len(items), max(map(length, items)))
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    for row, item in enumerate(items):
        ids[row, : length(item)] = torch.tensor([*item.prompt, *item.gold])
        labels[row, len(item.prompt) : length(item)] = torch.tensor(item.gold)
    lengths = torch.tensor([length(item) for item in items])
    return {"input_ids": ids, "labels": labels, "lengths": lengths}


def completion_loss(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Sum of -log p over the gold tokens in nats (float32), and how many there are.

    The model's head runs at the positions that predict a gold token and nowhere else.
    """
    targets = batch["labels"][:, 1:]
    gold = targets != IGNORED
    predicts = torch.nn.functional.pad(gold, (0, 1))
    logits = model(
        input_ids=batch["input_ids"], logits_to_keep=predicts, use_cache=False
    ).logits  # [gold tokens, vocabulary]
    if logits.dim() == 3:  # a model that does not know logits_to_keep
        logits = logits[predicts]
    return CrossEntropy.apply(logits, targets[gold]), len(logits)
