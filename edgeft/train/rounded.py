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


def stored(weight: Tensor, how: Storage, out: Tensor | None = None) -> Tensor:
    """``weight``, float32 [rows, columns], as it is read back from the file: float32, same shape.

    Args:
        out: where the result goes, as in :func:`edgeft.rounding.rounded`; it may be ``weight``.
    """
    if "ggml" in how:  # a GGUF is quantized from one in float16
        return rounded(weight, how["ggml"], half=True, out=out)
    return rounded_int4(weight, **how["int4"], out=out)


class _Rounded:
    """What a quantizer leaves of one matrix and its adapter; made when it is asked for.

    Memory is taken once: fresh pages would cost more than most kinds of rounding. Matrices of one
    shape share the ``scratch``.
    """

    def __init__(
        self, base: Tensor, how: Storage, dtype: torch.dtype, scratch: dict[torch.Size, Tensor]
    ) -> None:
        self.base, self.how, self.scratch = base, how, scratch
        self.weight = torch.empty_like(base, dtype=dtype)
        self.is_current = False

    def of(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """[out, in] of the dtype, from a [r, in] and b [out, r]."""
        if not self.is_current:
            # Looking at held-out questions may come first, in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                if self.base.shape not in self.scratch:
                    self.scratch[self.base.shape] = torch.empty_like(self.base)
                merged = self.scratch[self.base.shape]
                # As PEFT merges: in float32, which autocast leaves alone where out= is given.
                torch.mm(b.float(), a.float(), out=merged).mul_(scale).add_(self.base)
                self.weight.copy_(stored(merged, self.how, merged))
            self.is_current = True
        return self.weight


class OncePerStep(TrainerCallback):  # type: ignore[misc]
    """Rounds anew after each optimizer step. (A fused optimizer leaves tensors' versions alone.)"""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        for module in model.modules():
            if isinstance(held := getattr(module, "rounded", None), _Rounded):
                held.is_current = False

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
    scratch: dict[torch.Size, Tensor] = {}
    for name, module in model.named_modules():
        key = name.removeprefix(_ADAPTED) + ".weight"
        if isinstance(module, LoraLayer) and key in plan:
            if not (type(module) is LoraLayer and is_plain(module)):
                raise UserError(f"cannot train {name} for a target: it is no plain LoRA layer")
            like = module.base_layer.weight
            own = weights[key].to(like.device)
            module.rounded = _Rounded(own, plan[key], like.dtype, scratch)
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
