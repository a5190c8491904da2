"""The loss over a batch is the plain one, and batches hold questions of similar length."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from train_runs import SHAPE, items, llama, plain
from transformers import Gemma2Config, Gemma2ForCausalLM

from edgeft.train.batches import SortedBatches, collate, completion_loss
from edgeft.train.heldout import heldout_loss


def gemma() -> Any:
    torch.manual_seed(0)
    settings = {**SHAPE, "final_logit_softcapping": 2.0, "sliding_window": 8}
    return Gemma2ForCausalLM(Gemma2Config(**settings))


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("make", [llama, lambda: llama(tied=False), gemma])
def test_the_loss_is_the_plain_one(make: Callable[[], Any], peft: bool) -> None:
    model, questions = make().eval(), items(9, 3)
    if peft:
        from peft import LoraConfig, get_peft_model

        # init_lora_weights=False: an adapter that does something.
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config).eval()
    assert len({len(item.prompt) + len(item.gold) for item in questions}) > 3  # there is padding
    total, tokens = plain(model, questions)
    loss, count = completion_loss(model, collate(questions, pad=2))
    assert count == tokens
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert heldout_loss(model, questions, pad=5) == pytest.approx(total / tokens, rel=1e-5)


def test_the_head_runs_at_gold_tokens_only() -> None:
    model, questions = llama(), items(6, 4)
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape))
    completion_loss(model, collate(questions, pad=2))
    assert seen == [(sum(len(item.gold) for item in questions), SHAPE["vocab_size"])]


def test_gradients_are_the_plain_ones() -> None:
    questions, grads = items(6, 5), []
    for ours in (True, False):
        model = llama()
        batch = collate(questions, pad=2)
        if ours:
            total, count = completion_loss(model, batch)
            (total / count).backward()
        else:
            mask = torch.arange(batch["input_ids"].shape[1]) < batch["lengths"][:, None]
            model(
                input_ids=batch["input_ids"], attention_mask=mask.long(), labels=batch["labels"]
            ).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_batches_are_of_similar_length_and_change_with_the_epoch() -> None:
    lengths = [random.Random(i).randrange(5, 50) for i in range(43)]
    sampler = SortedBatches(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(43)) and first == list(sampler)
    spans = sorted(
        (min(part), max(part))
        for part in ([lengths[i] for i in first[at : at + 8]] for at in range(0, 43, 8))
    )
    assert all(high <= low for (_, high), (low, _) in pairwise(spans))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(SortedBatches(lengths, 8, seed=4)) != first
