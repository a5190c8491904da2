"""The report of a run directory that is written here as the stages write theirs."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from report_runs import NASTY, TARGETS, UNSEEN, N, make_run, write_results
from rich.console import Console

from edgeft import report
from edgeft.errors import UserError
from edgeft.report import markdown, tables, terminal
from edgeft.survival import Result, survival


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "x")
    report.write(run)
    return run


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)
    return data


def read(run: Path, *folder: str, group: str = "") -> list[Result]:
    lines = (run.joinpath("bench", *folder) / "results.jsonl").read_text().splitlines()
    names = ("id", "group", "text", "answer", "correct", "gold_logprob", "gold_tokens")
    every = [Result(**{n: json.loads(line)[n] for n in names}) for line in lines]
    return [r for r in every if r.group == group]


def test_json_has_the_public_schema(found: dict[str, Any]) -> None:
    assert found["schema"] == 1
    assert {"recipe", "machine", "host", "variants", "verdict"} <= found.keys()
    assert {"base", "tuned", "benefit", "benefit_ci", "mcnemar_p"} <= found["host"].keys()
    assert found["host"]["base"].keys() == {"accuracy", "n", "ci", "nll"}
    for variant in found["variants"]:
        wanted = "target device runtime bytes base tuned benefit benefit_ci retention retention_ci"
        assert set(wanted.split()) | {"agreement", "verdict", "latency"} <= variant.keys()
    assert found["recipe"]["model"] == "smollm2-135m"
    assert found["machine"]["host"]["cpu"] == "Example 9000"
    assert found["train"]["facts"]["final_loss"] is None


def test_figures_are_survivals_on_the_headline_questions(run: Path, found: dict[str, Any]) -> None:
    host = (read(run, "host", "base"), read(run, "host", "tuned"))
    assert [v["target"] for v in found["variants"]] == list(TARGETS)  # by size
    for variant in found["variants"]:
        here = [read(run, "local", variant["target"], w) for w in ("base", "tuned")]
        s = survival(*host, *here)
        assert variant["retention"] == s.retention
        assert tuple(variant["retention_ci"]) == s.retention_ci
        assert (variant["agreement"], variant["verdict"]) == (s.agreement, s.verdict)
        assert variant["tuned"]["n"] == N
        assert variant["bytes"] == TARGETS[variant["target"]][1]
    assert found["host"]["tuned"]["accuracy"] == sum(r.correct for r in host[1]) / N
    assert found["host"]["tuned"]["nll"] == pytest.approx(0.21)


def test_verdict_names_every_target_smallest_first(found: dict[str, Any]) -> None:
    assert found["verdict"] == (
        "survives at gguf-q8_0, gguf-f16; partial at gguf-q4_0, gguf-q4_k_m; lost at gguf-q2_k"
    )


def test_the_step_of_the_loss_is_named(found: dict[str, Any]) -> None:
    after = {v["target"]: v["lost_after"] for v in found["variants"]}
    assert after["gguf-f16"] is None and after["gguf-q8_0"] is None
    assert after["gguf-q4_k_m"] == after["gguf-q4_0"] == "gguf-q8_0"
    assert after["gguf-q2_k"] == "gguf-q8_0"


def test_unseen_templates_are_apart(run: Path, found: dict[str, Any]) -> None:
    assert len(found["groups"]) == 1 + len(TARGETS)
    host = found["groups"][0]
    assert (host["group"], host["target"], host["base"]["n"]) == ("unseen templates", None, UNSEEN)
    right = [r.correct for r in read(run, "host", "tuned", group="unseen templates")]
    assert host["tuned"]["accuracy"] == sum(right) / UNSEEN


def test_how_answers_were_read_is_counted(run: Path, found: dict[str, Any]) -> None:
    def counted(folder: Path) -> Counter[str]:
        lines = (folder / "results.jsonl").read_text().splitlines()
        return Counter(json.loads(line)["read"] or "none" for line in lines)

    assert len(found["readings"]) == 2 * (1 + len(TARGETS))
    for reading in found["readings"]:
        place = ("host",) if reading["target"] is None else (reading["device"], reading["target"])
        found_some = {how: n for how, n in reading["counts"].items() if n}
        assert found_some == counted(run.joinpath("bench", *place, reading["weights"]))
    first = found["readings"][0]
    assert (first["target"], first["weights"]) == (None, "base") and first["counts"]["none"] > 0
    page = (run / "report.md").read_text()
    row = " | ".join(str(first["counts"][how]) for how in ("####", "last", "none"))
    assert f"host, base | {row}" in page and "How answers were read" in page


def test_differences_come_with_both_outputs(found: dict[str, Any]) -> None:
    shown = found["variants"][-1]["differences"]
    assert len(shown) == 10
    assert [d["id"] for d in shown] == sorted(d["id"] for d in shown)
    assert all(d["host_correct"] and not d["target_correct"] for d in shown)
    assert all(d["question"].startswith("Ada has") for d in shown)
    assert all(d["host"].endswith(d["gold"]) and d["host"] != d["target"] for d in shown)


class Page(HTMLParser):
    """Collects text, tags and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.opened: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.depth: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)
        if tag not in ("meta", "br", "link", "img", "input", "hr"):
            self.depth.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.labels += [value or "" for name, value in attrs if name == "aria-label"]
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.depth.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_is_whole_and_loads_nothing(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.depth == []
    assert all(place.startswith("#") for place in page.loads)
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.opened)
    assert page.opened.count("svg") == 5 + len(TARGETS)  # and a waterfall each
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"#0[1-9a]0[1-9a]0[1-9a]\b", text)  # every stand-in colour replaced
    assert not re.search(r"\bnan\b", text, re.I)


