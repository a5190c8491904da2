"""A small vocabulary of SentencePiece's kind, in the shapes that tokenizer.json has for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

UNICODE = (
    "Zoë's naïve café: 12 € “été”… 数学は楽しい。 на български език ½ ٣٤ हिन्दी 한국어\n\n"
    "| a | b |\n\tx = 1234567.89;  # two  spaces\n😀 👩‍👩‍👧 #### 42\n" * 4
)
# TinyLlama's way: no BOS, and the end of a turn is the end of the text.
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] + eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Llama 2's way: the BOS comes first, then plain text until the turn ends.
INST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEMPLATES = {"zephyr": ZEPHYR, "inst": INST, "gemma": GEMMA, "none": None}
RUNS = [character * n for character in "\n▁" for n in range(2, 6)]  # as Gemma has them, up to 31
LLAMA = ["<unk>", "<s>", "</s>"]
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
TURNS = ["<start_of_turn>", "<end_of_turn>"]


def learn(corpus: list[str], special: list[str], runs: list[str]) -> dict[str, Any]:
    """``vocab`` and ``merges`` as transformers makes them of a SentencePiece model."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers.tokenization_utils_base import generate_merges

    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(split=True), pre_tokenizers.Digits(individual_digits=True)]
    )
    trainer = trainers.BpeTrainer(vocab_size=900, limit_alphabet=110, show_progress=False)
    learned.train_from_iterator(corpus, trainer)
    pieces = sorted(learned.get_vocab().items(), key=lambda item: item[1])
    characters = [piece for piece, _ in pieces if len(piece) == 1]
    joined = [piece for piece, _ in pieces if len(piece) > 1 and piece not in runs]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *runs, *joined, *characters]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "\n", "▁"]))}
    scores = {run: 0.0 for run in runs} | {piece: -1.0 - i for i, piece in enumerate(joined)}
    return {"vocab": vocab, "merges": generate_merges(vocab, scores)}


def save(kind: str, template: str, corpus: list[str], folder: Path) -> Path:
    """Write a tokenizer into a folder.

    Args:
        kind: ``gemma`` and ``llama`` (``bare``: without a space in front) as transformers 5 saves
            them, ``tinyllama`` as the hub has it.
        template: a key of ``TEMPLATES``.
    """
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer, LlamaTokenizer

    if kind == "gemma":
        model = learn(corpus, [*GEMMA_TOKENS, *TURNS], RUNS)
        made = GemmaTokenizer(**model, add_bos_token=True)
        made.add_tokens([AddedToken(turn, special=True, normalized=False) for turn in TURNS])
        made.add_tokens([AddedToken(run, normalized=False) for run in RUNS])
    else:
        model = learn(corpus, LLAMA, [])
        made = LlamaTokenizer(**model, add_bos_token=True, add_prefix_space=kind != "bare")
    made.chat_template = TEMPLATES[template]
    made.save_pretrained(folder)
    if kind == "tinyllama":
        edit(folder, as_the_hub_has_it)
    return folder


def random_model(words: Path, folder: Path, family: str, seed: int = 0, **config: Any) -> Path:
    """A model folder with random weights and the tokenizer in ``words``."""
    import torch
    import transformers

    shutil.copytree(words, folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    settings = getattr(transformers, name)(
        vocab_size=len(tokens) + 5,  # padded, as many are
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.3,
        **{"hidden_size": 64, "intermediate_size": 128, **config},
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(settings)
    for key, weight in model.named_parameters():
        if key.endswith("norm.weight"):  # each its own, so that none can stand for another
            torch.nn.init.normal_(weight, 0.0 if family == "Gemma3" else 1.0, 0.3)
    model.save_pretrained(folder)
    return folder


def as_the_hub_has_it(data: dict[str, Any]) -> None:
    """The steps that LlamaTokenizerFast of transformers 4 wrote."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    data["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    data["pre_tokenizer"] = None


def edit(folder: Path, change: Any) -> None:
    """Apply a change to ``tokenizer.json``."""
    data = json.loads((folder / "tokenizer.json").read_text())
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
