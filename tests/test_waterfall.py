"""Where it went, in a report: each target's steps, their causes, and how the views show them."""

from __future__ import annotations

import json
import re
from html import unescape
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_json, write_lines
from rich.console import Console
from test_report import Page

from edgeft import report
from edgeft.report import tables, terminal
from edgeft.report.variant import Cause, Variant

N, FEW = 100, 20
LOCAL = "local"


def rows(right: int, n: int, nats: float, kl: float | None) -> list[dict[str, Any]]:
    """The first ``right`` questions are answered correctly, from the last one down."""
    return [
        {
            "id": f"q{i:03}",
            "group": "",
            "text": "",
            "answer": str(i < right),
            "read": "####",
            "correct": i < right,
            "gold_logprob": -10 * nats,
            "gold_tokens": 10,
            "kl": kl,
        }
        for i in reversed(range(n))
    ]


def put(
    run: Path,
    place: str,
    right: int,
    *,
    base: int = 10,
    n: int = N,
    nats: float = 0.2,
    kl: float | None = 0.01,
    bundle: str = "one",
) -> None:
    """Results of a place as ``device/target``, or ``host``."""
    for weights, count in (("base", base), ("tuned", right)):
        folder = run / "bench" / place / weights
        write_lines(folder / "results.jsonl", rows(count, n, nats, kl))
        limit = {"limit": n} if n < N else {}
        write_json(folder / "stage.json", {"done": True, "manifest": bundle, **limit})


def export(run: Path, target: str, size: int = 100, **facts: Any) -> None:
    """A bundle's manifest; ``facts`` that the checks found, or ``repair`` and ``elsewhere``."""
    own = {name: facts.pop(name) for name in ("repair", "elsewhere", "runtime") if name in facts}
    verify = {"tokenizer_prompts": N, "positions": 5120, "mean_kl": 0.02, **facts}
    manifest = {
        "runtime": "llama.cpp",
        "artifact": "model.gguf",
        "files": {"model.gguf": {"bytes": size * 1_000_000}},
        "verify": verify,
        **own,
    }
    write_json(run / "export" / target / "tuned" / "manifest.json", manifest)


def adapter(run: Path, right: int, *, kind: str = "original", nats: float = 0.2) -> None:
    host = run / "bench" / "host"
    write_lines(host / "adapter" / "results.jsonl", rows(right, N, nats, 0.003))
    write_json(host / "adapter.json", {"kind": kind})


def exact(run: Path, target: str = "gguf-f16", right: int = 80, **facts: Any) -> None:
    put(run, f"{LOCAL}/{target}", right, kl=0.0001)
    export(run, target, 270, **{"exact": True, "mean_kl": 0.0001, **facts})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The adapter has 82 right; merged and exported it has 80, and 50 in 4 bits."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "recipe.yaml").write_text("model: smollm2-135m\n")
    put(out, "host", 80, kl=None)
    write_json(out / "merged" / "merge.json", {"max_logit_diff": 1.2e-5})
    adapter(out, 82)
    exact(out)
    put(out, f"{LOCAL}/gguf-q4_0", 50, base=8, nats=0.5, kl=0.2)
    export(out, "gguf-q4_0", 91)
    return out


def variants(run: Path) -> dict[str, Variant]:
    return {f"{v.target} on {v.device}": v for v in report.build(run).variants}


def way(variant: Variant) -> list[tuple[str, str]]:
    return [(s.kind, s.after) for s in variant.steps]


START = [("merge", "merged on the host"), ("export", "gguf-f16")]


def test_a_target_is_reached_step_by_step(run: Path) -> None:
    found = variants(run)
    assert way(found["gguf-f16 on local"]) == START
    steps = found["gguf-q4_0 on local"].steps
    assert way(found["gguf-q4_0 on local"]) == [*START, ("quantize", "gguf-q4_0")]
    assert [s.before for s in steps] == ["adapter on the host", "merged on the host", "gguf-f16"]
    assert [(s.broken, s.fixed) for s in steps] == [(2, 0), (0, 0), (30, 0)]
    assert [s.change for s in steps] == pytest.approx([-0.02, 0, -0.3])
    assert [s.benefit_change for s in steps] == pytest.approx([-0.02, 0, -0.28])
    assert [s.nats for s in steps] == pytest.approx([0, 0, 0.3])
    assert [s.kl for s in steps] == pytest.approx([0.003, 0.0001, 0.2])
    assert [s.costs for s in steps] == [False, False, True]


