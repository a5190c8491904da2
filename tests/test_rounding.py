"""Rounding in torch against the quantizers themselves, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize

from edgeft import rounding
from edgeft.errors import UserError
from edgeft.exporters import onnx
from edgeft.rounding import compiled, ggml
from edgeft.rounding.onnx_int4 import ALGORITHMS, rounded_int4

INT4 = [(name, symmetric) for name in ALGORITHMS for symmetric in (True, False)]


def edges() -> torch.Tensor:
    """Rows of 512 at which quantizers go separate ways."""
    torch.manual_seed(1)
    rows = torch.randn(24, 512) * 0.05
    rows[0] = 0
    rows[1, 256:] = 0
    rows[2] = 0.3
    rows[3] = -0.3
    rows[4] = rows[4].abs()
    rows[5] = -rows[5].abs()
    rows[6, 5] = 60000  # what else is there rounds to nothing
    rows[7, 5] = -60000
    rows[8, ::2], rows[8, 1::2] = 0.5, -0.5  # which of two is farthest from zero
    rows[9, ::2], rows[9, 1::2] = -0.5, 0.5
    rows[10] = torch.arange(512).remainder(17) - 8.0  # codes half way between
    rows[11] = torch.arange(512).remainder(32) / 2 - 8
    rows[12] *= 2**-14  # float16's subnormals
    rows[13] *= 2**-19
    rows[14] = 0
    rows[14, ::37] = 1
    rows[15] = 0
    rows[15, 3] = -(2**-24)
    rows[16, :32] = 1e-3
    rows[17, :16], rows[17, 16:32] = 1e-3, -1e-3
    rows[18] = rows[18].round(decimals=2)
    rows[19, :256] *= 1e-4
    rows[20] = torch.linspace(-1, 1, 512)
    rows[21] = torch.linspace(0, 1, 512)
    return rows.half().float()


@pytest.fixture(scope="module")
def matrices(embedded_gguf: Path) -> dict[str, torch.Tensor]:
    """Weights in rows of 768: a model's own, the same after a bit of training, and the edges."""
    names = ("token_embd.weight", "blk.0.attn_q.weight", "blk.3.ffn_down.weight")
    found = [t for t in GGUFReader(embedded_gguf).tensors if t.name in names]
    assert len(found) == len(names)
    pieces = [dequantize(t.data, t.tensor_type).ravel()[: 768 * 768] for t in found]
    real = torch.from_numpy(np.concatenate(pieces).astype(np.float32)).view(-1, 768)
    real = real[: len(real) // 2 * 2].half().float()
    torch.manual_seed(0)
    moved = real + torch.randn_like(real) * 0.05 * real.abs().mean()
    return {"real": real, "moved": moved.half().float(), "edges": edges()}


@pytest.fixture(params=["numba", "torch"])
def searches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to search for a block's scale."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "available", lambda: False)
    elif not compiled.available():
        pytest.skip("no numba, or no x86-64")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, so that 0 is not -0."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.usefixtures("searches")
@pytest.mark.skipif(not ggml.available(), reason="no libggml-base")
@pytest.mark.parametrize("kind", rounding.KINDS)
@pytest.mark.parametrize("name", ["real", "moved", "edges"])
def test_torch_rounds_as_llama_cpp(matrices: dict[str, torch.Tensor], name: str, kind: str) -> None:
    weight = matrices[name]
    expected = rounding.rounded(weight, kind, library=True)
    ours = rounding.rounded(weight, kind, library=False)
    # Of weights without a scale the two may write the other zero.
    assert torch.equal(ours, expected) if name == "edges" else same(ours, expected)
    assert not same(weight, expected) or kind == "F16"


@pytest.mark.skipif(not ggml.available(), reason="no libggml-base")
@pytest.mark.parametrize("kind", [k for k in rounding.KINDS if k != "F16"])
def test_the_library_is_called_right(matrices: dict[str, torch.Tensor], kind: str) -> None:
    """Against the gguf package's own reading of the blocks that the library writes."""
    import ctypes

    from gguf import GGMLQuantizationType

    weight = matrices["moved"][:64]
    number = ggml.TYPES[kind]
    library = ggml._library()
    size = library.ggml_get_type_traits(number).contents
    blocks = np.zeros((len(weight), weight.shape[1] // size.block * size.bytes), np.uint8)
    place = blocks.ctypes.data_as(ctypes.c_void_p)
    library.ggml_quantize_chunk(number, weight.data_ptr(), place, 0, *weight.shape, None)
    expected = torch.from_numpy(dequantize(blocks, GGMLQuantizationType(number)))
    assert torch.equal(rounding.rounded(weight, kind), expected)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_K"])
def test_half_in_place_and_in_parts(kind: str, library: bool) -> None:
    if library and not ggml.available():
        pytest.skip("no libggml-base")
    torch.manual_seed(0)
    weight = torch.randn(1003, 768) * 0.05
    expected = rounding.rounded(weight.half().float(), kind, library=library)
    assert same(rounding.rounded(weight, kind, half=True, library=library), expected)
    parts = [rounding.rounded(part, kind, half=True, library=library) for part in weight.split(250)]
    assert same(torch.cat(parts), expected)
    out = rounding.rounded(weight, kind, half=True, out=weight, library=library)
    assert out is weight and same(weight, expected)


def test_it_rounds_again_to_the_same(matrices: dict[str, torch.Tensor]) -> None:
    """Blocks of the plain kinds are fixed points: no drift when a step changes nothing."""
    for kind in ("F16", "Q8_0"):
        once = rounding.rounded(matrices["moved"], kind)
        twice = rounding.rounded(once, kind)
        assert (once - twice).abs().max() <= 1e-3 * once.abs().max()


def test_no_gradient_and_no_rows() -> None:
    weight = torch.randn(2, 32, requires_grad=True)
    assert not rounding.rounded(weight, "Q4_0").requires_grad
    assert not rounded_int4(weight).requires_grad
    assert rounding.rounded(torch.empty(0, 32), "Q4_0").shape == (0, 32)
    assert rounded_int4(torch.empty(0, 32)).shape == (0, 32)


def test_a_view_is_taken_as_it_looks() -> None:
    weight = torch.randn(64, 32)
    assert same(rounding.rounded(weight.t(), "Q4_0"), rounding.rounded(weight.t().clone(), "Q4_0"))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: rounding.rounded(torch.zeros(1, 256), "Q4_k"), "'Q4_K'"),
        (lambda: rounding.rounded(torch.zeros(1, 100), "Q4_0"), "multiple of 32, not of 100"),
        (lambda: rounding.rounded(torch.zeros(1, 576), "Q4_K"), "multiple of 256, not of 576"),
        (lambda: rounding.rounded(torch.zeros(1, 32).half(), "Q4_0"), "float32"),
        (lambda: rounding.rounded(torch.zeros(32), "Q4_0"), "2 dimensions"),
        (lambda: rounding.rounded(torch.zeros(2, 32), "Q4_0", out=torch.zeros(1, 32)), "out"),
        (lambda: rounded_int4(torch.zeros(1, 32), algorithm="kquant"), "'k_quant'"),
        (lambda: rounded_int4(torch.zeros(1, 32), block_size=24), "not of 24"),
        (lambda: rounded_int4(torch.zeros(1, 32).double()), "float32"),
    ],
)
def test_what_cannot_be_rounded(call: Callable[[], torch.Tensor], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        call()


def by_onnxruntime(weight: np.ndarray, block: int, symmetric: bool, algorithm: str) -> np.ndarray:
    """(code - zero point) * scale of onnxruntime's own quantizers; weight [out, in]."""
    out, columns = weight.shape
    full = -(-columns // block) * block
    if algorithm == "default":
        from onnxruntime.capi._pybind_state import quantize_matmul_4bits

        blocks = full // block
        packed = np.zeros((out, blocks, block // 2), np.uint8)
        zeros = np.zeros((out, (blocks + 1) // 2), np.uint8)
        scale = np.zeros((out, blocks), np.float32)
        padded = np.pad(weight.T, ((0, full - columns), (0, 0)))
        quantize_matmul_4bits(
            packed, np.ascontiguousarray(padded), scale, zeros, block, out, columns, symmetric
        )
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(-1, block)
        zero = np.stack([zeros & 15, zeros >> 4], -1).reshape(out, -1)[:, :blocks].reshape(-1, 1)
        if symmetric:
            zero = np.full_like(zero, 8)
        scale = scale.reshape(-1, 1)
    else:
        from onnxruntime.quantization.neural_compressor import weight_only

        padded = np.pad(weight, ((0, 0), (0, full - columns)))
        with np.errstate(all="ignore"):
            if algorithm == "rtn":
                scheme = "sym" if symmetric else "asym"
                found = weight_only.quant_tensor(padded, 4, block, scheme, "uint", 1)
            else:
                found = weight_only.quant_tensor_k_quant_cpu(padded, 4, block)
        codes, scale, zero = found
    values = codes.astype(np.float32) - zero.astype(np.float32)
    values = values * scale.astype(np.float32)
    return values.reshape(out, full)[:, :columns]


@pytest.mark.usefixtures("searches")
@pytest.mark.parametrize(("algorithm", "symmetric"), INT4)
@pytest.mark.parametrize("block", [16, 32, 128, 256])
def test_int4_rounds_as_onnxruntime(
    matrices: dict[str, torch.Tensor], block: int, algorithm: str, symmetric: bool
) -> None:
    for weight in (matrices["moved"][:400], matrices["real"][-400:], matrices["edges"]):
        expected = by_onnxruntime(weight.numpy(), block, symmetric, algorithm)
        found = rounded_int4(
            weight, block_size=block, symmetric=symmetric, algorithm=algorithm
        ).numpy()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("searches")
@pytest.mark.parametrize(("algorithm", "symmetric"), INT4)
def test_int4_of_a_last_block_that_is_not_full(algorithm: str, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(33, 72)
    found = rounded_int4(weight, symmetric=symmetric, algorithm=algorithm)
    np.testing.assert_array_equal(found, by_onnxruntime(weight.numpy(), 32, symmetric, algorithm))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_int4_is_what_the_builder_writes(
    tiny: Path, tmp_path: Path, algorithm: str, tied: bool
) -> None:
    """Every matrix of the graph, from float32 weights; and which are there at all."""
    from transformers import AutoModelForCausalLM

    onnx.convert(tiny, tmp_path, onnx.OnnxSettings("int4", algorithm=algorithm, tied=tied), [2])
    weights, dense = graph_weights(tmp_path / "model.onnx")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    linear = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    ours = {name: rounded_int4(matrix, algorithm=algorithm) for name, matrix in linear.items()}
    for layer in range(2):  # the builder packs these three into one
        place = f"model.layers.{layer}.self_attn."
        packed = torch.cat([ours.pop(f"{place}{part}_proj") for part in "qkv"])
        ours[f"{place}qkv_proj"] = packed
    assert len(weights) == 2 * 5 + 1 == len(ours)
    for name, matrix in ours.items():
        end = re.sub(r"\.(?=[a-z])", "/", name.replace("self_attn", "attn"))
        (found,) = [w for node, w in weights.items() if f"{end}/" in node]
        np.testing.assert_array_equal(matrix.numpy(), found)
    assert any("embed" in name for name in dense) is not tied


def graph_weights(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """A graph's MatMulNBits by node, dequantized [out, in], and its float32 matrices' names."""
    import onnx as onnx_format
    from onnx import numpy_helper

    graph = onnx_format.load(path).graph
    initial: dict[str, Any] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        facts = {a.name: a.i for a in node.attribute}
        packed, scale = initial[node.input[1]], initial[node.input[2]].reshape(-1, 1)
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(-1, facts["block_size"])
        zero: Any = np.float32(8)
        if len(node.input) > 3 and node.input[3]:
            zeros = initial[node.input[3]].reshape(facts["N"], -1)
            pairs = np.stack([zeros & 15, zeros >> 4], -1).reshape(facts["N"], -1)
            zero = pairs[:, : facts["K"] // facts["block_size"]].reshape(-1, 1).astype(np.float32)
        values = (codes.astype(np.float32) - zero) * scale
        found[node.name] = values.reshape(facts["N"], facts["K"])
    dense = [n for n, t in initial.items() if t.ndim == 2 and t.dtype == np.float32]
    return found, dense
