"""A tiny random Llama, questions it can learn, and what two trainings have in common."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.prompts import Item
from edgeft.train.batches import IGNORED
from edgeft.train.record import rows
from edgeft.train.settings import TrainSettings

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
FACTS = {"task": "wordmath", "stop": [2], "max_new_tokens": 8}
SETTINGS = TrainSettings(epochs=2, batch_size=4, rank=4, alpha=8, lr=1e-2, checkpoint_steps=3)


def llama(tied: bool = True) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))


def items(count: int, seed: int) -> list[Item]:
    """Questions whose solution counts from 10, however far: something to learn."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        prompt = [1, 7, 7, *(draw.randrange(3, 97) for _ in range(draw.randrange(3, 14)))]
        gold = [*range(10, 10 + draw.randrange(1, 7)), 2]
        made.append(Item(f"q{i}", "", "", prompt, gold, str(gold[-2])))
    return made


def silent(event: str, **fields: Any) -> None:
    pass


def curve(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(out / "log.jsonl") if "loss" in row]


def plain(model: Any, questions: list[Item]) -> tuple[float, int]:
    """The loss as transformers computes it itself, one question at a time, from every logit."""
    total, tokens = 0.0, 0
    for item in questions:
        ids = torch.tensor([[*item.prompt, *item.gold]])
        labels = ids.clone()
        labels[:, : len(item.prompt)] = IGNORED
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        total, tokens = total + float(loss) * len(item.gold), tokens + len(item.gold)
    return total, tokens


def same_adapter(one: Path, two: Path) -> bool:
    a, b = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_same(whole: Path, again: Path) -> None:
    names = ("step", "steps", "loss", "lr", "tokens", "heldout_loss")
    logs = [
        [{name: row.get(name) for name in names} for row in rows(out / "log.jsonl")]
        for out in (whole, again)
    ]
    assert logs[0] == logs[1]
    assert same_adapter(whole, again)
