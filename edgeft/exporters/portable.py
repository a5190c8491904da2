"""A model folder to an ONNX graph of standard operators, by optimum in an environment of its own.

optimum-onnx needs transformers 4, which cannot be installed beside the transformers 5 that trains.
So the export is a child of that environment's Python, and reads a configuration rewritten for it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from edgeft import child, model
from edgeft.errors import UserError, near
from edgeft.run import write_json

# optimum-onnx knows more; each of these is proved against transformers in tests/test_portable.py.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
)
PRECISIONS = ("fp32", "int8")
# The others' frequencies follow the length of the text, which a traced graph does not see.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_VARIABLE = "EDGEFT_OPTIMUM_PYTHON"
_FOLDER = ".venv-optimum"


def find_python() -> Path:
    """The Python of the environment that has optimum.

    Raises:
        UserError: there is none; the text says what to type.
    """
    if given := os.environ.get(_VARIABLE):
        if not Path(given).is_file():
            raise UserError(f"{_VARIABLE}={given}: there is no such file")
        return Path(given).absolute()
    checkout = Path(__file__).absolute().parents[2]
    for place in (Path.cwd(), checkout):
        # Not resolved: an environment's python is a link, and it is the link that tells which.
        if (python := place / _FOLDER / "bin" / "python").is_file():
            return python
    make = (
        f"make -C {checkout} optimum"
        if (checkout / "Makefile").is_file()
        else f"python -m venv {_FOLDER} && {_FOLDER}/bin/pip install 'edgeft[optimum]'"
    )
    raise UserError(
        "onnx-portable targets are exported by optimum, in an environment of its own "
        f"(it cannot live beside transformers 5): {make} (or name its python in {_VARIABLE})"
    )


def precision_of(target: str, settings: dict[str, Any]) -> str:
    """The precision in a target's ``[onnx-portable]`` table.

    Raises:
        UserError: an unknown key or precision; the target is named.
    """
    for key in settings:
        if key != "precision":
            raise UserError(f"target {target}: unknown key '{key}'{near(key, ['precision'])}")
    precision = str(settings.get("precision", "fp32"))
    if precision not in PRECISIONS:
        raise UserError(
            f"target {target}: unknown precision '{precision}'{near(precision, PRECISIONS)}"
        )
    return precision


def check_supported(folder: Path) -> None:
    """Refuse, before any training, a model that could not be exported afterwards.

    Raises:
        UserError: with what is supported, or with how to get the environment that exports.
    """
    config = model.config(folder)
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"cannot export {architecture} to onnx-portable (supported: {known})")
    for_transformers_4(config)
    find_python()


def convert(folder: Path, out: Path, precision: str) -> None:
    """Write ``out/model.onnx`` (beyond 2 GB with its data in a second file) from a model folder.

    The graph takes ``input_ids``, ``attention_mask``, ``position_ids`` and ``past_key_values``.
    Its operators are ONNX's own (domain ``ai.onnx``), those of int8 too: ``MatMulInteger`` and
    ``DynamicQuantizeLinear``.

    Args:
        out: created if it is not there.
        precision: one of :data:`PRECISIONS`.

    Raises:
        UserError: there is no environment with optimum, or the export failed; one line.
    """
    python = find_python()
    config = for_transformers_4(model.config(folder))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as work:
        source = Path(work) / "model"
        source.mkdir()
        write_json(source / "config.json", config)
        for path in folder.iterdir():
            if path.name.endswith((".safetensors", ".safetensors.index.json")):
                (source / path.name).symlink_to(path.resolve())
        request = {"folder": str(source), "out": work, "precision": precision}
        try:
            child.run("edgeft.exporters.portable_export", request, {"HF_HUB_OFFLINE": "1"}, python)
        except child.ChildDied as error:
            if "No module named 'edgeft" in str(error):
                raise UserError(
                    f"{python} has no edgeft: {python} -m pip install 'edgeft[optimum]'"
                ) from error
            raise
        for path in Path(work).glob("model.onnx*"):
            path.rename(out / path.name)


def for_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that transformers 4 reads as transformers 5 reads ``config``.

    Transformers 4 does not know ``rope_parameters``: it would silently take its own defaults.

    Raises:
        UserError: transformers 4, or a traced graph, has no such rotary embedding.
    """
    config = dict(config)
    rope = config.pop("rope_parameters", None)
    if rope is None:  # written by transformers 4
        rope = config.get("rope_scaling") or {}
        _check_rope(rope)
        return config
    config.pop("rope_scaling", None)
    if "full_attention" in rope:  # one rotary embedding for each kind of layer
        local = rope.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise UserError(
                f"cannot export rotary type '{local['rope_type']}' of sliding layers to "
                "onnx-portable: optimum's transformers has only 'default' there"
            )
        if "rope_theta" in local:
            config["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"]
    _check_rope(rope)
    rope = {key: value for key, value in rope.items() if value is not None}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config[key] = rope.pop(key)
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    return config


def _check_rope(rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_TYPES:
        raise UserError(
            f"cannot export rotary type '{kind}' to onnx-portable "
            f"(supported: {', '.join(_ROPE_TYPES)})"
        )
