"""Faster pieces put into a loaded model, wherever it has the ones that they equal."""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from edgeft.train.kernels import CausalAttention, GatedSilu, LoraLinear, RmsNorm

_ATTENTION = "sdpa_short"
_MOST = 1 << 25  # probabilities of one layer; more would take more memory than they save time
# Those that compute weight * x / rms(x); Gemma's has 1 + weight.
_SILU = ("SiLU", "SiLUActivation")
_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm", "SmolLM3RMSNorm")


def quicken(model: Any) -> None:
    """Swap in our norms, gated activations, LoRA products and, on a CPU, attention.

    Whatever is not known to compute the same stays as it is: other norms, DoRA, 4-bit layers,
    dropout. Parameters, their names and what is saved do not change.
    """
    for module in model.modules():
        if type(module).__name__ in _NORMS:
            module.forward = types.MethodType(_norm, module)
        elif type(getattr(module, "act_fn", None)).__name__ in _SILU and hasattr(
            module, "gate_proj"
        ):
            module.forward = types.MethodType(_mlp, module)
        elif type(module) is LoraLayer and is_plain(module):
            module.forward = types.MethodType(_lora, module)
    if not torch.cuda.is_available() and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_ATTENTION, _attention)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        model.config._attn_implementation = _ATTENTION


def _norm(self: Any, x: torch.Tensor) -> Any:
    return RmsNorm.apply(x, self.weight, self.variance_epsilon)


def _mlp(self: Any, x: torch.Tensor) -> Any:
    return self.down_proj(GatedSilu.apply(self.gate_proj(x), self.up_proj(x)))


def is_plain(layer: Any) -> bool:
    """Whether it is a LoRA layer on a plain frozen linear one, without dropout, bias of its own or DoRA."""
    name = next(iter(layer.lora_A), None)
    return (
        name is not None
        and len(layer.lora_A) == 1
        and not layer.lora_variant
        and not layer.lora_bias[name]
        and type(layer.base_layer) is torch.nn.Linear
        and not any(p.requires_grad for p in layer.base_layer.parameters())
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
    )


def _lora(self: Any, x: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
    if arguments or settings or self.disable_adapters or self.merged:
        return LoraLayer.forward(self, x, *arguments, **settings)
    (name,) = self.lora_A
    base = self.base_layer
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return LoraLinear.apply(x, base.weight, base.bias, a, b, self.scaling[name])


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> Any:
    length = query.shape[2]
    causal = settings.get("is_causal", getattr(module, "is_causal", True)) is not False
    other = attention_mask is not None or dropout or not causal
    other = other or any(settings.get(name) is not None for name in ("softcap", "position_bias"))
    many = query.shape[0] * query.shape[1] * length * length > _MOST
    whole = length == key.shape[2] and length > 1 and not many
    if other or not whole or not torch.is_grad_enabled():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **settings
        )
    if torch.is_autocast_enabled(query.device.type):  # with float32 parameters only v is bfloat16
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = CausalAttention.apply(query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None
