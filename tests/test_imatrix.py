"""Importance matrices: llama-imatrix's figures, what they do to a quantization, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_end_to_end import command, finish, run_command

from edgeft import child, prompts, tokenizer
from edgeft.errors import UserError
from edgeft.exporters import gguf, imatrix
from edgeft.prompts import Item

DATA = Path(__file__).parent / "data"
TEXT, GOLDEN, CHUNK = DATA / "imatrix.txt", DATA / "imatrix.gguf", 128
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp's own programs, built by the user: PROGRAMS/llama-imatrix, PROGRAMS/llama-quantize.
PROGRAMS = os.environ.get("EDGEFT_LLAMA_PROGRAMS")
Weights = dict[str, Any]
needs_programs = pytest.mark.skipif(not PROGRAMS, reason="EDGEFT_LLAMA_PROGRAMS names no folder")


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory, gguf_fields: dict[str, Any]) -> Path:
    """A Llama whose weights never change: float16 values out of a stream that numpy has frozen."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("fixed")
    tokenizer.from_gguf(gguf_fields, folder)
    words, width, inner, layers = len(gguf_fields["tokenizer.ggml.tokens"]), 64, 128, 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rows = {"k_proj": 32, "v_proj": 32, "gate_proj": inner, "up_proj": inner}
    columns = {"down_proj": inner}
    stream = np.random.RandomState(0)

    def drawn(*shape: int) -> Any:
        return (0.3 * stream.standard_normal(shape)).astype(np.float16)

    tensors = {"model.embed_tokens.weight": drawn(words, width)}
    for block in range(layers):
        for part in PARTS.values():
            last = part.rpartition(".")[2]
            shape = rows.get(last, width), columns.get(last, width)
            tensors[f"model.layers.{block}.{part}.weight"] = drawn(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{norm}.weight"] = 1 + drawn(width)
    tensors["model.norm.weight"] = 1 + drawn(width)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def source(fixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf.convert(fixed, out, "fixed")
    return out


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """Eleven of all lengths: two batches, with padding."""
    stream = np.random.RandomState(1)
    return [stream.randint(3, 40_000, size).tolist() for size in range(1, 34, 3)]


def test_the_sums_are_those_of_one_token_after_another(fixed: Path, texts: list[list[int]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    found = imatrix.measure(fixed, texts, "float32")
    model = AutoModelForCausalLM.from_pretrained(fixed, dtype=torch.float64)
    sums: dict[str, Any] = {}

    def hook(name: str) -> Callable[[Any, Any], None]:
        def add(_: Any, inputs: Any) -> None:
            for token in inputs[0].detach().numpy().reshape(-1, inputs[0].shape[-1]):
                sums[name] = sums.get(name, 0) + token**2

        return add

    for part, module in PARTS.items():
        for block in range(2):
            layer = model.get_submodule(f"model.layers.{block}.{module}")
            layer.register_forward_pre_hook(hook(f"blk.{block}.{part}.weight"))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([text]))
    assert found.keys() == sums.keys(), "no head, no embedding: as llama-imatrix"
    for name, one in found.items():
        assert one.tokens == sum(map(len, texts))
        np.testing.assert_allclose(one.squares, sums[name], rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
        ("Gemma3", {"head_dim": 16, "num_hidden_layers": 7, "sliding_window": 8}),
    ],
)
def test_every_matrix_of_every_architecture_has_its_name(
    family: str, config: dict[str, Any], make_model: Callable[..., Path], texts: list[list[int]]
) -> None:
    folder = make_model(family, **config)
    found = imatrix.measure(folder, texts[-2:], "float32")
    layers = config.get("num_hidden_layers", 2)
    assert set(found) == {f"blk.{i}.{part}.weight" for i in range(layers) for part in PARTS}
    wide = {"ffn_down": 128, "attn_output": 4 * config.get("head_dim", 16)}
    for name, one in found.items():
        assert one.squares.shape == (wide.get(name.split(".")[2], 64),)
        assert one.squares.min() >= 0 and one.squares.max() > 0


def test_bfloat16_says_the_same(fixed: Path, texts: list[list[int]]) -> None:
    exact, fast = (imatrix.measure(fixed, texts, dtype) for dtype in ("float32", "bfloat16"))
    for name, one in exact.items():
        assert np.corrcoef(one.squares, fast[name].squares)[0, 1] > 0.99, name


def chunks(folder: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokens.encode(TEXT.read_text().removesuffix("\n"), add_special_tokens=False).ids
    return [ids[at : at + CHUNK] for at in range(0, len(ids) - CHUNK + 1, CHUNK)]


def test_the_figures_are_llama_imatrixs(fixed: Path) -> None:
    """The golden file is llama-imatrix's; the next test made it, and says how."""
    found, golden = imatrix.measure(fixed, chunks(fixed), "float32"), imatrix.read(GOLDEN)
    assert found.keys() == golden.columns.keys()
    for name, one in found.items():
        ours, theirs = one.squares / one.tokens, golden.columns[name]
        assert np.corrcoef(ours, theirs)[0, 1] > 0.9999, name
        np.testing.assert_allclose(ours, theirs, rtol=0.05)
    assert golden.chunks * CHUNK == next(iter(found.values())).tokens


@needs_programs
def test_the_golden_file_is_llama_imatrixs(source: Path, tmp_path: Path) -> None:
    """Written anew where it is not there: ``rm`` it, and EDGEFT_LLAMA_PROGRAMS=DIR pytest -k golden."""
    out = tmp_path / "imatrix.gguf"
    files = ["-m", str(source), "-f", str(TEXT), "-o", str(out)]
    done = [f"{PROGRAMS}/llama-imatrix", *files, "--no-ppl", "-c", str(CHUNK), "-b", str(CHUNK)]
    subprocess.run(done, check=True, capture_output=True)
    if not GOLDEN.exists():
        GOLDEN.write_bytes(out.read_bytes())
    again, golden = imatrix.read(out), imatrix.read(GOLDEN)
    assert again.chunks == golden.chunks
    for name, columns in golden.columns.items():
        np.testing.assert_allclose(again.columns[name], columns, rtol=1e-3)


def item(number: int, size: int) -> Item:
    return Item(str(number), "", "", [number] * (size - 1), [7], "")


def test_questions_are_drawn_by_the_seed_and_bounded() -> None:
    many = [item(i, 10) for i in range(400)]
    drawn = imatrix.draw(many, 0)
    assert drawn == imatrix.draw(many, 0) != imatrix.draw(many, 1)
    assert len(drawn) == imatrix.QUESTIONS and len({text[0] for text in drawn}) == len(drawn)
    assert {(len(text), text[-1]) for text in drawn} == {(10, 7)}, "the solution is read too"
    long = imatrix.draw([item(i, 1 << 12) for i in range(400)], 0)
    assert sum(map(len, long)) == imatrix.TOKENS
    assert len(imatrix.draw(many[:3], 0)) == 3


def quantized(source: Path, out: Path, ftype: str, **more: Any) -> dict[str, Any]:
    """A quantization's tensors by name, in a child as in a run."""
    from gguf import GGUFReader

    request = {"source": str(source), "out": str(out), "ftype": ftype, **more}
    child.run("edgeft.exporters.quantize", request)
    return {tensor.name: tensor for tensor in GGUFReader(out).tensors}


@pytest.fixture(scope="module")
def real(embedded_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """A GGUF that holds little more than two blocks of SmolLM2's, and their matrices."""
    import gguf as official

    weights = {
        tensor.name: official.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in official.GGUFReader(embedded_gguf).tensors
        if tensor.name.startswith(("blk.0.", "blk.1.")) and len(tensor.shape) > 1
    }
    out = tmp_path_factory.mktemp("real") / "model.gguf"
    writer = official.GGUFWriter(out, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(576)
    writer.add_feed_forward_length(1536)
    writer.add_head_count(9)
    writer.add_head_count_kv(3)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    writer.add_file_type(official.LlamaFileType.MOSTLY_F16)
    writer.add_tensor("token_embd.weight", np.ones((32, 576), np.float16))
    for name, weight in weights.items():
        writer.add_tensor(name, weight.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out, weights


@pytest.fixture(scope="module")
def skewed(real: tuple[Path, Weights]) -> Weights:
    """By a matrix' name: how much its columns matter, a few of them far more than others."""
    stream = np.random.RandomState(2)
    return {n: np.exp(2 * stream.standard_normal(w.shape[1])) for n, w in real[1].items()}


@pytest.fixture(scope="module")
def matrix(skewed: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("imatrix") / "imatrix.gguf", skewed)


def written(out: Path, columns: Weights) -> Path:
    found = {name: imatrix.Statistics(64 * mean, 64) for name, mean in columns.items()}
    imatrix.write(out, found, "task/train.jsonl", 4, 16)
    return out


def test_the_file_is_in_llama_imatrixs_format(matrix: Path, skewed: Weights) -> None:
    from gguf import GGUFReader

    ours, theirs = GGUFReader(matrix), GGUFReader(GOLDEN)
    facts = {name: field.contents() for name, field in ours.fields.items()}
    assert list(ours.fields) == list(theirs.fields)
    assert [f.types for f in ours.fields.values()] == [f.types for f in theirs.fields.values()]
    assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
    assert {t.tensor_type for t in ours.tensors} == {t.tensor_type for t in theirs.tensors}
    assert facts["general.type"] == "imatrix"
    assert facts["imatrix.datasets"] == ["task/train.jsonl"]
    assert facts["imatrix.chunk_count"] == 4 and facts["imatrix.chunk_size"] == 16
    for name, columns in imatrix.read(matrix).columns.items():
        np.testing.assert_allclose(columns, skewed[name], rtol=1e-6)


def test_columns_that_matter_are_rounded_better(
    real: tuple[Path, Weights], skewed: Weights, matrix: Path, tmp_path: Path
) -> None:
    from gguf import GGUFReader, quants

    source, weights = real
    flat = written(tmp_path / "flat.gguf", {n: np.ones_like(m) for n, m in skewed.items()})
    without = quantized(source, tmp_path / "without.gguf", "Q4_0")
    evenly = quantized(source, tmp_path / "evenly.gguf", "Q4_0", imatrix=str(flat))
    with_it = quantized(source, tmp_path / "with.gguf", "Q4_0", imatrix=str(matrix))
    for name, weight in weights.items():
        assert with_it[name].tensor_type == without[name].tensor_type
        plain, even, weighted = (
            (quants.dequantize(found[name].data, found[name].tensor_type) - weight) ** 2
            for found in (without, evenly, with_it)
        )
        assert (weighted @ skewed[name]).mean() < 0.8 * (plain @ skewed[name]).mean(), name
        # llama.cpp looks longer for a scale when it has any matrix: that is not all.
        assert (weighted @ skewed[name]).mean() < 0.9 * (even @ skewed[name]).mean(), name
        assert weighted.mean() > even.mean(), "the other columns pay for it"
    said = GGUFReader(tmp_path / "with.gguf").fields
    facts = {n.rpartition(".")[2]: f.contents() for n, f in said.items() if "quantize.im" in n}
    assert facts.pop("file") == "imatrix.gguf" and facts.pop("dataset") == "task/train.jsonl"
    assert facts == {"entries_count": 14, "chunks_count": 4}


@needs_programs
def test_the_same_weights_as_llama_quantize_makes(
    real: tuple[Path, Weights], matrix: Path, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    types = {r"blk\.1\.ffn_down": "Q5_1", "ffn_down": "Q8_0"}
    ours = quantized(real[0], tmp_path / "ours.gguf", "Q4_K_M", imatrix=str(matrix), types=types)
    theirs = tmp_path / "theirs.gguf"
    files = ["--imatrix", str(matrix), str(real[0]), str(theirs), "Q4_K_M"]
    chosen = [part for one in types.items() for part in ("--tensor-type", "=".join(one))]
    subprocess.run([f"{PROGRAMS}/llama-quantize", *chosen, *files], check=True, capture_output=True)
    for tensor in GGUFReader(theirs).tensors:
        assert tensor.tensor_type == ours[tensor.name].tensor_type
        assert np.array_equal(tensor.data, ours[tensor.name].data), tensor.name


def test_types_are_obeyed_the_first_that_is_found(
    real: tuple[Path, Weights], tmp_path: Path
) -> None:
    types = {r"blk\.1\.ffn_down": "Q6_K", "ffn_down": "Q8_0", "attn_(k|v)": "F16"}
    found = quantized(real[0], tmp_path / "model.gguf", "Q4_0", types=types)
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0" and kinds["blk.1.ffn_down.weight"] == "Q6_K"
    assert kinds["blk.0.attn_k.weight"] == kinds["blk.1.attn_v.weight"] == "F16"
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_up.weight"] == "Q4_0"


def test_what_cannot_be_quantized_so(
    real: tuple[Path, Weights], skewed: Weights, tmp_path: Path
) -> None:
    source, out, other = real[0], tmp_path / "model.gguf", tmp_path / "other.gguf"
    with pytest.raises(UserError, match=r"'ffn_dwn' is in no tensor's name; did you mean 'ffn_"):
        quantized(source, out, "Q4_0", types={"ffn_dwn": "Q8_0"})
    with pytest.raises(UserError, match="has no type 'Q9_0'; did you mean"):
        quantized(source, out, "Q4_0", types={"ffn_down": "Q9_0"})
    with pytest.raises(UserError, match="could not quantize .* to Q4_0: .*failed to quantize"):
        quantized(source, out, "Q4_0", types={"(?P<x>ffn_down)": "Q8_0"})  # Python's, not C++'s
    written(other, {n: mean for n, mean in skewed.items() if "blk.0" in n})
    with pytest.raises(UserError, match="another model's importance matrix: it has 1 blocks, .* 2"):
        quantized(source, out, "Q4_0", imatrix=str(other))
    written(other, {n: mean[:32] for n, mean in skewed.items()})
    with pytest.raises(UserError, match="blk.0.attn_k.weight has 32 columns there, 576 in"):
        quantized(source, out, "Q4_0", imatrix=str(other))
    assert not out.exists()


def test_without_training_questions(fixed: Path, tmp_path: Path) -> None:
    prompts.write_items(tmp_path / "train.jsonl", [])
    request = {"folder": str(fixed), "questions": str(tmp_path / "train.jsonl"), "seed": 0}
    with pytest.raises(UserError, match="made from training questions and there are none"):
        child.run("edgeft.exporters.imatrix", {**request, "dataset": "", "out": ""})


def test_the_parent_stays_light() -> None:
    code = (
        "import sys, edgeft.exporters.stage;"
        "print({'torch', 'transformers', 'llama_cpp'} & set(sys.modules) or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


@pytest.mark.slow
def test_a_run_killed_while_it_measures_goes_on(tiny: Path, tmp_path: Path) -> None:
    """And the matrix is made once for each of base and tuned, whichever targets want it."""
    wanted = [*("--target", "gguf-q4_0-imatrix"), *("--target", "gguf-q3_k_m-imatrix")]
    out, matrices = tmp_path / "run", [tmp_path / f"run/imatrix/{w}" for w in ("base", "tuned")]
    for folder in matrices:
        process = subprocess.Popen(run_command(tiny, out, *wanted), stderr=subprocess.DEVNULL)
        while process.poll() is None and not folder.with_name(f"{folder.name}.partial").exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not folder.exists()
    done = finish(run_command(tiny, out, *wanted))
    assert done.stderr.count("✓ importance matrix") == 1, "the base's was kept"
    assert not list(out.glob("**/*.partial"))
    base, tuned = (imatrix.read(folder / "imatrix.gguf") for folder in matrices)
    assert base.chunks == tuned.chunks == 48 and base.datasets == ["wordmath/train.jsonl"]
    name = "blk.1.ffn_down.weight"
    assert not np.array_equal(base.columns[name], tuned.columns[name])
    found = {
        name: json.loads((out / f"export/{name}/tuned/stage.json").read_text())
        for name in ("gguf-q4_0", "gguf-q4_0-imatrix", "gguf-q3_k_m-imatrix")
    }
    assert "imatrix" not in found["gguf-q4_0"]
    assert found["gguf-q4_0-imatrix"]["imatrix"] == found["gguf-q3_k_m-imatrix"]["imatrix"]
    report = json.loads(finish(command("report", out, "--json")).stdout)
    assert "gguf-q4_0-imatrix" in {v["target"] for v in report["variants"]}
    again = finish(run_command(tiny, out, *wanted))
    assert "✓" not in again.stderr and again.stderr.count("importance matrix") == 2