def test_without_an_adapter_the_way_begins_at_the_weights(run: Path) -> None:
    for path in (run / "bench" / "host" / "adapter").iterdir():
        path.unlink()
    assert way(variants(run)["gguf-f16 on local"]) == START[1:]


def test_an_adapter_that_was_merged_otherwise_is_left_out(run: Path) -> None:
    write_json(run / "bench" / "host" / "adapter" / "stage.json", {"merged": "other weights"})
    assert way(variants(run)["gguf-f16 on local"]) == START[1:]


def test_on_a_device_all_steps_are_over_its_questions(run: Path) -> None:
    put(run, "pi/gguf-q4_0", 15, n=FEW)
    found = variants(run)
    steps = found["gguf-q4_0 on pi"].steps
    assert way(found["gguf-q4_0 on pi"]) == [
        *START,
        ("quantize", "gguf-q4_0"),
        ("device", "gguf-q4_0 on pi"),
    ]
    assert [s.n for s in steps] == [FEW] * 4
    assert [s.broken for s in steps] == [0, 0, 0, 5]
    assert {s.n for s in found["gguf-q4_0 on local"].steps} == {N}


def test_another_bundle_on_a_device_is_no_step_from_here(run: Path) -> None:
    put(run, "pi/gguf-q4_0", 60, bundle="another")
    last = ("quantize", "gguf-q4_0 on pi")
    assert way(variants(run)["gguf-q4_0 on pi"]) == [*START, last]


def test_on_a_device_alone(run: Path) -> None:
    put(run, "pi/gguf-q8_0", 79)
    export(run, "gguf-q8_0")
    last = ("quantize", "gguf-q8_0 on pi")
    assert way(variants(run)["gguf-q8_0 on pi"]) == [*START, last]


def test_a_repaired_target_comes_from_the_host_by_other_weights(run: Path) -> None:
    put(run, f"{LOCAL}/gguf-q4_0-repaired", 85)
    export(run, "gguf-q4_0-repaired", 91, repair={"rounded": True, "steps": 50})
    found = variants(run)["gguf-q4_0-repaired on local"]
    assert way(found) == [START[0], ("repair", "gguf-q4_0-repaired")]
    assert found.steps[1].fixed == 5


def test_what_rounds_the_least_is_on_the_way_of_what_rounds(run: Path) -> None:
    exact(run, "gguf-bf16", mean_kl=0.002)
    found = variants(run)
    assert way(found["gguf-bf16 on local"]) == [START[0], ("export", "gguf-bf16")]
    assert way(found["gguf-f16 on local"]) == START
    assert way(found["gguf-q4_0 on local"])[1] == ("export", "gguf-f16")


def test_a_file_made_elsewhere_is_on_no_other_targets_way(run: Path) -> None:
    exact(run, "file-theirs", 20, mean_kl=0.00005, elsewhere="theirs.gguf")
    found = variants(run)
    assert way(found["gguf-q4_0 on local"])[1] == ("export", "gguf-f16")
    assert way(found["file-theirs on local"]) == [START[0], ("export", "file-theirs")]


def test_another_runtime_has_its_own_way(run: Path) -> None:
    put(run, f"{LOCAL}/onnx-int4", 70)
    export(run, "onnx-int4", 92, runtime="onnxruntime-genai")
    assert way(variants(run)["onnx-int4 on local"]) == [START[0], ("quantize", "onnx-int4")]
    exact(run, "onnx-fp32", runtime="onnxruntime-genai")
    assert way(variants(run)["onnx-int4 on local"])[1] == ("export", "onnx-fp32")


def causes(run: Path, name: str, step: str) -> list[Cause]:
    return [cause for cause in variants(run)[name].causes if cause.step == step]


def test_what_costs_nothing_has_no_cause(run: Path) -> None:
    assert variants(run)["gguf-f16 on local"].causes == []


