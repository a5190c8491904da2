"""Real runs whose report says where it went: files made elsewhere, an adapter, QLoRA, a bundle alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import spoil
from test_bench import BLOCKER, NOT_ON_A_DEVICE

from edgeft.bench import divergence
from edgeft.prompts import Item, read_items

pytestmark = pytest.mark.slow

SMALL = (
    *(
        "train.dtype=float32",
        "task.train=16",
        "task.heldout=4",
        "task.evaluation=16",
        "task.unseen=4",
    ),
    *("bench.max_new_tokens=6", "bench.latency_prompt_tokens=16", "bench.latency_new_tokens=4"),
    *("train.max_steps=6", "train.lr=1e-2", "train.heldout_answers=0"),
)
SETTINGS = [part for setting in SMALL for part in ("--set", setting)]
# All the way to the report; tests/test_foreign.py has every fault.
FAULTS = ("eos-within", "bos-dropped", "template-swapped", "head-permuted", "four-bits")
RIGHT = ("f16", "q4_0", "q4_0-imatrix")


def edgeft(*arguments: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "edgeft", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def world(place: Path) -> spoil.World:
    return spoil.world(place / "world")


@pytest.fixture(scope="module")
def run(world: spoil.World, place: Path) -> Path:
    """The adapter exported by edgeft and as files of others, benched; ``stdout`` is beside it."""
    (place / "files").mkdir()
    files = [spoil.FAULTS[name][2](world, place / "files" / f"{name}.gguf") for name in FAULTS]
    for name in RIGHT:
        ftype = name.partition("-")[0].upper()
        matrix = spoil.imatrix(world, place / "imatrix.gguf") if "imatrix" in name else None
        out = place / "files" / f"{name}.gguf"
        files.append(spoil.quantize(world.file("tuned"), out, ftype, matrix))
    given = [part for file in files for part in ("--file", str(file))]
    ours = ["--target", "gguf-f16", "--target", "gguf-q4_0", "--out", "run"]
    model = ["--model", str(world.base), "--adapter", str(world.adapter)]
    edgeft("export", *model, *ours, *given, *SETTINGS, cwd=place)
    (place / "stdout").write_text(edgeft("bench", "run", cwd=place).stdout)
    return place / "run"


@pytest.fixture(scope="module")
def variants(run: Path) -> dict[str, Any]:
    report = json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)
    return {variant["target"]: variant for variant in report["variants"]}


def manifest(run: Path, target: str, weights: str = "tuned") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (run / "export" / target / weights / "manifest.json").read_text()
    )
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_in_every_view(name: str, run: Path, variants: dict[str, Any]) -> None:
    kind, text, _ = spoil.FAULTS[name]
    faults = manifest(run, f"file-{name}")["verify"]["faults"]
    assert {fault["kind"] for fault in faults} == {kind}
    [fault] = [fault for fault in faults if re.search(text, fault["text"])]
    causes = [(c["step"], c["text"], c["remedy"]) for c in variants[f"file-{name}"]["causes"]]
    assert ("export", fault["text"], fault["remedy"]) in causes
    said = f"{fault['text']}. To try: {fault['remedy']}."
    assert said in " ".join((run.parent / "stdout").read_text().split())
    assert said.replace("\\", "") in (run / "report.md").read_text().replace("\\", "")


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_file_has_no_fault(name: str, run: Path, variants: dict[str, Any]) -> None:
    facts = manifest(run, f"file-{name}")
    assert facts["verify"]["faults"] == [] and facts["elsewhere"] == f"{name}.gguf"
    assert variants[f"file-{name}"]["elsewhere"] == f"{name}.gguf"
    errors = facts["verify"]["tensors"]
    assert (errors["error"] < 1e-6) == (name == "f16") and len(errors["worst"]) == 5


def test_our_own_files_have_none(run: Path, variants: dict[str, Any]) -> None:
    for name in ("gguf-f16", "gguf-q4_0"):
        assert manifest(run, name)["verify"]["faults"] == [] and not variants[name]["elsewhere"]


def test_the_same_file_from_elsewhere_goes_the_same_way(variants: dict[str, Any]) -> None:
    ours, theirs = (variants[name]["steps"] for name in ("gguf-q4_0", "file-q4_0"))
    assert [s["kind"] for s in theirs] == ["merge", "export", "quantize"]
    for one, other in zip(ours, theirs, strict=True):
        assert {**one, "after": ""} == {**other, "after": ""}
    assert {s["after"] for s in ours[:2]} == {"merged on the host", "gguf-f16"}


def test_an_adapter_and_what_it_is_merged_into_are_one(variants: dict[str, Any]) -> None:
    merge = variants["gguf-f16"]["steps"][0]
    assert (merge["kind"], merge["broken"], merge["fixed"]) == ("merge", 0, 0)
    assert abs(merge["nats"]) < 1e-4 and merge["kl"] < 1e-5 and merge["kl_questions"] == 16


def test_only_tuned_brings_the_hosts_distributions(run: Path) -> None:
    assert divergence.FILE in manifest(run, "gguf-q4_0")["files"]
    assert divergence.FILE not in manifest(run, "gguf-q4_0", "base")["files"]
    assert not (run / "export" / "gguf-q4_0" / "base" / divergence.FILE).exists()


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return {row["id"]: row for row in lines}


def test_a_bundle_alone_tells_its_divergence(run: Path, tmp_path: Path) -> None:
    """On a device, where there is neither torch nor the host."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER % NOT_ON_A_DEVICE)
    bundle = run / "export" / "gguf-q4_0" / "tuned"
    edgeft("bench", bundle, "--out", "out", "--json", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    there, here = rows(tmp_path / "out"), rows(run / "bench" / "local" / "gguf-q4_0" / "tuned")
    headline = {item.id for item in read_items(bundle / "evaluation.jsonl") if not item.group}
    assert {i for i, row in there.items() if "kl" in row} == headline and len(headline) == 16
    for name in headline:
        assert there[name]["kl"] == pytest.approx(here[name]["kl"], rel=1e-6)
        assert there[name]["kl"] > 1e-3
    assert len(there) == 20


def test_a_truncated_file_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    data = (run.parent / "files" / "f16.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    done = subprocess.run(
        [sys.executable, "-m", "edgeft", "export", run, "--file", tmp_path / "cut.gguf"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and not (run / "export" / "file-cut").exists()
    [line] = done.stderr.splitlines()
    assert "cut.gguf is truncated or not a GGUF file: fetch it again" in line


def likelihood_on_nf4(run: Path, base: Path, item: Item) -> float:
    """Of a gold solution, by PEFT on the weights that QLoRA trains on."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=nf4, dtype=torch.float32, device_map="cpu"
    )
    for module in model.modules():  # else its scales become bfloat16 in eval mode
        module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, run / "train" / "adapter").eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[*item.prompt, *item.gold[:-1]]])).logits[0].float()
    logs = logits[len(item.prompt) - 1 :].log_softmax(-1)
    return float(logs[torch.arange(len(item.gold)), torch.tensor(item.gold)].sum())


@pytest.fixture(scope="module")
def qlora(world: spoil.World, place: Path) -> Path:
    chosen = ["--method", "qlora", "--target", "gguf-f16", "--set", "export.merge=original"]
    model = ["--model", str(world.base), "--out", "qlora"]
    edgeft("run", *model, *chosen, *SETTINGS, cwd=place)
    return place / "qlora"


def merge_step(run: Path) -> dict[str, Any]:
    [variant] = json.loads((run / "report.json").read_text())["variants"]
    found: dict[str, Any] = variant["steps"][0]
    assert found["kind"] == "merge"
    return found


def test_a_qlora_adapter_is_scored_on_the_weights_it_was_trained_on(
    qlora: Path, world: spoil.World
) -> None:
    described = json.loads((qlora / "bench" / "host" / "adapter.json").read_text())
    assert described["kind"] == "dequantized"
    scored = rows(qlora / "bench" / "host" / "adapter")
    for item in read_items(qlora / "data" / "evaluation.jsonl")[:3]:
        expected = likelihood_on_nf4(qlora, world.base, item)
        assert scored[item.id]["gold_logprob"] == pytest.approx(expected, rel=1e-3)


def test_what_qlora_never_saw_is_a_step(qlora: Path, place: Path) -> None:
    """Merged into the original weights it differs, into those of NF4 it does not."""
    assert merge_step(qlora)["kl"] > 1e-3
    edgeft(
        "run",
        qlora / "recipe.yaml",
        "--out",
        "qlora",
        "--set",
        "export.merge=dequantized",
        cwd=place,
    )
    step = merge_step(qlora)
    assert abs(step["nats"]) < 1e-4 and step["kl"] < 1e-5 and step["broken"] == step["fixed"] == 0
