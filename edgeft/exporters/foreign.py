"""A GGUF that was made elsewhere of the run's tuned model: what is in it, and what is wrong with it.

It is benched as tuned. Base beside it is quantized by edgeft to the types that the file has, tensor
by tensor, so that the benefit there is the file's own and not that of another mixture.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import child
from edgeft.catalog import Target
from edgeft.errors import UserError
from edgeft.exporters import gguf_settings

if TYPE_CHECKING:
    from edgeft.exporters.diagnosis import Files

_PREFIX = "file-"


def target_of(path: Path) -> Target:
    """The target that stands for a file, such as ``file-my-model-q4_k_m``.

    Raises:
        UserError: it is no GGUF, or has a type that llama.cpp does not write any more.
    """
    from edgeft.exporters.tensors import matrices, opened

    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        fields, tensors = opened(path)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path} is truncated or not a GGUF file: fetch it again") from error
    by_type: dict[str, list[str]] = defaultdict(list)
    for name, tensor in matrices(tensors).items():
        by_type[tensor.tensor_type.name].append(name)
    for kind in by_type:
        if kind not in gguf_settings.TYPES:
            raise UserError(f"{path} has tensors in {kind}, which base cannot be quantized to")
    kind_of_file = fields["general.file_type"].contents() if "general.file_type" in fields else 1
    sixteen_bit = "BF16" if "BF16" in by_type else "F16"
    settings: dict[str, Any] = {"file": str(path.resolve()), "ftype": sixteen_bit}
    if set(by_type) - {"F16", "BF16", "F32"}:
        settings |= {"ftype": _ftype(kind_of_file), "types": _patterns(by_type)}
        if any(gguf_settings.needs_matrix(kind) for kind in (settings["ftype"], *by_type)):
            settings["imatrix"] = True
    name = re.sub(r"[^a-z0-9._+-]+", "-", path.stem.lower()).strip("-.")
    about = f"{path.name}, made elsewhere"
    return Target(f"{_PREFIX}{name or 'model'}", "gguf", "llama.cpp", about, settings)


def check_names(targets: Sequence[Target]) -> None:
    """Refuse two files of one name, of which the second would replace the first.

    Raises:
        UserError: it names both.
    """
    known: dict[str, str] = {}
    for target in targets:
        file = target.settings.get("file")
        if file and known.setdefault(target.name, file) != file:
            raise UserError(
                f"{known[target.name]} and {file} would both be {target.name}: rename one"
            )


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


def _check_same_model(name: str, files: Files, architectures: Sequence[str]) -> None:
    """Refuse what cannot be compared.

    Raises:
        UserError: another architecture or shape.
    """
    theirs, ours = architectures
    if theirs != ours:
        raise UserError(f"{name} is another model's: a {theirs}, and tuned a {ours}")
    for tensor in sorted(files.theirs.keys() & files.tuned.keys()):
        shapes = [[int(n) for n in file[tensor].shape] for file in (files.theirs, files.tuned)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{name} is another model's: {tensor} has the shape {shapes[0]} there and "
                f"{shapes[1]} in tuned"
            )


def _work(request: Any, emit: Callable[..., None]) -> None:
    from edgeft.exporters import tensors
    from edgeft.exporters.diagnosis import Files, diagnose

    paths = {name: Path(path) for name, path in request.items()}
    found = {path: tensors.opened(path) for path in set(paths.values())}
    theirs, tuned, base, expected = (
        found[paths[name]] for name in ("artifact", "tuned", "base", "expected")
    )
    files = Files(theirs[1], tuned[1], base[1], expected[1])
    named = [fields["general.architecture"].contents() for fields, _ in (theirs, tuned)]
    _check_same_model(paths["artifact"].name, files, named)
    emit(
        "diagnosed",
        faults=[asdict(fault) for fault in diagnose(files)],
        tensors=tensors.summary(tensors.errors(files.theirs, files.tuned)),
    )


if __name__ == "__main__":
    child.serve(_work)
