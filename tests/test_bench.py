"""Bench: every question once, whatever kills it; files checked before use; facts of the machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from edgeft import bench, recipe, tasks
from edgeft.bench import stage as benching
from edgeft.bench.accuracy import read_rows
from edgeft.bench.job import job_of_request
from edgeft.bench.latency import fewest_of_the_fastest
from edgeft.errors import UserError
from edgeft.prompts import Item
from edgeft.runtimes import llama_cpp, thread_count
from edgeft.tasks.answers import read_number

COUNT = 10
NEW = 16


def digest(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.fixture(scope="module")
def bundle(embedded_gguf: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a few word problems, as an export leaves it."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "model.gguf").symlink_to(embedded_gguf)
    (folder / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    session = llama_cpp.open_session(embedded_gguf, threads=1, context=8, parallel=1)
    made = tasks.find("wordmath").make(tasks.TaskSettings("wordmath", 0, 0, COUNT), 0).evaluation
    with (folder / "evaluation.jsonl").open("w") as out:
        for q in made:
            prompt = llama_cpp.tokenize(session, f"Question: {q.question}\nAnswer:", special=True)
            gold = llama_cpp.tokenize(session, f" {q.solution}<|im_end|>", special=True)
            item = Item(q.id, q.group, q.question, prompt, gold, q.answer)
            out.write(json.dumps(asdict(item)) + "\n")
    session.close()
    names = ("model.gguf", "evaluation.jsonl", "tokenizer.json")
    manifest = {
        "schema": 1,
        "model": "smollm2-135m",
        "weights": "base",
        "target": "as-it-comes",
        "runtime": "llama.cpp",
        "artifact": "model.gguf",
        "task": "wordmath",
        "max_new_tokens": NEW,
        "stop": [2],
        "context": 256,
        "files": {name: digest(folder / name) for name in names},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def silent(done: int, total: int, text: str) -> None:
    pass


def by_id(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows), "a question twice"
    return {row["id"]: {k: v for k, v in row.items() if k != "seconds"} for row in rows}


@pytest.fixture(scope="module")
def whole(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    seen: list[tuple[int, int]] = []
    job = bench.job_of_bundle(bundle, threads=1, parallel=2)
    bench.accuracy(job, out, lambda done, total, _: seen.append((done, total)))
    assert seen == [(i + 1, 2 * COUNT) for i in range(2 * COUNT)]
    return out


def test_every_question_has_a_whole_line(whole: Path, bundle: Path) -> None:
    rows = by_id(whole / "results.jsonl")
    items = {row["id"]: row for row in read_rows(bundle / "evaluation.jsonl")}
    assert rows.keys() == items.keys()
    for name, row in rows.items():
        assert row["answer"] == read_number(row["text"])
        assert row["correct"] == (row["answer"] == items[name]["answer"])
        assert (row["finish"] == "length") == (len(row["tokens"]) == NEW)
        assert row["gold_tokens"] == len(items[name]["gold"]) and row["gold_logprob"] < 0
    assert not (whole / "scores.jsonl").exists()


@pytest.mark.slow
def test_the_batch_does_not_change_a_result(whole: Path, bundle: Path, tmp_path: Path) -> None:
    bench.accuracy(bench.job_of_bundle(bundle, threads=1, parallel=7), tmp_path, silent)
    assert by_id(tmp_path / "results.jsonl") == by_id(whole / "results.jsonl")


def test_a_bundle_brings_its_pattern(bundle: Path, tmp_path: Path) -> None:
    """A device has no recipe and reads answers by the manifest."""
    here = shutil.copytree(bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("model.gguf"))
    (here / "model.gguf").symlink_to(bundle / "model.gguf")
    manifest = json.loads((here / "manifest.json").read_text())
    (here / "manifest.json").write_text(json.dumps({**manifest, "pattern": r"[0-9]+"}))
    job = bench.job_of_bundle(here)
    assert job.pattern == r"[0-9]+" == job_of_request(job.request()).pattern
    assert bench.job_of_bundle(bundle).pattern is None


BLOCKER = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in %r:
            raise ImportError(f"{name} is not on a device")
sys.meta_path.insert(0, Blocker())
"""
NOT_ON_A_DEVICE = ["torch", "transformers", "peft", "datasets", "safetensors"]
NOT_ON_A_DEVICE += ["math_verify", "sympy", "gguf", "matplotlib", "accelerate", "reasoning_gym"]


