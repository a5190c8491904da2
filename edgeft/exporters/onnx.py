"""A model folder to ONNX, by onnxruntime-genai's model builder: a fused graph for ONNX Runtime.

The builder copies whatever EOS the model's configuration names into ``genai_config.json``; here it
gets the ids that end a completion in training and scoring.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgeft import child, model
from edgeft.errors import UserError, near
from edgeft.run import write_json

# The builder knows more; each of these is proved against transformers in tests/test_onnx.py.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
)
PRECISIONS = ("fp32", "int8", "int4")
ALGORITHMS = ("default", "rtn", "k_quant")
PLACES = ("last_matmul", "mixed_layers")


@dataclass(frozen=True)
class OnnxSettings:
    """A target's ``[onnx]`` table: what the builder does to the weights.

    Attributes:
        precision: of the weights; activations are float32, or int8 at ``accuracy_level`` 4.
        block_size: weights that share one scale: 16, 32, 64, 128 or 256.
        symmetric: no zero points.
        accuracy_level: MatMulNBits' least accuracy of activations: 1 float32, 4 int8.
        algorithm: how weights are rounded: ``default`` (MLAS, to nearest), ``rtn``, ``k_quant``
            (scales chosen by weighted error, as llama.cpp's K-quants).
        eight_bit: what stays at 8 bits: ``last_matmul`` (the head), ``mixed_layers`` (the
            sensitive matrices of every few layers, as Q4_K_M chooses them).
        tied: one copy of the weights for embedding and head, where the model ties them. At int4
            both then have 4 bits.
    """

    precision: str = "fp32"
    block_size: int = 32
    symmetric: bool = True
    accuracy_level: int = 4
    algorithm: str = "default"
    eight_bit: Sequence[str] = ()
    tied: bool = True

    def __post_init__(self) -> None:
        for values, known, name in (
            ([self.precision], PRECISIONS, "precision"),
            ([self.algorithm], ALGORITHMS, "algorithm"),
            (self.eight_bit, PLACES, "eight_bit"),
        ):
            for value in values:
                if value not in known:
                    raise UserError(f"onnx.{name}: unknown '{value}'{near(str(value), known)}")


def settings_of(target: str, table: Mapping[str, Any]) -> OnnxSettings:
    """A target's table as settings.

    Raises:
        UserError: an unknown key or value; the target is named.
    """
    known = [field.name for field in fields(OnnxSettings)]
    for key in table:
        if key not in known:
            raise UserError(f"target {target}: unknown key 'onnx.{key}'{near(key, known)}")
    try:
        return OnnxSettings(**table)
    except UserError as error:
        raise UserError(f"target {target}: {error}") from error


def rounding_of(settings: OnnxSettings) -> dict[str, Any]:
    """The settings that decide how a matrix is rounded."""
    names = ("block_size", "symmetric", "algorithm")
    return {name: getattr(settings, name) for name in names}


def check_supported(folder: Path) -> None:
    """Refuse, before any training, a model that could not be exported afterwards.

    Raises:
        UserError: with what is supported.
    """
    architecture = (model.config(folder).get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"cannot export {architecture} to ONNX (supported: {', '.join(ARCHITECTURES)})"
        )


def convert(folder: Path, out: Path, settings: OnnxSettings, stop: Sequence[int]) -> None:
    """Write ``model.onnx``, its weights, ``genai_config.json`` and the tokenizer into ``out``.

    Args:
        stop: ids that end a completion; they become the configuration's EOS.

    Raises:
        UserError: the builder failed, with its reason.
    """
    from onnxruntime_genai.models import builder

    with tempfile.TemporaryDirectory() as cache:
        place = (str(folder), str(folder), str(out), settings.precision, "cpu", cache)
        try:
            options = builder.parse_extra_options(*place, _options(folder, settings))
            _one_rope(options["hf_details"]["hf_config"])
            builder.create_model(*place, **options)
        except Exception as error:  # whatever the builder raises is about this model
            reason = (str(error).strip() or "no reason").splitlines()[0]
            raise UserError(
                f"the ONNX model builder failed on {folder}: {type(error).__name__}: {reason}"
            ) from error
    path = out / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = list(stop)
    if config["model"].get("pad_token_id") is None:
        config["model"]["pad_token_id"] = stop[0]
    write_json(path, config)
    # The tokenizer as the model has it, not as it was saved again.
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def _one_rope(config: Any) -> None:
    """Rotary settings by kind of layer, as transformers 5 has them, the way the builder reads them."""
    nested = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in nested:
        config.rope_theta = nested["full_attention"]["rope_theta"]
        config.rope_local_base_freq = nested["sliding_attention"]["rope_theta"]
        config.rope_parameters = nested["full_attention"]


def _options(folder: Path, settings: OnnxSettings) -> list[str]:
    """The builder's ``KEY=VALUE`` options."""
    if settings.precision == "fp32":
        return []
    options = [
        f"block_size={settings.block_size}",
        f"is_symmetric={str(settings.symmetric).lower()}",
        f"accuracy_level={settings.accuracy_level}",
        f"algo_config={settings.algorithm}",
    ]
    if settings.eight_bit:
        places = ",".join(f"{place}:int8" for place in settings.eight_bit)
        options.append(f"matmul_mixed_precision={places}")
    if not settings.tied and model.config(folder).get("tie_word_embeddings"):
        options.append("shared_embeddings=false")
    return options


def _work(request: Any, emit: Callable[..., None]) -> None:
    settings = OnnxSettings(**request["settings"])
    convert(Path(request["folder"]), Path(request["out"]), settings, request["stop"])


def export(folder: Path, out: Path, settings: OnnxSettings, stop: Sequence[int]) -> None:
    """:func:`convert` in a child process.

    Raises:
        UserError: the builder failed, with its reason.
    """
    request = {"folder": str(folder), "out": str(out), "stop": list(stop)}
    child.run("edgeft.exporters.onnx", {**request, "settings": asdict(settings)})


if __name__ == "__main__":
    child.serve(_work)
