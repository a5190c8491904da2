"""Which file to ship: what meets the limits, the front of speed and accuracy, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_run, write_json, write_lines
from test_cli import refused

from edgeft import report
from edgeft.report import markdown, tables
from edgeft.report.build import build
from edgeft.report.ship import Limits, choices, front, megabytes

PI = {  # target: decode tok/s, peak MB
    "gguf-f16": (9.0, 420.0),
    "gguf-q8_0": (17.0, 260.0),
    "gguf-q4_k_m": (24.0, 215.0),
    "gguf-q4_0": (31.0, 240.0),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was benched here and on a small board."""
    folder = make_run(tmp_path / "run", tuple(PI))
    for target, (speed, memory) in PI.items():
        for weights in ("base", "tuned"):
            here = folder / "bench" / "local" / target / weights
            there = folder / "bench" / "pi" / target / weights
            there.mkdir(parents=True)
            for name in ("results.jsonl", "stage.json"):
                (there / name).write_bytes((here / name).read_bytes())
        latency = json.loads((here / "latency.json").read_text())
        write_json(
            there / "latency.json",
            {
                **latency,
                "decode_tok_s": speed,
                "decode_tok_s_range": [speed - 1, speed + 1],
                "peak_rss_mb": memory,
                "temperature_c": [48.0, 84.2, 80.1],
                "clock_mhz": [2400.0, 1500.0, 1800.0],
                "governor": "ondemand",
                "throttled": ["throttled"] if target == "gguf-f16" else [],
                "other_load": 0.6,
                "energy_j": 12.5,
                "threads": 4,
                "threads_tried": {"1": 9.4, "4": speed},
            },
        )
    return folder


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def chosen(folder: Path, **limits: Any) -> dict[str, str | None]:
    return {c.device: c.target for c in build(folder, Limits(**limits)).ship}


def test_the_most_accurate_that_meets_the_limits(run: Path) -> None:
    accuracy = {v.target: v.survival.here.tuned.accuracy for v in build(run).variants}
    assert accuracy["gguf-f16"] > accuracy["gguf-q8_0"] > accuracy["gguf-q4_k_m"]
    assert chosen(run) == {"local": "gguf-f16", "pi": "gguf-f16"}
    assert chosen(run, max_memory_mb=300)["pi"] == "gguf-q8_0"
    assert chosen(run, max_memory_mb=300, min_tok_s=20)["pi"] == "gguf-q4_k_m"
    assert chosen(run, min_tok_s=25, min_retention=0.1)["pi"] == "gguf-q4_0"
    assert chosen(run, min_tok_s=25, min_retention=0.9)["pi"] is None


def test_what_survives_goes_first_unless_retention_is_asked_for(run: Path) -> None:
    found = {v.target: v.survival.verdict for v in build(run).variants if v.device == "pi"}
    assert found["gguf-q4_0"] == "partial" and found["gguf-q8_0"] == "survives"
    assert chosen(run, min_tok_s=30)["pi"] == "gguf-q4_0", "nothing that survives is so fast"


def test_the_answer_says_why(run: Path) -> None:
    fits = build(run, Limits(max_memory_mb=300)).ship[1]
    assert fits.sentence.startswith("On pi, ship gguf-q8_0: ")
    assert "17.0 tok/s, 260 MB of memory" in fits.sentence and "retention 0." in fits.sentence
    assert fits.unmet == {"gguf-f16": ["420 MB of memory"]}
    none = build(run, Limits(max_memory_mb=100, min_tok_s=1)).ship[1]
    assert none.sentence == (
        "On pi, nothing meets the limits; gguf-f16 comes closest: 420 MB of memory."
    )


