"""Merge a PEFT adapter into its base, in float32, and check that the logits stayed the same.

QLoRA trains on what NF4 leaves of the weights, so there are two merges, and the better one is taken;
merging into the four bits themselves would round the update away.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.errors import UserError
from edgeft.prompts import Item, read_items
from edgeft.run import write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
ORIGINAL, DEQUANTIZED = "original", "dequantized"
_PROMPTS = 8
# Float32 sums in another order differ by about 1e-6 of the largest logit; a wrong merge by 1e-2.
_TOLERANCE = 1e-3


def check_adapter(adapter: Path, model: str, base_sha256: str) -> None:
    """Refuse what is no PEFT adapter, or was trained on another base as far as its files tell.

    Args:
        model: the recipe's model reference.
        base_sha256: fingerprint of the base's files; adapters that edgeft trained carry it.

    Raises:
        UserError: with the reason.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} is not a PEFT adapter: it has no adapter_config.json")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{adapter} has no adapter_model.safetensors (pickled .bin adapters are not read): "
            "save it again with PEFT's save_pretrained"
        )
    named = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    ours = adapter / "edgeft.json"
    if ours.is_file():
        same = json.loads(ours.read_text())["base_sha256"] == base_sha256
    else:
        same = not (_is_hub_id(named) and _is_hub_id(model)) or named == model
    if not same:
        raise UserError(
            f"{adapter} was trained on another base ({named}), not on {model}: "
            "give that one with --model"
        )


def _is_hub_id(name: str | None) -> bool:
    return bool(name) and str(name).count("/") == 1 and not Path(str(name)).exists()


def merge(
    base: Path,
    adapter: Path,
    heldout: Path,
    out: Path,
    kinds: Sequence[str] = (ORIGINAL,),
    dtype: str = "auto",
) -> None:
    """Write the merged model folder (float32) and ``merge.json`` into ``out``.

    Args:
        heldout: questions; their prompts verify the merge, their loss chooses between two kinds.
        kinds: what to merge into. ``original``: the base's own weights. ``dequantized``: what NF4
            leaves of them, which is what a QLoRA adapter was trained on. Of two, the one with the
            lower held-out loss stays.
        dtype: that QLoRA was trained in, as train.dtype has it.

    Raises:
        UserError: the adapter does not fit the base, or merging changed the logits.
    """
    items = read_items(heldout)
    facts = {kind: _merge(base, adapter, items, out / kind, kind, dtype) for kind in kinds}
    chosen = min(facts, key=lambda kind: facts[kind]["heldout_loss"])
    for path in (out / chosen).iterdir():
        path.replace(out / path.name)
    for kind in kinds:
        shutil.rmtree(out / kind)
    copy_tokenizer(base, out)
    merges = {"chosen": chosen, "merges": facts} if len(kinds) > 1 or chosen != ORIGINAL else {}
    write_json(out / "merge.json", {**facts[chosen], **merges})


def _merge(
    base: Path, adapter: Path, items: Sequence[Item], out: Path, kind: str, dtype: str
) -> dict[str, float]:
    """One merge into the folder ``out``; its logit difference and held-out loss (nats a token)."""
    import torch
    from peft import PeftModel

    from edgeft.train.heldout import heldout_loss

    shutil.rmtree(out, ignore_errors=True)
    model = base_model(base, kind, dtype)
    try:
        adapted = PeftModel.from_pretrained(model, adapter).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{adapter} does not fit {base.name}: it was trained on another base "
            f"({_first_mismatch(error)})"
        ) from error
    _check_all_loaded(adapted, adapter)
    prompts = [item.prompt for item in items[:_PROMPTS]]
    with torch.inference_mode():
        before = [adapted(torch.tensor([p])).logits for p in prompts]
        merged = adapted.merge_and_unload()
        after = [merged(torch.tensor([p])).logits for p in prompts]
    difference = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    allowed = _TOLERANCE * max(float(b.abs().max()) for b in before)
    if not difference <= allowed:
        raise UserError(
            f"merging changed the logits by {difference:.3g} (allowed {allowed:.3g}): "
            f"{adapter} cannot be merged into {base.name}"
        )
    loss = heldout_loss(merged, items, pad=0)
    merged.save_pretrained(out)
    return {"max_logit_diff": difference, "allowed": allowed, "heldout_loss": loss}


def base_model(base: Path, kind: str, dtype: str) -> Any:
    """The base in float32, with the weights that the adapter is merged into.

    Args:
        kind, dtype: see :func:`merge`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if kind == ORIGINAL:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    from edgeft.train.methods import load, training_dtype
    from edgeft.train.settings import TrainSettings

    trained = load(base, TrainSettings(method="qlora"), training_dtype(dtype))
    return trained.dequantize().float()


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy what belongs to the tokenizer, the chat template and generation."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _check_all_loaded(adapted: Any, adapter: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
        unused = set(tensors.keys()) - set(get_peft_model_state_dict(adapted))
    if unused:
        raise UserError(
            f"{adapter} does not fit the base: {len(unused)} of its tensors have no place "
            f"there, such as {min(unused)}"
        )


def _first_mismatch(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "size mismatch" in line), lines[0])[:160]


def _work(request: Any, emit: Callable[..., None]) -> None:
    base, adapter, heldout, out = (
        Path(request[name]) for name in ("base", "adapter", "heldout", "out")
    )
    merge(base, adapter, heldout, out, request["kinds"], request["dtype"])


if __name__ == "__main__":
    child.serve(_work)
