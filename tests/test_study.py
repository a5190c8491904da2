"""`edgeft study` as a whole, on a tiny model: shared, resumed, with failures, and its page."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_runs import (
    ENVIRONMENT,
    SEEDS,
    TARGETS,
    answers,
    command,
    copied,
    marks,
    outcomes,
    runs,
    study,
    write_study,
)

pytestmark = pytest.mark.slow

CELLS = ["zero-shot", "2-shot", "lora-s0", "lora-s1", "full-s0", "full-s1"]
PLACES = [(None, None), *((target, "local") for target in TARGETS)]


def test_standard_output_is_the_json_alone(whole_study: Path) -> None:
    printed = (whole_study.parent / "stdout").read_text()
    assert json.loads(printed) and printed == (whole_study / "study.json").read_text()
    assert "lora-s1: done in" in (whole_study.parent / "stderr").read_text()


def test_the_pages_figures_are_the_runs(whole_study: Path) -> None:
    data = json.loads((whole_study / "study.json").read_text())
    assert [row["method"] for row in data["rows"]] == ["zero-shot", "2-shot", "lora", "full"]
    markdown = (whole_study / "study.md").read_text()
    accuracies = set()
    for row in data["rows"]:
        cells = [f"{row['method']}-s{seed}" for seed in row["seeds"]] or [row["method"]]
        weights = "tuned" if row["seeds"] else "base"
        assert [(s["target"], s["device"]) for s in row["scores"]] == PLACES
        for score in row["scores"]:
            place = f"bench/{score['device'] or 'host'}/{score['target'] or ''}/{weights}"
            right = [
                json.loads(line)["correct"]
                for cell in cells
                for line in (runs(whole_study) / cell / place / "results.jsonl").open()
            ]
            assert len(right) == 24 * len(cells) and score["n"] == 24
            assert score["accuracy"] == pytest.approx(np.mean(right))
            assert f"{100 * np.mean(right):.1f} (" in markdown
            accuracies.add(score["accuracy"])
            if score["target"] and row["seeds"]:
                sizes = [
                    (runs(whole_study) / cell / "export" / score["target"] / "tuned/model.gguf")
                    .stat()
                    .st_size
                    for cell in cells
                ]
                assert score["bytes"] == sizes[0] and score["tok_s"] > 0 < score["memory_mb"]
    assert len(accuracies) > 3, "the test is one: methods and places answer differently"
    assert [row["parameters"] for row in data["rows"]] == [data["rows"][0]["parameters"]] * 4
    assert set(outcomes(whole_study)) == set(CELLS)
    for outcome in outcomes(whole_study).values():
        assert outcome["state"] == "done" and outcome["attempts"] == 1 and outcome["seconds"] > 1
    assert "<svg" in (whole_study / "study.html").read_text()


def test_base_is_exported_and_scored_once(whole_study: Path) -> None:
    zero = runs(whole_study) / "zero-shot"
    shared = ["data", "gguf/base", "bench/host/base", "bench/general/host/base"]
    for target in TARGETS:
        shared += [f"export/{target}/base", f"bench/local/{target}/base"]
        shared += [f"bench/general/{target}/base"]
    for cell in (runs(whole_study) / name for name in CELLS[2:]):
        for stage in shared:
            files = [path for path in (zero / stage).rglob("*") if path.is_file()]
            assert files, stage
            for path in files:
                assert path.samefile(cell / path.relative_to(zero)), path
        assert (cell / "report.html").is_file()
    several = (runs(whole_study) / "2-shot/data/evaluation.jsonl").read_text()
    assert several != (zero / "data/evaluation.jsonl").read_text()
    said = (whole_study.parent / "stderr").read_text()
    assert said.count("✓ export base in 16 bits") == 2, "zero-shot's, and with other questions"
    assert said.count("· score base on the host: up to date") == 4


def test_seeds_train_on_the_same_questions_to_other_weights(whole_study: Path) -> None:
    first, second = (runs(whole_study) / f"lora-s{seed}" for seed in SEEDS)
    assert (first / "data/train.jsonl").samefile(second / "data/train.jsonl")
    weights = [(cell / "merged/model.safetensors").read_bytes() for cell in (first, second)]
    assert weights[0] != weights[1]


def test_what_is_done_is_not_repeated(whole_study: Path, tiny: Path, vowels: Path) -> None:
    before = marks(whole_study)
    done = study(whole_study.parent / "whole.yaml", whole_study)
    assert done.returncode == 0 and "6 of 6 cells: up to date" in done.stderr
    assert "□" not in done.stderr and marks(whole_study) == before
    assert done.stdout.rstrip().endswith(str(whole_study / "study.html"))
    assert "Accuracy" in done.stdout and "Retention" in done.stdout


@pytest.fixture(scope="module")
def changed(
    whole_study: Path, tiny: Path, vowels: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """The study without ``full`` and a seed, with a method that cannot work and another one."""
    folder = tmp_path_factory.mktemp("changed")
    odd = {"name": "odd", "method": "lora", "target_modules": "nothing"}
    methods = ["zero-shot", "2-shot", odd, "lora", "3-shot"]
    file = write_study(folder / "x.yaml", tiny, vowels, methods=methods, seeds=[0], retries=1)
    out = copied(whole_study, folder / "x")
    return file, out, study(file, out)


def test_a_cell_that_fails_is_tried_again_and_shown_and_the_rest_is_done(
    changed: tuple[Path, Path, subprocess.CompletedProcess[str]],
) -> None:
    _, out, done = changed
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("edgeft: 1 of 5 cells failed (") and "vowels/odd-s0): the same" in last
    found = outcomes(out)
    odd = found["odd-s0"]
    assert odd["state"] == "failed" and odd["attempts"] == 2 and "nothing" in odd["error"]
    assert found["3-shot"]["state"] == "done"
    for name in ("study.md", "study.html"):
        assert "names nothing, which no linear layer" in (out / name).read_text()
    data = json.loads((out / "study.json").read_text())
    assert [row["method"] for row in data["rows"]] == ["zero-shot", "2-shot", "lora", "3-shot"]
    assert [row["seeds"] for row in data["rows"]] == [[], [], [0], []]


def test_a_changed_study_does_only_what_changed(
    changed: tuple[Path, Path, subprocess.CompletedProcess[str]], whole_study: Path
) -> None:
    _, out, done = changed
    assert "3 of 5 cells: up to date" in done.stderr
    began = [line for line in done.stderr.splitlines() if line.startswith("□")]
    assert [line.rpartition("/")[2] for line in began] == ["odd-s0", "3-shot"]
    now = marks(out)
    assert all(now[name] == when for name, when in marks(whole_study).items())


def test_the_same_command_tries_only_what_failed(
    changed: tuple[Path, Path, subprocess.CompletedProcess[str]],
) -> None:
    file, out, _ = changed
    done = study(file, out)
    assert done.returncode == 2 and "4 of 5 cells: up to date" in done.stderr
    began = [line for line in done.stderr.splitlines() if line.startswith("□")]
    assert [line.rpartition("/")[2] for line in began] == ["odd-s0"]
    assert outcomes(out)["odd-s0"]["attempts"] == 4


def test_killed_in_the_middle_of_a_cell_the_same_command_goes_on(
    whole_study: Path, tmp_path: Path
) -> None:
    file = whole_study.parent / "whole.yaml"
    out = copied(whole_study, tmp_path / "x", without=("lora-s1",))
    cell = runs(out) / "lora-s1"
    process = subprocess.Popen(
        command(file, out), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (cell / "bench/host/tuned.partial/results.jsonl").exists():
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert "lora-s1" not in outcomes(out)
    before = marks(out)
    assert any("lora-s1/merged" in name for name in before)
    done = study(file, out)
    assert done.returncode == 0, done.stderr
    now = marks(out)
    assert all(now[name] == when for name, when in before.items())
    assert answers(cell) == answers(runs(whole_study) / "lora-s1") != {}
    ours, theirs = (json.loads((path / "study.json").read_text()) for path in (out, whole_study))
    assert [_figures(row) for row in ours["rows"]] == [_figures(row) for row in theirs["rows"]]


def _figures(row: dict[str, Any]) -> list[Any]:
    names = ("target", "accuracy", "accuracy_ci", "benefit", "benefit_ci", "retention", "verdict")
    return [row["method"], row["seeds"], [[score[n] for n in names] for score in row["scores"]]]


def listed(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_tells_what_is_left_and_writes_nothing(
    whole_study: Path, tiny: Path, vowels: Path, tmp_path: Path
) -> None:
    methods = ["zero-shot", "2-shot", "lora", "full", "dora"]
    file = write_study(tmp_path / "x.yaml", tiny, vowels, methods=methods, seeds=[0, 1, 2])
    before = listed(whole_study)
    done = study(file, whole_study, "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0 and listed(whole_study) == before
    assert list(tmp_path.iterdir()) == [file]
    found = {guess["id"].rpartition("/")[2]: guess for guess in json.loads(done.stdout)}
    assert {name for name, guess in found.items() if guess["state"] == "done"} == set(CELLS)
    left = {name: guess for name, guess in found.items() if guess["state"] != "done"}
    assert {name: guess["basis"] for name, guess in left.items()} == {
        "lora-s2": "measured",
        "full-s2": "measured",
        **dict.fromkeys(("dora-s0", "dora-s1", "dora-s2"), "computed"),
    }
    assert all(guess["seconds"] > 0 and guess["bytes"] > 0 for guess in left.values())
    spent = [outcomes(whole_study)[f"lora-s{seed}"]["seconds"] for seed in SEEDS]
    assert left["lora-s2"]["seconds"] == pytest.approx(np.mean(spent))
    used = sum(p.stat().st_size for p in (runs(whole_study) / "full-s0").rglob("*.[sg]*"))
    assert 0.3 * used < left["full-s2"]["bytes"] < 3 * used
    printed = study(file, whole_study, "--dry-run", cwd=tmp_path).stdout
    assert "5 of 11 cells to do: about " in printed and "free" in printed


def test_a_dry_run_of_a_new_study_makes_no_folder(tiny: Path, vowels: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "x.yaml", tiny, vowels)
    done = study(file, tmp_path / "deep/x", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [file]
    assert all(name in done.stdout for name in CELLS)


def test_ctrl_c_stops_with_one_line(tiny: Path, vowels: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "x.yaml", tiny, vowels, methods=["lora"])
    process = subprocess.Popen(
        command(file, tmp_path / "x"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "x").glob("runs/**/data.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors
    last = "edgeft: stopped; the same command goes on from here"
    assert errors.strip().splitlines()[-1] == last
    assert not (tmp_path / "x/cells").exists(), "a cell that was stopped has not failed"


def test_two_commands_on_one_folder(whole_study: Path) -> None:
    with (whole_study / ".lock").open("a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = study(whole_study.parent / "whole.yaml", whole_study)
    assert done.returncode == 2 and "another edgeft" in done.stderr.splitlines()[-1]
