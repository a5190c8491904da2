"""Questions that are not trained on, looked at while training goes on: loss and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from edgeft.prompts import Item, own_answer, read_items
from edgeft.tasks import grading
from edgeft.train.batches import collate, completion_loss, length

_BATCH = 16
# Answered at once: a growing cache leaves memory in pieces, more than training itself needs.
_ANSWERED = 8


@dataclass(frozen=True)
class Heldout:
    """The questions, and what it takes to answer the first ones.

    Attributes:
        answered: how many are answered; 0: none.
        stop: ids that end an answer.
        decode: token ids to text.
        read: the answer in a text, given the gold one.
        pad: any id; nothing sees it.
    """

    items: list[Item]
    answered: int
    max_new_tokens: int
    stop: frozenset[int]
    decode: Callable[[list[int]], str]
    read: grading.Read
    pad: int = 0


def read_heldout(data: Path, answered: int, facts: dict[str, Any]) -> Heldout:
    """What the stage before left in ``data``; ``facts``: as :func:`edgeft.train.train` has them."""
    items = read_items(data / "heldout.jsonl")
    decode = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json")).decode
    return Heldout(
        items,
        min(answered, len(items)),
        facts["max_new_tokens"],
        frozenset(facts["stop"]),
        decode,
        grading.reader(facts["task"], facts.get("pattern")),
    )


def heldout_loss(model: Any, items: Sequence[Item], pad: int) -> float:
    """Mean nats a gold token; the model is left in the mode it was in."""
    training = model.training
    model.eval()
    ordered = sorted(items, key=length)
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for at in range(0, len(ordered), _BATCH):
            batch = collate(ordered[at : at + _BATCH], pad)
            loss, n = completion_loss(model, {k: v.to(model.device) for k, v in batch.items()})
            total, tokens = total + float(loss), tokens + n
    model.train(training)
    return total / tokens


def heldout_accuracy(model: Any, held: Heldout) -> float | None:
    """Share of the answered questions that greedy decoding gets right; None where none is.

    The model is left in the mode it was in.
    """
    from edgeft.runtimes.transformers import TransformersSession

    asked = held.items[: held.answered]
    if not asked:
        return None
    training = model.training
    model.eval()
    context = max(len(item.prompt) for item in asked) + held.max_new_tokens
    session = TransformersSession(model, context, _ANSWERED)
    prompts = [item.prompt for item in asked]
    right = 0
    for done in session.generate(prompts, held.max_new_tokens, held.stop):
        gold = asked[done.index].answer
        found = held.read(own_answer(held.decode(done.tokens)), gold)
        right += grading.same(found.answer, gold)
    model.train(training)
    return right / len(asked)
