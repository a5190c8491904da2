"""The faster pieces compute what they replace: losses, gradients, answers, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from train_runs import SHAPE, items

from edgeft.prompts import Item
from edgeft.train.batches import collate, completion_loss
from edgeft.train.fast import quicken
from edgeft.train.kernels import CausalAttention, CrossEntropy, GatedSilu, RmsNorm

FAMILIES = {
    "Llama": {},
    "Qwen2": {"head_dim": 8},
    "Qwen3": {},
    "Gemma3": {"query_pre_attn_scalar": 8, "sliding_window": 16},
}
Make = Callable[..., Any]


def build(family: str, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """The same random model and adapter at every call."""
    torch.manual_seed(0)
    architecture = getattr(transformers, f"{family}ForCausalLM")
    config_class = transformers.Gemma3TextConfig if family == "Gemma3" else None
    config = (config_class or architecture.config_class)(**{**SHAPE, **FAMILIES[family]})
    model = architecture._from_config(config, attn_implementation="sdpa").to(dtype)
    settings = {"target_modules": "all-linear", "init_lora_weights": False, "r": 4, **lora}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


def loss_and_gradients(model: Any, questions: list[Item], bf16: bool) -> tuple[float, torch.Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        total, count = completion_loss(model, collate(questions, pad=2))
    (total / count).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return float(total.detach() / count), torch.cat(gradients)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"lora_dropout": 0.5}, {"r": 3}])
def test_loss_and_gradients_stay(family: str, lora: dict[str, Any]) -> None:
    questions = items(7, 3)
    plain, quick = build(family, **lora), build(family, **lora)
    quicken(quick)
    results = []
    for model in (plain, quick):
        torch.manual_seed(1)  # dropout
        results.append(loss_and_gradients(model, questions, bf16=False))
    (loss, gradients), (quick_loss, quick_gradients) = results
    assert quick_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(quick_gradients, gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_in_bfloat16_they_are_as_close_to_float32_as_the_plain_ones(family: str) -> None:
    questions = items(7, 3)
    _, exact = loss_and_gradients(build(family), questions, bf16=False)
    errors = []
    for quick in (False, True):
        model = build(family, torch.bfloat16)
        if quick:
            quicken(model)
        _, found = loss_and_gradients(model, questions, bf16=True)
        errors.append(float((found - exact).norm() / exact.norm()))
    plain, ours = errors
    assert ours < 0.1 and ours < 1.2 * plain


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_parameters_in_bfloat16_products(family: str) -> None:
    questions, found = items(7, 3), []
    for quick, bf16 in [(False, False), (False, True), (True, True)]:
        model = build(family).unload()
        model.requires_grad_(True)
        if quick:
            quicken(model)
        found.append(loss_and_gradients(model, questions, bf16))
    (_, exact), (loss, plain), (quick_loss, ours) = found
    assert quick_loss == pytest.approx(loss, rel=5e-3)
    assert (ours - exact).norm() < 1.2 * (plain - exact).norm() < 0.1 * exact.norm()


def test_a_trained_bias_of_the_base_keeps_its_gradient() -> None:
    questions, found = items(7, 3), []
    for quick in (False, True):
        model = build("Qwen2", bias="lora_only")
        if quick:
            quicken(model)
        found.append(loss_and_gradients(model, questions, bf16=False)[1])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("full", [True, False])
def test_all_parameters_can_be_trained(full: bool) -> None:
    questions, results = items(5, 4), []
    for quick in (False, True):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
        model.requires_grad_(full)
        model.model.norm.weight.requires_grad_(True)
        if quick:
            quicken(model)
        results.append(loss_and_gradients(model, questions, bf16=False))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_the_pieces_are_really_in_use() -> None:
    model = build("Llama")
    quicken(model)
    total, _ = completion_loss(model, collate(items(5, 4), pad=2))
    seen, todo = set(), [total.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    names = {type(node).__name__ for node in seen}
    ours = {"LoraLinear", "RmsNorm", "GatedSilu", "CausalAttention"}
    assert {f"{name}Backward" for name in ours} <= names


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_stay(family: str) -> None:
    plain, quick = build(family).eval(), build(family).eval()
    quicken(quick)
    ids = torch.tensor([[0, 0, 1, 7, 9, 11, 30], [1, 7, 3, 4, 5, 6, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    one, two = (m.generate(input_ids=ids, attention_mask=mask, **options) for m in (plain, quick))
    assert one.tolist() == two.tolist()


@pytest.mark.parametrize("length", [2, 17, 33])
def test_attention_gradients_by_numbers(length: int) -> None:
    torch.manual_seed(length)
    shapes = [(2, 6, length, 8), (2, 2, length, 8), (2, 2, length, 8)]
    tensors = [torch.randn(shape, dtype=torch.float32, requires_grad=True) for shape in shapes]
    weights = torch.randn(shapes[0])
    out = CausalAttention.apply(*tensors, 0.3)
    ours = torch.autograd.grad((out * weights).sum(), tensors)
    query, key, value = tensors
    key, value = (t.repeat_interleave(3, dim=1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2)) * 0.3
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    plain = scores.softmax(-1) @ value
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((plain * weights).sum(), tensors)
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_norm_and_activation_gradients_by_numbers() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    up = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GatedSilu.apply, (x, up))
    wide, weight = (
        torch.randn(4, 16).requires_grad_(),
        torch.randn(16).requires_grad_(),
    )
    found = torch.autograd.grad(RmsNorm.apply(wide, weight, 1e-5).sin().sum(), (wide, weight))
    plain = torch.nn.functional.rms_norm(wide, (16,), weight, 1e-5)
    for one, two in zip(found, torch.autograd.grad(plain.sin().sum(), (wide, weight)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("count", "vocabulary"), [(1, 97), (37, 97), (29, 120_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_cross_entropy(count: int, vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(count, vocabulary)).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (count,))
    found = CrossEntropy.apply(logits, targets)
    (slope,) = torch.autograd.grad(3 * found, logits)
    plain = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    (expected,) = torch.autograd.grad(3 * plain, logits)
    assert found.dtype == torch.float32 and slope.dtype == dtype
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        slope, expected, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-5
    )


def test_what_is_saved_is_as_before(tmp_path: Path) -> None:
    from safetensors import safe_open

    names = []
    for quick in (False, True):
        model = build("Llama")
        if quick:
            quicken(model)
        model.save_pretrained(tmp_path / str(quick))
        with safe_open(tmp_path / str(quick) / "adapter_model.safetensors", "pt") as tensors:
            names.append(sorted(tensors.keys()))
    assert names[0] == names[1]
    whole = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    quicken(whole)
    whole.save_pretrained(tmp_path / "whole")
    assert "sdpa_short" not in json.dumps((tmp_path / "whole" / "config.json").read_text())
