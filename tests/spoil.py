"""A fine-tuned model as GGUF files that others made of it, right ones and wrong ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import spm

from edgeft import child, prompts, tasks
from edgeft.exporters import gguf, merge, tensors
from edgeft.exporters import imatrix as importance

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
HEADS = {"num_key_value_heads": 2, "tie_word_embeddings": False}
ALPHA, RANK = 8, 4
END = "<halt>"  # llama.cpp knows it by the metadata alone, and </s> by its name


@dataclass(frozen=True)
class World:
    """A small model with a BOS, a LoRA adapter of it, and what becomes of them.

    Attributes:
        base, adapter, tuned: folders.
        evaluation: questions as token ids.
    """

    path: Path
    base: Path
    adapter: Path
    tuned: Path
    evaluation: Path

    def file(self, weights: str) -> Path:
        """In 16 bits, as edgeft writes it."""
        out = self.path / f"{weights}.gguf"
        if not out.exists():
            gguf.convert(getattr(self, weights), out, weights)
        return out

    def matrices(self, weights: str) -> dict[str, Any]:
        return matrices(self.file(weights))


def world(path: Path, template: str = "inst", scale: float = 0.3, **config: Any) -> World:
    """Make one; ``scale``: of the update."""
    questions = tasks.find("wordmath").make(tasks.TaskSettings("wordmath", 200, 0, 12), 0)
    corpus = [f"{q.question} {q.solution}" for q in questions.train]
    kind = "tinyllama" if template == "zephyr" else "llama"
    words = spm.save(kind, template, corpus, path / "words")
    for file in words.iterdir():
        file.write_text(file.read_text().replace("</s>", END))
    base = spm.random_model(words, path / "base", "Llama", **SHAPE, **HEADS, **config)
    (path / "data").mkdir()
    prompts.encode(base, {"evaluation": questions.evaluation}, path / "data")
    tuned = path / "tuned"
    adapt(base, path / "adapter", scale).save_pretrained(tuned)
    merge.copy_tokenizer(base, tuned)
    return World(path, base, path / "adapter", tuned, path / "data" / "evaluation.jsonl")


def adapt(base: Path, out: Path, scale: float, seed: int = 1) -> Any:
    """Write an adapter of random weights; the model that it is merged into."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                weights *= scale
    adapted.save_pretrained(out)
    return adapted.merge_and_unload()


