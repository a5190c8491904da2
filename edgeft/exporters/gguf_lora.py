"""A PEFT adapter to a GGUF LoRA, which llama.cpp applies to a quantized base when it loads.

What llama.cpp's ``convert_lora_to_gguf.py`` writes, and with rsLoRA's and each layer's own scaling,
which that leaves out. The matrices are float16: half the bytes of float32, on the disk and for every
token, and rounding them is nothing beside what quantizing the base costs. A QLoRA adapter goes onto
the original weights here, though it was trained on what NF4 leaves of them.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.catalog import Target
from edgeft.errors import UserError
from edgeft.exporters import gguf
from edgeft.recipe import Recipe

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SCRIPT = "convert_lora_to_gguf.py"
METHODS = ("lora", "qlora")
_MATRIX = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
# What PEFT computes otherwise than W + scaling * B A, by the key that turns it on.
_BEYOND = {
    "use_dora": "DoRA",
    "modules_to_save": "whole layers (modules_to_save)",
    "trainable_token_indices": "trained embeddings",
    "target_parameters": "target_parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "aLoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "lora_bias": "biases",
    "fan_in_fan_out": "transposed layers",
}


def check_supported(targets: Iterable[Target], recipe: Recipe, adapter: Path | None) -> None:
    """Refuse, before any training where it can be known, an adapter that GGUF cannot hold.

    Args:
        adapter: the PEFT adapter's folder, if there is one yet.

    Raises:
        UserError: the first target that wants one, and why it cannot have it.
    """
    name = next((target.name for target in targets if target.adapter), None)
    if name is None:
        return
    method = recipe.train.method
    if recipe.adapter is None and method not in METHODS:
        leaves = "no adapter" if method == "full" else "one that llama.cpp cannot apply"
        raise UserError(
            f"target {name} ships the base with a LoRA adapter, and method {method} leaves {leaves}: "
            f"train with --method {' or '.join(METHODS)}, or take a target without one"
        )
    checkout = recipe.export.llama_cpp
    if checkout and not (Path(checkout) / _SCRIPT).is_file():
        raise UserError(f"target {name}: {checkout} has no {_SCRIPT}")
    if adapter is not None:
        try:
            _layers(adapter, _config(adapter))
        except UserError as error:
            raise UserError(f"target {name}: {error}") from error


def convert(adapter: Path, base: Path, out: Path, llama_cpp: Path | None = None) -> None:
    """Write ``out`` (GGUF LoRA, matrices float16).

    For each adapted matrix of the model [rows, columns] there are ``<name>.lora_a`` [rank, columns]
    and ``<name>.lora_b`` [rows, rank], and llama.cpp adds ``adapter.lora.alpha / rank * B A``.

    Args:
        adapter: a PEFT adapter's folder.
        base: the model folder that it belongs to.
        llama_cpp: a llama.cpp checkout whose converter is used instead of ours.

    Raises:
        UserError: the adapter is not plain LoRA, has no place in the base, or exceeds float16.
    """
    config = _config(adapter)
    alpha, matrices = _scaled(adapter, config)
    if llama_cpp is not None:
        _convert_by_checkout(matrices, {**config, "lora_alpha": alpha}, base, out, llama_cpp)
        return
    import gguf as official
    import numpy as np

    layout = gguf.layout(base)
    writer = official.GGUFWriter(out, layout.architecture)
    writer.add_type(official.GGUFType.ADAPTER)
    writer.add_string(official.Keys.Adapter.TYPE, "lora")
    writer.add_float32(official.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_quantization_version(official.GGML_QUANT_VERSION)
    for layer, (a, b) in matrices.items():
        name = layout.name(f"{layer}.weight")
        if name is None or (layout.tied and layer == "lm_head"):
            raise UserError(f"{adapter} adapts {layer}, which a GGUF of {base.name} does not have")
        # Only B has the rows of the weight.
        parts = {"lora_a": a, "lora_b": layout.rows(f"{layer}.weight", b)}
        for part, matrix in parts.items():
            if not float(np.abs(matrix).max()) <= float(np.finfo(np.float16).max):
                raise UserError(f"{adapter}: {layer} has values that float16 cannot hold")
            writer.add_tensor(f"{name}.{part}", matrix.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _config(adapter: Path) -> dict[str, Any]:
    """``adapter_config.json``, if it is plain LoRA's."""
    try:
        config: dict[str, Any] = json.loads((adapter / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{adapter}: {_CONFIG} cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise UserError(f"{adapter} is {config.get('peft_type')}, a GGUF adapter holds LoRA only")
    beyond = [what for key, what in _BEYOND.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        beyond.append("biases")
    if beyond:
        raise UserError(f"{adapter} has {beyond[0]}, a GGUF adapter holds plain LoRA only")
    if not config.get("lora_alpha"):
        raise UserError(f"{adapter}: lora_alpha is 0, so the adapter changes nothing")
    return config


def _layers(adapter: Path, config: dict[str, Any]) -> list[str]:
    """Names of the adapted layers; refuses an adapter with any other tensor in it."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, set[str]] = {}
    try:
        with safe_open(adapter / _WEIGHTS, framework="numpy") as tensors:
            keys = list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{adapter / _WEIGHTS} cannot be read: {error}") from error
    for key in keys:
        if key.endswith(".base_layer.weight"):  # PEFT saves an adapted head with what it adapts
            continue
        match = _MATRIX.fullmatch(key)
        if match is None:
            raise UserError(f"{adapter} has {key}, a GGUF adapter holds plain LoRA only")
        found.setdefault(match["layer"], set()).add(match["part"])
    for layer, parts in found.items():
        if parts != {"A", "B"}:
            raise UserError(f"{adapter} is damaged: {layer} has only one of its two matrices")
    if not found:
        raise UserError(f"{adapter} has no layer in it")
    return sorted(found)


def _scaled(adapter: Path, config: dict[str, Any]) -> tuple[float, dict[str, tuple[Any, Any]]]:
    """``adapter.lora.alpha``, and A [rank, columns] and B [rows, rank] of each layer, float32.

    llama.cpp scales by alpha / rank, with each matrix's own rank and one alpha for all; what PEFT
    scales by besides goes into B, which for plain LoRA stays as it is.
    """
    from peft.utils.other import get_pattern_key
    from safetensors import safe_open

    alpha = float(config["lora_alpha"])
    own = config.get("alpha_pattern") or {}
    matrices = {}
    with safe_open(adapter / _WEIGHTS, framework="pt") as tensors:
        for layer in _layers(adapter, config):
            a, b = (
                tensors.get_tensor(f"base_model.model.{layer}.lora_{part}.weight").float().numpy()
                for part in "AB"
            )
            more = own.get(get_pattern_key(list(own), layer), alpha) / alpha
            if config.get("use_rslora"):  # alpha / sqrt(rank)
                more *= len(a) ** 0.5
            matrices[layer] = (a, b if more == 1 else b * more)
    return alpha, matrices


def _convert_by_checkout(
    matrices: dict[str, tuple[Any, Any]],
    config: dict[str, Any],
    base: Path,
    out: Path,
    checkout: Path,
) -> None:
    from safetensors.numpy import save_file

    plain = {**config, "use_rslora": False, "alpha_pattern": {}}  # it is in B already
    tensors = {
        f"base_model.model.{layer}.lora_{part}.weight": matrix
        for layer, both in matrices.items()
        for part, matrix in zip("AB", both, strict=True)
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / _CONFIG).write_text(json.dumps(plain), encoding="utf-8")
        save_file(tensors, folder / _WEIGHTS)
        gguf.run_script(checkout / _SCRIPT, [place, "--base", str(base), "--outtype", "f16"], out)


def _work(request: Any, emit: Callable[..., None]) -> None:
    adapter, base, out = (Path(request[name]) for name in ("adapter", "base", "out"))
    convert(adapter, base, out, Path(request["llama_cpp"]) if request["llama_cpp"] else None)


if __name__ == "__main__":
    child.serve(_work)
