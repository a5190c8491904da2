"""``edgeft check``: a run as a test of other people's CI."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from report_runs import NASTY, UNSEEN, N, make_run, write_results
from typer.testing import CliRunner, Result

from edgeft import ship_commands
from edgeft.check import Checked, Wanted, check, check_run, named, summary, write_junit
from edgeft.errors import UserError
from edgeft.report.build import Report, build

TARGETS = ("gguf-f16", "gguf-q8_0", "gguf-q4_0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Retention 1, 0.99 and about 0.7."""
    return make_run(tmp_path_factory.mktemp("runs") / "x", TARGETS)


@pytest.fixture(scope="module")
def report(run: Path) -> Report:
    return build(run)


@pytest.fixture
def two_devices(run: Path, tmp_path: Path) -> Path:
    """As ``run``, and two of the targets on a board as well."""
    folder = tmp_path / "x"
    shutil.copytree(run, folder)
    for target in ("gguf-f16", "gguf-q4_0"):
        shutil.copytree(folder / "bench/local" / target, folder / "bench/pi" / target)
    return folder


def retention(report: Report, target: str) -> tuple[float, tuple[float, float]]:
    [found] = [v.survival for v in report.variants if v.target == target]
    assert found.retention is not None and found.retention_ci is not None
    return found.retention, found.retention_ci


def failed(found: Checked) -> list[str]:
    return [row.name for row in found.rows if not row.passed]


def test_the_estimate_is_what_counts(report: Report) -> None:
    kept, (low, high) = retention(report, "gguf-q4_0")
    assert low < 0.9 * kept
    assert check(report, Wanted(kept)).passed, "reaching it is enough"
    found = check(report, Wanted(kept + 1e-9))
    assert not found.passed and failed(found) == ["gguf-q4_0 on local"]
    found = check(report, Wanted(0.9))
    assert found.line == (
        f"check failed: gguf-q4_0 on local keeps {kept:.2f} ({low:.2f} to {high:.2f}) of the "
        "benefit, 0.90 are wanted; gguf-f16, gguf-q8_0 pass"
    )


def test_confident_asks_the_lower_end(report: Report) -> None:
    kept, (low, high) = retention(report, "gguf-q4_0")
    between = (low + kept) / 2
    assert check(report, Wanted(between)).passed
    found = check(report, Wanted(between, confident=True))
    assert failed(found) == ["gguf-q4_0 on local"]
    assert f"keeps {kept:.2f} ({low:.2f} to {high:.2f}) of the benefit" in found.line
    assert found.line.endswith("are wanted for sure; gguf-f16, gguf-q8_0 pass")
    assert check(report, Wanted(low, confident=True)).passed


def test_without_a_figure_the_verdict_decides(report: Report) -> None:
    found = check(report, Wanted())
    assert failed(found) == ["gguf-q4_0 on local"]
    assert found.line.startswith("check failed: gguf-q4_0 on local is partial: keeps 0.")
    assert "0.80 are wanted for sure" in found.line
    alone = check(report, Wanted(), ["gguf-q8_0"])
    kept, (low, high) = retention(report, "gguf-q8_0")
    assert alone.passed and alone.line == (
        "check passed: gguf-q8_0; 0.80 are wanted for sure, the least is gguf-q8_0 on local, "
        f"which keeps {kept:.2f} ({low:.2f} to {high:.2f}) of the benefit"
    )


def with_survival(report: Report, **changes: Any) -> Report:
    """The report of its first variant alone, whose survival is changed."""
    variant = report.variants[0]
    return replace(
        report, variants=[replace(variant, survival=replace(variant.survival, **changes))]
    )


def test_a_figure_that_misses_by_little_is_not_rounded_to_what_is_wanted(report: Report) -> None:
    near = with_survival(report, retention=0.8996, retention_ci=(0.79996, 0.99))
    assert "keeps 0.8996 (0.80 to 0.99) of the benefit, 0.90 are" in check(near, Wanted(0.9)).line
    line = check(near, Wanted(0.8, confident=True)).line
    assert "keeps 0.90 (0.79996 to 0.99) of the benefit, 0.80 are wanted for sure" in line
    assert check(near, Wanted(0.8996)).passed
    assert "0.9251 are wanted" in check(near, Wanted(0.9251)).line


