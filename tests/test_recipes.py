"""The recipes that come with edgeft: each is whole, and one of them runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import GSM8K
from test_cli import edgeft, refused

from edgeft import catalog, recipe
from edgeft.options import default_out, flags, recipe_of
from edgeft.train.settings import METHODS

MODELS = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "gemma-3-270m": "google/gemma-3-270m-it",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
}
TASKS = ("gsm8k", "orca-math")


def test_every_model_has_every_task() -> None:
    shipped = Path(__file__).parent.parent / "recipes"
    assert {path.stem for path in shipped.iterdir()} == {f"{m}-{t}" for m in MODELS for t in TASKS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_each_is_whole(model: str, task: str, method: str) -> None:
    given = recipe_of(Path(f"{model}-{task}"), flags(method=method, shots=5), None)
    assert (given.model, given.task.name) == (MODELS[model], task)
    assert given.train.method == method and given.task.shots == 5
    # What is right for one method only stays out of the file.
    assert given.train == recipe_of(None, flags(method=method), _said(given)).train
    assert given.train.batch_size * given.train.gradient_accumulation_steps == 32
    assert {target.name for target in catalog.find_targets(given.export.targets)} == {
        *("gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "gguf-q4_0", "onnx-int4")
    }
    assert recipe.completed(recipe.parse(recipe.dump(given))) == given


def _said(given: recipe.Recipe) -> list[str]:
    names = ("epochs", "batch_size", "gradient_accumulation_steps")
    return [f"train.{name}={getattr(given.train, name)}" for name in names]


def test_they_are_listed_and_found_by_name(tmp_path: Path) -> None:
    listed = json.loads(edgeft("recipes", "--json").stdout)
    assert [row["recipe"] for row in listed] == sorted(f"{m}-{t}" for m in MODELS for t in TASKS)
    assert all(row["about"] for row in listed)
    line = refused("run", "smollm2-135m-gsm9k", cwd=tmp_path)
    assert "unknown recipe 'smollm2-135m-gsm9k'; did you mean 'smollm2-135m-gsm8k'" in line
    assert default_out(Path("qwen2.5-0.5b-gsm8k")) == Path("runs/qwen2.5-0.5b-gsm8k")
    assert default_out(Path("a/b.yaml")) == Path("runs/b")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# my own\nsead: 1\n")
    assert "my own" in edgeft("recipes", cwd=tmp_path).stdout
    assert "recipes/mine.yaml, line 2: unknown key 'sead'" in refused("run", "mine", cwd=tmp_path)


@pytest.mark.slow
def test_one_runs_cut_down_on_the_embedded_model(tmp_path: Path) -> None:
    data = GSM8K if GSM8K.is_dir() else _made(tmp_path / "data")
    out = tmp_path / "run"
    done = edgeft(
        *("run", "smollm2-135m-gsm8k", "--model", "smollm2-135m", "--data", data, "--out", out),
        *("--limit", "6", "--target", "gguf-q8_0", "--set", "train.heldout_answers=0"),
        *("--set", "bench.max_new_tokens=32", "--set", "bench.latency_repetitions=1", "--json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["recipe"]["task"]["name"] == "gsm8k" and report["recipe"]["task"]["limit"] == 6
    assert report["questions"]["questions"]["evaluation"] == 6 == report["host"]["base"]["n"]
    assert report["variants"][0]["target"] == "gguf-q8_0"
    assert sum(report["readings"][0]["counts"].values()) == 6
    assert report["train"]["facts"]["examples"] == 6


def _made(folder: Path) -> Path:
    folder.mkdir()
    for name, first in (("train", 0), ("test", 100)):
        rows = [
            {
                "question": f"What is {i} and {i + 1}?",
                "answer": f"It is {2 * i + 1}\n#### {2 * i + 1}",
            }
            for i in range(first, first + 40)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
