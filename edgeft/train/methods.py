"""The model as each method trains it, and what is kept of it afterwards."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from edgeft.errors import UserError
from edgeft.run import write_json
from edgeft.train.settings import TrainSettings


def prepared(base: Path, settings: TrainSettings, dtype: torch.dtype) -> tuple[Any, int]:
    """The model ready to be trained, and how many parameters the base has.

    Full fine-tuning: float32 parameters, whose products autocast makes in ``dtype``. The others:
    the base in ``dtype`` (QLoRA: in NF4), frozen, and a fresh float32 adapter on it.

    Raises:
        UserError: the base does not load, or has no layer that an adapter could train.
    """
    model = load(base, settings, dtype)
    parameters: int = model.num_parameters()
    if settings.method == "full":
        return model, parameters
    _check_targets(model, base, settings.target_modules)
    try:
        return get_peft_model(model, _lora(settings)), parameters
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot train {base}: {str(error).splitlines()[0]}") from error


def load(base: Path, settings: TrainSettings, dtype: torch.dtype) -> Any:
    """The base as the method sees it, before any adapter.

    Raises:
        UserError: it cannot be loaded.
    """
    own: dict[str, Any] = {"dtype": torch.float32 if settings.method == "full" else dtype}
    if settings.method == "qlora":
        own["quantization_config"] = nf4(dtype)
    if settings.attention != "auto":
        own["attn_implementation"] = settings.attention
    try:
        model = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, **own)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot train {base}: {str(error).strip().splitlines()[0]}") from error
    for module in model.modules():
        # bitsandbytes packs a layer for inference when it is first used in eval mode: its scales
        # are bfloat16 from then on, so looking at the held-out loss would change the weights.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def training_dtype(wanted: str) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies it, else float32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        try:
            flags = set(Path("/proc/cpuinfo").read_text().split())
        except OSError:
            flags = set()
        fast = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})  # the last one is ARM's
    return torch.bfloat16 if fast else torch.float32


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's storage (Dettmers et al. 2023): NF4, the scales quantized again; products in dtype."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def finish(trained: Path, start: Path, settings: TrainSettings, out: Path) -> None:
    """Make of what the model saved last, or at its best, what edgeft's users get.

    That is a PEFT adapter that fits the base as it is, or a whole model. An adapter that began with
    a part of the base, W - B0 A0 + B A, is the plain one W + [B, -B0] [A; A0] of twice the rank
    (as PEFT's ``path_initial_model_for_weight_conversion`` makes it).

    Args:
        trained, start: written by ``save_pretrained`` now and before the first step; ``start`` is
            read only for such an adapter.
    """
    if not settings.mutates_base:
        shutil.move(trained, out)
        return
    name = "adapter_model.safetensors"
    now, before = load_file(trained / name), load_file(start / name)
    plain = {
        key: torch.cat([value, before[key]], 0)
        if "lora_A" in key
        else torch.cat([value, -before[key]], 1)
        for key, value in now.items()
    }
    config = json.loads((trained / "adapter_config.json").read_text())
    # The scaling, alpha / r or alpha / sqrt(r), stays.
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2
    config |= {"r": 2 * config["r"], "init_lora_weights": True}
    out.mkdir(exist_ok=True)
    save_file(plain, out / name, metadata={"format": "pt"})
    write_json(out / "adapter_config.json", config)


def _lora(settings: TrainSettings) -> LoraConfig:
    modules = settings.target_modules.split(",")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.method == "dora",
        use_rslora=settings.rslora,
        init_lora_weights=True if settings.init == "default" else settings.init,
        target_modules=modules if len(modules) > 1 else modules[0],
    )


def _check_targets(model: Any, base: Path, wanted: str) -> None:
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    if not linear:
        raise UserError(
            f"{base} has no linear layer besides its head, so no adapter can train it: "
            "use train.method=full"
        )
    if wanted == "all-linear":
        return
    missing = {name for name in wanted.split(",") if name.rpartition(".")[2] not in linear}
    if missing:
        raise UserError(
            f"train.target_modules names {min(missing)}, which no linear layer of {base} is "
            f"called: it has {', '.join(sorted(linear))}"
        )
