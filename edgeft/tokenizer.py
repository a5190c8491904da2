"""A model folder's tokenizer: what its files say, and how one is rebuilt from GGUF's metadata.

One table serves both directions (:mod:`edgeft.exporters.gguf_tokenizer` is the other): GGUF names
the pre-tokenizer of a byte-level BPE, ``tokenizer.json`` spells it out. Which name fits a
``tokenizer.json`` is found by what it does to a probe text, not by how it is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from edgeft.errors import UserError

# The splits of meta-llama/Meta-Llama-3-8B and Qwen/Qwen2: they differ in how digits are grouped.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT.format(digits=digits)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "qwen2": lambda: _split(r"\p{N}"),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
}
PROBE = (
    "Hello  World!\n\n\n \t\t x = 1234567 + 3.14; I'VE, you're  he'd\r\n  (ok)...   end "
    "naïve été 数学 на български ½ ٣٤ 🦙🦙 #### 42 \t"
)
CONTROL, USER_DEFINED = 3, 4  # gguf.TokenType
SPECIAL = ("bos", "eos", "unk", "pad")
_GGUF_NAME = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def pre_tokenizer_name(tokenizer: Tokenizer) -> str | None:
    """GGUF's name for a tokenizer's pre-tokenizer, or None when it is none that we know."""
    if tokenizer.pre_tokenizer is None:
        return None
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)
    for name, make in PRE_TOKENIZERS.items():
        if make().pre_tokenize_str(PROBE) == pieces:
            return name
    return None


def from_gguf(fields: Mapping[str, Any], folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``.

    Args:
        fields: a GGUF's metadata, key to plain value.
        folder: where the three files go.

    Raises:
        UserError: the tokenizer is of a kind that cannot be rebuilt from the metadata.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"the GGUF's tokenizer ({kind}, {pre}) cannot be rebuilt: "
            "give the model's Hugging Face id or folder instead"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind_ in zip(tokens, types, strict=True):
        if kind_ == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind_ == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    special = {
        name: tokens[fields[f"tokenizer.ggml.{_GGUF_NAME[name]}_token_id"]]
        for name in SPECIAL
        if f"tokenizer.ggml.{_GGUF_NAME[name]}_token_id" in fields
    }
    bos = special.get("bos") if fields.get("tokenizer.ggml.add_bos_token") else None
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": token for name, token in special.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    if template := fields.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template)


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` of a model folder, or nothing."""
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def special_ids(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, int]:
    """The ids of bos, eos, unk and pad, as far as ``tokenizer_config.json`` names them."""
    ids = {}
    for name in SPECIAL:
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (i := tokenizer.token_to_id(token)) is not None:
            ids[name] = i
    return ids


def adds_bos(tokenizer: Tokenizer, ids: Mapping[str, int]) -> bool:
    """Whether plain text gets a BOS in front, by what the tokenizer really does."""
    encoded = tokenizer.encode("a", add_special_tokens=True).ids
    return "bos" in ids and encoded[:1] == [ids["bos"]]


def chat_template(folder: Path) -> str | None:
    """The model's chat template: its own file, or the key in ``tokenizer_config.json``."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    template = tokenizer_config(folder).get("chat_template")
    if isinstance(template, list):  # several named ones: the one named default is the chat's
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template
