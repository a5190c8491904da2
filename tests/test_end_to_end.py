"""`edgeft run` as a whole, on a tiny model: killed anywhere, the same command goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SMALL = (
    "task.train=48",
    "task.heldout=8",
    "task.evaluation=24",
    "task.unseen=8",
    "train.epochs=2",
    "train.checkpoint_steps=1",
    "bench.max_new_tokens=24",
    "bench.parallel=4",
    "bench.latency_prompt_tokens=16",
    "bench.latency_new_tokens=8",
)


def command(verb: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "edgeft", verb, *map(str, arguments)]


def run_command(model: Path, out: Path, *more: str) -> list[str]:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    chosen = ["--target", "gguf-f16", "--target", "gguf-q8_0", "--target", "gguf-q4_0"]
    return command("run", "--model", model, "--out", out, *chosen, *settings, *more)


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def answers(run: Path) -> dict[str, list[tuple[str, Any]]]:
    """Every question's output tokens, by results file; what does not change from run to run."""
    return {
        str(path.relative_to(run)): sorted(
            (row["id"], tuple(row["tokens"]), round(row["gold_logprob"], 3), near(row.get("kl")))
            for row in map(json.loads, path.read_text().splitlines())
        )
        for path in sorted(run.glob("bench/**/results.jsonl"))
    }


def near(kl: float | None) -> float | None:
    return None if kl is None else round(kl, 5)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(run_command(tiny, out))
    return out


