"""A target's ``[gguf]`` table: what llama.cpp quantizes to, and by what help."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from edgeft.errors import UserError, near

UNQUANTIZED = ("F16", "BF16", "F32", "ALL_F32")
# What llama.cpp's ``ggml_quantize_chunk`` writes, by ggml's names.
TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"),
    *("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "TQ1_0", "TQ2_0", "MXFP4"),
    *("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)
# llama.cpp refuses these without a matrix (``tensor_requires_imatrix`` in src/llama-quant.cpp).
_NEED_MATRIX = re.compile("IQ1_.*|IQ2_.*|IQ3_XX?S|Q2_K_S")


@dataclass(frozen=True)
class GgufSettings:
    """How the 16-bit GGUF is quantized.

    Attributes:
        ftype: llama.cpp's name of the quantization, such as ``Q4_K_M``.
        imatrix: the importance matrix: True, made from the training questions; a file that
            llama-imatrix made (its GGUF format; a relative path is one from the working folder);
            False, none.
        types: a regular expression, searched for in a tensor's name (``blk.0.ffn_down.weight``),
            to the tensor's ggml type, such as ``Q6_K``; the first that is found counts.
        lora: the base is quantized, and the adapter stays beside it instead of being merged.
    """

    ftype: str = ""
    imatrix: bool | str = False
    types: Mapping[str, str] = field(default_factory=dict)
    lora: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.ftype, str):
            raise UserError(f"gguf.ftype: {self.ftype!r} is not a name")
        if not isinstance(self.imatrix, bool | str) or self.imatrix == "":
            raise UserError(f"gguf.imatrix: {self.imatrix!r} is neither true, false nor a file")
        if not isinstance(self.lora, bool):
            raise UserError(f"gguf.lora is true or false, not {self.lora!r}")
        if not isinstance(self.types, Mapping):
            raise UserError(f"gguf.types: {self.types!r} is not a table of expression = type")
        for pattern, kind in self.types.items():
            if kind not in TYPES:
                raise UserError(f"gguf.types: unknown type {kind!r}{near(str(kind), TYPES)}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"gguf.types: {pattern!r}: {error}") from error
        for key in ("imatrix", "types"):
            if self.ftype in UNQUANTIZED and getattr(self, key):
                raise UserError(f"gguf.{key}: nothing is quantized with ftype {self.ftype}")
        for kind in (self.ftype, *self.types.values()):
            if not self.imatrix and _NEED_MATRIX.fullmatch(kind):
                raise UserError(f"{kind} needs an importance matrix: imatrix = true")


def settings_of(target: str, table: Mapping[str, Any]) -> GgufSettings:
    """A target's table as settings.

    Raises:
        UserError: an unknown key or value; the target is named.
    """
    known = [one.name for one in fields(GgufSettings)]
    for key in table:
        if key not in known:
            raise UserError(f"target {target}: unknown key 'gguf.{key}'{near(key, known)}")
    if "ftype" not in table:
        raise UserError(f'target {target}: gguf.ftype is missing, such as ftype = "Q4_0"')
    try:
        return GgufSettings(**table)
    except UserError as error:
        raise UserError(f"target {target}: {error}") from error


def check_types(types: Mapping[str, str], tensors: Iterable[str]) -> None:
    """Refuse an expression that is found in none of the tensors' names: a slip of the pen.

    Raises:
        UserError: it names the expression.
    """
    names = [name for name in tensors if name.endswith(".weight") and "_norm." not in name]
    for pattern in types:
        if not any(re.search(pattern, name) for name in names):
            parts = {re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight") for name in names}
            raise UserError(
                f"gguf.types: '{pattern}' is in no tensor's name{near(pattern, sorted(parts))}"
            )
