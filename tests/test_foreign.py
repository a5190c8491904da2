"""A GGUF made elsewhere: each fault that is put into one is named, and a right one has none."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spoil

from edgeft.catalog import Target
from edgeft.errors import UserError
from edgeft.exporters import diagnosis, foreign, gguf_settings, tensors, verify
from edgeft.exporters.faults import Fault

Make = Callable[[spoil.World, Path], Path]
METADATA = [name for name, (kind, _, _) in spoil.FAULTS.items() if kind != "weights"]
WEIGHTS = [name for name in spoil.FAULTS if name not in METADATA]
FEW = ("head-permuted", "four-bits", "base", "twice", "another-model")
SOME_SLOW = [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in WEIGHTS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> spoil.World:
    return spoil.world(tmp_path_factory.mktemp("world"))


def tensor_faults(world: spoil.World, file: Path) -> list[Fault]:
    target = foreign.target_of(file)
    expected = world.file("tuned")
    if target.settings["ftype"] != "F16":
        expected = quantized_alike(world.file("tuned"), target, file.with_suffix(".expected"))
    four = (file, world.file("tuned"), world.file("base"), expected)
    return diagnosis.diagnose(diagnosis.Files(*(tensors.opened(path)[1] for path in four)))


def quantized_alike(source: Path, target: Target, out: Path) -> Path:
    request = {"source": str(source), "out": str(out), "ftype": target.settings["ftype"]}
    spoil.child.run("edgeft.exporters.quantize", {**request, "types": target.settings.get("types")})
    return out


def check(world: spoil.World, file: Path, strict: bool = False) -> verify.Verification:
    exact = foreign.target_of(file).settings["ftype"] in gguf_settings.UNQUANTIZED
    return verify.verify(
        "llama.cpp", file, world.tuned, world.evaluation, exact=exact, strict=strict
    )


@pytest.mark.parametrize("name", METADATA)
def test_a_fault_in_the_metadata_is_named(name: str, world: spoil.World, tmp_path: Path) -> None:
    kind, text, make = spoil.FAULTS[name]
    file = make(world, tmp_path / f"{name}.gguf")
    assert tensor_faults(world, file) == []
    found = check(world, file).faults
    assert {fault.kind for fault in found} == {kind}
    assert any(re.search(text, fault.text) for fault in found), found
    assert all("tokenizer." in fault.remedy for fault in found)
    with pytest.raises(UserError, match=f"{name}.gguf: "):  # our own export is refused
        check(world, file, strict=True)


def test_a_bos_too_many_is_named(tmp_path: Path) -> None:
    plain = spoil.world(tmp_path / "plain", template="zephyr")
    assert check(plain, plain.file("tuned")).faults == []
    fields = {"tokenizer.ggml.add_bos_token": True}
    file = spoil.rewrite(plain.file("tuned"), tmp_path / "bos.gguf", fields)
    [fault] = check(plain, file).faults
    assert fault.kind == "bos"
    assert re.search(r"llama.cpp puts a BOS \(token 1\) before .* \(12 of 12 prompts\)", fault.text)


@pytest.mark.parametrize("name", SOME_SLOW)
def test_a_fault_in_the_weights_is_named(name: str, world: spoil.World, tmp_path: Path) -> None:
    kind, text, make = spoil.FAULTS[name]
    file = make(world, tmp_path / f"{name}.gguf")
    [fault] = tensor_faults(world, file)
    assert fault.kind == kind and re.search(text, fault.text), fault


def test_wrong_weights_are_seen_by_the_logits_too(world: spoil.World) -> None:
    [fault] = check(world, world.file("base")).faults
    assert fault.kind == "weights" and "weights were not written right" in fault.text


def test_rows_are_elsewhere_where_they_are_others_not_where_they_changed() -> None:
    rng = np.random.default_rng(0)
    ours, noise = (rng.normal(0, 1, (200, 64)).astype(np.float32) for _ in range(2))
    assert diagnosis._moved(ours, ours) == diagnosis._moved(noise, ours) == 0
    lengths = np.linalg.norm(ours, axis=1, keepdims=True)
    apart = noise - (noise * ours).sum(1, keepdims=True) / lengths**2 * ours
    apart *= 0.52 * lengths / np.linalg.norm(apart, axis=1, keepdims=True)
    assert diagnosis._moved(ours + apart, ours) == 0
    assert diagnosis._moved(ours[::-1] + 0.1 * noise, ours) == 1
    swapped = ours[[1, 0, *range(2, 200)]]
    assert diagnosis._moved(swapped, ours) == 0.01


QUANTIZED = {
    "four-bits": "nearer to NF4's rounding of tuned .* it was rounded to 4 bits before",
    "four-bits-of-four": "nearer to NF4's rounding of tuned",
    "another-model": "tensors are another model's",
    "norm-shifted": "blk.1.attn_norm.weight",
    "base": "the fine-tuning is not in it",
    "another-adapter": "not in it|tensors are not the tuned model's, by more than rounding",
    "twice": r"the fine-tuning is in it (1\.9|2\.0)\d times",
    "alpha-forgotten": r"the fine-tuning is in it (7\.9|8\.0)\d times",
}


@pytest.mark.slow
@pytest.mark.parametrize("ftype", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_a_fault_is_seen_through_rounding(ftype: str, world: spoil.World, tmp_path: Path) -> None:
    for name in set(WEIGHTS) - {"half"}:  # which an importance matrix could leave
        _, text, make = spoil.FAULTS[name]
        file = make(world, tmp_path / f"{name}.16.gguf")
        file = spoil.quantize(file, tmp_path / f"{name}.gguf", ftype)
        [fault] = tensor_faults(world, file)
        assert re.search(QUANTIZED.get(name, text), fault.text), (name, fault)


def test_a_wrong_rotary_base_is_seen_by_the_logits(world: spoil.World, tmp_path: Path) -> None:
    fields = {"llama.rope.freq_base": 500.0}
    file = spoil.rewrite(world.file("tuned"), tmp_path / "rope.gguf", fields)
    assert tensor_faults(world, file) == []
    [fault] = check(world, file).faults
    assert fault.kind == "weights" and "agree on only" in fault.text


OTHERS = ("BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K")


@pytest.mark.parametrize(
    ("scale", "ftypes"),
    [
        (0.3, ("Q4_0",)),
        pytest.param(0.3, OTHERS, marks=pytest.mark.slow),
        pytest.param(0.003, OTHERS, marks=pytest.mark.slow),
    ],
)
def test_a_right_file_has_no_fault(
    scale: float, ftypes: tuple[str, ...], world: spoil.World, tmp_path: Path
) -> None:
    """Of an update that is 10% of the weights, and of one that is less than 4 bits can hold."""
    if scale != 0.3:
        world = spoil.world(tmp_path / "world", scale=scale)
    files = [spoil.rewrite(world.file("tuned"), tmp_path / "16.gguf", {"general.name": "theirs"})]
    matrix = spoil.imatrix(world, tmp_path / "imatrix.gguf")
    for ftype in ftypes:
        files.append(spoil.quantize(files[0], tmp_path / f"{ftype}.gguf", ftype))
        if ftype in ("Q4_0", "Q4_K_M", "Q2_K"):
            out = tmp_path / f"{ftype}-imatrix.gguf"
            files.append(spoil.quantize(files[0], out, ftype, matrix))
    for file in files:
        assert tensor_faults(world, file) == [], file.name
    for file in (files[0], files[-1]):
        done = check(world, file)
        assert (done.faults, done.tokenizer_prompts, done.chat_template) == ([], 12, True)


@pytest.mark.slow
def test_on_a_base_that_lay_on_a_grid_there_is_no_false_alarm(tmp_path: Path) -> None:
    """As the default model's, which Q4_1 rounds back to where it was: update and all."""
    world = spoil.world(tmp_path, scale=0.05)
    before, after = world.matrices("base"), world.matrices("tuned")
    grid = spoil.matrices(spoil.quantize(world.file("base"), tmp_path / "grid.gguf", "Q4_1"))
    base = spoil.rewrite(world.file("base"), tmp_path / "base-16.gguf", changes=grid)
    update = {name: grid[name] + after[name] - before[name] for name in grid}
    source = spoil.rewrite(world.file("tuned"), tmp_path / "tuned-16.gguf", changes=update)
    matrix = spoil.imatrix(world, tmp_path / "imatrix.gguf")

    def found(ftype: str, made_of: Path, matrix: Path | None = None) -> list[Fault]:
        expected = spoil.quantize(source, tmp_path / "expected.gguf", ftype)
        file = spoil.quantize(made_of, tmp_path / "file.gguf", ftype, matrix)
        four = (file, source, base, expected)
        return diagnosis.diagnose(diagnosis.Files(*(tensors.opened(path)[1] for path in four)))

    for ftype in ("Q4_0", "Q5_0", "Q4_1"):
        assert found(ftype, source) == found(ftype, source, matrix) == []
    assert found("Q4_1", base) == []  # nor does ours have more of it
    [fault] = found("Q5_0", base)
    assert fault.text == "the fine-tuning is not in it"


