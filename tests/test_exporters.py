"""Merging and writing GGUF keep the model; what does not fit is refused; faults are found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shapes import LLAMA3

from edgeft import child, prompts, run, tasks
from edgeft.errors import UserError
from edgeft.exporters import gguf, merge, verify
from edgeft.tasks import Question

QUESTIONS = [
    Question(str(i), f"Tom has {i} apples and buys {i + 3}. How many?", f"{2 * i + 3}", "0")
    for i in range(1, 25)
]


def encode(folder: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    prompts.encode(folder, {"evaluation": QUESTIONS}, out)
    return out / "evaluation.jsonl"


@pytest.fixture(scope="module")
def evaluation(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tiny, tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def tiny_gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf.convert(tiny, out, "tiny")
    return out


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter as PEFT saves it, far enough from zero to matter."""
    return make_adapter(tiny, tmp_path_factory.mktemp("adapter"))


def make_adapter(base: Path, out: Path) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(out)
    return out


FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("Llama", "smollm", {}),
    ("Llama", "llama-bpe", {"tie_word_embeddings": False}),
    (
        "Llama",
        "llama-bpe",
        {"rope_parameters": LLAMA3},
    ),
    ("Qwen2", "qwen2", {}),
    ("Qwen3", "qwen2", {"head_dim": 32}),
]