def test_html_escapes_what_people_and_models_wrote(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    seen = "".join(page.texts)
    assert NASTY in seen
    assert "boxes <b>of</b> pens & gives" in seen


def test_markdown_escapes_what_people_and_models_wrote(run: Path) -> None:
    text = (run / "report.md").read_text()
    assert "<script>" not in text and "\\<script\\>alert" in text
    for line in text.splitlines():
        if line.startswith("|") and "Ada has" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 5


def figures(found: dict[str, Any]) -> list[str]:
    """The figures of report.json as people read them, written out here independently."""
    said = []
    for part in (found["host"], *found["variants"]):
        for score in (part["base"], part["tuned"]):
            low, high = score["ci"]
            said.append(f"{score['nll']:.3f}")
            said.append(f"{score['accuracy'] * 100:.1f}% ({low * 100:.1f} to {high * 100:.1f})")
        low, high = (100 * end for end in part["benefit_ci"])
        said.append(f"{part['benefit'] * 100:+z.1f} ({low:+z.1f} to {high:+z.1f})")
    for v in found["variants"]:
        low, high = v["retention_ci"]
        said += [v["verdict"], f"{v['retention']:z.2f} ({low:z.2f} to {high:z.2f})"]
        said += [f"{v['agreement'] * 100:.1f}%", f"{v['bytes'] / 1e6:.1f} MB"]
        said += [f"{v['latency']['decode_tok_s']:.1f}", f"{v['latency']['ttft_ms']:.0f}"]
    said += [found["verdict"], "0.031", "99.91%"]
    return said


def test_every_view_shows_the_figures_of_the_json(run: Path, found: dict[str, Any]) -> None:
    out = StringIO()
    terminal.show(report.build(run), Console(file=out, width=200))
    views = {
        "html": "".join(Page((run / "report.html").read_text()).texts),
        "markdown": (run / "report.md").read_text().replace("\\", ""),
        "terminal": " ".join(out.getvalue().split()),
    }
    for figure in figures(found):
        for name, text in views.items():
            assert figure in text, f"{figure} is not in the {name}"


def test_terminal_fits_80_columns(run: Path) -> None:
    out = StringIO()
    terminal.show(report.build(run), Console(file=out, width=80))
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "(0.98 to 1.02)" in text  # no interval is broken in two


def test_a_run_without_host_scores_says_what_to_do(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", [])
    (run / "bench" / "host" / "tuned" / "results.jsonl").unlink()
    with pytest.raises(UserError, match="nothing to report yet; run `edgeft bench"):
        report.write(run)
    assert not (run / "report.json").exists()


def test_a_run_with_the_host_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", [])
    assert report.write(run).verdict == "a benefit on the host; no target benched yet"
    assert json.loads((run / "report.json").read_text())["variants"] == []
    assert Page((run / "report.html").read_text()).opened.count("svg") == 2


def test_what_is_exported_but_not_benched_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", ["gguf-f16", "gguf-q8_0"])
    (run / "bench" / "local" / "gguf-q8_0" / "base" / "results.jsonl").unlink()
    assert [v.target for v in report.build(run).variants] == ["gguf-f16"]


def test_a_run_without_training_bundles_or_timings(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", ["gguf-q8_0"])
    (run / "train" / "log.jsonl").unlink()
    (run / "export" / "gguf-q8_0" / "tuned" / "manifest.json").unlink()
    (run / "bench" / "local" / "gguf-q8_0" / "tuned" / "latency.json").unlink()
    built = report.write(run)
    assert built.train is None
    assert (built.variants[0].bytes, built.variants[0].latency) == (None, None)


def test_without_a_benefit_on_the_host_there_is_no_retention(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", ["gguf-f16"])
    write_results(run / "bench" / "host" / "tuned", [i % 5 == 0 for i in range(N + UNSEEN)])
    built = report.write(run)
    assert built.verdict == "no-benefit on the host"
    found = json.loads((run / "report.json").read_text())
    assert found["variants"][0]["retention"] is None
    assert found["variants"][0]["verdict"] == "no-benefit"


def test_two_devices_are_told_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", ["gguf-f16"])
    (run / "bench" / "pi5").mkdir()
    (run / "bench" / "local" / "gguf-f16").rename(run / "bench" / "pi5" / "gguf-f16")
    run = make_run(run, ["gguf-f16"])
    assert report.write(run).verdict == "survives at gguf-f16 on local and pi5"


def test_results_of_another_evaluation_set_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", ["gguf-f16"])
    write_results(run / "bench" / "local" / "gguf-f16" / "base", [True] * (N + UNSEEN - 1))
    with pytest.raises(UserError, match="gguf-f16 on local: .* differ in 1 questions"):
        report.build(run)


def test_damaged_results_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", [])
    (run / "bench" / "host" / "base" / "results.jsonl").write_text('{"id": "q0')
    with pytest.raises(UserError, match=r"results\.jsonl is damaged"):
        report.build(run)


def test_an_inconclusive_target_says_how_many_questions_decide(run: Path) -> None:
    built = report.build(run)
    few = replace(built.variants[0].survival, verdict="inconclusive", needed_questions=1300)
    unsure = replace(built, variants=[replace(built.variants[0], survival=few)])
    assert tables.remarks(unsure)[-1] == "gguf-f16: about 1,300 questions would decide it."
    assert "about 1,300 questions would decide it" in markdown.render(unsure)
