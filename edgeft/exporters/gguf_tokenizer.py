"""A model folder's tokenizer as GGUF metadata: byte-level BPE, or SentencePiece's kind of BPE.

Byte-level BPE is written as it is: merges and the name of a pre-tokenizer. For the other kind
(Llama 2, TinyLlama, Gemma) llama.cpp has no merges but a score for each token, and joins any two
neighbours that make a token, the best score first. ``tokenizer.json`` says the same by the order
of its merges, as long as every way to make a token is a merge: so scores follow from it, and a
``tokenizer.model`` is not needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers

from edgeft import tokenizer
from edgeft.errors import UserError

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # gguf.TokenType
_SPACE = "▁"  # how SentencePiece writes a space
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_TEXTS = (
    tokenizer.PROBE,
    "  two  spaces   three",
    "tail  ",
    "\n\na line\n",
    "\tTab\u00a0\uff46\uff35 \ufb01 e\u0301 \u2581 \u200b \U0001d7d9",
)
_QUESTION = f"{tokenizer.PROBE} Tom has 12 apples and buys 7. How many?"


def check_supported(folder: Path) -> None:
    """Refuse a model folder whose tokenizer cannot be written.

    Raises:
        UserError: with what is supported.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(unsupported(folder))
    ours, data = _read(folder)
    if _byte_level(ours, data) is None and _sentencepiece(folder, ours, data) is None:
        raise UserError(unsupported(folder))


def to_gguf(writer: Any, folder: Path, vocab_size: int) -> None:
    """Write a model folder's tokenizer and chat template into a ``gguf.GGUFWriter``.

    Args:
        vocab_size: rows of the embedding; ids that the tokenizer lacks become unused tokens.

    Raises:
        UserError: the tokenizer is of no kind that can be written.
    """
    ours, data = _read(folder)
    ids = tokenizer.special_ids(ours, tokenizer.tokenizer_config(folder))
    by_id = {i: token for token, i in ours.get_vocab(with_added_tokens=True).items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    apart = _apart(ours)
    types = [_type(by_id.get(i), apart.get(i)) for i in range(vocab_size)]
    if (pre := _byte_level(ours, data)) is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(merge) for merge in _merges(data)])
        prefix = False
    elif (found := _sentencepiece(folder, ours, data)) is not None:
        places, prefix = found
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        # A token that no merge makes is a character, a byte or an added one: never joined.
        writer.add_token_scores([-float(places.get(token, len(places))) for token in tokens])
    else:
        raise UserError(unsupported(folder))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if name in ids:
            add(ids[name])
    template = tokenizer.chat_template(folder)
    writer.add_add_space_prefix(prefix)
    writer.add_add_bos_token(
        tokenizer.adds_bos(ours, ids)
        and (template is None or _writes_bos(template, by_id[ids["bos"]]))
    )
    if template is not None:
        writer.add_chat_template(template)


def unsupported(folder: Path) -> str:
    """The line for a tokenizer that our GGUF writer does not cover."""
    return (
        f"{folder}: its tokenizer is neither a byte-level BPE that edgeft can write to GGUF "
        f"(pre-tokenizers known: {', '.join(tokenizer.PRE_TOKENIZERS)}) nor a SentencePiece-style "
        "BPE that llama.cpp would read in the same way; "
        "give llama.cpp's own converter with --llama-cpp DIR"
    )


