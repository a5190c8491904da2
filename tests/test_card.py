"""``edgeft card``: the Hub reads its metadata, its figures are the report's, its files the run's."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import typer
import yaml
from card_runs import (
    ARTIFACTS,
    MODEL,
    TASK,
    blocks,
    export,
    head_of,
    make_card_run,
    row_of,
    scores,
    set_recipe,
    text_of,
)
from report_runs import UNSEEN, N, write_json, write_results
from typer.testing import CliRunner, Result

from edgeft import card, runtimes, ship_commands
from edgeft.card.contents import describe, select
from edgeft.errors import UserError
from edgeft.report.build import build


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_card_run(tmp_path / "math")


def test_the_hub_reads_the_metadata(run: Path) -> None:
    from huggingface_hub import ModelCard

    loaded = ModelCard.load(card.write(run) / "README.md")
    data = loaded.data
    assert (data.base_model, data.base_model_relation) == (MODEL, "finetune")
    assert (data.library_name, data.pipeline_tag) == ("gguf", "text-generation")
    assert {"edgeft", "gguf", "onnx", "llama.cpp", "lora", "wordmath"} <= set(data.tags)
    assert data.language == ["en"] and data.license is None
    assert data.datasets is None, "the questions are generated"
    assert data.model_name == TASK
    assert loaded.text.lstrip().startswith(f"# {TASK}")
    # The library's own writer changes nothing that it means.
    assert yaml.safe_load(data.to_yaml())["base_model"] == MODEL


def test_results_are_the_reports(run: Path) -> None:
    from huggingface_hub import ModelCard

    results = ModelCard.load(card.write(run) / "README.md").data.eval_results
    assert results is not None and len(results) == 2 * len(ARTIFACTS)
    found = {(r.metric_type, r.metric_name): r for r in results}
    for v in build(run).variants:
        where = f"({v.target} on local, {N} questions)"
        accuracy = found["accuracy", f"accuracy {where}"]
        assert accuracy.metric_value == pytest.approx(v.survival.here.tuned.accuracy, abs=5e-5)
        kept = found["retention", f"share of the host's benefit kept {where}"]
        assert kept.metric_value == pytest.approx(v.survival.retention, abs=5e-5)
        for result in (accuracy, kept):
            assert (result.task_type, result.verified) == ("text-generation", False)
            assert result.task_name == f"wordmath, {v.target}"
            assert (result.dataset_type, result.dataset_split) == ("wordmath", "evaluation")


def test_a_data_set_of_the_hub(run: Path) -> None:
    set_recipe(run, task={"name": "gsm8k"})
    items = run / "data" / "evaluation.jsonl"
    items.write_text(items.read_text().replace('"id": "q', '"id": "gsm8k-test-'))
    head = head_of(card.write(run))
    assert head["datasets"] == ["openai/gsm8k"]
    for result in head["model-index"][0]["results"]:
        assert result["dataset"] == {
            "name": "openai/gsm8k",
            "type": "openai/gsm8k",
            "config": "main",
            "split": "test",
        }
    set_recipe(run, task={"name": "jsonl", "data": "org/riddles"})
    head = head_of(card.write(run))
    assert head["datasets"] == ["org/riddles"] and "language" not in head


def test_the_embedded_model_is_known_by_its_name_on_the_hub(run: Path) -> None:
    set_recipe(run, model="smollm2-135m")
    folder = card.write(run)
    head = head_of(folder)
    assert (head["base_model"], head["license"]) == (MODEL, "apache-2.0")
    assert "dequantized from SmolLM2-135M-Instruct.Q4_1.gguf" in text_of(folder)


def test_every_figure_of_the_table_is_the_reports(run: Path) -> None:
    places = {"gguf-f16": f"{TASK}-F16.gguf", "onnx-int4": "onnx-int4"}
    before = text_of(card.write(run))
    for target, place in places.items():
        assert row_of(before, place)[1:] == scores(build(run), target)
    host = build(run).host
    assert row_of(before, "full precision")[3:5] == [
        f"{100 * score.accuracy:.1f}%" for score in (host.base, host.tuned)
    ]
    write_results(run / "bench/local/gguf-f16/tuned", [i % 3 == 0 for i in range(N + UNSEEN)])
    export(run, "gguf-f16")
    after = text_of(card.write(run))
    assert row_of(after, places["gguf-f16"])[1:] == scores(build(run), "gguf-f16")
    assert row_of(after, places["gguf-f16"]) != row_of(before, places["gguf-f16"])


def test_training_and_measurement_are_said(run: Path) -> None:
    set_recipe(run, train={"rank": 24, "alpha": 48.0, "schedule": "cosine"}, seed=11)
    write_json(run / "data" / "data.json", {"questions": {"train": 643}, "chat_template": True})
    text = text_of(card.write(run))
    assert "Method: lora, on 643 questions of wordmath." in text
    for row in ("| rank | 24 |", "| alpha | 48 |", "| schedule | cosine |", "| seed | 11 |"):
        assert row in text
    assert "| tokens | 48,000 |" in text and "| learning rate | 0.001 |" in text
    assert f"By edgeft 0.1.0, on {N} questions of wordmath (evaluation)" in text
    assert "10,000 resamples" in text and "host: Example 9000, 2 cores" in text
    assert f"{UNSEEN} questions that the headline figures leave out" in text
    assert "was not measured" in text.partition("## What it costs")[2].partition("##")[0]


def test_weights_of_their_own_are_told(run: Path) -> None:
    export(run, "gguf-q8_0", repair={"rounded": True, "steps": 50})
    loss = {"ftype": 1.0, "measured": 0.9, "predicted": 0.91}
    export(run, "gguf-f16", auto={"groups": {"a": "Q6_K"}, "loss": loss})
    text = text_of(card.write(run))
    costs = text.partition("## What it costs")[2].partition("## How it was measured")[0]
    assert f"- {TASK}-Q8_0.gguf has weights of its own, trained 50 steps further, seeing" in costs
    assert f"- {TASK}-F16.gguf has the types that measuring chose for these weights" in costs
    assert "loss 1.000 -\\> 0.900 nats a token" in costs
    alone = text_of(card.write(run, ["gguf-f16"]))
    assert "steps further" not in alone and "measuring chose" in alone


def test_what_is_not_sure_is_said(run: Path) -> None:
    built = build(run)
    first = built.variants[0]
    unsure = replace(first.survival, verdict="inconclusive", needed_questions=1300)
    few = replace(unsure.here, tuned=replace(unsure.here.tuned, n=30))
    variants = [replace(first, survival=replace(unsure, here=few), not_measured="an emulated CPU")]
    report, shipped, _ = select(run, replace(built, variants=variants), [], "x", {})
    said = card.render(describe(run, built, None), report, shipped).partition("## Limit")[2]
    assert "- On local 30 of the 200 questions were asked." in said
    assert f"{shipped[0].place} on local: about 1,300 questions would decide" in said
    assert "- Speed was not measured everywhere: an emulated CPU." in said


def test_some_targets_alone(run: Path) -> None:
    folder = card.write(run, ["gguf-q4_k_m-imatrix", "onnx"], repo_id="ann/tiny-math")
    places = {path.name for path in folder.iterdir()} - {"README.md", "edgeft.json"}
    assert places == {f"{TASK}-Q4_K_M-imatrix.gguf", "onnx-int4"}
    text = text_of(folder)
    head = head_of(folder)
    assert head["model-index"][0]["name"] == "tiny-math" and "# tiny-math" in text
    assert len(head["model-index"][0]["results"]) == 2
    assert "**survives at onnx-int4; partial at gguf-q4_k_m-imatrix**" in text
    assert "gguf-f16" not in text and "gguf-q8_0" not in text, "nor as what to ship"
    assert "On local, ship onnx-int4: " in text
    assert "hf download ann/tiny-math --local-dir tiny-math" in text
    assert f"llama-server -hf ann/tiny-math --hf-file {TASK}-Q4_K_M-imatrix.gguf" in text


def test_two_devices_both_count(run: Path) -> None:
    shutil.copytree(run / "bench/local/gguf-q8_0", run / "bench/pi/gguf-q8_0")
    write_results(run / "bench/pi/gguf-q8_0/tuned", [i % 3 == 0 for i in range(N + UNSEEN)])
    export(run, "gguf-q8_0")
    write_json(run / "bench/pi/machine.json", {"board": "Raspberry Pi 5", "cores": 4})
    folder = card.write(run, ["gguf-q8_0"])
    [result] = head_of(folder)["model-index"][0]["results"]
    names = [m["name"].split("(")[1] for m in result["metrics"]]
    assert names == 2 * [f"gguf-q8_0 on local, {N} questions)"] + 2 * [
        f"gguf-q8_0 on pi, {N} questions)"
    ]
    assert "- pi: Raspberry Pi 5, 4 cores" in text_of(folder)


def test_no_path_of_this_machine_is_told(run: Path) -> None:
    secret = "/home/ann/secret"
    data = {"name": "jsonl", "data": f"{secret}/riddles.jsonl"}
    more = {"llama_cpp": f"{secret}/llama.cpp"}
    set_recipe(run, model=f"{secret}/My Model", task=data, export=more)
    folder = card.write(run)
    head = head_of(folder)
    assert "base_model" not in head and "datasets" not in head
    assert head["model-index"][0]["results"][0]["dataset"]["name"] == "riddles.jsonl"
    assert (folder / "My-Model-riddles-Q8_0.gguf").is_file()
    set_recipe(run, model=f"{secret}/base.Q4_0.gguf", adapter=f"{secret}/my-adapter")
    other = card.write(run, out=run.parent / "other")
    assert "trained elsewhere (my-adapter), on the base" in text_of(other)
    assert "dequantized from base.Q4" in text_of(other)
    for place in (folder, other):
        for name in ("README.md", "edgeft.json"):
            said = (place / name).read_text()
            assert secret not in said and str(run.parent) not in said
            assert "Ada has" not in said, "nor questions of people's own"


def test_a_relative_folder_is_no_hub_id(run: Path) -> None:
    set_recipe(run, model="models/mine")
    adapter = run / "train" / "adapter" / "adapter_config.json"
    write_json(adapter, {"base_model_name_or_path": "/home/ann/models/mine"})
    folder = card.write(run)
    assert "base_model" not in head_of(folder) and "/home/ann" not in text_of(folder)
    cache = "/home/ann/.cache/huggingface/hub/models--models--mine/snapshots/12ab"
    write_json(adapter, {"base_model_name_or_path": cache})
    assert head_of(card.write(run))["base_model"] == "models/mine"


def test_an_adapter_from_elsewhere_was_not_trained_here(run: Path) -> None:
    set_recipe(run, adapter="adapters/theirs", task={"name": "gsm8k"})
    folder = card.write(run)
    head, text = head_of(folder), text_of(folder)
    assert "datasets" not in head and "lora" not in head["tags"]
    assert "that training never saw" not in text and "learning rate" not in text
    assert head["model-index"][0]["results"][0]["dataset"]["type"] == "openai/gsm8k"


def test_without_a_benefit_nothing_is_claimed(run: Path) -> None:
    host = run / "bench" / "host"
    shutil.copy(host / "base/results.jsonl", host / "tuned/results.jsonl")
    folder = card.write(run)
    metrics = [
        m["type"] for r in head_of(folder)["model-index"][0]["results"] for m in r["metrics"]
    ]
    assert metrics == ["accuracy"] * len(ARTIFACTS)
    assert "**no-benefit on the host**" in text_of(folder) and "ship" not in text_of(folder)


def test_commands_ask_what_was_asked(run: Path) -> None:
    """Whatever stands in prompts, the shell and Python read it as it is."""
    question = 'Ann\'s "box" has $8 & `3` pens.\n```\nHow\\many?'
    system = "It's ```sh``` and $HOME; answer 'so'."
    items = run / "data" / "evaluation.jsonl"
    first, *rest = items.read_text().splitlines(keepends=True)
    items.write_text(json.dumps({**json.loads(first), "question": question}) + "\n" + "".join(rest))
    set_recipe(run, task={"system": system})
    text = text_of(card.write(run))
    shells = [shlex.split(block, comments=True) for block in blocks(text, "sh")]
    asked = [words for words in shells if "llama-cli" in words]
    assert len(asked) == 2, "merged files, and the adapter beside its base"
    for words in asked:
        assert words[words.index("-p") + 1] == question
        assert words[words.index("-sys") + 1] == system
        assert words[words.index("-n") + 1] == "96" and words[words.index("-c") + 1] == "1024"
    assert shells[1][shells[1].index("--lora") + 1] == "gguf-q4_0+lora/adapter.gguf"
    programs = blocks(text, "python")
    assert len(programs) == 4
    for program in programs:
        literals = [n.value for n in ast.walk(ast.parse(program)) if isinstance(n, ast.Constant)]
        assert question in literals and system in literals


def test_a_model_without_a_chat_template(run: Path) -> None:
    write_json(run / "data" / "data.json", {"chat_template": False})
    text = text_of(card.write(run))
    assert "has no chat template" in text and "apply_chat_template" not in text
    asked = json.loads((run / "data/evaluation.jsonl").read_text().splitlines()[0])["question"]
    for block in blocks(text, "python"):
        literals = [n.value for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Constant)]
        assert f"Question: {asked}\nAnswer:" in literals
    assert "llama-completion -m" in text


def edgeft(*arguments: str | Path) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(ship_commands.card)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command(run: Path, tmp_path: Path) -> None:
    done = edgeft(run, "--target", "gguf", "--out", tmp_path / "c", "--repo-id", "ann/math")
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'c'}\n"
    assert len(list((tmp_path / "c").glob("*.gguf"))) == 3
    for wrong in ("math", "ann/ma th", "ann/../x", "-ann/x", "a/b/c"):
        done = edgeft(run, f"--repo-id={wrong}")
        assert isinstance(done.exception, UserError)
        assert str(done.exception).startswith("--repo-id takes ORG/NAME")
    done = edgeft(tmp_path)
    assert isinstance(done.exception, UserError) and "not an edgeft run" in str(done.exception)


def test_a_card_needs_nothing_heavy(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgeft import card, ship_commands;"
        "card.write(Path(sys.argv[1]));"
        "print({'torch', 'transformers', 'huggingface_hub', 'llama_cpp'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


FEW = 8  # tokens: with random weights a near tie comes soon


def answers(artifact: Path, runtime: str, ids: Sequence[int]) -> list[int]:
    session = runtimes.open_session(runtime, artifact, threads=2, context=600, parallel=1)
    [found] = session.generate([ids], FEW, {2, 7})
    return list(found.tokens)


@pytest.mark.slow
def test_the_programs_in_the_card_run(
    run: Path, tiny: Path, portable_graph: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    """On real files of a tiny model they print what edgeft's own runtimes answer."""
    from edgeft import prompts
    from edgeft.exporters import gguf, onnx
    from edgeft.tasks import Question

    gguf.convert(tiny, tmp_path / "model.gguf", "tiny")
    onnx.export(tiny, tmp_path / "onnx", onnx.OnnxSettings("fp32"), [2, 7])
    places = {
        "gguf-f16": (tmp_path / "model.gguf", "llama.cpp"),
        "onnx-int4": (tmp_path / "onnx", "onnxruntime-genai"),
        "onnx-portable-int8": (portable_graph(tiny, "fp32"), "onnxruntime"),
    }
    for target, (place, _) in places.items():
        shutil.rmtree(run / "export" / target / "tuned")
        files = [place] if place.is_file() else [p for p in place.iterdir() if p.is_file()]
        inside = "" if place.is_file() else "model/"
        contents = {f"{inside}{path.name}": path.read_bytes() for path in files}
        export(run, target, contents, max_new_tokens=FEW)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, run / "data" / "tokenizer" / name)
    folder = card.write(run, list(places))
    tokenizer = prompts.load_tokenizer(tiny)
    asked = json.loads((run / "data/evaluation.jsonl").read_text().splitlines()[0])["question"]
    text = prompts.prompt_text(tokenizer, Question("", asked, "", ""))
    ids = tokenizer.encode(text, add_special_tokens=False)
    programs = blocks(text_of(folder), "python")
    assert len(programs) == len(places)
    for program, (place, runtime) in zip(programs, places.values(), strict=True):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said = tokenizer.decode(answers(place, runtime, ids), skip_special_tokens=True)
        # llama-cpp-python leaves out half characters, and goes on where one comes last.
        printed, said = (text.replace("\ufffd", "").strip() for text in (done.stdout, said))
        assert said and printed.startswith(said), runtime
