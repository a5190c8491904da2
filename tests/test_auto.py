"""Types by measurement: the choice is the best there is, and the file is the choice."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import make_run, write_json
from test_repair import FEW, cli

from edgeft import child, prompts
from edgeft.errors import UserError
from edgeft.exporters import auto
from edgeft.exporters.auto import Option, added_loss, knapsack
from edgeft.exporters.gguf_settings import settings_of
from edgeft.report.build import as_json, build
from edgeft.report.tables import remarks
from edgeft.tasks import Question

LOSSES, COSTS = st.floats(-1, 1), st.integers(-50, 50)
GROUPS = st.lists(
    st.lists(st.tuples(LOSSES, COSTS), min_size=1, max_size=3), min_size=1, max_size=5
)


@given(GROUPS, st.integers(-100, 200))
@settings(deadline=None, max_examples=60)
def test_the_choice_is_the_best_under_the_budget(
    groups: list[list[tuple[float, int]]], budget: int
) -> None:
    options = [[Option(str(i), *pair) for i, pair in enumerate(group)] for group in groups]
    taken = knapsack(options, budget)
    fitting = [c for c in itertools.product(*options) if sum(o.cost for o in c) <= budget]
    if taken is None:
        assert not fitting
        return
    assert all(option in group for option, group in zip(taken, options, strict=True))
    assert sum(option.cost for option in taken) <= budget
    # Costs are whole numbers and steps are not, so that a tight fit may be missed by rounding up.
    looser = [c for c in fitting if sum(o.cost for o in c) <= budget - 0.01 * len(groups)]
    least = min((sum(o.loss for o in c) for c in looser), default=float("inf"))
    assert sum(option.loss for option in taken) <= least + 1e-9


def test_loss_by_error() -> None:
    """Through what was measured, and never less for more error."""
    facts = {
        "loss": 0.4,
        "error": 2.0,
        "errors": {"Q8_0": 0.01, "Q4_0": 4.0},
        "coarsest": {"kind": "Q4_0", "loss": 0.8},
    }
    floor = 0.5
    for error, expected in ((0, -0.1), (1, -0.05), (2, 0), (3, 0.15), (4, 0.3)):
        assert added_loss(facts, floor, error) == pytest.approx(expected, abs=1e-5)
    lucky = {**facts, "loss": 0.6, "coarsest": {"kind": "Q4_0", "loss": 0.4}}
    found = [added_loss(lucky, floor, error) for error in (0, 1, 2, 3)]
    assert found == sorted(set(found)) and found == pytest.approx([0, 0, 0, 0], abs=1e-5)
    unmeasured = {key: value for key, value in facts.items() if key != "coarsest"}
    assert added_loss(unmeasured, floor, 2.4) == pytest.approx(0.02)
    assert added_loss(facts, floor, 1, share=0.5) == pytest.approx(-0.025)
    whole = {**facts, "error": 0.0, "loss": floor}
    assert added_loss(whole, floor, 2) == pytest.approx(0.15)


def test_a_type_that_undoes_the_training_is_not_taken() -> None:
    """Its error is small where the untuned weights lie on its grid, and the loss says what it does."""
    group = auto.Group({"w": "Q4_0"}, ["blk.0.ffn_up.weight"], [320], 180)
    errors = {"Q4_1": 0.1, "Q5_0": 0.3}
    losses = {
        "": {"loss": 0.5, "own": 0.3},
        "Q4_1": {"loss": 0.9},
        "Q5_0": {"loss": 0.4},
        "up": {"loss": 0.3, "error": 1.0, "errors": errors},
    }
    options = auto._options({"up": group}, losses, auto._extra_bytes)["up"]
    found = {option.kind: option.loss for option in options}
    assert found["Q4_1"] == pytest.approx(0.4, abs=1e-4)
    assert found["Q5_0"] == pytest.approx(-0.1, abs=1e-4)
    [taken] = knapsack([options], 100) or []
    assert taken.kind == "Q5_0"


def test_groups_are_quarters_of_the_blocks() -> None:
    names = [auto._group(f"blk.{i}.ffn_down.weight", 30) for i in range(30)]
    assert dict.fromkeys(names) == dict.fromkeys(
        f"ffn_down {part}" for part in ("0-7", "8-14", "15-22", "23-29")
    )
    for i, name in enumerate(names):
        first, last = map(int, name.split()[1].split("-"))
        assert first <= i <= last
    assert auto._group("token_embd.weight", 30) == "token_embd"


@pytest.mark.slow
def test_losses_are_those_of_the_rounded_model(tiny: Path, tmp_path: Path) -> None:
    """By transformers itself, with the weights that llama.cpp's rounding leaves."""
    from edgeft.exporters.sensitivity import _open, measure
    from edgeft.rounding import rounded

    questions = [Question(str(i), f"What is {i} + 1?", str(i + 1), "") for i in range(6)]
    prompts.encode(tiny, {"heldout": questions}, tmp_path)
    items = prompts.read_items(tmp_path / "heldout.jsonl")
    key = "model.layers.0.mlp.up_proj.weight"
    other = "model.layers.1.self_attn.o_proj.weight"
    groups = {"a": {key: "Q4_0"}, "b": {other: "Q8_0"}}
    opened = _open(tiny, [key, other], "float32")
    found = dict(measure(opened, items, groups, ["Q4_0", "Q5_0", "Q4_K"], known=["a"]))
    assert list(found) == ["", "Q4_0", "Q5_0", "b"]  # 64 columns are no block of Q4_K
    opened = _open(tiny, [key, other], "float32")
    found |= dict(measure(opened, items, groups, ["Q4_0", "Q5_0", "Q4_K"], known=["", "b"]))
    assert set(found["b"]["errors"]) == {"Q4_0", "Q5_0"}
    assert found["b"]["coarsest"]["kind"] == "Q4_0" and "coarsest" not in found["a"]

    def expected(types: dict[str, str]) -> float:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in types:
                    parameter.copy_(rounded(parameter, types[name], half=True))
            for item in items:
                logits = model(torch.tensor([[*item.prompt, *item.gold]])).logits[0]
                scores = logits[len(item.prompt) - 1 : -1].log_softmax(-1)
                total -= float(scores[torch.arange(len(item.gold)), torch.tensor(item.gold)].sum())
                count += len(item.gold)
        return total / count

    for name, types in (
        ("", {key: "Q4_0", other: "Q8_0"}),
        ("a", {other: "Q8_0"}),
        ("b", {key: "Q4_0"}),
        ("Q5_0", {key: "Q5_0", other: "Q5_0"}),
    ):
        assert found[name]["loss"] == pytest.approx(expected(types), rel=1e-5)
    assert found[""]["own"] == pytest.approx(expected({}), rel=1e-5)
    coarse = expected({key: "Q4_0", other: "Q4_0"})
    assert found["b"]["coarsest"]["loss"] == pytest.approx(coarse, rel=1e-5)


