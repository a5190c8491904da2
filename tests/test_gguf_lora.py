"""The adapter beside the base: llama.cpp computes what the merged model does, or says why not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeft import catalog, prompts, recipe
from edgeft.errors import UserError
from edgeft.exporters import check_supported, gguf, gguf_lora, merge
from edgeft.runtimes import llama_cpp
from edgeft.tasks import Question

PROMPTS = [[1, 50 + i, *range(300 + i, 340 + i)] for i in range(6)]
Session = llama_cpp.LlamaSession


def make_adapter(base: Path, out: Path, **config: Any) -> Path:
    """A LoRA as PEFT saves it, far enough from zero to matter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "init_lora_weights": False}
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(**{**settings, **config})).save_pretrained(out)
    return out


def with_adapter(base_gguf: Path, adapter: Path, base: Path, out: Path) -> Path:
    """A bundle's folder of both."""
    out.mkdir()
    (out / "model.gguf").hardlink_to(base_gguf)
    gguf_lora.convert(adapter, base, out / "adapter.gguf")
    return out


def opened(artifact: Path, parallel: int = 4) -> Session:
    return llama_cpp.open_session(artifact, threads=1, context=96, parallel=parallel)


def logits(artifact: Path) -> np.ndarray:
    session = opened(artifact)
    found = np.concatenate(list(session.logits(PROMPTS)))
    session.close()
    return found


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean KL(ours || theirs), nats."""
    p, q = (rows - np.log(np.exp(rows).sum(-1, keepdims=True)) for rows in (ours, theirs))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def tiny_gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "base.gguf"
    gguf.convert(tiny, out, "tiny")
    return out


@pytest.fixture(scope="module")
def folder(
    tiny: Path, tiny_gguf: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return with_adapter(tiny_gguf, adapter, tiny, tmp_path_factory.mktemp("lora") / "model")


def merged(base: Path, adapter: Path, out: Path) -> Path:
    """The merged model in 16 bits, the way it is exported otherwise."""
    question = Question("0", "How many?", "1", "1")
    out.mkdir()
    prompts.encode(base, {"heldout": [question]}, out)
    merge.merge(base, adapter, out / "heldout.jsonl", out / "merged")
    gguf.convert(out / "merged", out / "merged.gguf", "merged")
    return out / "merged.gguf"


@pytest.fixture(scope="module")
def tuned_gguf(tiny: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merged(tiny, adapter, tmp_path_factory.mktemp("tuned") / "model")


FAMILIES: list[Any] = [
    (
        "Llama",
        "smollm",
        {},
        {"use_rslora": True, "alpha_pattern": {"layers.0.self_attn.q_proj": 9}},
    ),
    pytest.param(
        "Llama",
        "llama-bpe",
        {"tie_word_embeddings": False},
        {"target_modules": ["q_proj", "k_proj", "lm_head"], "rank_pattern": {"k_proj": 7}},
        marks=pytest.mark.slow,
    ),
    pytest.param("Qwen2", "qwen2", {}, {}, marks=pytest.mark.slow),
    pytest.param(
        *("Gemma3", "smollm", {"head_dim": 16, "query_pre_attn_scalar": 16}, {}),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("family", "pre", "config", "lora"), FAMILIES)
def test_base_and_adapter_are_the_merged_model(
    family: str,
    pre: str,
    config: dict[str, Any],
    lora: dict[str, Any],
    make_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = make_model(family, pre=pre, **config)
    if family == "Qwen2":
        give_biases(base)
    gguf.convert(base, tmp_path / "base.gguf", "base")
    adapter = make_adapter(base, tmp_path / "adapter", **lora)
    both = logits(with_adapter(tmp_path / "base.gguf", adapter, base, tmp_path / "model"))
    whole = logits(merged(base, adapter, tmp_path / "merged"))
    assert apart(both, whole) < 1e-4
    assert apart(logits(tmp_path / "base.gguf"), whole) > 0.01, "the adapter does nothing"


def give_biases(folder: Path) -> None:
    """Random ones: fresh models have zeros."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)


def test_all_that_a_session_does_is_with_the_adapter(folder: Path, tuned_gguf: Path) -> None:
    both, whole = opened(folder), opened(tuned_gguf)
    golds = [[400 + i, 7, 8] for i in range(len(PROMPTS))]
    pairs = list(zip(PROMPTS, golds, strict=True))
    assert list(both.score(pairs)) == pytest.approx(list(whole.score(pairs)), rel=5e-3)
    answers = [
        {one.index: one.tokens for one in session.generate(PROMPTS, 4, set())}
        for session in (both, whole)
    ]
    assert answers[0] == answers[1] and len(answers[0]) == len(PROMPTS)
    timing = both.time(8, 4)
    assert timing.ttft_s > 0 and len(timing.token_s) == 3
    both.close()
    whole.close()


def test_a_batch_answers_as_one_at_a_time(folder: Path) -> None:
    answers = []
    for parallel in (1, 2, 6):
        session = opened(folder, parallel)
        answers.append({one.index: one.tokens for one in session.generate(PROMPTS, 6, set())})
        session.close()
    assert answers[0] == answers[1] == answers[2]


