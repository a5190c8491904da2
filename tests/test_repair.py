"""Repair: training sees what the file will hold, and the file holds what training saw."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_runs import make_run, write_json
from safetensors.torch import load_file

from edgeft import catalog, repair
from edgeft.errors import UserError
from edgeft.report.build import build
from edgeft.rounding import rounded
from edgeft.train.kernels import RoundedLinear
from edgeft.train.rounded import round_like, stored
from edgeft.train.settings import TrainSettings

FEW = ["task.train=32", "task.heldout=4", "task.evaluation=4", "task.unseen=0", "train.max_steps=2"]
REPAIR = """
[repair]
max_steps = 4
batch_size = 4
lr = 1e-2
dtype = "float32"
"""


def test_gradients_pass_straight_through() -> None:
    """As autograd has them where the rounding's difference is added as a constant."""
    torch.manual_seed(0)
    x, base = torch.randn(3, 5, 64, requires_grad=True), torch.randn(48, 64)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    whole = base + 0.5 * (b @ a)
    left = rounded(whole.detach(), "Q4_0")
    plain = torch.nn.functional.linear(x, whole + (left - whole).detach())
    ours = RoundedLinear.apply(x, left, None, a, b, 0.5)
    torch.testing.assert_close(ours, plain)
    weights = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * weights).sum(), (x, a, b))
    found = torch.autograd.grad((ours * weights).sum(), (x, a, b))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_training_rounds_what_will_be_merged(tiny: Path) -> None:
    """The products' dtype is no matter of the weights': they are merged in float32 and then rounded."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, lora)
    names = ("layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "layers.1.self_attn.k_proj")
    plan = {f"model.{name}.weight": {"ggml": "Q4_0"} for name in names}
    round_like(model, tiny, plan)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)
    merged = copy.deepcopy(model).merge_and_unload()
    for name in names:
        held = model.get_submodule(f"base_model.model.model.{name}").rounded
        expected = stored(merged.get_submodule(f"model.{name}").weight, {"ggml": "Q4_0"})
        torch.testing.assert_close(held.weight, expected, rtol=0, atol=0)


def cli(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeft", *words], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, and targets of the user's own that are repaired in a few steps."""
    place = tmp_path_factory.mktemp("repair")
    (place / "export").mkdir()
    for name in ("gguf-q4_0", "onnx-int4"):
        table = Path(catalog.folders("export")[-1], f"{name}.toml").read_text()
        (place / "export" / f"{name}-repaired.toml").write_text(table + REPAIR)
    sets = [word for setting in FEW for word in ("--set", setting)]
    done = cli(place, "train", "--model", str(tiny), "--out", "run", *sets)
    assert done.returncode == 0, done.stderr
    return place / "run"


def adapted(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "repair" / name / "merged" / "model.safetensors")


@pytest.mark.slow
def test_the_file_holds_what_training_saw(run: Path) -> None:
    from gguf import GGUFReader, dequantize

    done = cli(run.parent, "repair", "run", "--target", "gguf-q4_0")
    assert done.returncode == 0, done.stderr
    bundle = run / "export" / "gguf-q4_0-repaired" / "tuned"
    tensors = {t.name: t for t in GGUFReader(bundle / "model.gguf").tensors}
    weights, before = (
        adapted(run, "gguf-q4_0-repaired"),
        load_file(run / "merged/model.safetensors"),
    )
    for key, name in (
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
    ):
        file = tensors[name]
        ours = stored(weights[key], {"ggml": file.tensor_type.name}).numpy()
        np.testing.assert_array_equal(ours, dequantize(file.data, file.tensor_type))
        assert not torch.equal(weights[key], before[key])
    log = (run / "repair/gguf-q4_0-repaired/train/log.jsonl").read_text().splitlines()
    held = [row["heldout_loss"] for row in map(json.loads, log) if "heldout_loss" in row]
    assert len(set(held)) == len(held) > 1  # rounded anew after every step
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["repair"]["rounded"] and manifest["repair"]["steps"] == 4
    base = json.loads((run / "export/gguf-q4_0-repaired/base/manifest.json").read_text())
    assert "repair" not in base
    assert "repair for gguf-q4_0-repaired: up to date" in (
        cli(run.parent, "repair", "run", "--target", "gguf-q4_0-repaired").stderr
    )


@pytest.mark.slow
def test_onnx_is_repaired_and_reported(run: Path) -> None:
    done = cli(run.parent, "repair", "run", "--target", "onnx-int4")
    assert done.returncode == 0, done.stderr
    done = cli(run.parent, "bench", "run", "--target", "onnx-int4-repaired", "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert "onnx-int4-repaired" in [v["target"] for v in report["variants"]]


@pytest.mark.slow
def test_training_for_a_target(tiny: Path, tmp_path: Path) -> None:
    """--for: from the first step on, and every matrix of the file is in the plan."""
    sets = [word for setting in FEW for word in ("--set", setting)]
    words = ["train", "--model", str(tiny), "--for", "gguf-q4_k_m", "--out", "run", *sets]
    done = cli(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run/train/stage.json").read_text())["plan"]
    assert len(plan) == 2 * 7 + 1
    assert {how["ggml"] for how in plan.values()} <= {"Q5_0", "Q8_0", "Q4_K", "Q6_K"}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"max_step": 3}, "unknown key 'repair.max_step'; did you mean 'max_steps'"),
        ({"method": "dora"}, "takes method lora"),
        ({"lr": -1}, "lr must be above 0"),
    ],
)
def test_a_table_with_a_mistake(table: dict[str, Any], reason: str) -> None:
    target = catalog.Target("mine", "gguf", "llama.cpp", "", {"ftype": "Q4_0"}, table)
    with pytest.raises(UserError, match=reason):
        repair.settings_of(target)


def test_which_target_repairs() -> None:
    assert repair.find("gguf-q4_0").name == "gguf-q4_0-repaired"
    assert repair.find("onnx-int4-repaired").name == "onnx-int4-repaired"
    with pytest.raises(UserError, match=r"export/gguf-q8_0-repaired\.toml"):
        repair.find("gguf-q8_0")
    with pytest.raises(UserError, match="did you mean 'gguf-q4_0'"):
        repair.find("gguf-q4_o")


def test_what_cannot_be_trained_for() -> None:
    for wrong in ({"method": "full"}, {"dropout": 0.1}, {"init": "pissa"}):
        with pytest.raises(ValueError, match="takes method lora"):
            TrainSettings(target="gguf-q4_0", **wrong)


def test_a_repaired_target_is_no_step_on_the_way_of_others(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    survives = [v for v in build(run).variants if v.survival.verdict == "survives"]
    lost = next(v for v in build(run).variants if v.lost_after == survives[-1].target)
    path = run / "export" / survives[-1].target / "tuned" / "manifest.json"
    facts = {"rounded": True, "steps": 50}
    write_json(path, {**json.loads(path.read_text()), "repair": facts})
    after = {v.target: v.lost_after for v in build(run).variants}
    assert after[lost.target] not in (None, survives[-1].target)
