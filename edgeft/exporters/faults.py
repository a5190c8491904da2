"""What a user's own program would do otherwise than the benchmark: tokenizer, BOS, EOS, template.

Scores cannot show these, for every runtime is given the same token ids (DESIGN, decision 1).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import tokenizer
from edgeft.prompts import Item

_WRITE = "write the model's own into the file's {}, or export it with edgeft"
TOKENIZER, BOS, EOS, TEMPLATE, WEIGHTS = "tokenizer", "bos", "eos", "template", "weights"


@dataclass(frozen=True)
class Fault:
    """Something proved wrong with an artifact.

    Attributes:
        kind: ``tokenizer``, ``bos``, ``eos``, ``template`` or ``weights``.
        text: what is wrong, a clause without a full stop.
        remedy: what to try, likewise.
    """

    kind: str
    text: str
    remedy: str


def in_gguf(
    session: Any, items: Sequence[Item], folder: Path
) -> tuple[list[Fault], int, bool | None]:
    """What is wrong with a GGUF's metadata, as the llama.cpp that opened it understands it.

    Args:
        session: of the llama.cpp runtime.
        folder: the model's, whose tokenizer and template are right.

    Returns:
        The faults, how many prompts the file's tokenizer reads as the model's, and whether it
        carries the model's chat template (None: the model has none).
    """
    from edgeft.runtimes import llama_cpp

    faults, same = _tokenizer_faults(session, items, folder)
    ends = _end_faults(items, folder, lambda i: llama_cpp.ends(session, i))
    ours, theirs = tokenizer.chat_template(folder), llama_cpp.chat_template(session)
    template = None if ours is None else ours == theirs
    if template is False:
        text = "it has no chat template" if not theirs else "its chat template is not the model's"
        ends.append(Fault(TEMPLATE, text, _WRITE.format("tokenizer.chat_template")))
    return [*faults, *ends], same, template


def _tokenizer_faults(session: Any, items: Sequence[Item], folder: Path) -> tuple[list[Fault], int]:
    from tokenizers import Tokenizer

    from edgeft.runtimes import llama_cpp

    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.special_ids(ours, tokenizer.tokenizer_config(folder))
    bos = ours.id_to_token(ids["bos"]) if tokenizer.adds_bos(ours, ids) else None
    same, first = 0, None
    for item in items:
        # A template that writes the BOS itself is rendered without it by llama.cpp's programs.
        text = item.text.removeprefix(bos) if bos else item.text
        theirs = llama_cpp.tokenize(session, text, special=True)
        if theirs == item.prompt:
            same += 1
        elif first is None:
            first = _tokenizer_fault(theirs, item, ids.get("bos"))
    if first is None:
        return [], same
    share = f" ({len(items) - same} of {len(items)} prompts)"
    return [Fault(first.kind, first.text + share, first.remedy)], same


def _tokenizer_fault(theirs: Sequence[int], item: Item, bos: int | None) -> Fault:
    ours = item.prompt
    add = _WRITE.format("tokenizer.ggml.add_bos_token")
    if bos is not None and [bos, *theirs] == ours:
        return Fault(BOS, f"llama.cpp leaves out the BOS (token {bos}) before {item.id}", add)
    if bos is not None and list(theirs) == [bos, *ours]:
        return Fault(BOS, f"llama.cpp puts a BOS (token {bos}) before {item.id}", add)
    at = next(
        (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b),
        min(len(theirs), len(ours)),
    )
    return Fault(
        TOKENIZER,
        f"llama.cpp's tokenizer reads {item.id} differently from token {at} "
        f"({list(theirs[at : at + 3])} against {ours[at : at + 3]}): "
        "users' prompts would not be the ones scored here",
        _WRITE.format("tokenizer.ggml.pre and vocabulary"),
    )


def in_genai(artifact: Path, items: Sequence[Item], folder: Path) -> list[Fault]:
    """What is wrong with the EOS ids in ``genai_config.json``."""
    eos = json.loads((artifact / "genai_config.json").read_text())["model"].get("eos_token_id")
    stops = set(eos if isinstance(eos, list) else [eos])
    return _end_faults(items, folder, stops.__contains__)


def _end_faults(items: Sequence[Item], folder: Path, ends: Any) -> list[Fault]:
    """A program has to end where solutions end, and not within them."""
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    last = {item.gold[-1] for item in items if item.gold}
    within = {i for item in items for i in item.gold[:-1]} - last
    faults = []
    remedy = _WRITE.format("EOS (tokenizer.ggml.eos_token_id, or genai_config.json's eos_token_id)")
    if missed := sorted(i for i in last if not ends(i)):
        token = words.id_to_token(missed[0])
        text = f"it does not end an answer at {token!r} (token {missed[0]}), where solutions end"
        faults.append(Fault(EOS, text, remedy))
    if early := sorted(i for i in within if ends(i)):
        token = words.decode([early[0]], skip_special_tokens=False)
        text = f"it ends an answer at {token!r} (token {early[0]}), which stands within solutions"
        faults.append(Fault(EOS, text, remedy))
    return faults
