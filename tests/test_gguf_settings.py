"""What a GGUF target's table may say, and what is refused before any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from edgeft import catalog, exporters, rounding
from edgeft.catalog import Target
from edgeft.errors import UserError
from edgeft.exporters import gguf_settings, imatrix

GOLDEN = Path(__file__).parent / "data" / "imatrix.gguf"  # of two blocks


def targets(table: Mapping[str, Any]) -> list[Target]:
    return [Target("mine", "gguf", "llama.cpp", "", dict(table))]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"imatrx": True}, "unknown key 'gguf.imatrx'; did you mean 'imatrix'"),
        ({"imatrix": 3}, "gguf.imatrix: 3 is neither true, false nor a file"),
        ({"imatrix": "nowhere.gguf"}, "no such importance matrix: nowhere.gguf"),
        ({"imatrix": __file__}, "is no importance matrix in GGUF format: make one with llama-im"),
        ({"types": "Q6_K"}, "gguf.types: 'Q6_K' is not a table"),
        ({"types": {"ffn_down": "Q6K"}}, "unknown type 'Q6K'; did you mean 'Q6_K'"),
        ({"types": {"ffn_(down": "Q6_K"}}, r"gguf.types: 'ffn_\(down': "),
        ({"types": {"fnn_down": "Q6_K"}}, "'fnn_down' is in no tensor's name; did you mean 'ffn_d"),
        ({"ftype": "F16", "imatrix": True}, "gguf.imatrix: nothing is quantized with ftype F16"),
        ({"ftype": "IQ2_XS"}, "IQ2_XS needs an importance matrix: imatrix = true"),
        ({"auto": 1.03}, "gguf.auto: 1.03 is not a table"),
        ({"auto": {}}, "gguf.auto wants one budget: max_size, max_mb, min_tok_s"),
        ({"auto": {"max_size": 2, "max_mb": 9}}, "gguf.auto wants one budget"),
        ({"auto": {"max_size": 0}}, "gguf.auto.max_size: 0 is not a number above 0"),
        ({"auto": {"max_mb": "9"}}, "gguf.auto.max_mb: '9' is not a number above 0"),
        ({"auto": {"max_sise": 2}}, "unknown key 'gguf.auto.max_sise'; did you mean 'max_size'"),
        (
            {"auto": {"max_size": 2, "types": ["Q5_9"]}},
            "gguf.auto.types: unknown type 'Q5_9'; did you mean",
        ),
        ({"auto": {"max_size": 2, "types": []}}, r"gguf.auto.types: \[\] is not a list of types"),
        ({"auto": {"max_size": 2}, "lora": True}, "gguf.auto does not go with types or lora"),
        ({"ftype": "F16", "auto": {"max_size": 2}}, "gguf.auto: nothing is quantized"),
        ({"types": {"ffn_up": "IQ3_XXS"}}, "IQ3_XXS needs an importance matrix"),
    ],
)
def test_a_mistake_in_a_target_is_one_line_before_training(
    table: dict[str, Any], message: str, tiny: Path
) -> None:
    with pytest.raises(UserError, match=f"^target mine: .*{message}") as raised:
        exporters.check_supported(tiny, targets({"ftype": "Q4_0", **table}), None)
    assert "\n" not in str(raised.value)


def test_a_matrix_of_ones_own(tiny: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    mine = targets({"ftype": "IQ2_XS", "imatrix": str(GOLDEN)})
    exporters.check_supported(tiny, mine, None)
    deeper = make_model("Llama", num_hidden_layers=3)
    with pytest.raises(
        UserError, match="target mine: .* another model's .*: it has 2 blocks, .* 3"
    ):
        exporters.check_supported(deeper, mine, None)
    other, cut = tmp_path / "other.gguf", tmp_path / "cut.gguf"
    writer = GGUFWriter(other, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    cut.write_bytes(GOLDEN.read_bytes()[:2000])
    for path in (other, cut):
        with pytest.raises(UserError, match=f"{path} is no importance matrix in GGUF format"):
            imatrix.read(path)


def test_names_that_are_not_known(tiny: Path, tmp_path: Path) -> None:
    """With llama.cpp's own converter any architecture is exported, but not measured."""
    folder, checkout = tmp_path / "model", tmp_path / "llama.cpp"
    folder.mkdir()
    checkout.mkdir()
    (checkout / "convert_hf_to_gguf.py").write_text("")
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "n_layer": 2}')
    with pytest.raises(UserError, match="target mine: cannot make an importance matrix for GPT2LM"):
        exporters.check_supported(folder, targets({"ftype": "Q4_0", "imatrix": True}), checkout)
    theirs = targets({"ftype": "Q4_0", "imatrix": str(GOLDEN), "types": {"x": "Q8_0"}})
    exporters.check_supported(folder, theirs, checkout)
    exporters.check_supported(tiny, targets({"ftype": "Q4_0", "imatrix": True}), checkout)


def test_the_shipped_targets() -> None:
    for name, target in catalog.targets().items():
        if target.format == "gguf":
            settings = gguf_settings.settings_of(name, target.settings)
            kinds = {
                "-imatrix": settings.imatrix,
                "+lora": settings.lora,
                "-repaired": target.repair is not None,
            }
            assert set(kinds.values()) <= {True, False}
            said = "".join(kind for kind, is_so in kinds.items() if is_so)
            assert name == (
                "gguf-auto" if settings.auto else f"gguf-{settings.ftype.lower()}{said}"
            )


def test_a_formats_name_stands_for_what_any_run_has_at_once() -> None:
    names = {target.name for target in catalog.find_targets(["gguf", "onnx"])}
    assert {"gguf-q4_0", "gguf-q4_0-imatrix", "onnx-int4"} <= names
    assert not {"gguf-auto", "gguf-q4_0-repaired", "gguf-q4_0+lora", "onnx-int4-repaired"} & names
    every = {target.name for target in catalog.find_targets(["gguf"], every=True)}
    assert {"gguf-auto", "gguf-q4_0-repaired", "gguf-q4_0+lora"} <= every


def test_what_auto_measures_can_be_rounded() -> None:
    assert set(gguf_settings.MEASURED) == set(rounding.KINDS)
