"""SentencePiece-style tokenizers and Gemma 3 in GGUF: llama.cpp reads and computes as we do."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import spm

from edgeft import prompts, tasks
from edgeft.errors import UserError
from edgeft.exporters import gguf, gguf_tokenizer, verify

SIZES = tasks.TaskSettings(train=400, heldout=0, evaluation=12)
SHAPES: dict[str, dict[str, Any]] = {
    "Llama": {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": False},
    # Seven layers: the sixth sees all positions, the others a window shorter than the prompts.
    "Gemma3": {
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
        },
    },
}


@pytest.fixture(scope="session")
def wordmath() -> tasks.Splits:
    return tasks.find("wordmath").make(SIZES, 0)


@pytest.fixture(scope="session")
def make_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, wordmath: tasks.Splits
) -> Callable[[str, str], Path]:
    """``make_tokenizer("gemma", "gemma")``: a folder with a tokenizer, made once for each."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, template: str) -> Path:
        if (kind, template) not in made:
            corpus = [f"{q.question} {q.solution}" for q in wordmath.train]
            made[kind, template] = spm.save(
                kind,
                template,
                [*corpus, *[spm.UNICODE] * 20],
                tmp_path_factory.mktemp(f"{kind}-{template}"),
            )
        return made[kind, template]

    return make


@pytest.fixture(scope="session")
def make_family(
    tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[[str, str], Path]
) -> Callable[..., Path]:
    """A model folder with random weights and a tokenizer of SentencePiece's kind."""

    def make(family: str, kind: str, template: str, **config: Any) -> Path:
        folder = tmp_path_factory.mktemp(family) / "model"
        shape = {**SHAPES[family], **config}
        return spm.random_model(make_tokenizer(kind, template), folder, family, **shape)

    return make


@pytest.fixture(scope="session")
def gemma(make_family: Callable[..., Path]) -> Path:
    return make_family("Gemma3", "gemma", "gemma")


@pytest.fixture
def spoilt(gemma: Path, tmp_path: Path) -> Path:
    return shutil.copytree(gemma, tmp_path / "spoilt")