def test_the_report_has_every_part(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    assert report["schema"] == 1
    assert report["host"]["base"]["n"] == 24
    assert {v["target"] for v in report["variants"]} == {"gguf-f16", "gguf-q8_0", "gguf-q4_0"}
    for variant in report["variants"]:
        assert variant["runtime"] == "llama.cpp" and variant["device"] == "local"
        latency = variant["latency"]
        assert min(latency[k] for k in ("load_s", "ttft_ms", "prefill_tok_s", "decode_tok_s")) > 0
        assert latency["peak_rss_mb"] > 5
        artifact = whole / "export" / variant["target"] / "tuned" / "model.gguf"
        assert variant["bytes"] == artifact.stat().st_size
    assert report["verdict"]
    html = (whole / "report.html").read_text()
    assert "<svg" in html and "http://" not in html.replace("http://www.w3.org", "")
    assert (whole / "report.md").read_text().startswith("#")


def test_every_question_is_scored_once_everywhere(whole: Path) -> None:
    scored = answers(whole)
    assert len(scored) == 2 * (1 + 3) + 1  # and the adapter
    ids = {tuple(row[0] for row in rows) for rows in scored.values()}
    assert len(ids) == 1 and len(set(ids.pop())) == 32


def test_f16_on_the_device_writes_what_the_host_writes(whole: Path) -> None:
    scored = answers(whole)
    host = scored["bench/host/tuned/results.jsonl"]
    device = scored["bench/local/gguf-f16/tuned/results.jsonl"]
    # Random weights drift apart in a long free run once rounding has turned one token.
    same = sum(a[1][:4] == b[1][:4] for a, b in zip(host, device, strict=True))
    assert same >= 0.8 * len(host)
    assert [a[2] for a in host] == pytest.approx([b[2] for b in device], rel=5e-3)


def test_a_finished_run_is_not_repeated(whole: Path, tiny: Path) -> None:
    marks = {path: path.stat().st_mtime_ns for path in whole.glob("**/stage.json")}
    before = time.monotonic()
    done = finish(run_command(tiny, whole))
    assert time.monotonic() - before < 20
    assert {path: path.stat().st_mtime_ns for path in whole.glob("**/stage.json")} == marks
    quiet = whole / "bench/host/reference/stage.json"
    assert done.stderr.count("up to date") == len(marks.keys() - {quiet})


def test_same_recipe_and_seed_same_answers(whole: Path, tiny: Path, tmp_path: Path) -> None:
    finish(command("train", "--model", tiny, "--out", tmp_path / "x", *_settings()))
    for name in ("train.jsonl", "heldout.jsonl", "evaluation.jsonl"):
        assert (tmp_path / "x/data" / name).read_bytes() == (whole / "data" / name).read_bytes()
    again = (tmp_path / "x/merged/model.safetensors").read_bytes()
    assert again == (whole / "merged/model.safetensors").read_bytes()


def _settings() -> list[str]:
    return [part for setting in SMALL for part in ("--set", setting)]


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


KILLS: dict[str, Any] = {
    "train": lambda run: any((run / "train.partial").glob("checkpoints/checkpoint-*")),
    "merge": lambda run: (run / "merged.partial").exists(),
    "host": lambda run: _lines(run / "bench/host/base.partial/results.jsonl") > 0,
    "export": lambda run: (run / "export/gguf-q8_0/tuned.partial").exists(),
    "bench": lambda run: _lines(run / "bench/local/gguf-q4_0/tuned.partial/results.jsonl") > 0,
}


def test_killed_in_each_stage_the_same_command_goes_on(
    whole: Path, tiny: Path, tmp_path: Path
) -> None:
    out, hit = tmp_path / "run", []
    for stage, reached in KILLS.items():
        process = subprocess.Popen(
            run_command(tiny, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not reached(out):
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            hit.append(stage)
        assert process.wait() in (0, -signal.SIGKILL)
    assert hit == list(KILLS)
    finished = {p: p.stat().st_mtime_ns for p in out.glob("**/stage.json") if _is_final(p)}
    assert len(finished) > 8
    finish(run_command(tiny, out))
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert answers(out) == answers(whole)
    assert not list(out.glob("**/*.partial")) and not list(out.glob("**/*.tmp"))


def _is_final(path: Path) -> bool:
    return not any(part.endswith(".partial") for part in path.parts)


def test_ctrl_c_stops_with_one_line(tiny: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        run_command(tiny, tmp_path / "run"), stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run/train.partial").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].startswith("edgeft: stopped")
    assert "Traceback" not in errors


def test_two_runs_on_one_folder(whole: Path, tiny: Path) -> None:
    import fcntl

    with (whole / ".lock").open("a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = subprocess.run(run_command(tiny, whole), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "another edgeft" in done.stderr


def test_verbs_one_by_one_add_a_target(whole: Path) -> None:
    done = finish(command("export", whole, "--target", "gguf-q2_k"))
    assert done.stdout.strip() == str(whole / "export" / "gguf-q2_k")
    finish(command("bench", whole))
    report = json.loads(finish(command("report", whole, "--json")).stdout)
    assert "gguf-q2_k" in {v["target"] for v in report["variants"]}


def test_onnx_joins_the_same_report(whole: Path) -> None:
    names = ("onnx-fp32", "onnx-int8", "onnx-portable-fp32")
    finish(command("export", whole, *(part for name in names for part in ("--target", name))))
    report = json.loads(finish(command("bench", whole, "--json")).stdout)
    found = {v["target"]: v for v in report["variants"]}
    fp32 = found["onnx-fp32"]
    assert fp32["runtime"] == "onnxruntime-genai" and fp32["verify"]["top1_agreement"] == 1.0
    assert fp32["tuned"]["accuracy"] == report["host"]["tuned"]["accuracy"]
    folder = whole / "export/onnx-fp32/tuned/model"
    assert fp32["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert fp32["latency"]["decode_tok_s"] > 0
    assert found["onnx-int8"]["verify"]["mean_kl"] > fp32["verify"]["mean_kl"]
    assert found["onnx-portable-fp32"]["runtime"] == "onnxruntime"
    scored = answers(whole)
    host = scored["bench/host/tuned/results.jsonl"]
    for name in ("onnx-fp32", "onnx-portable-fp32"):
        device = scored[f"bench/local/{name}/tuned/results.jsonl"]
        same = sum(a[1] == b[1] for a, b in zip(host, device, strict=True))
        assert same >= len(host) - 1
        assert [a[2] for a in host] == pytest.approx([b[2] for b in device], rel=1e-3)


def test_a_target_that_fails_leaves_no_half_folder_and_keeps_none(
    whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export/onnx-odd.toml").write_text(
        'format = "onnx"\nruntime = "onnxruntime-genai"\nabout = "odd"\n'
        '[onnx]\nprecision = "int4"\nblock_size = 17\n'
    )
    chosen = ["--target", "onnx-odd", "--target", "gguf-q5_k_m"]
    done = subprocess.run(
        command("export", whole, *chosen), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("edgeft: onnx-odd was not exported: the ONNX model builder failed on")
    assert not list((whole / "export").glob("onnx-odd/*"))
    assert (whole / "export/gguf-q5_k_m/tuned/manifest.json").is_file()


def test_a_bundle_of_other_weights_is_left_out(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    path = run / "export/gguf-q4_0/tuned/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "made_from": "others"}))
    done = finish(command("bench", run, "--json"))
    assert "bench gguf-q4_0 tuned: of other weights, export it again" in done.stderr
    stage = run / "bench/local/gguf-q4_0/tuned/stage.json"
    stage.write_text(json.dumps({**json.loads(stage.read_text()), "made_from": "others"}))
    report = json.loads(finish(command("report", run, "--json")).stdout)
    targets = {v["target"] for v in report["variants"]}
    assert "gguf-q8_0" in targets and "gguf-q4_0" not in targets


def test_a_bundle_copied_elsewhere_is_benched_by_hand(whole: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(whole / "export/gguf-q8_0/tuned", tmp_path / "bundle")
    summary = json.loads(finish(command("bench", bundle, "--json")).stdout)
    report = json.loads((whole / "report.json").read_text())
    variant = next(v for v in report["variants"] if v["target"] == "gguf-q8_0")
    assert summary["accuracy"] == variant["tuned"]["accuracy"]
    assert sum(summary["read"].values()) == 32
    alone = finish(command("bench", bundle, "--batch", "1", "--out", tmp_path / "alone", "--json"))
    assert json.loads(alone.stdout)["accuracy"] == summary["accuracy"]
    with (bundle / "model.gguf").open("r+b") as data:
        data.seek(50_000)
        data.write(b"spoilt")
    shutil.rmtree(bundle / "bench")
    done = subprocess.run(command("bench", bundle), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "model.gguf" in done.stderr.splitlines()[-1]


def test_one_at_a_time_answers_alike_and_stays_the_runs_setting(
    whole: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    finish(command("bench", run, "--batch", "1"))
    ours, theirs = (
        {place: rows for place, rows in answers(path).items() if "gguf-f16" in place}
        for path in (run, whole)
    )
    assert ours == theirs and ours
    stages = [run / "bench" / place / "tuned/stage.json" for place in ("host", "local/gguf-f16")]
    assert [json.loads(path.read_text())["parallel"] for path in stages] == [1, 1]
    again = finish(command("bench", run))
    assert "✓" not in again.stderr and "up to date" in again.stderr
    done = subprocess.run(
        command("bench", run, "--batch", "0"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "parallel must be at least 1" in done.stderr


def test_an_adapter_trained_elsewhere(whole: Path, tiny: Path, tmp_path: Path) -> None:
    """Any PEFT adapter: exported against its base, the same file as the run's own."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((whole / "train/adapter" / name).read_bytes())
    settings = ["--model", tiny, "--adapter", adapter, "--target", "gguf-q8_0", *_settings()]
    finish(command("export", *settings, "--out", tmp_path / "run"))
    [ours] = (tmp_path / "run/export").glob("*/tuned/model.gguf")
    theirs = whole / "export/gguf-q8_0/tuned/model.gguf"
    assert ours.read_bytes() == theirs.read_bytes()
