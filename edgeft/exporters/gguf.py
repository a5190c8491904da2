"""A model folder to a 16-bit GGUF, by the official ``gguf`` package.

What llama.cpp's ``convert_hf_to_gguf.py`` does for the architectures below; its checkout
(``--llama-cpp DIR``) covers the others.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import child, model
from edgeft.errors import UserError
from edgeft.exporters import gguf_settings, gguf_tokenizer

# Hugging Face's name to GGUF's. Llama's query and key rows are interleaved for GGUF's rotary order.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
}
_ROPE_TYPES = ("default", "llama3")
# What transformers takes for keys that a Gemma 3 config.json may leave out.
_GEMMA3 = {
    "attention_bias": False,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_NOT_IN_GEMMA3 = (
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
)
_GEMMA3_PATTERN = 6  # every sixth layer sees all positions: llama.cpp takes no other
_GEMMA3_27B = 62  # layers by which llama.cpp knows the one size that scales attention otherwise


def check_supported(folder: Path, llama_cpp: Path | None) -> None:
    """Refuse, before any training, a model that could not be exported afterwards.

    Raises:
        UserError: with what is supported.
    """
    if llama_cpp is not None:
        if not (llama_cpp / "convert_hf_to_gguf.py").is_file():
            raise UserError(f"{llama_cpp} is no llama.cpp checkout: no convert_hf_to_gguf.py there")
        return
    config = _config(folder)
    architecture = (config.get("architectures") or ["none"])[0]
    known = ", ".join(ARCHITECTURES)
    advice = "give llama.cpp's own converter with --llama-cpp DIR"
    if architecture not in ARCHITECTURES:
        raise UserError(f"cannot export {architecture} to GGUF (supported: {known}); {advice}")
    if (rope := _rope(config)[0]) not in _ROPE_TYPES:
        raise UserError(f"cannot export rotary type '{rope}' to GGUF; {advice}")
    if ARCHITECTURES[architecture] == "gemma3" and (key := _odd_gemma3(config)):
        raise UserError(
            f"cannot export this Gemma 3 to GGUF: {key} is not what llama.cpp has built in; {advice}"
        )
    gguf_tokenizer.check_supported(folder)


def check_types(types: Mapping[str, str], folder: Path) -> None:
    """Refuse, before any training, expressions for types that no tensor's name has.

    Names are known for the architectures above; of others they are seen in the file.

    Raises:
        UserError: it names the expression.
    """
    import gguf

    config = model.config(folder)
    if types and (config.get("architectures") or ["none"])[0] in ARCHITECTURES:
        blocks = range(config["num_hidden_layers"])
        names = [gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[_arch(config)]]
        gguf_settings.check_types(
            types, [f"{name.format(bid=i)}.weight" for name in names for i in blocks]
        )


def convert(folder: Path, out: Path, name: str, llama_cpp: Path | None = None) -> None:
    """Write ``out`` (GGUF, matrices float16, vectors float32) from a model folder.

    Args:
        name: ``general.name`` in the file.
        llama_cpp: a llama.cpp checkout whose converter is used instead of ours.

    Raises:
        UserError: the architecture or tokenizer is not supported, or a weight exceeds float16.
    """
    if llama_cpp is not None:
        _convert_by_checkout(folder, out, name, llama_cpp)
        return
    import gguf

    config = _config(folder)
    architecture = ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_hyperparameters(writer, config)
    gguf_tokenizer.to_gguf(writer, folder, config["vocab_size"])
    _add_tensors(writer, folder, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_hyperparameters(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_rope(config)[1].get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    if config["architectures"][0] == "Gemma3ForCausalLM":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_freq_base_swa(_local_theta(config))


def _config(folder: Path) -> dict[str, Any]:
    config = model.config(folder)
    gemma3 = (config.get("architectures") or [""])[0] == "Gemma3ForCausalLM"
    return {**_GEMMA3, **config} if gemma3 else config


def _odd_gemma3(config: dict[str, Any]) -> str | None:
    """The first setting that llama.cpp's gemma3, which has most of them built in, cannot have."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    scale = config["hidden_size"] // heads if layers == _GEMMA3_27B else config["head_dim"]
    kinds = ["sliding_attention"] * layers
    kinds[_GEMMA3_PATTERN - 1 :: _GEMMA3_PATTERN] = ["full_attention"] * (layers // _GEMMA3_PATTERN)
    pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
    own = config.get("layer_types")
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    odd = {
        "query_pre_attn_scalar": config["query_pre_attn_scalar"] != scale,
        "layer_types": own != kinds if own else pattern not in (None, _GEMMA3_PATTERN),
        "sliding_window": not config["sliding_window"],
        "rope_parameters": local.get("rope_type", "default") != "default",
        "hidden_activation": config["hidden_activation"] != "gelu_pytorch_tanh",
        **{key: bool(config.get(key)) for key in _NOT_IN_GEMMA3},
    }
    name = next((key for key, is_odd in odd.items() if is_odd), None)
    value = config.get(name) if name else None
    return name if value is None or isinstance(value, (list, dict)) else f"{name} {value}"


def _rope(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The rotary type and its parameters, from transformers 5's key or the older ones."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parameters = parameters.get("full_attention", parameters)  # by the kind of layer, in Gemma 3
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    return kind, {**parameters, "rope_theta": theta}


def _local_theta(config: dict[str, Any]) -> float:
    """Gemma 3's rotary base in the layers that see a window, from the newer key or the older."""
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    theta: float = local.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0
    return theta


def name_map(config: dict[str, Any]) -> Any:
    """``gguf.TensorNameMap``: a model's tensor names to GGUF's.

    Args:
        config: of a model of one of :data:`ARCHITECTURES`.
    """
    import gguf

    return gguf.get_tensor_name_map(_arch(config), config["num_hidden_layers"])


def _arch(config: dict[str, Any]) -> Any:
    """``gguf.MODEL_ARCH`` of a known architecture."""
    import gguf

    ours = ARCHITECTURES[config["architectures"][0]]
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == ours)


@dataclass(frozen=True)
class Layout:
    """Where a model's weights stand in GGUF, and in which order of rows.

    Attributes:
        architecture: GGUF's name of it.
        tied: the head is the embedding and is not written.
    """

    architecture: str
    tied: bool
    _heads: int
    _kv_heads: int
    _names: Any

    def name(self, key: str) -> str | None:
        """GGUF's name of a weight or bias by transformers' one, if it has a place."""
        found: str | None = self._names.get_name(key, try_suffixes=(".weight", ".bias"))
        return found

    def rows(self, key: str, tensor: Any) -> Any:
        """The rows in llama.cpp's order: of a weight, a bias, or a LoRA's B."""
        if self.architecture == "llama" and ".q_proj." in key:
            return _interleave(tensor, self._heads)
        if self.architecture == "llama" and ".k_proj." in key:
            return _interleave(tensor, self._kv_heads)
        return tensor


def layout(folder: Path) -> Layout:
    """Of a model folder that :func:`check_supported` has taken."""
    config = _config(folder)
    architecture = ARCHITECTURES[config["architectures"][0]]
    heads = config["num_attention_heads"]
    return Layout(
        architecture,
        config.get("tie_word_embeddings", False),
        heads,
        config.get("num_key_value_heads") or heads,
        name_map(config),
    )


def _add_tensors(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    import numpy as np

    place = layout(folder)
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    for key, tensor in _tensors(folder):
        if (place.tied and key == "lm_head.weight") or key.endswith("rotary_emb.inv_freq"):
            continue
        name = place.name(key)
        if name is None:
            raise UserError(f"{folder}: tensor {key} has no place in a {place.architecture} GGUF")
        tensor = place.rows(key, tensor)
        if place.architecture == "gemma3":
            tensor = tensor + _shift(key)
        if tensor.ndim > 1:
            if float(np.abs(tensor).max()) > np.finfo(np.float16).max:
                raise UserError(
                    f"{folder}: {key} has values beyond float16, GGUF F16 cannot hold it"
                )
            tensor = tensor.astype(np.float16)
        writer.add_tensor(name, tensor)


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield key, tensors.get_tensor(key).float().numpy()


def _interleave(tensor: Any, heads: int) -> Any:
    """Rows [head, half, pair] to [head, pair, half], as llama.cpp's converter permutes them."""
    shape = tensor.shape
    return (
        tensor.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    )


def _shift(key: str) -> int:
    """What transformers adds to Gemma 3's weights in the layer, and llama.cpp does not."""
    return 1 if key.endswith("norm.weight") else 0


def _rope_factors(config: dict[str, Any]) -> list[float] | None:
    """Llama 3.1's frequency factors (transformers' ``_compute_llama3_parameters``), or None."""
    kind, rope = _rope(config)
    if kind != "llama3":
        return None
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = min(max((context / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return factors


def _convert_by_checkout(folder: Path, out: Path, name: str, checkout: Path) -> None:
    arguments = [str(folder), "--outtype", "f16", "--model-name", name]
    run_script(checkout / "convert_hf_to_gguf.py", arguments, out)


def run_script(script: Path, arguments: Sequence[str], out: Path) -> None:
    """Write ``out`` by one of a llama.cpp checkout's converters.

    Raises:
        UserError: it failed, with its last line.
    """
    command = [sys.executable, str(script), *arguments, "--outfile", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise UserError(f"{script} failed: {lines[-1].strip()}")


def _work(request: Any, emit: Callable[..., None]) -> None:
    checkout = request["llama_cpp"]
    convert(
        Path(request["folder"]),
        Path(request["out"]),
        request["name"],
        Path(checkout) if checkout else None,
    )


if __name__ == "__main__":
    child.serve(_work)