def _read(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    path = folder / "tokenizer.json"
    return Tokenizer.from_file(str(path)), json.loads(path.read_text(encoding="utf-8"))


def _byte_level(ours: Tokenizer, data: dict[str, Any]) -> str | None:
    """GGUF's name of the pre-tokenizer, or None for another kind of tokenizer."""
    return tokenizer.pre_tokenizer_name(ours) if data["model"].get("type") == "BPE" else None


def _sentencepiece(
    folder: Path, ours: Tokenizer, data: dict[str, Any]
) -> tuple[dict[str, int], bool] | None:
    """Each merged token's place in the order, and whether text gets a space in front, or None."""
    model = data["model"]
    # With neither a prefix nor a suffix, which no SentencePiece model has, a merge is a + b.
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if model.get("type") != "BPE" or not model.get("byte_fallback") or any(map(model.get, odd)):
        return None
    vocab = model["vocab"]
    if any(f"<0x{i:02X}>" not in vocab and not (i < 128 and chr(i) in vocab) for i in range(256)):
        return None
    places = _places(data, {token.content for token in _apart(ours).values()})
    prefix = _space_prefix(folder, ours) if places is not None else None
    return None if places is None or prefix is None else (places, prefix)


def _merges(data: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in data["model"]["merges"])
    return [(a, b) for a, b in pairs]


def _places(data: dict[str, Any], apart: set[str]) -> dict[str, int] | None:
    """Token to its place in the order of merging; None where no scores can say the same.

    Args:
        apart: tokens that are cut out of a text before any merging.
    """
    merges = _merges(data)
    # Runs of one character tie in SentencePiece, so their merges lie among each other.
    ties = {token["content"] for token in data["added_tokens"]}
    places: dict[str, int] = {}
    before = ""
    for a, b in merges:
        if (token := a + b) != before and token in places and token not in ties:
            return None
        places.setdefault(token, len(places))
        before = token
    pairs = set(merges)
    for token in data["model"]["vocab"].keys() - apart:
        for i in range(1, len(token)):
            pair = token[:i], token[i:]
            if pair not in pairs and all(len(part) == 1 or part in places for part in pair):
                return None
    return places


def _apart(ours: Tokenizer) -> dict[int, AddedToken]:
    """The added tokens that llama.cpp cuts out of a text before anything else.

    Gemma's runs of ``▁`` are not among them: ``tokenizer.json`` lists them as added, but a text
    has spaces there, so it is merges that make them.
    """
    added = ours.get_added_tokens_decoder()
    return {i: token for i, token in added.items() if token.special or _SPACE not in token.content}


def _type(token: str | None, added: AddedToken | None) -> int:
    if token is None:
        return UNUSED
    if added is not None:
        return CONTROL if added.special else USER_DEFINED
    return BYTE if _BYTE.fullmatch(token) else NORMAL


def _writes_bos(template: str, bos: str) -> bool:
    """Whether a chat begins with a BOS; where it has none, llama.cpp must not add one either."""
    return "bos_token" in template or bos in template


def _space_prefix(folder: Path, ours: Tokenizer) -> bool | None:
    """Whether llama.cpp is to put a space before texts; None where it cannot read as we do.

    It puts one before a text and behind each special token, or nowhere. A tokenizer that wants
    one before a text only (what transformers 5 saves for Llama) is read right as long as its
    prompts have no need of both.
    """
    theirs = {prefix: _as_llama_cpp(ours, prefix) for prefix in (False, True)}

    def right(*texts: str) -> bool | None:
        for prefix, other in theirs.items():
            if all(_tokens(other, text) == _tokens(ours, text) for text in texts):
                return prefix
        return None

    apart = "".join(f"a{token.content} b {token.content}\n" for token in _apart(ours).values())
    everywhere = right(*_TEXTS, apart)
    return right(_prompt(folder)) if everywhere is None else everywhere


def _tokens(ours: Tokenizer, text: str) -> Sequence[str]:
    tokens: list[str] = ours.encode(text, add_special_tokens=False).tokens
    return tokens


def _as_llama_cpp(ours: Tokenizer, prefix: bool) -> Tokenizer:
    """The same merges, around which llama.cpp's few steps are all that happens."""
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    theirs = Tokenizer(ours.model)
    theirs.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    theirs.add_tokens(
        [
            AddedToken(token.content, normalized=False, special=token.special)
            for _, token in sorted(_apart(ours).items())
        ]
    )
    return theirs


def _prompt(folder: Path) -> str:
    """A text of the shape that the model is asked, in its chat template if it has one."""
    from edgeft import prompts
    from edgeft.tasks import Question

    question = Question("", _QUESTION, "", "")
    return prompts.prompt_text(prompts.load_tokenizer(folder), question)