@pytest.mark.parametrize(
    ("family", "pre", "config"),
    [FAMILIES[0], *(pytest.param(*family, marks=pytest.mark.slow) for family in FAMILIES[1:])],
)
def test_f16_agrees_with_the_host(
    family: str, pre: str, config: dict[str, Any], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model(family, pre=pre, **config)
    gguf.check_supported(folder, None)
    gguf.convert(folder, tmp_path / "model.gguf", "tiny")
    done = verify.verify(
        "llama.cpp", tmp_path / "model.gguf", folder, encode(folder, tmp_path / "data"), exact=True
    )
    assert done.tokenizer_prompts == len(QUESTIONS)
    assert done.chat_template is True
    assert done.positions > 300
    assert done.top1_agreement is not None and done.top1_agreement >= 0.99
    assert done.max_logit_diff is not None and 0 < done.max_logit_diff < 0.3


def test_the_merged_model_is_base_plus_adapter(
    tiny: Path, adapter: Path, evaluation: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    merge.merge(tiny, adapter, evaluation, tmp_path)
    key = "model.layers.0.self_attn.q_proj"
    low = load_file(adapter / "adapter_model.safetensors")
    a, b = (low[f"base_model.model.{key}.lora_{x}.weight"] for x in "AB")
    config = json.loads((adapter / "adapter_config.json").read_text())
    before = load_file(tiny / "model.safetensors")[f"{key}.weight"]
    after = load_file(tmp_path / "model.safetensors")[f"{key}.weight"]
    assert after.dtype == torch.float32
    expected = before.float() + config["lora_alpha"] / config["r"] * (b @ a)
    assert torch.allclose(after, expected, atol=1e-5)
    assert not torch.allclose(after, before.float(), atol=1e-2)
    noted = json.loads((tmp_path / "merge.json").read_text())
    assert noted["max_logit_diff"] <= noted["allowed"]
    assert (tmp_path / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_an_adapter_of_another_base_is_refused(
    tiny: Path,
    adapter: Path,
    evaluation: Path,
    make_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    wider = make_model("Llama", hidden_size=128)
    with pytest.raises(UserError, match="does not fit .* another base"):
        merge.merge(wider, adapter, evaluation, tmp_path / "a")
    shallower = make_model("Llama", num_hidden_layers=1)
    with pytest.raises(UserError, match="does not fit"):
        merge.merge(shallower, adapter, evaluation, tmp_path / "b")


def test_an_adapter_says_which_base_it_belongs_to(
    tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    ours = shutil.copytree(adapter, tmp_path / "ours")
    run.write_json(ours / "edgeft.json", {"base_sha256": "one"})
    merge.check_adapter(ours, str(tiny), "one")
    with pytest.raises(UserError, match="trained on another base"):
        merge.check_adapter(ours, str(tiny), "two")
    theirs = shutil.copytree(adapter, tmp_path / "theirs")
    config = json.loads((theirs / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/one"
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    merge.check_adapter(theirs, "org/one", "")
    with pytest.raises(UserError, match=r"another base \(org/one\)"):
        merge.check_adapter(theirs, "org/two", "")


def test_what_is_no_adapter(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        merge.check_adapter(tiny, "x", "")
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(UserError, match=r"\.bin adapters are not read"):
        merge.check_adapter(pickled, "x", "")


def test_a_model_that_cannot_be_exported_is_refused(
    make_model: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["XForCausalLM"]}))
    with pytest.raises(
        UserError, match=r"cannot export XForCausalLM.*LlamaForCausalLM.*--llama-cpp"
    ):
        gguf.check_supported(other, None)
    with pytest.raises(UserError, match="no llama.cpp checkout"):
        gguf.check_supported(other, tmp_path)


@pytest.fixture
def spoilt(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "spoilt")


def test_a_wrong_tokenizer_is_found(
    spoilt: Path, tiny: Path, evaluation: Path, tmp_path: Path, gguf_fields: dict[str, Any]
) -> None:
    from edgeft import tokenizer

    merges = gguf_fields["tokenizer.ggml.merges"][:20_000]
    tokenizer.from_gguf({**gguf_fields, "tokenizer.ggml.merges": merges}, spoilt)
    gguf.convert(spoilt, tmp_path / "model.gguf", "spoilt")
    with pytest.raises(UserError, match="tokenizer reads .* differently"):
        verify.verify("llama.cpp", tmp_path / "model.gguf", tiny, evaluation, exact=False)


def test_a_swapped_template_is_found(
    spoilt: Path, tiny: Path, evaluation: Path, tmp_path: Path
) -> None:
    (spoilt / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    gguf.convert(spoilt, tmp_path / "model.gguf", "spoilt")
    with pytest.raises(UserError, match="chat template is not the model's"):
        verify.verify("llama.cpp", tmp_path / "model.gguf", tiny, evaluation, exact=False)


def test_a_permuted_head_is_found(
    tiny: Path, evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_interleave", lambda tensor, heads: tensor)
    gguf.convert(tiny, tmp_path / "model.gguf", "spoilt")
    with pytest.raises(UserError, match="weights were not written right"):
        verify.verify("llama.cpp", tmp_path / "model.gguf", tiny, evaluation, exact=True)


def test_quantizing_shrinks_and_still_opens(
    tiny: Path, tiny_gguf: Path, evaluation: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.gguf"
    child.run(
        "edgeft.exporters.quantize", {"source": str(tiny_gguf), "out": str(out), "ftype": "Q8_0"}
    )
    assert out.stat().st_size < 0.7 * tiny_gguf.stat().st_size
    done = verify.verify("llama.cpp", out, tiny, evaluation, exact=False)
    assert done.tokenizer_prompts == len(QUESTIONS) and 0 < done.mean_kl < 0.1


def test_an_unknown_quantization_and_a_broken_source(tiny_gguf: Path, tmp_path: Path) -> None:
    request = {"source": str(tiny_gguf), "out": str(tmp_path / "x.gguf"), "ftype": "Q4_K_N"}
    with pytest.raises(UserError, match="no quantization 'Q4_K_N'.*Q4_K_M"):
        child.run("edgeft.exporters.quantize", request)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:100_000])
    request |= {"source": str(broken), "ftype": "Q8_0"}
    with pytest.raises(UserError):
        child.run("edgeft.exporters.quantize", request)


def test_a_vocabulary_that_aborts_llama_cpp_is_one_clear_line(
    tiny: Path, evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DESIGN's trap 4: the wrong vocabulary type ends the whole process from C++."""
    import gguf as official

    right = official.GGUFWriter.add_tokenizer_model
    monkeypatch.setattr(
        official.GGUFWriter, "add_tokenizer_model", lambda self, _: right(self, "llama")
    )
    artifact = tmp_path / "model.gguf"
    gguf.convert(tiny, artifact, "spoilt")
    request = {"artifact": str(artifact), "folder": str(tiny), "evaluation": str(evaluation)}
    with pytest.raises(UserError) as raised:
        child.run("edgeft.exporters.verify", {**request, "logits": False})
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(
    "EDGEFT_LLAMA_CPP" not in os.environ, reason="EDGEFT_LLAMA_CPP names no llama.cpp checkout"
)
def test_the_same_bytes_as_llama_cpps_own_converter(tiny: Path, tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFReader

    gguf.convert(tiny, tmp_path / "ours.gguf", "tiny")
    gguf.convert(tiny, tmp_path / "theirs.gguf", "tiny", Path(os.environ["EDGEFT_LLAMA_CPP"]))
    ours, theirs = (
        {t.name: t for t in GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert np.array_equal(tensor.data, theirs[name].data), name


def test_prompts_by_the_chat_template(tiny: Path, evaluation: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    item = prompts.read_items(evaluation)[0]
    assert tokenizer.decode(item.prompt) == item.text
    assert item.text.endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(item.gold) == "5<|im_end|>"


def test_prompts_of_a_base_model_are_plain(spoilt: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (spoilt / "chat_template.jinja").unlink()
    item = prompts.read_items(encode(spoilt, tmp_path / "data"))[0]
    assert item.text == f"Question: {QUESTIONS[0].question}\nAnswer:"
    assert AutoTokenizer.from_pretrained(spoilt).decode(item.gold) == " 5<|im_end|>"


def test_a_template_that_does_not_render(spoilt: Path, tmp_path: Path) -> None:
    (spoilt / "chat_template.jinja").write_text("{{ raise_exception('no system prompt') }}")
    with pytest.raises(UserError, match="chat template does not render: no system prompt"):
        encode(spoilt, tmp_path / "data")


def test_tasks_are_found_by_name() -> None:
    assert tasks.find("wordmath").name == "wordmath"
    with pytest.raises(UserError, match="did you mean 'wordmath'"):
        tasks.find("wordmat")