def test_what_was_never_benched_fails_by_name(two_devices: Path) -> None:
    found = check_run(two_devices, Wanted(0.5), ["gguf-q8_0", "gguf-q4_km"], ["local", "pi"])
    assert not found.passed
    assert failed(found) == ["gguf-q8_0 on pi", "gguf-q4_km on local", "gguf-q4_km on pi"]
    assert "gguf-q8_0 on pi was never benched;" in found.line
    assert "gguf-q4_km on pi was never benched (did you mean 'gguf-q4_0'" in found.line
    assert found.line.endswith("gguf-q8_0 passes")
    anywhere = check_run(two_devices, Wanted(0.5), ["onnx-int4"])
    assert [(row.target, row.device) for row in anywhere.rows] == [("onnx-int4", None)]
    assert anywhere.line.startswith("check failed: onnx-int4 was never benched (there are: ")


def test_a_device_alone_stands_for_all_that_it_has(two_devices: Path) -> None:
    found = check_run(two_devices, Wanted(0.9), None, ["pi"])
    assert [row.name for row in found.rows] == ["gguf-f16 on pi", "gguf-q4_0 on pi"]
    assert failed(found) == ["gguf-q4_0 on pi"]
    gone = check_run(two_devices, Wanted(0.5), None, ["local", "raspberry-pi-5"])
    assert not gone.passed and failed(gone) == ["every target on raspberry-pi-5"]
    assert "every target on raspberry-pi-5 is missing: nothing was benched there" in gone.line


def test_every_device_counts_and_is_named(two_devices: Path) -> None:
    worse = two_devices / "bench/pi/gguf-f16/tuned"
    write_results(worse, [i % 4 == 0 for i in range(N + UNSEEN)])
    found = check_run(two_devices, Wanted(0.9), ["gguf-f16", "gguf-q8_0"])
    assert failed(found) == ["gguf-f16 on pi"]
    assert found.line.endswith("gguf-f16, gguf-q8_0 pass")
    both = check_run(two_devices, Wanted(0.1), ["gguf-q4_0", "gguf-q8_0"])
    assert "check passed: gguf-q4_0 on local and pi, gguf-q8_0 on local; 0.10 are" in both.line


def test_a_format_stands_for_its_benched_targets(report: Report) -> None:
    assert named(["gguf"], report.variants) == list(TARGETS)
    assert named(["gguf-q8_0", "gguf"], report.variants) == ["gguf-q8_0", "gguf-f16", "gguf-q4_0"]
    found = check(report, Wanted(0.1), named(["onnx"], report.variants))
    assert not found.passed and "onnx was never benched" in found.line


def test_a_run_with_nothing_benched_fails(tmp_path: Path) -> None:
    found = check_run(make_run(tmp_path / "x", []), Wanted(0.1))
    assert (found.passed, found.line) == (
        False,
        "check failed: every target is missing: nothing was benched",
    )


@pytest.mark.parametrize(
    ("right", "verdict"), [(5, "no-benefit on the host"), (50, "negative-transfer on the host")]
)
def test_without_a_benefit_on_the_host_nothing_passes(
    tmp_path: Path, right: int, verdict: str
) -> None:
    run = make_run(tmp_path / "x", ["gguf-f16"])
    write_results(run / "bench/host/tuned", [i % right == 0 for i in range(N + UNSEEN)])
    found = check_run(run, Wanted(0.01))
    assert failed(found) == ["gguf-f16 on local"]
    host = build(run).host
    assert found.line == (
        f"check failed: {verdict}: {100 * host.base.accuracy:.1f}% right before fine-tuning and "
        f"{100 * host.tuned.accuracy:.1f}% after, so there is nothing to keep"
    )
    assert "nothing to keep" in found.rows[0].why


def test_questions_that_would_decide_are_said(report: Report) -> None:
    unsure = with_survival(
        report,
        retention=0.4,
        retention_ci=(-0.1, 0.9),
        verdict="inconclusive",
        needed_questions=1300,
    )
    assert check(unsure, Wanted()).line == (
        "check failed: gguf-f16 on local is inconclusive: keeps 0.40 (-0.10 to 0.90) of the "
        "benefit, 0.80 are wanted for sure (about 1,300 questions would decide it)"
    )


def test_no_benefit_on_the_few_questions_asked_there(report: Report) -> None:
    few = with_survival(report, retention=None, retention_ci=None, verdict="inconclusive")
    found = check(few, Wanted(0.1))
    assert not found.passed and found.line == (
        f"check failed: gguf-f16 on local cannot be judged: the {N} questions asked there show no "
        "benefit on the host"
    )


