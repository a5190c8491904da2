"""A GGUF that was made elsewhere of the run's tuned model: what is in it, and what is wrong with it.

It is benched as tuned. Base beside it is quantized by edgeft to the types that the file has, tensor
by tensor, so that the benefit there is the file's own and not that of another mixture.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeft import child
from edgeft.catalog import Target
from edgeft.errors import UserError
from edgeft.exporters import gguf_settings

_PREFIX = "file-"


def target_of(path: Path) -> Target:
    """The target that stands for a file, such as ``file-my-model-q4_k_m``.

    Raises:
        UserError: it is no GGUF, or has a type that llama.cpp does not write any more.
    """
    from gguf import GGUFReader

    from edgeft.exporters.tensors import matrices

    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        fields = GGUFReader(path).fields
        tensors = matrices(path)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path} is truncated or not a GGUF file: fetch it again") from error
    by_type: dict[str, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        by_type[tensor.tensor_type.name].append(name)
    for kind in by_type:
        if kind not in gguf_settings.TYPES:
            raise UserError(f"{path} has tensors in {kind}, which base cannot be quantized to")
    kind_of_file = fields["general.file_type"].contents() if "general.file_type" in fields else 1
    settings: dict[str, Any] = {"file": str(path.resolve()), "ftype": "F16"}
    if set(by_type) - {"F16", "BF16", "F32"}:
        settings |= {"ftype": _ftype(kind_of_file), "types": _patterns(by_type)}
        if any(gguf_settings.needs_matrix(kind) for kind in (settings["ftype"], *by_type)):
            settings["imatrix"] = True
    name = re.sub(r"[^a-z0-9._+-]+", "-", path.stem.lower()).strip("-.")
    about = f"{path.name}, made elsewhere"
    return Target(f"{_PREFIX}{name or 'model'}", "gguf", "llama.cpp", about, settings)


def _ftype(number: int) -> str:
    """llama.cpp's name; what no tensor follows anyway where all types are given."""
    from edgeft.exporters.quantize import ftypes

    names = {value: name for name, value in ftypes().items()}
    name = names.get(number, "Q8_0")
    return "Q8_0" if name in gguf_settings.UNQUANTIZED else name


def _patterns(by_type: dict[str, list[str]]) -> dict[str, str]:
    return {
        "^(" + "|".join(re.escape(name) for name in names) + ")$": kind
        for kind, names in by_type.items()
    }


def diagnose(artifact: Path, tuned: Path, base: Path, expected: Path) -> dict[str, Any]:
    """``faults`` of the weights and ``tensors`` as a manifest has them, in a child process.

    Args:
        tuned, base: our 16-bit files.
        expected: tuned, quantized by us to the artifact's own types.

    Raises:
        UserError: the file is another model's.
    """
    paths = {"artifact": artifact, "tuned": tuned, "base": base, "expected": expected}
    request = {name: str(path) for name, path in paths.items()}
    found = child.run("edgeft.exporters.foreign", request)[-1]
    return {name: found[name] for name in ("faults", "tensors")}


def _check_same_model(artifact: Path, tuned: Path) -> None:
    """Refuse what cannot be compared.

    Raises:
        UserError: another architecture or shape.
    """
    from gguf import GGUFReader

    from edgeft.exporters.tensors import matrices

    names = [
        GGUFReader(path).fields["general.architecture"].contents() for path in (artifact, tuned)
    ]
    if names[0] != names[1]:
        raise UserError(f"{artifact.name} is another model's: a {names[0]}, and tuned a {names[1]}")
    theirs, ours = matrices(artifact), matrices(tuned)
    for name in theirs.keys() & ours.keys():
        shapes = [[int(n) for n in tensor.shape] for tensor in (theirs[name], ours[name])]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{artifact.name} is another model's: {name} has the shape {shapes[0]} there and "
                f"{shapes[1]} in tuned"
            )


def _work(request: Any, emit: Callable[..., None]) -> None:
    from edgeft.exporters import tensors

    paths = {name: Path(path) for name, path in request.items()}
    _check_same_model(paths["artifact"], paths["tuned"])
    faults = tensors.diagnose(**paths)
    errors = tensors.errors(paths["artifact"], paths["tuned"])
    emit(
        "diagnosed",
        faults=[asdict(fault) for fault in faults],
        tensors=tensors.summary(errors),
    )


if __name__ == "__main__":
    child.serve(_work)
