"""The page of a study whose cells are written here, against figures worked out by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from study_files import N, make_study, study_of, write_cell, write_json, write_results

from edgeft.report import terminal
from edgeft.report.figures import Table
from edgeft.study import cell as work
from edgeft.study import page
from edgeft.study.findings import findings, lead
from edgeft.study.results import StudyResult, collect
from edgeft.study.settings import Cell, cells
from edgeft.study.tables import MARK, tables

Q8, Q4 = ("gguf-q8_0", "local"), ("gguf-q4_0", "local")
HOST = (None, None)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies") / "x"


@pytest.fixture(scope="module")
def made(study: Path) -> list[Cell]:
    return make_study(study, study_of())


@pytest.fixture(scope="module")
def found(study: Path, made: list[Cell]) -> StudyResult:
    return page.write(study, made)


def table(found: StudyResult, title: str) -> Table:
    return next(t for t in tables(found) if t.title == title)


def accuracy(run: Path, weights: str, *place: str) -> float:
    """From the results of the questions, as anybody can count them."""
    lines = (run.joinpath("bench", *place) / weights / "results.jsonl").read_text().splitlines()
    right = [json.loads(line)["correct"] for line in lines]
    return sum(right) / len(right)


def test_figures_are_those_of_the_results(study: Path, found: StudyResult) -> None:
    runs = study / "runs/smollm2-135m/wordmath"
    places = {HOST: ["host"], Q8: ["local", "gguf-q8_0"], Q4: ["local", "gguf-q4_0"]}
    assert [row.method for row in found.rows] == ["zero-shot", "5-shot", "full", "lora", "dora"]
    for row in found.rows:
        names = [f"{row.method}-s{seed}" for seed in row.seeds] or [row.method]
        weights = "tuned" if row.seeds else "base"
        assert [(s.target, s.device) for s in row.scores] == list(places)
        for score in row.scores:
            place = places[score.target, score.device]
            here = np.mean([accuracy(runs / name, weights, *place) for name in names])
            zero = accuracy(runs / "zero-shot", "base", *place)
            assert score.accuracy == pytest.approx(here) and score.n == N
            assert score.accuracy_ci[0] < here < score.accuracy_ci[1]
            if row.method == "zero-shot":
                assert score.benefit is None and score.verdict is None
                continue
            assert score.benefit == pytest.approx(here - zero)
            if score.retention is not None:
                host = row.at(HOST)
                assert host is not None
                assert score.retention == pytest.approx(score.benefit / (host.benefit or 0))


def test_size_speed_and_parameters_come_with_it(found: StudyResult) -> None:
    lora = next(row for row in found.rows if row.method == "lora")
    score = lora.at(Q4)
    assert score is not None
    assert (score.bytes, score.tok_s, score.memory_mb) == (92_000_000, 200.5, 310.0)
    assert lora.parameters == 134_515_008 and lora.seeds == [0, 1]
    host = lora.at(HOST)
    assert host is not None and host.bytes is None and host.tok_s is None
    rows = table(found, "Size and speed").rows
    assert [row[1:] for row in rows] == [
        ["gguf-q8_0", "145.0 MB", "125.5", "310"],
        ["gguf-q4_0", "92.0 MB", "200.5", "310"],
    ]


def test_negative_transfer_is_marked_and_said(found: StudyResult) -> None:
    rows = {row[2]: row[3:] for row in table(found, "Accuracy").rows}
    assert [MARK in cell for cell in rows["full"][1:]] == [True, True, True]
    assert not any(MARK in cell for method in ("zero-shot", "lora") for cell in rows[method])
    assert rows["full"][0] == "2" and rows["5-shot"][0] == "1"
    host = next(row for row in found.rows if row.method == "full").at(HOST)
    assert host is not None and host.verdict == "negative-transfer"
    assert all(MARK in cell for cell in table(found, "Benefit").rows[1][3:])
    said = [line for line in findings(found) if "full fine-tuning hurts" in line]
    assert len(said) == 1 and "negative transfer at 135M, as the paper" in said[0]


def test_verdicts_after_deployment(found: StudyResult) -> None:
    verdicts = {
        row.method: [s.verdict for s in row.scores] for row in found.rows if row.method != "5-shot"
    }
    assert verdicts == {
        "zero-shot": [None, None, None],
        "full": ["negative-transfer"] * 3,
        "lora": ["benefit", "survives", "partial"],
        "dora": ["benefit", "survives", "partial"],
    }
    kept = {row[2]: row[3:] for row in table(found, "Retention").rows}
    assert re.fullmatch(r"0\.9\d \(0\.\d\d to 1\.\d\d\) survives", kept["lora"][0])
    assert kept["full"] == ["negative-transfer"] * 2
    assert any(
        re.search(r"at gguf-q4_0, .*partial: lora 0\.\d\d \(", line) for line in findings(found)
    )


def test_methods_are_compared_in_words(found: StudyResult) -> None:
    said = "\n".join(findings(found))
    assert "lora against dora: cannot be told apart, +1.5 (" in said
    assert "lora against full: lora is ahead, +53.5 (" in said
    assert lead(found).startswith(
        "1 model, 5 methods (zero-shot, 5-shot, full, lora, dora), 2 places after deployment on 1 "
        "device, up to 200 questions: 8 of 8 cells done."
    )


def test_every_view_has_the_same_figures(study: Path, found: StudyResult) -> None:
    markdown, html = (study / "study.md").read_text(), (study / "study.html").read_text()
    console = Console(file=StringIO(), width=400)
    for one in tables(found):
        console.print(terminal.grid(one, 400))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for one in tables(found):
        for row in one.rows:
            for cell in filter(None, row):
                assert cell in markdown.replace("\\", "") and cell in printed and cell in html
    assert html.count("<svg") == 1 and "http://" not in html.replace("http://www.w3.org", "")
    data = json.loads((study / "study.json").read_text())
    assert data["schema"] == 1 and data["keep"] == 0.8 and data["name"] == "x"
    lora = next(row for row in data["rows"] if row["method"] == "lora")
    score = next(row for row in found.rows if row.method == "lora").at(Q8)
    assert score is not None
    assert lora["scores"][1]["retention_ci"] == list(score.retention_ci or ())
    assert "draws" not in lora["scores"][1] and "answers" not in lora["scores"][1]
    assert [cell["id"] for cell in data["cells"]] == [o.id for o in found.outcomes]


def test_models_of_a_size_are_pooled(tmp_path: Path) -> None:
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    models = [str(tmp_path / "small"), "smollm2-135m", str(tmp_path / "large")]
    out = tmp_path / "study"
    made = make_study(out, study_of(models=models, methods=["lora"], tasks=["wordmath", "gsm8k"]))
    for path in out.glob("runs/large/**/train.json"):
        write_json(path, {"parameters": 700_000_000})
    found = page.write(out, made)
    rows = {row[0]: row[2:] for row in table(found, "By model size").rows}
    assert rows["below 300M"][:2] == ["2", "4"] and rows["500M and more"][:2] == ["1", "2"]
    wide, narrow = (
        np.ptp([float(end) for end in re.findall(r"[+-][\d.]+", rows[band][2])[1:]])
        for band in ("500M and more", "below 300M")
    )
    assert narrow == pytest.approx(wide / 2**0.5, rel=0.15)
    assert (out / "study.html").read_text().count("<svg") == 7, "a plot a model and task, and sizes"


def test_a_failed_cell_is_shown_with_its_reason(study: Path, tmp_path: Path) -> None:
    given = study_of(methods=["full", "lora"])
    made = make_study(tmp_path / "y", given)
    bad = next(c for c in made if c.method == "lora" and c.seed == 1)
    reason = "Target modules {'nothing'} not found | <b>"
    write_cell(tmp_path / "y", bad, state=work.FAILED, error=reason, attempts=2)
    found = page.write(tmp_path / "y", made)
    lora = next(row for row in found.rows if row.method == "lora")
    assert lora.seeds == [0], "what it left from before is of other settings"
    [row] = [row for row in table(found, "Cells").rows if row[0] == bad.id]
    assert row == [bad.id, "failed", "60", "2", reason]
    assert "&lt;b&gt;" in (tmp_path / "y/study.html").read_text()
    assert lead(found).endswith("4 of 5 cells done.")


def test_what_a_failed_cell_scored_is_shown_all_the_same(tmp_path: Path) -> None:
    """A device that is off, or a target that fails, takes nothing from the rest of the page."""
    made = make_study(tmp_path, study_of(methods=["lora"], seeds=[0]))
    for cell in made:
        folder = work.run_folder(tmp_path, cell.id) / "bench/local/gguf-q4_0"
        for path in folder.glob("*/*"):
            path.unlink()
        state = {"state": work.FAILED, "error": "gguf-q4_0 was not exported"}
        work.keep(tmp_path, replace(work.outcome(tmp_path, cell.id), **state, scored=True))
    found = page.write(tmp_path, made)
    assert [row.method for row in found.rows] == ["zero-shot", "lora"]
    assert found.places == [HOST, Q8]


def test_without_zero_shot_the_base_that_another_scored_is_compared_with(tmp_path: Path) -> None:
    made = make_study(tmp_path, study_of(methods=["5-shot", "lora"], seeds=[0]))
    work.keep(tmp_path, work.Outcome(made[0].id, work.FAILED, "its worker was lost"))
    found = page.write(tmp_path, made)
    assert [row.method for row in found.rows] == ["5-shot", "lora"]
    lora = found.rows[1].at(HOST)
    assert lora is not None and lora.benefit == pytest.approx(0.4, abs=0.05)


def test_a_place_that_one_seed_lacks_is_no_figure(tmp_path: Path) -> None:
    made = make_study(tmp_path, study_of(methods=["lora"]))
    run = work.run_folder(tmp_path, made[-1].id)
    (run / "bench/local/gguf-q4_0/tuned/results.jsonl").unlink()
    found = page.write(tmp_path, made)
    assert found.rows[1].at(Q4) is None and found.rows[1].at(Q8) is not None
    assert table(found, "Accuracy").rows[1][-1] == "-"


def test_results_of_other_weights_are_left_out(tmp_path: Path) -> None:
    made = make_study(tmp_path, study_of(methods=["lora"], seeds=[0]))
    run = work.run_folder(tmp_path, made[-1].id)
    write_results(run / "bench/local/gguf-q4_0/tuned", [True] * N, made_from="others")
    assert page.write(tmp_path, made).rows[1].at(Q4) is None


def test_what_the_study_no_longer_asks_for_is_not_on_its_page(tmp_path: Path) -> None:
    make_study(tmp_path, study_of(methods=["lora"]))
    less = cells(study_of(methods=["lora"], targets=["gguf-q8_0"], seeds=[0]))
    found = collect(tmp_path, less)
    assert found.places == [HOST, Q8] and found.rows[1].seeds == [0]


def test_places_stand_in_the_studys_order(tmp_path: Path) -> None:
    made = make_study(tmp_path, study_of(methods=["lora"], targets=["gguf-q4_0", "gguf-q8_0"]))
    assert collect(tmp_path, made).places == [HOST, Q4, Q8]


def test_a_target_whose_types_the_tuned_weights_choose_has_a_base_in_every_cell(
    tmp_path: Path,
) -> None:
    made = cells(study_of(methods=["lora"], targets=["gguf-q8_0"]))

    def right(cell: Cell, weights: str, place: int) -> Iterable[bool]:
        few = 40 if weights == "base" else 120 + 10 * (cell.seed or 0)
        return [i < few for i in range(N)]

    (tmp_path / "study.yaml").write_text("")
    for cell in made:
        own = cell
        if cell.seed is not None:
            devices = [{**d, "targets": ["gguf-q8_0", "gguf-auto"]} for d in cell.devices]
            own = replace(cell, devices=devices)
        write_cell(tmp_path, own, right)
        run = work.run_folder(tmp_path, cell.id)
        for weights in own.weights if cell.seed is not None else []:
            few = (20 if weights == "base" else 100) + 10 * (cell.seed or 0)
            write_results(run / "bench/local/gguf-auto" / weights, [i < few for i in range(N)])
        made[made.index(cell)] = own
    found = collect(tmp_path, made)
    assert found.places == [HOST, Q8, ("gguf-auto", "local")]
    score = found.rows[1].at(("gguf-auto", "local"))
    assert score is not None and score.benefit == pytest.approx(80 / 200)


def test_nothing_done_is_a_page_too(tmp_path: Path) -> None:
    made = cells(study_of())
    found = page.write(tmp_path, made)
    assert lead(found) == "Nothing is scored yet: 0 of 8 cells done."
    assert [t.title for t in tables(found)] == ["Cells"] and findings(found) == []


def test_equal_scores_of_two_models_are_two_rows(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    given = study_of(models=["smollm2-135m", str(tmp_path / "other")], methods=["zero-shot"])
    found = page.write(tmp_path / "s", make_study(tmp_path / "s", given))
    assert [row[0] for row in table(found, "Size and speed").rows] == ["smollm2-135m", "other"] * 2


def test_a_limited_device_says_how_many_questions(tmp_path: Path) -> None:
    (tmp_path / "devices").mkdir()
    given = study_of(methods=["lora"], seeds=[0])
    made: list[Any] = make_study(tmp_path, given)
    board = {"name": "board", "said": {"limit": 24}, "targets": ["gguf-q8_0"]}
    for i, cell in enumerate(made):
        run = work.run_folder(tmp_path, cell.id)
        for weights in cell.weights:
            lines = (run / "bench/local/gguf-q8_0" / weights / "results.jsonl").read_text()
            rows = sorted(lines.splitlines())[:24]
            right = [json.loads(row)["correct"] for row in rows]
            write_results(run / "bench/board/gguf-q8_0" / weights, right)
        made[i] = replace(cell, devices=[*cell.devices, board])
    found = page.write(tmp_path, made)
    score = found.rows[1].at(("gguf-q8_0", "board"))
    assert score is not None and score.n == 24
    assert table(found, "Accuracy").header[-1] == "gguf-q8_0 on board"
    assert lead(found).count("on 2 devices, up to 200 questions") == 1