def test_the_front_has_nothing_better_in_both(run: Path) -> None:
    there = [v for v in build(run).variants if v.device == "pi"]
    assert [v.target for v in front(there)] == [
        *("gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "gguf-q4_0")
    ]
    slow = run / "bench/pi/gguf-q4_k_m/tuned/latency.json"
    write_json(slow, {**json.loads(slow.read_text()), "decode_tok_s": 10.0})
    there = [v for v in build(run).variants if v.device == "pi"]
    assert [v.target for v in front(there)] == ["gguf-f16", "gguf-q8_0", "gguf-q4_0"]


def rows(found: report.Report, title: str) -> dict[str, dict[str, str]]:
    [table] = [t for t in tables.tables(found) if t.title == title]
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_a_device_has_its_table_and_its_picture(run: Path) -> None:
    found = report.write(run, Limits(max_memory_mb=300))
    row = rows(found, "On pi")["gguf-q8_0"]
    assert row.items() >= {"tok/s": "17.0", "memory, MB": "260", "energy, J": "12.50"}.items()
    assert row["as on local"] == "200 of 200" and row["verdict"] == "survives"
    assert "as on local" not in rows(found, "On local")["gguf-q8_0"]
    page = (run / "report.html").read_text()
    assert 'aria-label="Decode speed on pi against accuracy"' in page
    assert "On pi, ship gguf-q8_0" in page and "On pi, ship gguf-q8_0" in markdown.render(found)
    public = json.loads((run / "report.json").read_text())
    assert {c["device"]: c["target"] for c in public["ship"]}["pi"] == "gguf-q8_0"


def test_throttling_heat_and_other_work_are_said(run: Path) -> None:
    said = rows(build(run), "Latency")["gguf-f16 on pi"]
    assert said["machine"] == (
        "THROTTLED (throttled); 48/84/80 °C; 2400/1500/1800 MHz; governor ondemand; "
        "0.6 cores of other load; threads tried, tok/s: 9 with 1, 9 with 4"
    )
    assert said["decode, tok/s"] == "9.0 (8.0 to 10.0)"
    assert "THROTTLED" not in rows(build(run), "Latency")["gguf-q8_0 on pi"]["machine"]


def test_times_that_mean_nothing_are_not_shown(run: Path) -> None:
    for target in PI:
        path = run / "bench/pi" / target / "tuned/latency.json"
        write_json(path, {"not_measured": "an emulated CPU"})
    found = report.write(run)
    row = rows(found, "On pi")["gguf-q8_0"]
    assert row["tok/s"] == row["memory, MB"] == "not measured"
    assert not any("on pi" in name for name in rows(found, "Latency"))
    assert "Not measured: an emulated CPU." in (run / "report.md").read_text()
    assert "Decode speed on pi" not in (run / "report.html").read_text()
    none = build(run, Limits(min_tok_s=1)).ship[1]
    assert none.target is None and "its speed was not measured" in none.sentence


def test_some_of_the_questions_are_compared_with_the_same_on_the_host(run: Path) -> None:
    asked = 30
    for target in PI:
        for weights in ("base", "tuned"):
            folder = run / "bench/pi" / target / weights
            kept = sorted((x for x in results(folder) if not x["group"]), key=lambda x: x["id"])[
                :asked
            ]
            write_lines(folder / "results.jsonl", kept)
            write_json(folder / "stage.json", {"fingerprint": "x", "done": True, "limit": asked})
    found = report.write(run)
    there = [v for v in found.variants if v.device == "pi"]
    assert {v.survival.here.tuned.n for v in there} == {asked}
    assert {v.same_as_local for v in there} == {(asked, asked)}
    assert "On pi 30 of 200 questions were asked." in (run / "report.md").read_text()
    assert not any("on pi" in name for name in rows(found, "Unseen templates"))
    exact = next(v for v in there if v.target == "gguf-f16")
    assert exact.survival.retention == 1.0 and exact.survival.agreement == 1.0


def test_questions_too_few_to_show_the_benefit_decide_nothing(run: Path) -> None:
    """Here: the first ones that host, base and tuned, got wrong."""
    by_id = {
        weights: {x["id"]: x for x in results(run / "bench/host" / weights)}
        for weights in ("base", "tuned")
    }
    alike = [i for i, x in by_id["tuned"].items() if not (x["correct"] or x["group"])][:6]
    assert not any(by_id["base"][i]["correct"] for i in alike)
    for target in PI:
        for weights in ("base", "tuned"):
            folder = run / "bench/pi" / target / weights
            kept = [x for x in results(folder) if x["id"] in alike]
            write_lines(folder / "results.jsonl", kept)
            write_json(folder / "stage.json", {"fingerprint": "x", "done": True, "limit": 6})
    found = build(run)
    there = [v.survival for v in found.variants if v.device == "pi"]
    assert [(s.verdict, s.retention) for s in there] == [("inconclusive", None)] * len(PI)
    assert chosen(run) == {"local": "gguf-f16", "pi": None}
    assert found.ship[1].sentence == (
        "On pi, nothing can be recommended; gguf-f16 comes closest: 6 questions show no benefit "
        "on the host."
    )
    assert chosen(run, max_memory_mb=300, min_retention=0.1)["pi"] is None
    assert "inconclusive at gguf-q4_0 on pi" in found.verdict


def test_a_file_that_lost_the_benefit_is_not_recommended(tmp_path: Path) -> None:
    variants = build(make_run(tmp_path / "run")).variants
    [gone] = [v for v in variants if v.survival.verdict == "lost"]
    [choice] = choices([gone], Limits(min_tok_s=1))
    assert choice.target is None and choice.unmet == {gone.target: ["the benefit is lost"]}
    assert "comes closest: the benefit is lost" in choice.sentence


def test_without_a_benefit_nothing_is_recommended(run: Path) -> None:
    host = run / "bench" / "host"
    (host / "tuned" / "results.jsonl").write_bytes((host / "base" / "results.jsonl").read_bytes())
    assert build(run).ship == []


@pytest.mark.parametrize(("text", "size"), [("300", 300), ("300MB", 300), ("1.5 gb", 1500)])
def test_sizes(text: str, size: float) -> None:
    assert megabytes(text) == size


def test_a_wrong_size_is_one_line(run: Path) -> None:
    line = refused("report", run, "--max-memory", "much")
    assert line == "edgeft: --max-memory takes a size as 300, 300MB or 1.5GB, not 'much'"