BOTH = {
    "max_logit_diff": 1e-5,
    "chosen": "original",
    "merges": {"original": {"heldout_loss": 0.51}, "dequantized": {"heldout_loss": None}},
}


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        (BOTH, "NF4 weights .*never saw .held-out loss: original 0.5100, dequantized -"),
        ({"max_logit_diff": 1e-5}, "merged into the original ones, which it never saw$"),
        ({**BOTH, "chosen": "dequantized"}, r"verified \(logits within 1e-05 of the adapter's"),
    ],
)
def test_a_merge_that_costs_says_into_what(merge: dict[str, Any], said: str, run: Path) -> None:
    adapter(run, 99, kind="dequantized")
    write_json(run / "merged" / "merge.json", merge)
    [cause] = causes(run, "gguf-q4_0 on local", "merge")
    assert re.search(said, cause.text), cause.text
    assert ("export.merge=dequantized" in cause.remedy) == ("never saw" in said)


def test_a_verified_merge_that_costs_is_near_ties(run: Path) -> None:
    adapter(run, 99)
    [cause] = causes(run, "gguf-q4_0 on local", "merge")
    assert "logits within 1.2e-05 of the adapter's" in cause.text


def test_an_export_that_costs_has_its_own_targets_figures(run: Path) -> None:
    exact(run, right=60)
    [of_f16] = causes(run, "gguf-f16 on local", "export")
    [of_q4] = causes(run, "gguf-q4_0 on local", "export")
    assert of_f16 == of_q4 and "KL divergence 0.0001 nats" in of_f16.text
    assert "gguf-f16, gguf-q4_0: the file is verified" in " ".join(
        tables.remarks(report.build(run))
    )


WORST = [
    {"name": f"blk.{i}.ffn_down.weight", "type": "Q4_0", "error": 0.12 - i / 100} for i in range(5)
]
TENSORS = {"error": 0.082, "worst": WORST}


def test_rounding_that_costs_names_the_worst_tensors(run: Path) -> None:
    export(run, "gguf-q4_0", 91, tensors=TENSORS)
    [cause] = causes(run, "gguf-q4_0 on local", "quantize")
    assert "weights 8.2% off in all" in cause.text
    assert "blk.0.ffn_down.weight 12.0% (Q4_0), blk.1.ffn_down.weight 11.0% (Q4_0)" in cause.text
    assert cause.remedy == "exporting gguf-q4_0-repaired, gguf-q4_0-imatrix or gguf-auto"


@pytest.mark.parametrize(
    ("right", "size", "fault", "tried"),
    [
        (78, 95, None, "gguf-q4_1, which survives with 78.0% correct at 95.0 MB"),
        (78, 144, None, "exporting"),  # too large for the same place
        (40, 95, None, "exporting"),
        (78, 95, "eos", "exporting"),
    ],
)
def test_what_to_try_is_better_where_it_was_measured(
    right: int, size: int, fault: str | None, tried: str, run: Path
) -> None:
    put(run, f"{LOCAL}/gguf-q4_1", right)
    export(run, "gguf-q4_1", size, faults=[FAULT | {"kind": fault}] if fault else [])
    [cause] = causes(run, "gguf-q4_0 on local", "quantize")
    assert cause.remedy.startswith(tried)


def test_a_better_target_has_nothing_to_learn_from_a_worse_one(run: Path) -> None:
    put(run, f"{LOCAL}/gguf-q8_0", 79, nats=0.4)
    export(run, "gguf-q8_0", 144)
    put(run, f"{LOCAL}/gguf-q4_1", 77)
    export(run, "gguf-q4_1", 95)
    [cause] = causes(run, "gguf-q8_0 on local", "quantize")
    assert "gguf-q4_1" not in cause.remedy


def test_a_repair_that_costs_is_its_own_step(run: Path) -> None:
    put(run, f"{LOCAL}/gguf-q4_0-repaired", 40)
    export(run, "gguf-q4_0-repaired", 91, repair={"rounded": True, "steps": 50}, tensors=TENSORS)
    [cause] = causes(run, "gguf-q4_0-repaired on local", "repair")
    assert "quantization error" in cause.text


FAULT = {"kind": "template", "text": "its chat template is not the model's", "remedy": "write it"}
WEIGHTS = {"kind": "weights", "text": "the fine-tuning is not in it", "remedy": "merge first"}