TARGET = """
format = "gguf"
runtime = "llama.cpp"
about = "chosen"

[gguf]
ftype = "Q4_0"
auto = {%s}
"""


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, and targets under several budgets."""
    place = tmp_path_factory.mktemp("auto")
    (place / "export").mkdir()
    budgets = {
        "size": "max_size = 0.9",
        "mb": "max_mb = 4.2",
        "slow": "min_tok_s = 1",
        "never": "min_tok_s = 1e9",
        "none": "max_mb = 0.1",
    }
    for name, budget in budgets.items():
        (place / "export" / f"gguf-{name}.toml").write_text(TARGET % budget)
    sets = [word for setting in FEW for word in ("--set", setting)]
    done = cli(place, "train", "--model", str(tiny), "--out", "run", *sets)
    assert done.returncode == 0, done.stderr
    return place / "run"


def types_of(run: Path, name: str, weights: str) -> dict[str, str]:
    from gguf import GGUFReader

    reader = GGUFReader(run / "export" / name / weights / "model.gguf")
    return {t.name: t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}


@pytest.mark.slow
def test_the_file_is_the_choice_and_keeps_to_the_budget(run: Path) -> None:
    done = cli(run.parent, "export", "run", "--target", "gguf-q4_0", "--target", "gguf-size")
    assert done.returncode == 0, done.stderr
    plain, tuned = types_of(run, "gguf-q4_0", "tuned"), types_of(run, "gguf-size", "tuned")
    assert tuned == types_of(run, "gguf-size", "base")
    choice = json.loads((run / "auto/gguf-size/choice.json").read_text())
    groups = json.loads((run / "auto/Q4_0/groups.json").read_text())["groups"]
    expected = dict(plain)
    for name, kind in choice["groups"].items():
        expected |= dict.fromkeys(groups[name]["tensors"], kind)
    assert tuned == expected != plain
    small, large = (
        (run / "export" / name / "tuned/model.gguf").stat().st_size
        for name in ("gguf-size", "gguf-q4_0")
    )
    assert 0.7 * large < small <= 0.9 * large
    manifest = json.loads((run / "export/gguf-size/tuned/manifest.json").read_text())
    assert manifest["auto"] == {"groups": choice["groups"], "loss": choice["loss"]}
    done = cli(run.parent, "export", "run", "--target", "gguf-mb")
    assert "sensitivity at Q4_0: up to date" in done.stderr  # another budget, the same measuring
    assert (run / "export/gguf-mb/tuned/model.gguf").stat().st_size <= 4.2e6


@pytest.mark.slow
def test_a_speed_is_a_budget_too(run: Path) -> None:
    done = cli(run.parent, "export", "run", "--target", "gguf-slow")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "auto/gguf-slow/choice.json").read_text())["loss"]["measured"] > 0
    for name, reason in (
        ("never", "no choice of types reaches 1e+09 tok/s here: the fastest file"),
        ("none", "no choice of types makes it 0.1 MB: at least"),
    ):
        done = cli(run.parent, "export", "run", "--target", f"gguf-{name}")
        assert done.returncode == 2 and reason in done.stderr
        assert not (run / "export" / f"gguf-{name}").exists()


@pytest.mark.slow
def test_a_killed_measuring_goes_on(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("auto", "export"))
    words = [sys.executable, "-m", "edgeft", "export", "run", "--target", "gguf-auto"]
    rows = tmp_path / "run/auto/Q4_0.partial/measured.jsonl"
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (rows.is_file() and rows.read_bytes().count(b"\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = rows.read_text().splitlines()
    done = cli(tmp_path, "export", "run", "--target", "gguf-auto")
    assert done.returncode == 0, done.stderr
    after = (tmp_path / "run/auto/Q4_0/measured.jsonl").read_text().splitlines()
    groups = json.loads((tmp_path / "run/auto/Q4_0/groups.json").read_text())["groups"]
    assert after[: len(before) - 1] == before[:-1]
    names = [json.loads(row)["name"] for row in after]
    assert len(set(names)) == len(names) and set(names) >= {"", "Q8_0", *groups}


@pytest.mark.slow
def test_types_that_cannot_be_measured(tiny: Path, tmp_path: Path) -> None:
    """They may come from the ftype itself."""
    source, out = tmp_path / "16.gguf", tmp_path / "out.gguf"
    request: dict[str, Any] = {"folder": str(tiny), "name": "tiny", "llama_cpp": None}
    child.run("edgeft.exporters.gguf", {**request, "out": str(source)})
    request = {"source": str(source), "out": str(out), "ftype": "Q4_0"}
    child.run("edgeft.exporters.quantize", {**request, "types": {"ffn_up": "MXFP4"}})
    with pytest.raises(UserError, match="gguf.auto cannot measure MXFP4, which blk.0.ffn_up"):
        auto.grouped(tiny, out)


@pytest.mark.slow
def test_training_cannot_see_types_that_are_not_chosen_yet(tiny: Path, tmp_path: Path) -> None:
    sets = [word for setting in FEW for word in ("--set", setting)]
    words = ["train", "--model", str(tiny), "--for", "gguf-auto", "--out", "run", *sets]
    done = cli(tmp_path, *words)
    assert done.returncode == 2
    assert "gguf-auto chooses types by the tuned weights: train without --for" in done.stderr


def test_settings_are_read() -> None:
    table = {"ftype": "Q4_0", "auto": {"max_size": 1.03, "types": ["Q8_0"]}}
    found = settings_of("mine", table).auto
    assert found and (found.max_size, found.types) == (1.03, ["Q8_0"])


def test_the_report_says_what_was_chosen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["gguf-q4_0"])
    path = run / "export" / "gguf-q4_0" / "tuned" / "manifest.json"
    loss = {"ftype": 0.11, "predicted": 0.07, "measured": 0.08}
    chosen = {"groups": {"ffn_down 0-7": "Q6_K"}, "loss": loss}
    write_json(path, {**json.loads(path.read_text()), "auto": chosen})
    said = (
        "gguf-q4_0 has types chosen by measuring: held-out loss 0.110 -> 0.080 nats a token "
        "(predicted 0.070); groups of tensors: 1 in Q6_K."
    )
    assert said in remarks(build(run))
    assert as_json(build(run))["variants"][0]["auto"] == chosen
