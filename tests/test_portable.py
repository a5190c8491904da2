"""optimum's graphs are the model, whatever transformers wrote its files; failures are one line."""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from shapes import LLAMA3

from edgeft import catalog
from edgeft.errors import UserError
from edgeft.exporters import portable
from edgeft.runtimes import onnxruntime
from edgeft.runtimes import transformers as host

# Longer than Gemma's sliding window below, of unequal length, and with something in common.
PROMPTS = [
    [1, 510, 42, 7, 900, 31, *((17 * i) % 4000 + 3 for i in range(at, at + length))]
    for at, length in ((0, 40), (50, 9), (100, 23), (200, 40))
]
GEMMA = {
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 300000.0, "factor": 4.0},
    },
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"rope_parameters": LLAMA3, "tie_word_embeddings": False},
    "Qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "Qwen3": {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "Gemma3": GEMMA,
}


@pytest.fixture(scope="module")
def folder_of(make_model: Callable[..., Path]) -> Callable[[str], Path]:
    """The model folder of each family, made once so that it is exported once."""
    return functools.cache(lambda family: make_model(family, pre="qwen2", **FAMILIES[family]))


def operators(path: Path) -> tuple[Counter[str], set[str]]:
    """How often each operator stands in a graph, and the domains that it imports or uses."""
    model = onnx.load(path, load_external_data=False)
    domains = {node.domain for node in model.graph.node} | {o.domain for o in model.opset_import}
    assert not model.functions
    return Counter(node.op_type for node in model.graph.node), domains


def matrices(path: Path) -> set[int]:
    """The element types of the matrices that ``MatMulInteger`` multiplies by."""
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {kinds[node.input[1]] for node in graph.node if node.op_type == "MatMulInteger"}