def test_a_fault_of_the_file_is_named_though_scores_are_right(run: Path) -> None:
    exact(run, "file-theirs", elsewhere="theirs.gguf", faults=[FAULT])
    [cause] = causes(run, "file-theirs on local", "export")
    assert cause == Cause("export", FAULT["text"], FAULT["remedy"])
    found = report.build(run)
    said = "file-theirs: its chat template is not the model's. To try: write it."
    assert said in tables.remarks(found)
    assert "gguf-f16" in found.ship[0].sentence and FAULT["text"] in str(found.ship[0].unmet)


def test_of_wrong_weights_rounding_is_not_to_blame(run: Path) -> None:
    export(run, "gguf-q4_0", 91, elsewhere="x.gguf", faults=[WEIGHTS], tensors=TENSORS)
    assert [c.text for c in variants(run)["gguf-q4_0 on local"].causes] == [WEIGHTS["text"]]


def test_a_file_made_elsewhere_is_not_what_the_loss_comes_after(run: Path) -> None:
    put(run, f"{LOCAL}/file-theirs", 79)
    export(run, "file-theirs", 95, elsewhere="theirs.gguf")
    assert variants(run)["gguf-q4_0 on local"].lost_after == "gguf-f16"


@pytest.mark.parametrize(
    ("there", "said", "tried"),
    [
        (
            {"llama-cpp-python": "0.3.29", "architecture": "aarch64"},
            "other software: llama-cpp-python 0.3.29 there and 0.3.30 here",
            "edgeft devices setup pi",
        ),
        (
            {"llama-cpp-python": "0.3.30", "architecture": "aarch64"},
            "byte for byte (SHA-256), so another kernel adds up in another order (aarch64 there, "
            "x86_64 here)",
            "more bits",
        ),
    ],
)
def test_a_device_that_costs_says_what_differs(
    there: dict[str, str], said: str, tried: str, run: Path
) -> None:
    put(run, "pi/gguf-q4_0", 20)
    here = {"llama-cpp-python": "0.3.30", "architecture": "x86_64"}
    for name, facts in ((LOCAL, here), ("pi", there)):
        write_json(run / "bench" / name / "machine.json", facts)
    [cause] = causes(run, "gguf-q4_0 on pi", "device")
    assert said in cause.text and cause.remedy.startswith(tried)


def table(run: Path) -> tables.Table:
    return next(t for t in tables.tables(report.build(run)) if t.title == tables.WAY)


def test_shared_steps_stand_once_in_the_table(run: Path) -> None:
    found = table(run)
    assert [row[0] for row in found.rows] == ["merged on the host", "gguf-f16", "gguf-q4_0"]
    assert found.rows[2][1:5] == ["quantized", "-30.0 (-39.0 to -20.8)", "30", "0"]
    assert [row[-1] for row in found.rows] == ["", "", "costs"]
    assert "asked" not in found.header


def test_a_table_of_different_questions_says_how_many(run: Path) -> None:
    put(run, "pi/gguf-q4_0", 15, n=FEW)
    found = table(run)
    at = found.header.index("asked")
    assert [row[at] for row in found.rows] == ["100"] * 3 + ["20"] * 4
    assert {len(row) for row in found.rows} == {len(found.header)}


def test_every_view_shows_the_way(run: Path) -> None:
    put(run, "pi/gguf-q4_0", 15, n=FEW, nats=float("inf"))
    report.write(run)
    data = json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)
    for variant in data["variants"]:
        assert len(variant["steps"]) >= 2 and "causes" in variant
    page = Page((run / "report.html").read_text())
    assert "".join(page.texts).count("Where it went") == 1
    labels = [value for value in page.labels if value.startswith("The way of")]
    assert labels == [
        f"The way of {name}, step by step"
        for name in ("gguf-f16 on local", "gguf-q4_0 on local", "gguf-q4_0 on pi")
    ]
    out = StringIO()
    terminal.show(report.build(run), Console(file=out, width=80))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    for text in (out.getvalue(), (run / "report.md").read_text()):
        assert "Where it went" in text and "quantized" in text


def test_names_are_escaped(run: Path) -> None:
    name = 'my "$x$" <pi>'
    put(run, f"{name}/gguf-q4_0", 15, n=FEW)
    report.write(run)
    text = (run / "report.html").read_text()
    assert "<pi>" not in text
    page = Page(text)
    assert page.depth == [] and f"The way of gguf-q4_0 on {name}, step by step" in page.labels
    assert f">gguf-q4_0 on {name}</text>" in unescape(text)  # beside its bar