def rewrite(
    source: Path,
    out: Path,
    fields: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Copy a GGUF.

    Args:
        fields: new values of the metadata; None leaves a key out.
        changes: new tensors by name, float16 where they are matrices, else float32.
    """
    import gguf as official

    fields, changes = fields or {}, changes or {}
    reader = official.GGUFReader(source)
    writer = official.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        value = fields.get(name, field.contents())
        if value is None or name.startswith("GGUF.") or name == "general.architecture":
            continue
        part = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], part)
    for tensor in reader.tensors:
        if (new := changes.get(tensor.name)) is not None:
            writer.add_tensor(tensor.name, new.astype(np.float16 if new.ndim > 1 else np.float32))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def quantize(source: Path, out: Path, ftype: str, imatrix: Path | None = None) -> Path:
    request = {"source": str(source), "out": str(out), "ftype": ftype}
    matrix = str(imatrix) if imatrix else None
    child.run("edgeft.exporters.quantize", {**request, "imatrix": matrix})
    return out


def matrices(path: Path) -> dict[str, Any]:
    """Every matrix in float32."""
    found = tensors.matrices(tensors.opened(path)[1])
    return {name: tensors.read(tensor) for name, tensor in found.items()}


def imatrix(it: World, out: Path) -> Path:
    """An importance matrix of someone else's: some columns weigh thousands of times others."""
    rng, found = np.random.default_rng(0), {}
    for name, weights in it.matrices("tuned").items():
        squares = np.exp(rng.normal(0, 2, weights.shape[1]))
        found[name] = importance.Statistics(squares, 1000)
    importance.write(out, found, "theirs", 10, 100)
    return out


def nf4(weights: Any) -> Any:
    """What bitsandbytes leaves of weights in NF4, blocks of 64."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(torch.tensor(weights), blocksize=64, quant_type="nf4")
    return dequantize_4bit(packed, state).numpy()


def with_fields(**fields: Any) -> Callable[[World, Path], Path]:
    said = {f"tokenizer.{name.replace('__', '.')}": value for name, value in fields.items()}
    return lambda it, out: rewrite(it.file("tuned"), out, said)


def with_weights(change: Callable[[Any, Any], Any]) -> Callable[[World, Path], Path]:
    """``change(base, tuned)`` of each matrix that tuning changed."""

    def make(it: World, out: Path) -> Path:
        base, tuned = it.matrices("base"), it.matrices("tuned")
        changed = {n: change(base[n], w) for n, w in tuned.items() if (w != base[n]).any()}
        return rewrite(it.file("tuned"), out, changes=changed)

    return make


def with_rows(name: str) -> Callable[[World, Path], Path]:
    """The rows of one matrix in another order."""

    def make(it: World, out: Path) -> Path:
        rows = it.matrices("tuned")[name]
        order = np.random.default_rng(0).permutation(len(rows))
        return rewrite(it.file("tuned"), out, changes={name: rows[order]})

    return make


def with_eos_within(it: World, out: Path) -> Path:
    """The end of text is what stands in most solutions."""
    items = prompts.read_items(it.evaluation)
    [(token, _)] = Counter(i for item in items for i in set(item.gold[:-1])).most_common(1)
    return rewrite(it.file("tuned"), out, {"tokenizer.ggml.eos_token_id": token})


def with_norm(change: Callable[[Any], Any]) -> Callable[[World, Path], Path]:
    """One vector otherwise."""

    def make(it: World, out: Path) -> Path:
        name = "blk.1.attn_norm.weight"
        found = tensors.read(tensors.opened(it.file("tuned"))[1][name])[0]
        return rewrite(it.file("tuned"), out, changes={name: change(found)})

    return make


def another_model(it: World, out: Path) -> Path:
    folder = spm.random_model(it.base, out.with_suffix(""), "Llama", seed=5, **SHAPE, **HEADS)
    gguf.convert(folder, out, "another")
    return out


def another_adapter(it: World, out: Path) -> Path:
    folder = out.with_suffix("")
    adapt(it.base, folder / "adapter", 0.3, seed=7).save_pretrained(folder)
    merge.copy_tokenizer(it.base, folder)
    gguf.convert(folder, out, "another")
    return out


# By the file's name: the kind of fault, what is said of it, and how the file is made.
FAULTS: dict[str, tuple[str, str, Callable[[World, Path], Path]]] = {
    "eos-within": ("eos", "it ends an answer at '.+' .* stands within solutions", with_eos_within),
    "eos-missing": (
        "eos",
        r"it does not end an answer at '<halt>' \(token 2\), where solutions end",
        with_fields(ggml__eos_token_id=0),
    ),
    "bos-dropped": (
        "bos",
        r"llama.cpp leaves out the BOS \(token 1\) before .* \((12 of 12|20 of 20) prompts\)",
        with_fields(ggml__add_bos_token=False),
    ),
    "template-swapped": (
        "template",
        "its chat template is not the model's",
        with_fields(chat_template="{{ messages[0]['content'] }}"),
    ),
    "template-missing": ("template", "it has no chat template", with_fields(chat_template=None)),
    "head-permuted": (
        "weights",
        r"the rows of output.weight are the model's in another order \((100|99)% moved\)",
        with_rows("output.weight"),
    ),
    "embedding-permuted": (
        "weights",
        "the rows of token_embd.weight are the model's in another order",
        with_rows("token_embd.weight"),
    ),
    "queries-permuted": (
        "weights",
        "the rows of blk.1.attn_q.weight are the model's in another order",
        with_rows("blk.1.attn_q.weight"),
    ),
    "four-bits": (
        "weights",
        "at most 16 different values in every block of 64: it was rounded to 4 bits before",
        with_weights(lambda base, tuned: nf4(tuned)),
    ),
    "four-bits-of-four": (
        "weights",
        "at most 16 different values in every block of 64: it was rounded to 4 bits before",
        with_weights(lambda base, tuned: nf4(nf4(base) + tuned - base)),
    ),
    "base": (
        "weights",
        "the fine-tuning is not in it: these are the base's weights",
        with_weights(lambda base, tuned: base),
    ),
    "twice": (
        "weights",
        r"the fine-tuning is in it 2\.00 times",
        with_weights(lambda base, tuned: 2 * tuned - base),
    ),
    "half": (
        "weights",
        r"the fine-tuning is in it 0\.50 times",
        with_weights(lambda base, tuned: (tuned + base) / 2),
    ),
    "alpha-forgotten": (
        "weights",
        r"the fine-tuning is in it 8\.00 times",
        with_weights(lambda base, tuned: base + ALPHA * (tuned - base)),
    ),
    "another-model": ("weights", "tensors are another model's: ", another_model),
    "another-adapter": (
        "weights",
        "14 of its 21 tensors are not the tuned model's, by more than rounding",
        another_adapter,
    ),
    "norm-shifted": (
        "weights",
        "1 of its 21 tensors are not the tuned model's, .* blk.1.attn_norm.weight",
        with_norm(lambda norm: norm + 1),
    ),
}