def test_the_file_is_what_llama_cpp_documents(folder: Path, adapter: Path) -> None:
    from gguf import GGUFReader
    from safetensors.numpy import load_file

    reader = GGUFReader(folder / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 3
    ours = {tensor.name: tensor.data for tensor in reader.tensors}
    theirs = load_file(adapter / "adapter_model.safetensors")
    assert len(ours) == len(theirs) == 2 * 2 * 7
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    for part in "AB":
        expected = theirs[key.format(part)].astype(np.float16)
        assert np.array_equal(ours[f"blk.1.ffn_down.weight.lora_{part.lower()}"], expected)


@pytest.mark.skipif(
    "EDGEFT_LLAMA_CPP" not in os.environ, reason="EDGEFT_LLAMA_CPP names no llama.cpp checkout"
)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_same_tensors_as_llama_cpps_own_converter(
    tiny: Path, tmp_path: Path, rslora: bool
) -> None:
    from gguf import GGUFReader

    adapter = make_adapter(tiny, tmp_path / "adapter", use_rslora=rslora)
    gguf_lora.convert(adapter, tiny, tmp_path / "ours.gguf")
    checkout = Path(os.environ["EDGEFT_LLAMA_CPP"])
    gguf_lora.convert(adapter, tiny, tmp_path / "theirs.gguf", checkout)
    ours, theirs = (
        {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_an_adapter_of_another_model_is_one_line(
    folder: Path, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    for name, other in {
        "does not exist in base model": make_model("Llama", num_hidden_layers=1),
        "incorrect shape": make_model("Llama", intermediate_size=96),
        "arch mismatch": make_model("Qwen2", pre="qwen2"),
    }.items():
        place = tmp_path / name
        place.mkdir()
        gguf.convert(other, place / "model.gguf", "other")
        shutil.copyfile(folder / "adapter.gguf", place / "adapter.gguf")
        with pytest.raises(UserError, match=rf"adapter\.gguf does not go with model\.gguf.*{name}"):
            opened(place)


@pytest.mark.parametrize("kept", [0, 100, 4000, -100])
def test_a_damaged_adapter_is_one_line(folder: Path, tmp_path: Path, kept: int) -> None:
    (tmp_path / "model.gguf").hardlink_to(folder / "model.gguf")
    (tmp_path / "adapter.gguf").write_bytes((folder / "adapter.gguf").read_bytes()[:kept])
    with pytest.raises(UserError) as caught:
        opened(tmp_path)
    assert "does not go with model.gguf: " in str(caught.value)
    assert "\n" not in str(caught.value) and "no reason" not in str(caught.value)


def test_a_folder_without_a_model(folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(folder / "adapter.gguf", tmp_path / "adapter.gguf")
    with pytest.raises(UserError, match=r"model\.gguf does not exist"):
        opened(tmp_path)


LORA = catalog.Target("gguf-x+lora", "gguf", "llama.cpp", "", {"ftype": "Q8_0", "lora": True})


def of_method(method: str) -> recipe.Recipe:
    return recipe.parse(f"train: {{method: {method}}}")


def test_a_method_without_such_an_adapter_is_refused() -> None:
    for method, leaves in (("full", "no adapter"), ("dora", "one that llama.cpp cannot apply")):
        with pytest.raises(UserError, match=rf"gguf-x\+lora .*{method} leaves {leaves}.*--method"):
            gguf_lora.check_supported([LORA], of_method(method), None)
        merged_one = catalog.Target("x", "gguf", "llama.cpp", "", {"ftype": "Q8_0"})
        gguf_lora.check_supported([merged_one], of_method(method), None)
    gguf_lora.check_supported([LORA], of_method("qlora"), None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dora": True}, "has DoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "has whole layers"),
        ({"trainable_token_indices": [1]}, "has trained embeddings"),
        ({"bias": "all"}, "has biases"),
        ({"peft_type": "LOHA"}, "is LOHA, a GGUF adapter holds LoRA only"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(
    changed: dict[str, Any], message: str, adapter: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(UserError, match=f"target gguf-x.*{message}"):
        gguf_lora.check_supported([LORA], of_method("lora"), other)


def test_tensors_that_are_no_plain_lora_are_refused(
    adapter: Path, tiny: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    other = shutil.copytree(adapter, tmp_path / "other")
    file = other / "adapter_model.safetensors"
    right = load_file(file)
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    head = "base_model.model.lm_head"
    a, b = (right[f"{layer}.lora_{part}.weight"] for part in "AB")
    without = {key: value for key, value in right.items() if key != f"{layer}.lora_A.weight"}
    huge = {**right, f"{layer}.lora_B.weight": 1e6 * b}
    tied = {**right, f"{head}.lora_A.weight": a, f"{head}.lora_B.weight": b}
    for tensors, message in (
        ({**right, "base_model.model.model.embed_tokens.weight": a}, "has base_.*embed_tokens"),
        (without, r"damaged: model\.layers\.0\.mlp\.up_proj has only one"),
        ({}, "has no layer"),
        (huge, "up_proj has values that float16 cannot hold"),
        (tied, "adapts lm_head, which a GGUF of .* does not have"),
    ):
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            gguf_lora.convert(other, tiny, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"ftype": "Q4_0", "lorra": True}, "unknown key 'gguf.lorra'; did you mean 'lora'"),
        ({"ftype": "Q4_0", "lora": "yes"}, "gguf.lora is true or false, not 'yes'"),
        ({"lora": True}, "gguf.ftype is missing"),
    ],
)
def test_a_target_with_a_mistake(table: dict[str, Any], message: str, tiny: Path) -> None:
    target = catalog.Target("mine+lora", "gguf", "llama.cpp", "", table)
    with pytest.raises(UserError, match=rf"target mine\+lora: {message}"):
        check_supported(tiny, [target], None)


def test_the_shipped_targets() -> None:
    names = ["gguf-q4_0+lora", "gguf-q4_k_m+lora"]
    assert [t.name for t in catalog.find_targets(names) if t.adapter] == names
    with pytest.raises(UserError, match=r"did you mean 'gguf-q4_0\+lora'"):
        catalog.find_targets(["gguf-q4_0+lra"])