@pytest.mark.parametrize(("size", "proved"), [(100, 0), (10**8, 1)])
def test_few_values_in_much_rounding_prove_nothing(size: int, proved: int) -> None:
    lengths = {"tuned": 1000, "base": 1000, "update": 1, "base_update": 0, "from_base": 10}
    rounding = {"off": 10, "rounded": 10, "along": 0.0, "expected": 1.0}
    tensor = diagnosis._Tensor("x", "Q4_0", size, **lengths, **rounding)
    files = diagnosis.Files({}, {}, {}, {})
    assert len(diagnosis._other_update([tensor], files)) == proved


def test_merged_in_bfloat16_a_small_update_is_partly_gone(tmp_path: Path) -> None:
    import torch

    def rounded(weights: Any) -> Any:
        return torch.tensor(weights).bfloat16().float().numpy()

    world = spoil.world(tmp_path, scale=0.003)
    before, tuned = world.matrices("base"), world.matrices("tuned")
    update = {n: w - before[n] for n, w in tuned.items() if (w != before[n]).any()}
    coarse = {name: rounded(before[name]) for name in update}
    right = {name: coarse[name] + update[name] for name in update}
    made = {"base": coarse, "right": right, "made": {n: rounded(w) for n, w in right.items()}}
    files = {
        name: spoil.rewrite(world.file("tuned"), tmp_path / f"{name}-16.gguf", changes=changes)
        for name, changes in made.items()
    }
    seen = [tensors.opened(files[name])[1] for name in ("made", "right", "base")]
    [fault] = diagnosis.diagnose(diagnosis.Files(*seen, seen[1]))
    assert re.search(r"in it 0\.\d\d times: it was merged in bfloat16", fault.text)
    assert "float32" in fault.remedy


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.9, 0.99999])
def test_a_truncated_file_is_one_line(share: float, world: spoil.World, tmp_path: Path) -> None:
    data = world.file("tuned").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(share * len(data)) // 32 * 32])
    with pytest.raises(
        UserError, match=r"cut\.gguf is truncated or not a GGUF file: fetch it again"
    ):
        foreign.target_of(tmp_path / "cut.gguf")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*x\.gguf"):
        foreign.target_of(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_text("<!DOCTYPE html>" * 100)
    with pytest.raises(UserError, match="not a GGUF file"):
        foreign.target_of(tmp_path / "x.gguf")


@pytest.mark.parametrize(("ftype", "count"), [("Q4_K_M", 3), ("BF16", 2), ("F16", 2)])
def test_base_is_rounded_as_the_file_is(
    ftype: str, count: int, world: spoil.World, tmp_path: Path
) -> None:
    """Tensor by tensor, whatever mixture it is."""
    mixed = spoil.quantize(world.file("tuned"), tmp_path / "My Model (v2).gguf", ftype)
    target = foreign.target_of(mixed)
    assert target.name == "file-my-model-v2" and target.settings["ftype"] == ftype
    base = quantized_alike(world.file("base"), target, tmp_path / "base.gguf")
    kinds = [{n: t.tensor_type for n, t in tensors.opened(p)[1].items()} for p in (mixed, base)]
    assert kinds[0] == kinds[1] and len(set(kinds[0].values())) == count


def test_two_files_of_one_name_are_refused(world: spoil.World, tmp_path: Path) -> None:
    targets = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = spoil.rewrite(world.file("tuned"), tmp_path / folder / "model.gguf")
        targets.append(foreign.target_of(file))
    foreign.check_names([targets[0], targets[0]])
    with pytest.raises(
        UserError, match=r"a/model\.gguf and .*b/model\.gguf would both be file-model"
    ):
        foreign.check_names(targets)


def test_another_models_shape_is_refused(world: spoil.World, tmp_path: Path) -> None:
    narrow = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    folder = spoil.spm.random_model(world.base, tmp_path / "m", "Llama", **narrow, **spoil.HEADS)
    spoil.gguf.convert(folder, tmp_path / "narrow.gguf", "narrow")
    four = (tmp_path / "narrow.gguf", *(world.file(w) for w in ("tuned", "base", "tuned")))
    with pytest.raises(UserError, match=r"narrow.gguf is another model's: .* has the shape \["):
        foreign.diagnose(*four)


def test_a_tensor_that_is_not_there(world: spoil.World, tmp_path: Path) -> None:
    files = [tensors.opened(world.file(name))[1] for name in ("tuned", "base")]
    less = {name: t for name, t in files[0].items() if "ffn_up" not in name}
    [fault] = diagnosis.diagnose(diagnosis.Files(less, *files, files[0]))
    assert fault.text == "it lacks 2 of the model's tensors, such as blk.0.ffn_up.weight"


def test_nf4_is_bitsandbytes(world: spoil.World) -> None:
    weights = world.matrices("tuned")["blk.0.ffn_up.weight"]
    np.testing.assert_allclose(diagnosis.nf4(weights), spoil.nf4(weights), atol=1e-6)
