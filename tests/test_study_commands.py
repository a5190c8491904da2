"""`edgeft study` and `edgeft recommend` as people type them: help, mistakes, what is written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from study_files import make_study, study_of
from test_cli import refused
from typer.testing import CliRunner

from edgeft import cli
from edgeft.errors import UserError
from edgeft.study import estimate, on_ray, page, stage
from edgeft.study import settings as studies

STUDY = "models: [smollm2-135m]\nmethods: [lora]\ntargets: [gguf-q4_0]\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY)
    return path


def printed(*arguments: str | Path) -> str:
    done = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_help_names_every_option() -> None:
    said = printed("study", "--help")
    assert all(option in said for option in ("--out", "--dry-run", "--executor", "--address"))
    said = printed("recommend", "--help")
    options = ("--device", "--model", "--task", "--max-memory", "--min-tok-s", "--parameters")
    assert all(option in said for option in (*options, "--json"))


def test_a_wrong_executor_is_one_line(file: Path, tmp_path: Path) -> None:
    line = refused("study", "mine.yaml", "--executor", "slurm", cwd=tmp_path)
    assert line == "edgeft: --executor is local or ray, not 'slurm'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "nothing.yaml"], "cannot read the study nothing.yaml"),
        (["study", "mine.yaml", "--out", "."], ". is no study and not empty: give another"),
        (["study", "mine.yaml", "--out", ".", "--dry-run"], ". is no study and not empty"),
        (["study", "key.yaml"], "key.yaml, line 5: unknown key 'train.lrr'; did you mean 'lr'"),
        (["study", "target.yaml"], "unknown target 'gguf-q4_00'; did you mean 'gguf-q4_0'"),
        (["recommend", "."], ". holds no study: make one with edgeft study"),
        (["recommend", "--parameters", "many"], "--parameters takes a size as 360M or 1.1B"),
        (["recommend", "--max-memory", "much"], "--max-memory takes a size as 300, 300MB"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    arguments: list[str],
    message: str,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "key.yaml").write_text(STUDY + "recipe:\n  train: {lrr: 1}\n")
    (tmp_path / "target.yaml").write_text(STUDY.replace("gguf-q4_0", "gguf-q4_00"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        printed(*arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_lists_every_cell_and_writes_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(printed("study", "mine.yaml", "--dry-run", "--json"))
    assert [guess["id"].rpartition("/")[2] for guess in found] == ["zero-shot", "lora-s0"]
    assert all(guess["seconds"] > 0 and guess["bytes"] > 0 for guess in found)
    assert {(guess["state"], guess["basis"]) for guess in found} == {("waiting", "computed")}
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_a_file(file: Path) -> None:
    study = studies.load(file)
    with pytest.raises(UserError, match="cannot write to .*mine.yaml: File exists"):
        stage.opened(file, study).__enter__()


def test_an_error_of_the_work_is_not_one_of_the_folder(file: Path, tmp_path: Path) -> None:
    study = studies.load(file)
    with pytest.raises(ConnectionError), stage.opened(tmp_path / "x", study):
        raise ConnectionError("of the work")


@pytest.mark.slow
def test_a_format_of_targets_can_be_estimated(tmp_path: Path) -> None:
    plan = stage.plan(tmp_path / "x", study_of(targets=["gguf", "onnx"], methods=["full"]))
    guesses = estimate.estimate(plan)
    assert all(guess.bytes and guess.seconds for guess in guesses)
    few = estimate.estimate(stage.plan(tmp_path / "x", study_of(methods=["full"])))
    assert sum(g.bytes or 0 for g in guesses) > sum(g.bytes or 0 for g in few)


def test_a_model_that_is_not_here_is_not_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = stage.plan(tmp_path / "x", study_of(models=["org/none"], methods=["lora"], seeds=[0]))
    guesses = estimate.estimate(plan)
    assert [(guess.seconds, guess.bytes) for guess in guesses] == [(None, None)] * 2
    estimate.show(plan, guesses, False)
    assert "not counted, since their model is not here yet: none/wordmath" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_what_was_measured_tells_for_its_like(tmp_path: Path) -> None:
    make_study(tmp_path, study_of(methods=["lora"], seeds=[0]))
    plan = stage.plan(tmp_path, study_of(methods=["lora", "dora"], seeds=[0, 1]))
    found = {g.id.rpartition("/")[2]: (g.state, g.basis) for g in estimate.estimate(plan)}
    assert found == {
        "zero-shot": ("done", "done"),
        "lora-s0": ("done", "done"),
        "lora-s1": ("waiting", "measured"),
        "dora-s0": ("waiting", "computed"),
        "dora-s1": ("waiting", "computed"),
    }


def test_recommend_reads_what_study_wrote(tmp_path: Path) -> None:
    study = tmp_path / "x"
    page.write(study, make_study(study, study_of()))
    [answer] = json.loads(printed("recommend", study, "--min-tok-s", "150", "--json"))
    assert (answer["method"], answer["target"]) == ("lora", "gguf-q4_0")
    assert len(answer["unmet"]) == 5 and "tok/s" in answer["unmet"][0]
    assert printed("recommend", study).splitlines() == [
        "wordmath on local: smollm2-135m by lora, shipped as gguf-q8_0",
        f"  expect    {answer_of(study)['expect']}",
        f"  evidence  {study}: 200 questions, 2 seeds",
    ]


def answer_of(study: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(printed("recommend", study, "--json"))[0]
    return found


def test_without_ray_it_says_how_to_install_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = stage.plan(tmp_path / "x", studies.load(file))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^Ray is not installed \(.*\): pip install 'edgeft\[ray"):
        on_ray.execute(plan, lambda _: None)
