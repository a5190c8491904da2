"""A target's ``[gguf]`` table: what llama.cpp quantizes to, and by what help."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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


# Whose rounding :mod:`edgeft.rounding` has, so that its harm can be measured.
MEASURED = (
    *("F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
BUDGETS = ("max_size", "max_mb", "min_tok_s")


@dataclass(frozen=True)
class AutoSettings:
    """A budget under which every group of tensors gets the type that pays; one of three.

    Attributes:
        max_size: of the file, times that of the one with ``ftype`` alone.
        max_mb: of the file, 10^6 bytes.
        min_tok_s: of the decode speed of one stream, on this machine and every core of it.
        types: what a group may get, by ggml's names.
    """

    max_size: float | None = None
    max_mb: float | None = None
    min_tok_s: float | None = None
    types: Sequence[str] = (
        *("Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0"),
        *("Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    )

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) != 1:
            raise UserError(f"gguf.auto wants one budget: {', '.join(BUDGETS)}")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise UserError(f"gguf.auto.{name}: {value!r} is not a number above 0")
        if not isinstance(self.types, list | tuple) or not self.types:
            raise UserError(f"gguf.auto.types: {self.types!r} is not a list of types")
        for kind in self.types:
            if kind not in MEASURED:
                raise UserError(
                    f"gguf.auto.types: unknown type {kind!r}{near(str(kind), MEASURED)}"
                )


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
        auto: such types are found by measuring; see :mod:`edgeft.exporters.auto`.
        lora: the base is quantized, and the adapter stays beside it instead of being merged.
        file: a GGUF made elsewhere that stands for tuned; see :mod:`edgeft.exporters.foreign`.
    """

    ftype: str = ""
    imatrix: bool | str = False
    types: Mapping[str, str] = field(default_factory=dict)
    lora: bool = False
    auto: AutoSettings | None = None
    file: str | None = None

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
        if self.auto and (self.types or self.lora):
            raise UserError("gguf.auto does not go with types or lora")
        for key in ("imatrix", "types", "auto"):
            if self.ftype in UNQUANTIZED and getattr(self, key):
                raise UserError(f"gguf.{key}: nothing is quantized with ftype {self.ftype}")
        for kind in (self.ftype, *self.types.values()):
            if not self.imatrix and needs_matrix(kind):
                raise UserError(f"{kind} needs an importance matrix: imatrix = true")


def needs_matrix(kind: str) -> bool:
    """Whether llama.cpp refuses a type without an importance matrix."""
    return bool(_NEED_MATRIX.fullmatch(kind))


def settings_of(target: str, table: Mapping[str, Any]) -> GgufSettings:
    """A target's table as settings.

    Raises:
        UserError: an unknown key or value; the target is named.
    """
    try:
        _check_keys(table, GgufSettings, "gguf")
        if "ftype" not in table:
            raise UserError('gguf.ftype is missing, such as ftype = "Q4_0"')
        if isinstance(auto := table.get("auto"), Mapping):
            _check_keys(auto, AutoSettings, "gguf.auto")
            table = {**table, "auto": AutoSettings(**auto)}
        elif auto is not None:
            raise UserError(f"gguf.auto: {auto!r} is not a table, such as {{max_size = 1.03}}")
        return GgufSettings(**table)
    except UserError as error:
        raise UserError(f"target {target}: {error}") from error


def _check_keys(table: Mapping[str, Any], kind: type, name: str) -> None:
    known = [one.name for one in fields(kind)]
    for key in table:
        if key not in known:
            raise UserError(f"unknown key '{name}.{key}'{near(key, known)}")


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