def encoded(folder: Path, wordmath: tasks.Splits, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    prompts.encode(folder, {"evaluation": wordmath.evaluation}, out)
    return out / "evaluation.jsonl"


def texts(folder: Path) -> Iterator[str]:
    """A few hundred: hand-picked ones, and pieces of the vocabulary and of Unicode at random."""
    data = json.loads((folder / "tokenizer.json").read_text())
    added = [token["content"] for token in data["added_tokens"] if "▁" not in token["content"]]
    yield from (spm.UNICODE, "", " ", " lead", "tail ", "a  b   c    d     e" + " " * 50)
    yield from ("\n" * 33, "x\n\n\ny\n\n z\t\t", "\r\n \r\n", "1234567890 3.14 1,000", "aaaa" * 30)
    yield from ("<0x0A><0x41> <s", "\x00\x07\x7f", "\ufb01 \uff46 e\u0301 \u200b \u00a0 🏳️‍🌈")
    yield from (f"{token}x {token} y{token}\n{token}{token}" for token in added)
    draw = random.Random(0)
    pieces = [token.replace("▁", " ") for token in data["model"]["vocab"] if token not in added]
    blocks = ((32, 127), (160, 0x530), (0x600, 0x700), (0x3000, 0xA000), (0x1F300, 0x1F700))
    for _ in range(150):
        yield "".join(draw.choices(pieces, k=25))
        yield "".join(chr(draw.randrange(*draw.choice(blocks))) for _ in range(40))
        yield " ".join(draw.choices([*pieces, *added, "\n"], k=20))


def differing(folder: Path, artifact: Path, special: bool = True) -> list[str]:
    """The texts that llama.cpp's own tokenizer reads otherwise."""
    from tokenizers import Tokenizer

    from edgeft.runtimes import llama_cpp

    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = llama_cpp.open_session(artifact, threads=0, context=64, parallel=1)
    bos = ours.encode("").ids if llama_cpp.tokenize(session, "", special=True) else []
    found = [
        text
        for text in texts(folder)
        if llama_cpp.tokenize(session, text, special=special)
        != [*bos, *ours.encode(text, add_special_tokens=False).ids]
    ]
    session.close()
    return found


def agrees(done: verify.Verification) -> bool:
    assert done.positions > 300 and done.max_logit_diff > 0
    return done.top1_agreement >= 0.99 and done.max_logit_diff < 0.3


@pytest.mark.parametrize(
    ("family", "kind", "template"), [("Llama", "tinyllama", "zephyr"), ("Gemma3", "gemma", "gemma")]
)
def test_a_family_agrees_with_the_host(
    family: str,
    kind: str,
    template: str,
    make_family: Callable[..., Path],
    wordmath: tasks.Splits,
    tmp_path: Path,
) -> None:
    folder = make_family(family, kind, template)
    gguf.check_supported(folder, None)
    gguf.convert(folder, tmp_path / "model.gguf", "tiny")
    evaluation = encoded(folder, wordmath, tmp_path)
    done = verify.verify("llama.cpp", tmp_path / "model.gguf", folder, evaluation, exact=True)
    assert done.tokenizer_prompts == SIZES.evaluation and done.chat_template is True
    assert agrees(done), done


@pytest.mark.parametrize(
    ("kind", "template", "prefix", "bos", "everywhere"),
    [
        ("tinyllama", "zephyr", True, False, True),
        ("tinyllama", "none", True, True, True),
        ("bare", "none", False, True, True),
        ("gemma", "gemma", False, True, True),
        # A space before the text alone: in the prompts llama.cpp does the same, elsewhere not.
        ("llama", "none", True, True, False),
        ("llama", "inst", False, True, False),
    ],
)
def test_llama_cpp_reads_texts_as_the_tokenizer_does(
    kind: str,
    template: str,
    prefix: bool,
    bos: bool,
    everywhere: bool,
    make_family: Callable[..., Path],
    wordmath: tasks.Splits,
    tmp_path: Path,
) -> None:
    from gguf import GGUFReader

    folder = make_family("Llama", kind, template)
    artifact = tmp_path / "model.gguf"
    gguf.check_supported(folder, None)
    gguf.convert(folder, artifact, "tiny")
    evaluation = encoded(folder, wordmath, tmp_path)
    verify.verify("llama.cpp", artifact, folder, evaluation, exact=False)
    fields = {name: field.contents() for name, field in GGUFReader(artifact).fields.items()}
    assert fields["tokenizer.ggml.add_space_prefix"] is prefix
    assert fields["tokenizer.ggml.add_bos_token"] is bos
    assert (differing(folder, artifact) == []) is everywhere


def test_wrong_scores_are_found(
    spoilt: Path, gemma: Path, wordmath: tasks.Splits, tmp_path: Path
) -> None:
    """llama.cpp's tokenizer goes by them, so the merges the other way round are other tokens."""
    spm.edit(spoilt, lambda data: data["model"]["merges"].reverse())
    gguf.convert(spoilt, tmp_path / "model.gguf", "spoilt")
    evaluation = encoded(gemma, wordmath, tmp_path)
    with pytest.raises(UserError, match="tokenizer reads .* differently"):
        verify.verify("llama.cpp", tmp_path / "model.gguf", gemma, evaluation, exact=False)
    assert len(differing(gemma, tmp_path / "model.gguf")) > 100


FAULTS: list[tuple[str, Any, str]] = [
    ("edgeft.exporters.gguf_tokenizer._space_prefix", lambda *_: True, "tokenizer reads"),
    ("edgeft.exporters.gguf_tokenizer._writes_bos", lambda *_: False, "leaves out the BOS"),
    ("edgeft.exporters.gguf_tokenizer._type", lambda *_: 1, "tokenizer reads"),
    ("edgeft.exporters.gguf._shift", lambda _: 0, "not written right"),
    ("gguf.GGUFWriter.add_sliding_window", lambda *_: None, "not written right"),
    # Within 60 tokens a wrong rotary base moves few of the top ones; the divergence tells.
    ("edgeft.exporters.gguf._local_theta", lambda _: 10_000.0, "not written right"),
    ("gguf.GGUFWriter.add_rope_freq_base", lambda *_: None, "not written right"),
]


@pytest.mark.parametrize(("name", "fault", "message"), FAULTS)
def test_a_fault_is_found(
    name: str,
    fault: Any,
    message: str,
    gemma: Path,
    wordmath: tasks.Splits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(name, fault)
    gguf.convert(gemma, tmp_path / "model.gguf", "spoilt")
    evaluation = encoded(gemma, wordmath, tmp_path)
    with pytest.raises(UserError, match=message):
        verify.verify("llama.cpp", tmp_path / "model.gguf", gemma, evaluation, exact=True)


def test_older_keys_say_the_same(gemma: Path, spoilt: Path, tmp_path: Path) -> None:
    """What the hub's Gemma 3 configurations have: no key by the kind of layer, defaults left out."""
    from gguf import GGUFReader

    config = json.loads((gemma / "config.json").read_text())
    for key in ("rope_parameters", "layer_types", "rms_norm_eps", "tie_word_embeddings"):
        config.pop(key)
    older = {"rope_theta": 500_000, "rope_local_base_freq": 20_000, "sliding_window_pattern": 6}
    (spoilt / "config.json").write_text(json.dumps({**config, **older}))
    gguf.check_supported(spoilt, None)
    gguf.convert(gemma, tmp_path / "new.gguf", "tiny")
    gguf.convert(spoilt, tmp_path / "old.gguf", "tiny")
    assert (tmp_path / "new.gguf").read_bytes() == (tmp_path / "old.gguf").read_bytes()
    fields = {name: f.contents() for name, f in GGUFReader(tmp_path / "old.gguf").fields.items()}
    assert fields["gemma3.rope.freq_base"] == 500_000
    assert fields["gemma3.attention.key_length"] == 32


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
        ({"layer_types": ["full_attention"] * 7}, "layer_types"),
        ({"layer_types": None, "sliding_window_pattern": 3}, "layer_types"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "silu"}, "hidden_activation silu"),
        ({"num_hidden_layers": 62, "layer_types": None}, "query_pre_attn_scalar 32"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rotary type 'yarn'"),
    ],
)
def test_a_gemma_3_that_llama_cpp_cannot_be(
    change: dict[str, Any], named: str, spoilt: Path
) -> None:
    config = json.loads((spoilt / "config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=f"cannot export .*{named}.*--llama-cpp"):
        gguf.check_supported(spoilt, None)


def made_twice(data: dict[str, Any]) -> int:
    """The first merge of a token, no run of one character, that another merge makes too."""
    made = ["".join(merge) for merge in data["model"]["merges"]]
    return next(i for i, t in enumerate(made) if made.count(t) > 1 and len(set(t)) > 1)


def lose_a_merge(data: dict[str, Any]) -> None:
    """Take one of several ways to make a token, as a trainer of BPE leaves it."""
    data["model"]["merges"].pop(made_twice(data))


def mix_merges(data: dict[str, Any]) -> None:
    """Give the ways to make a token, which share one score, places far from each other."""
    data["model"]["merges"].append(data["model"]["merges"].pop(made_twice(data)))


def lose_a_byte(data: dict[str, Any]) -> None:
    del data["model"]["vocab"]["<0xF0>"]


def fold(data: dict[str, Any]) -> None:
    steps = [{"type": "NFKC"}, data["normalizer"]]
    data["normalizer"] = {"type": "Sequence", "normalizers": steps}


def strip(data: dict[str, Any]) -> None:
    for token in data["added_tokens"]:
        token["rstrip"] = True


@pytest.mark.parametrize("change", [lose_a_merge, mix_merges, lose_a_byte, fold, strip])
def test_a_tokenizer_that_llama_cpp_would_read_otherwise(
    change: Callable[[dict[str, Any]], None], spoilt: Path
) -> None:
    spm.edit(spoilt, change)
    with pytest.raises(UserError, match="neither a byte-level BPE .* nor a SentencePiece"):
        gguf.check_supported(spoilt, None)


def test_a_space_both_before_the_text_and_behind_a_token(
    make_tokenizer: Callable[[str, str], Path],
) -> None:
    with pytest.raises(UserError, match="nor a SentencePiece-style BPE"):
        gguf_tokenizer.check_supported(make_tokenizer("llama", "zephyr"))


def test_prompts_are_by_tokenizer_json_as_written(
    make_tokenizer: Callable[[str, str], Path], wordmath: tasks.Splits, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    folder = make_tokenizer("tinyllama", "zephyr")
    item = prompts.read_items(encoded(folder, wordmath, tmp_path))[0]
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert item.prompt == ours.encode(item.text, add_special_tokens=False).ids
    end = item.prompt.index(ours.token_to_id("</s>"))
    assert ours.id_to_token(item.prompt[end + 1]) == "▁"
    # The answer goes on from the prompt: no second space, no first one either.
    solution = wordmath.evaluation[0].solution
    whole = ours.encode(item.text + solution, add_special_tokens=False).ids
    assert [*item.prompt, *item.gold[:-1]] == whole
    assert item.gold[-1] == ours.token_to_id("</s>")


def test_the_host_sees_past_a_window_as_without_a_batch(
    gemma: Path, wordmath: tasks.Splits, tmp_path: Path
) -> None:
    import numpy as np

    from edgeft.runtimes import common_prefix, transformers

    items = prompts.read_items(encoded(gemma, wordmath, tmp_path))
    texts = [item.prompt for item in items]
    longest = max(map(len, texts))
    assert common_prefix(texts) > 5 and longest > 2 * SHAPES["Gemma3"]["sliding_window"]
    host = transformers.open_session(gemma, threads=0, context=longest + 1, parallel=8)
    for together, text in list(zip(host.logits(texts), texts, strict=True))[:4]:
        _, alone = host.logits([[0, *text], text])  # no common prefix: logits everywhere
        assert np.abs(together - alone[-len(together) :]).max() < 1e-3
    host.close()