def logits(session: Any) -> np.ndarray:
    """float32 [positions behind the common prefix, vocabulary]."""
    return np.concatenate(list(session.logits(PROMPTS)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_is_the_model(
    family: str,
    folder_of: Callable[[str], Path],
    portable_graph: Callable[[Path, str], Path],
) -> None:
    folder = folder_of(family)
    portable.check_supported(folder)
    out = portable_graph(folder, "fp32")
    assert [path.name for path in out.iterdir()] == ["model.onnx"]
    expected = logits(host.open_session(folder, threads=2, context=64, parallel=1))
    session = onnxruntime.open_session(out, threads=2, context=64, parallel=3)
    got = logits(session)
    assert np.abs(got - expected).max() < 1e-3
    assert expected.std() > 0.5  # so that equal is not trivial
    assert operators(out / "model.onnx")[1] == {""}
    alone = onnxruntime.open_session(out, threads=2, context=64, parallel=1)
    done = {one.index: one.tokens for one in session.generate(PROMPTS, 6, set())}
    assert done == {one.index: one.tokens for one in alone.generate(PROMPTS, 6, set())}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny", "Gemma3"])
def test_int8_is_close_and_small(
    family: str,
    tiny: Path,
    folder_of: Callable[[str], Path],
    portable_graph: Callable[[Path, str], Path],
) -> None:
    folder = tiny if family == "tiny" else folder_of(family)
    whole, small = portable_graph(folder, "fp32"), portable_graph(folder, "int8")
    assert [path.name for path in small.iterdir()] == ["model.onnx"]
    expected, got = (
        logits(onnxruntime.open_session(path, threads=2, context=64, parallel=1))
        for path in (whole, small)
    )
    assert (expected.argmax(-1) == got.argmax(-1)).mean() > 0.7
    assert np.corrcoef(expected.ravel(), got.ravel())[0, 1] > 0.95
    # ONNX's own operators only, every matrix in 8 bits: 7 in each of 2 layers, the head. And the
    # embedding, which is the head: it is most of such a small model.
    count, domains = operators(small / "model.onnx")
    assert domains == {""}
    assert count["MatMulInteger"] == 15
    # Signed ones overflow where there is no VNNI: on such a machine, the assertions above fail too.
    assert matrices(small / "model.onnx") == {onnx.TensorProto.UINT8}
    sizes = [(path / "model.onnx").stat().st_size for path in (whole, small)]
    assert sizes[1] < 0.3 * sizes[0]


def test_transformers_4_is_told_the_rotary_parameters(folder_of: Callable[[str], Path]) -> None:
    def read(family: str) -> dict[str, Any]:
        return portable.for_transformers_4(
            json.loads((folder_of(family) / "config.json").read_text())
        )

    llama = read("Llama")
    assert "rope_parameters" not in llama
    assert llama["rope_theta"] == 500000.0
    assert llama["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    qwen = read("Qwen2")
    assert qwen["rope_theta"] == 1000000.0 and "rope_scaling" not in qwen
    gemma = read("Gemma3")
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (300000.0, 5000.0)
    assert gemma["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_a_configuration_of_transformers_4_stays_as_it_is() -> None:
    old = {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert portable.for_transformers_4(old) == old


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            r"cannot export MambaForCausalLM to onnx-portable \(supported: LlamaForCausalLM, "
            r"Qwen2ForCausalLM, Qwen3ForCausalLM, Gemma3ForCausalLM\)",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "cannot export rotary type 'longrope' to onnx-portable",
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "yarn"},
                }
            },
            "rotary type 'yarn' of sliding layers",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(
    change: dict[str, Any], message: str, tiny: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message) as raised:
        portable.check_supported(tmp_path)
    assert "\n" not in str(raised.value)


def without_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No optimum anywhere: neither named, nor in the working folder, nor in the checkout."""
    package = tmp_path / "site" / "edgeft" / "exporters" / "portable.py"
    monkeypatch.setattr(portable, "__file__", str(package))
    monkeypatch.delenv("EDGEFT_OPTIMUM_PYTHON", raising=False)
    monkeypatch.chdir(tmp_path)


def test_without_the_environment_it_says_what_to_type(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_environment(monkeypatch, tmp_path)
    with pytest.raises(UserError) as raised:
        portable.check_supported(tiny)
    line = str(raised.value)
    assert "\n" not in line and "EDGEFT_OPTIMUM_PYTHON" in line
    assert "python -m venv .venv-optimum && .venv-optimum/bin/pip install 'edgeft[optimum]'" in line
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "Makefile").touch()
    with pytest.raises(UserError, match=f"make -C {tmp_path}/site optimum"):
        portable.find_python()


def test_where_the_environment_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_environment(monkeypatch, tmp_path)

    def make(place: Path) -> Path:
        python = place / ".venv-optimum" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
        return python

    beside = make(tmp_path / "site")
    assert portable.find_python() == beside
    here = make(tmp_path)
    assert portable.find_python() == here  # the link, which is what makes it that environment
    monkeypatch.setenv("EDGEFT_OPTIMUM_PYTHON", sys.executable)
    assert portable.find_python() == Path(sys.executable)
    monkeypatch.setenv("EDGEFT_OPTIMUM_PYTHON", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"EDGEFT_OPTIMUM_PYTHON=.*gone: there is no such file"):
        portable.find_python()


def test_an_environment_without_optimum_or_edgeft(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEFT_OPTIMUM_PYTHON", sys.executable)
    with pytest.raises(UserError, match=r"optimum's environment is not complete: .*optimum"):
        portable.convert(tiny, tmp_path / "out", "fp32")
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setenv("EDGEFT_OPTIMUM_PYTHON", str(bare))
    with pytest.raises(UserError, match=r"python has no edgeft: .* -m pip install 'edgeft\["):
        portable.convert(tiny, tmp_path / "out", "fp32")


@pytest.mark.slow
def test_a_failed_export_is_one_line_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="^optimum could not export this model: ") as raised:
        portable.convert(folder, out, "fp32")
    assert "\n" not in str(raised.value) and "header" in str(raised.value)
    assert list(out.iterdir()) == []


def test_the_shipped_targets() -> None:
    targets = catalog.find_targets(["onnx-portable"])
    assert [target.name for target in targets] == ["onnx-portable-fp32", "onnx-portable-int8"]
    assert {target.runtime for target in targets} == {"onnxruntime"}
    found = [portable.precision_of(target.name, target.settings) for target in targets]
    assert found == ["fp32", "int8"]
    with pytest.raises(UserError, match="target mine: unknown precision 'int9'; did you mean"):
        portable.precision_of("mine", {"precision": "int9"})
    with pytest.raises(UserError, match="target mine: unknown key 'precison'; did you mean"):
        portable.precision_of("mine", {"precison": "int8"})