@pytest.mark.slow
def test_a_device_needs_the_runtime_alone(bundle: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER % NOT_ON_A_DEVICE)
    command = [sys.executable, "-m", "edgeft", "bench", bundle, "--out", tmp_path / "out", "--json"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for more, batch in ((), 32), (("--batch", "2"), 2):
        done = subprocess.run(
            [*command, *more], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert sum(json.loads(done.stdout)["read"].values()) == COUNT
        stage = json.loads((tmp_path / "out/stage.json").read_text())
        assert stage["parallel"] == batch
        assert by_id(tmp_path / "out/results.jsonl") == by_id(whole / "results.jsonl")
    done = subprocess.run(
        [*command, "--batch", "0"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "edgeft: recipe: bench: parallel must be at least 1\n"
    code = "import torch"
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 1


CLIENT = """
import sys
from pathlib import Path
from edgeft import bench
bench.accuracy(
    bench.job_of_bundle(Path(sys.argv[1]), threads=1, parallel=2), Path(sys.argv[2]),
    lambda *_: None,
)
"""


def kill_when(client: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    """SIGKILL, as soon as there is something to lose."""
    give_up = time.monotonic() + 120
    while not ready():
        assert client.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < give_up
        time.sleep(0.005)
    os.kill(client.pid, signal.SIGKILL)
    client.wait()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("file", ["scores.jsonl", "results.jsonl"])
def test_killed_midway_it_goes_on(whole: Path, bundle: Path, tmp_path: Path, file: str) -> None:
    client = subprocess.Popen([sys.executable, "-c", CLIENT, bundle, tmp_path])
    kill_when(client, lambda: lines(tmp_path / file) >= 2)
    kept = (tmp_path / file).read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 2 <= kept.count(b"\n") < COUNT
    with (tmp_path / file).open("ab") as torn:
        torn.write(b'{"id": "wordmath-ev')  # what a power cut may leave
    bench.accuracy(bench.job_of_bundle(bundle, threads=1, parallel=2), tmp_path, silent)
    assert by_id(tmp_path / "results.jsonl") == by_id(whole / "results.jsonl")
    if file == "results.jsonl":
        assert (tmp_path / file).read_bytes().startswith(kept), "a finished question was done again"


def test_latency_is_measured_alone(bundle: Path, tmp_path: Path) -> None:
    shape = {"prompt_tokens": 24, "new_tokens": 4, "repetitions": 2}
    bench.latency(bench.job_of_bundle(bundle, threads=1), tmp_path, **shape)
    facts = json.loads((tmp_path / "latency.json").read_text())
    assert facts.items() >= {**shape, "threads": 1}.items()
    assert facts["prefill_tok_s"] == pytest.approx(24_000 / facts["ttft_ms"], rel=0.01)
    assert facts["decode_tok_s"] > 0 and facts["load_s"] > 0
    # The 98 MB of weights are in it, this process with torch and its like is not.
    assert 98 < facts["peak_rss_mb"] < 600
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]


@pytest.mark.parametrize("name", ["evaluation.jsonl", "tokenizer.json"])
def test_a_changed_file_is_named(bundle: Path, tmp_path: Path, name: str) -> None:
    for path in bundle.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is not the file that was exported"):
        bench.job_of_bundle(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        bench.job_of_bundle(tmp_path)


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a bundle"):
        bench.job_of_bundle(tmp_path)


def test_an_artifact_that_does_not_open_is_one_line(bundle: Path, tmp_path: Path) -> None:
    job = bench.job_of_bundle(bundle, threads=1)
    (tmp_path / "model.gguf").write_bytes((bundle / "model.gguf").read_bytes()[:70_000_000])
    broken = bench.Job(**{**job.__dict__, "artifact": tmp_path / "model.gguf"})
    with pytest.raises(UserError, match=r"model.gguf does not open in llama.cpp: .*; export it ag"):
        bench.accuracy(broken, tmp_path, silent)


def test_machine_facts_are_plain_and_light() -> None:
    facts = bench.machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"] and facts["cores"] >= 1 and facts["memory_gb"] > 0
    assert "llama-cpp-python" in facts
    code = (
        "import sys; from edgeft import bench; bench.machine_facts(); import edgeft.bench.worker\n"
        "print([n for n in ('torch', 'transformers', 'llama_cpp') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_threads_are_swept_and_the_fewest_of_the_fastest_taken(
    bundle: Path, tmp_path: Path
) -> None:
    shape = {"prompt_tokens": 8, "new_tokens": 4, "repetitions": 2}
    bench.latency(bench.job_of_bundle(bundle), tmp_path, **shape, sweep=True)
    facts = json.loads((tmp_path / "latency.json").read_text())
    tried = {int(count): speed for count, speed in facts["threads_tried"].items()}
    assert min(tried) == 1 and max(tried) == thread_count(0)
    assert facts["threads"] == fewest_of_the_fastest(tried)
    assert fewest_of_the_fastest({1: 50.0, 2: 98.0, 3: 100.0, 4: 70.0}) == 2
    assert facts["throttled"] == [] and facts["other_load"] >= 0


@pytest.mark.slow
def test_fewer_questions_first_and_the_rest_later(bundle: Path, tmp_path: Path) -> None:
    """What was answered under a limit is not asked again, and all are more than some."""
    settings = recipe.parse("").bench
    out = tmp_path / "out"
    asked = []
    for said in ({"limit": 2}, {"limit": 4}, {}, {"limit": 3}):
        there = benching.there("local", {**said, "threads": 1})
        did = benching.bench_bundle(bundle, out, settings, there, timed=False)
        rows = (out / "results.jsonl").read_bytes().splitlines()
        asked.append((did, len(rows)))
    assert asked == [(True, 2), (True, 4), (True, COUNT), (False, COUNT)]
    seconds = [json.loads(row)["seconds"] for row in rows]
    assert len({json.loads(row)["id"] for row in rows}) == COUNT and min(seconds) > 0


def test_a_bundle_that_names_files_outside_is_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["../evil"] = {"bytes": 0, "sha256": ""}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for path in bundle.iterdir():
        if path.name != "manifest.json":
            (tmp_path / path.name).symlink_to(path.resolve())
    with pytest.raises(UserError, match=r"is not a bundle: it names the file ../evil"):
        bench.job_of_bundle(tmp_path)
