"""Merging, and from merged weights to what a device runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edgeft.catalog import Target
from edgeft.errors import UserError, near

FORMATS = ("gguf", "onnx", "onnx-portable")


def check_supported(folder: Path, targets: Iterable[Target], llama_cpp: Path | None) -> None:
    """Refuse, before any training, what could not be exported afterwards.

    Raises:
        UserError: a target's settings are wrong, or a model's architecture or tokenizer has no
            place in its format.
    """
    from edgeft.exporters import gguf, onnx, portable

    formats = set()
    for target in targets:
        if target.format not in FORMATS:
            raise UserError(
                f"target {target.name}: unknown format '{target.format}'"
                f"{near(target.format, FORMATS)}"
            )
        if target.format == "gguf":
            gguf.settings_of(target.name, target.settings)
        if target.format == "onnx":
            onnx.settings_of(target.name, target.settings)
        if target.format == "onnx-portable":
            portable.precision_of(target.name, target.settings)
        formats.add(target.format)
    if "gguf" in formats:
        gguf.check_supported(folder, llama_cpp)
    if "onnx" in formats:
        onnx.check_supported(folder)
    if "onnx-portable" in formats:
        portable.check_supported(folder)