def test_junit_is_what_test_reporters_read(report: Report, tmp_path: Path) -> None:
    found = check(report, Wanted(0.9), [*TARGETS, "onnx-int4"])
    path = tmp_path / "made" / "junit.xml"
    write_junit(found, path)
    every = ElementTree.parse(path).getroot()
    [suite] = every
    assert every.tag == "testsuites" and suite.tag == "testsuite"
    assert (suite.get("tests"), suite.get("failures")) == ("4", "2")
    cases = {case.get("name"): case for case in suite}
    assert cases["gguf-f16"].get("classname") == "x.local"
    assert cases["onnx-int4"].get("classname") == "x"
    assert [name for name, case in cases.items() if case.find("failure") is not None] == [
        "gguf-q4_0",
        "onnx-int4",
    ]
    failure = cases["gguf-q4_0"].find("failure")
    assert failure is not None and failure.get("type") == "partial"
    assert "0.90 are wanted" in (failure.get("message") or "")
    assert [p.name for p in path.parent.iterdir()] == ["junit.xml"], "no temporary file stays"


def test_nasty_names_leave_xml_and_markdown_whole(report: Report, tmp_path: Path) -> None:
    nasty = f"{NASTY}\x00\x1b[31m\ud800]]>"
    found = check(report, Wanted(0.9), [nasty])
    assert "\n" not in found.line
    write_junit(found, tmp_path / "junit.xml")
    [case] = ElementTree.parse(tmp_path / "junit.xml").iter("testcase")
    assert "<script>alert('x')</script>" in (case.get("name") or "")
    text = summary(found)
    assert "<script>" not in text and "\\<script\\>" in text
    [row] = [line for line in text.splitlines() if line.startswith("|") and "fail" in line]
    assert row.replace("\\|", "").count("|") == 6


def test_the_summary_is_appended(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    page = tmp_path / "summary.md"
    page.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    assert edgeft(run, "--min-retention", "0.9").exit_code == 1
    text = page.read_text()
    assert text.startswith("before\n") and "check failed: gguf-q4" in text
    rows = [line for line in text.splitlines() if line.startswith("| gguf")]
    assert [row.split(" | ")[-1] for row in rows] == ["✓ pass |", "✓ pass |", "✗ fail |"]
    kept, (low, high) = retention(report, "gguf-q4_0")
    assert f"| {kept:.2f} ({low:.2f} to {high:.2f}) | partial |" in rows[-1]
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    gone = edgeft(run, "--min-retention", "0.9")
    assert isinstance(gone.exception, UserError) and "cannot append to GITHUB" in str(
        gone.exception
    )


def edgeft(*arguments: str | Path) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(ship_commands.check)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = edgeft(run, "--min-retention", "0.9", "--junit", tmp_path / "j.xml")
    assert done.exit_code == 1 and (tmp_path / "j.xml").is_file()
    [line] = done.stdout.splitlines()
    assert line.startswith("check failed: gguf-q4_0 on local keeps")
    done = edgeft(run, "--min-retention", "0.9", "--target", "gguf-q8_0", "--device", "local")
    assert done.exit_code == 0 and done.stdout.startswith("check passed: gguf-q8_0;")
    done = edgeft(run, "--min-retention", "0.9", "--confident", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["passed"] is False
    assert found["wanted"] == {"min_retention": 0.9, "confident": True}
    assert [row["passed"] for row in found["rows"]] == [True, True, False]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("share", ["nan", "-1", "inf", "0"])
def test_a_share_that_is_none(run: Path, share: str) -> None:
    done = edgeft(run, f"--min-retention={share}")
    assert isinstance(done.exception, UserError)
    assert "--min-retention takes a share of the benefit, as 0.9" in str(done.exception)


def test_no_run_and_no_scores_are_the_users_errors(tmp_path: Path) -> None:
    done = edgeft(tmp_path)
    assert isinstance(done.exception, UserError) and "not an edgeft run" in str(done.exception)
    run = make_run(tmp_path / "x", [])
    shutil.rmtree(run / "bench" / "host")
    done = edgeft(run)
    assert isinstance(done.exception, UserError) and "nothing to report" in str(done.exception)


def test_a_junit_file_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    done = edgeft(run, "--junit", tmp_path)
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith(f"cannot write {tmp_path}: ")
