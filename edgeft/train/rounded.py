"""Training for a target: the model computes with its weights as the exported file will hold them."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from safetensors import safe_open
from torch import Tensor
from transformers import TrainerCallback

from edgeft.errors import UserError
from edgeft.exporters.storage import Storage
from edgeft.rounding import rounded
from edgeft.rounding.onnx_int4 import rounded_int4
from edgeft.train.fast import is_plain
from edgeft.train.kernels import RoundedLinear

Plan = Mapping[str, Storage]  # a parameter's name in the base, and how the target stores it
_ADAPTED = "base_model.model."  # what PEFT puts in front of the base's names


def stored(weight: Tensor, how: Storage) -> Tensor:
    """``weight``, float32 [rows, columns], as it is read back from the file: float32, same shape."""
    if "ggml" in how:  # a GGUF is quantized from one in float16
        return rounded(weight, how["ggml"], half=True)
    return rounded_int4(weight, **how["int4"])


class _Rounded:
    """What a quantizer leaves of one matrix and its adapter; made when it is asked for."""

    def __init__(self, base: Tensor, how: Storage, dtype: torch.dtype) -> None:
        self.base, self.how, self.dtype = base, how, dtype
        self.weight: Tensor | None = None  # None: what there was is out of date

    def of(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """[out, in] of the base's dtype, from a [r, in] and b [out, r]."""
        if self.weight is None:
            # Looking at held-out questions may come first, in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                merged = self.base + (b.float() @ a.float()) * scale  # as PEFT merges
                self.weight = stored(merged, self.how).to(self.dtype)
        return self.weight


class OncePerStep(TrainerCallback):  # type: ignore[misc]
    """Rounds anew after each optimizer step. (A fused optimizer leaves tensors' versions alone.)"""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        for module in model.modules():
            if isinstance(held := getattr(module, "rounded", None), _Rounded):
                held.weight = None

    on_optimizer_step = on_train_begin


def round_like(model: Any, base: Path, plan: Plan) -> None:
    """Let a model with a fresh LoRA adapter compute with what ``plan`` leaves of its weights.

    Rounding starts from the base's own float32, and is done once an optimizer step. What has no
    adapter is rounded here, once.

    Args:
        base: the folder that the model was loaded from.

    Raises:
        UserError: an adapted layer is none that can be rounded.
    """
    weights = read_weights(base, plan)
    missing = set(plan)
    for name, module in model.named_modules():
        key = name.removeprefix(_ADAPTED) + ".weight"
        if isinstance(module, LoraLayer) and key in plan:
            if not (type(module) is LoraLayer and is_plain(module)):
                raise UserError(f"cannot train {name} for a target: it is no plain LoRA layer")
            like = module.base_layer.weight
            module.rounded = _Rounded(weights[key].to(like.device), plan[key], like.dtype)
            module.forward = types.MethodType(_forward, module)
            missing.discard(key)
    for name, parameter in model.named_parameters():
        key = name.removeprefix(_ADAPTED)
        if key in missing:
            with torch.no_grad():
                parameter.copy_(stored(weights[key].to(parameter.device), plan[key]))
            missing.discard(key)


def _forward(self: Any, x: Tensor, *arguments: Any, **settings: Any) -> Any:
    if arguments or settings or self.disable_adapters or self.merged:
        return LoraLayer.forward(self, x, *arguments, **settings)
    (name,) = self.lora_A
    a, b, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    weight = self.rounded.of(a, b, scale)
    return RoundedLinear.apply(x, weight, self.base_layer.bias, a, b, scale)


def read_weights(folder: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """These weights of a model folder, float32.

    Raises:
        UserError: it lacks one.
    """
    keys, found = set(keys), {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for key in keys & set(tensors.keys()):
                found[key] = tensors.get_tensor(key).float().clone()  # not of the mapped file
    if lacking := keys - found.keys():
        raise UserError(f"{folder} has no {min(lacking)}, which the target stores")
    return found
