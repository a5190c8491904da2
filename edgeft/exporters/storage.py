"""How an exported file stores each matrix, by the model's own names. Light: no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# {"ggml": "Q4_0"}, or {"int4": the settings that a target's [onnx] table has}
Storage = Mapping[str, Any]
_NODE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)_proj/MatMul_Q(\d)")
_PLACES = {"attn": "self_attn", "mlp": "mlp"}
_PACKED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def gguf_tensors(artifact: Path, layers: int, keys: Iterable[str]) -> dict[str, Any]:
    """The tensors of a GGUF file that hold a model's matrices: ``gguf.gguf_reader.ReaderTensor``.

    Args:
        keys: the model's own names of them; those that the file has no place for are left out.
    """
    import gguf

    reader = gguf.GGUFReader(artifact)
    field = reader.get_field("general.architecture")
    assert field is not None
    name = field.contents()
    arch = next(a for a, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, layers)
    tensors = {t.name: t for t in reader.tensors if len(t.shape) > 1}
    found = {key: names.get_name(key, try_suffixes=(".weight",)) for key in keys}
    return {key: tensors[place] for key, place in found.items() if place in tensors}


def gguf_storage(artifact: Path, layers: int, keys: list[str]) -> dict[str, Storage]:
    """How a GGUF file stores a model's matrices; see :func:`gguf_tensors`."""
    tensors = gguf_tensors(artifact, layers, keys)
    return {key: {"ggml": tensor.tensor_type.name} for key, tensor in tensors.items()}


def onnx_storage(folder: Path, settings: Mapping[str, Any], keys: list[str]) -> dict[str, Storage]:
    """How the graph that onnxruntime-genai's builder made stores a model's matrices.

    Args:
        settings: of :class:`edgeft.exporters.onnx.OnnxSettings`, those that decide the rounding.
        keys: as in :func:`gguf_tensors`.
    """
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    found: dict[str, Storage] = {}
    for node in graph.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        if next(a.i for a in node.attribute if a.name == "bits") != 4:
            continue  # 8 bits lose next to nothing
        how = {"int4": settings}
        if node.op_type == "GatherBlockQuantized":
            found["model.embed_tokens.weight"] = how
        elif match := _NODE.fullmatch(node.name):
            layer, place, kind, _ = match.groups()
            for part in _PACKED.get(kind, (kind,)):
                found[f"model.layers.{layer}.{_PLACES[place]}.{part}_proj.weight"] = how
        elif node.name.startswith("/lm_head"):
            found["lm_head.weight"] = how
    if "lm_head.weight" in found:  # tied weights can be rounded in one way only: the head's
        found.setdefault("model.embed_tokens.weight", found["lm_head.weight"])
    return {key: how for key, how in found.items() if key in keys}
