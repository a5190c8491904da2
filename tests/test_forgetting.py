"""Forgetting is seen where there is some, advice is given where there is no benefit."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import N, make_run, write_json, write_lines, write_results

from edgeft import bench, prompts, survival
from edgeft.report import tables
from edgeft.report.advice import advice
from edgeft.report.build import as_json, build
from edgeft.report.forgetting import compare, forgetting, sentence
from edgeft.survival import Benefit, Result
from edgeft.tasks import general


@pytest.fixture(scope="module")
def items(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("general")
    prompts.encode(tiny, {"general": general.questions()}, folder)
    return folder / "general.jsonl"


def damaged(folder: Path, out: Path) -> Path:
    """The same model with noise on its weights, as if trained on something else for too long."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    torch.manual_seed(0)
    noisy = {name: w + 0.3 * w.std() * torch.randn_like(w) for name, w in weights.items()}
    save_file(noisy, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_the_set_is_sound() -> None:
    questions = general.questions()
    assert len(questions) == 3 * 32
    assert len({q.question for q in questions}) == 32
    for at in range(0, len(questions), 3):
        choices = [q.solution for q in questions[at : at + 3]]
        assert len(set(choices)) == 3
        assert max(map(len, choices)) <= 1.5 * min(map(len, choices)) + 4
    assert not any(character.isdigit() for q in questions for character in q.question)


@pytest.mark.slow
def test_likelihoods_are_the_models(tiny: Path, items: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    bench.general("transformers", tiny, items, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "general.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    for row, item in list(zip(rows, prompts.read_items(items), strict=True))[:7]:
        with torch.no_grad():
            logits = model(torch.tensor([[*item.prompt, *item.gold]])).logits[0]
        scores = logits[len(item.prompt) - 1 : -1].log_softmax(-1)
        expected = float(scores[torch.arange(len(item.gold)), torch.tensor(item.gold)].sum())
        assert row["logprob"] == pytest.approx(expected, rel=1e-4)
        assert row["tokens"] == len(item.gold) and row["bytes"] == len(item.answer)


@pytest.mark.slow
def test_forgetting_is_seen(tiny: Path, items: Path, tmp_path: Path) -> None:
    for weights, folder in (("base", tiny), ("tuned", damaged(tiny, tmp_path / "damaged"))):
        out = tmp_path / "bench" / "general" / "host" / weights
        assert forgetting(tmp_path) is None
        out.mkdir(parents=True)
        bench.general("transformers", folder, items, out)
        for kind in ("general/host", "host"):
            mark = tmp_path / "bench" / kind / weights / "stage.json"
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(json.dumps({"made_from": weights}))
    found = forgetting(tmp_path)
    assert found and found.n == 32
    assert found.nll_change == pytest.approx(found.tuned.nll - found.base.nll)
    low, high = found.nll_change_ci
    assert 0 < low < found.nll_change < high
    assert "forgetting is visible" in sentence(found)
    (tmp_path / "bench" / "host" / "tuned" / "stage.json").write_text('{"made_from": "later"}')
    assert forgetting(tmp_path) is None  # scores of weights that are no longer the run's
    base = tmp_path / "bench" / "general" / "host" / "base" / "general.jsonl"
    rows = [json.loads(line) for line in base.read_text().splitlines()]
    same = compare(rows, rows)
    assert same.nll_change == 0 and same.nll_change_ci == (0, 0)
    assert "no forgetting is visible" in sentence(same)
    json.dumps(asdict(found))


def test_accuracy_is_by_likelihood_a_byte() -> None:
    def rows(right: float) -> list[dict[str, Any]]:
        return [
            {"id": "q/0", "logprob": right, "tokens": 2, "bytes": 10},
            {"id": "q/1", "logprob": -6.0, "tokens": 1, "bytes": 4},
            {"id": "q/2", "logprob": -20.0, "tokens": 9, "bytes": 40},
        ]

    found = compare(rows(-4.0), rows(-6.0))  # -0.4 a byte beats -0.5, -0.6 does not
    assert (found.base.accuracy, found.tuned.accuracy) == (1.0, 0.0)
    assert found.nll_change == pytest.approx(1.0)


def host(before: int, after: int, n: int = 100) -> Benefit:
    def results(right: int) -> list[Result]:
        return [Result(f"q{i}", "", "", None, i < right, -1.0, 1) for i in range(n)]

    return survival.benefit(results(before), results(after))


def test_advice_against_full_fine_tuning_of_a_small_model() -> None:
    worse = host(40, 10)
    assert worse.verdict == "negative-transfer"
    recipe = {"train": {"method": "full", "lr": 3e-4}}
    train = {"method": "full", "parameters": 135e6, "keep": "last"}
    train["heldout"] = [[0, 1.0, None], [10, 0.8, None], [20, 1.4, None]]
    first, second = advice(worse, recipe, train)
    assert "--method lora" in first and "135M" in first and "2606.06920" in first
    assert "lowest at step 10 of 20" in second and "train.lr=0.0001" in second
    assert "--keep best" in second
    large = advice(worse, recipe, {**train, "parameters": 7e9, "heldout": []})
    assert len(large) == 1 and "train.lr=0.0001" in large[0]


def test_advice_for_an_adapter() -> None:
    recipe = {"train": {"method": "lora", "lr": 1e-3}}
    found = advice(host(40, 10), recipe, {"method": "lora", "parameters": 135e6})
    assert [line for line in found if "larger model than 135M" in line]
    assert not any("--method" in line for line in found)
    theirs = advice(host(40, 10), {**recipe, "adapter": "x"}, {})
    assert not any("train.lr" in line for line in theirs)
    undecided = advice(host(40, 43), recipe, {})
    assert host(40, 43).verdict == "no-benefit"
    assert any("larger task.evaluation" in line for line in undecided)
    falling = {"heldout": [[0, 1.0, None], [9, 0.5, None]]}
    assert any("train.epochs" in line for line in advice(host(40, 43), recipe, falling))
    assert advice(host(10, 60), recipe, {}) == []


def test_negative_transfer_is_in_every_view(tmp_path: Path) -> None:
    """From made-up per-question results to what people read."""
    from rich.console import Console

    from edgeft import report
    from edgeft.report import terminal

    run = tmp_path / "run"
    write_results(run / "bench" / "host" / "base", [i < 90 for i in range(N)])
    write_results(run / "bench" / "host" / "tuned", [i < 40 for i in range(N)])
    (run / "train").mkdir()
    (run / "recipe.yaml").write_text("train: {method: full, lr: 1.0e-4}")
    heldout = [[0, 1.0, 0.2], [10, 0.8, 0.3], [20, 1.1, 0.1]]
    facts = {"method": "full", "parameters": 135_000_000, "kept_step": 10, "heldout": heldout}
    (run / "train" / "train.json").write_text(json.dumps(facts))
    rows = [{"step": s, "heldout_loss": x, "heldout_accuracy": a} for s, x, a in heldout]
    (run / "train" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = report.write(run)
    assert found.verdict == "negative-transfer on the host"
    public = json.loads((run / "report.json").read_text())
    assert public["host"]["verdict"] == "negative-transfer"
    assert public["train"]["accuracy"] == [[0, 0.2], [10, 0.3], [20, 0.1]]
    console = Console(record=True, width=120, file=StringIO())
    terminal.show(found, console)
    views = [console.export_text()] + [
        (run / name).read_text() for name in ("report.md", "report.html", "report.json")
    ]
    for view in views:
        assert "negative-transfer" in view
        assert "Try --method lora or dora" in " ".join(view.split())
    assert [row[0] for row in tables.training(found).rows if row[-1] == "kept"] == ["step 10"]


def test_it_is_seen_at_every_target(tmp_path: Path) -> None:
    """And what was scored in another file is no part of it."""
    run = make_run(tmp_path / "run", ["gguf-f16", "gguf-q4_0"])
    assert tables.general(build(run)).rows == []
    for place, shift in (("host", 0.5), ("gguf-q4_0", 1.0)):
        for weights, nats in (("base", 1.0), ("tuned", 1.0 + shift)):
            choices = [
                {"id": f"{q}/{c}", "logprob": -4 * (nats + c), "tokens": 4, "bytes": 9}
                for q in range(5)
                for c in range(3)
            ]
            folder = run / "bench" / "general" / place / weights
            write_lines(folder / "general.jsonl", choices)
            write_json(folder / "stage.json", {"manifest": weights} if place != "host" else {})
            if place != "host":
                mark = run / "bench" / "local" / place / weights / "stage.json"
                write_json(mark, {**json.loads(mark.read_text()), "manifest": weights})
    rows = {row[0]: row[1:] for row in tables.general(build(run)).rows}
    assert rows.keys() == {"host", "gguf-q4_0"}
    assert rows["gguf-q4_0"] == ["+1.00 (+1.00 to +1.00)", "1.00", "2.00", "100.0%", "100.0%"]
    found = {v["target"]: v["general"] for v in as_json(build(run))["variants"]}
    assert found["gguf-f16"] is None and found["gguf-q4_0"]["n"] == 5
    mark = run / "bench" / "local" / "gguf-q4_0" / "tuned" / "stage.json"
    write_json(mark, {**json.loads(mark.read_text()), "manifest": "a later file"})
    assert "gguf-q4_0" not in {row[0] for row in tables.general(build(run)).rows}
