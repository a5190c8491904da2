"""``edgeft recommend``, from study.json files that are written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeft.errors import UserError
from edgeft.recommend import Recommendation, recommend, show
from edgeft.report.ship import Limits
from edgeft.study.results import StudyResult, as_json

NONE = Limits()


def score(target: str, accuracy: float, verdict: str | None = None, **more: Any) -> dict[str, Any]:
    tuned = verdict is not None
    return {
        "target": target,
        "device": "local",
        "n": 120,
        "accuracy": accuracy,
        "accuracy_ci": [accuracy - 0.05, accuracy + 0.05],
        "benefit": 0.4 if tuned else None,
        "benefit_ci": [0.3, 0.5] if tuned else None,
        "retention": 0.95 if tuned else None,
        "retention_ci": [0.9, 1.01] if tuned else None,
        "verdict": verdict,
        "bytes": 100_000_000,
        "tok_s": 100.0 if tuned else None,
        "memory_mb": 300.0 if tuned else None,
        **more,
    }


def row(method: str, *scores: dict[str, Any], **more: Any) -> dict[str, Any]:
    known = {"model": "small", "task": "wordmath", "parameters": 135_000_000, "seeds": [0, 1]}
    return {**known, "method": method, "scores": list(scores), **more}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    """A study's folder."""
    empty = StudyResult("x", "0.1.0", 0.8, [], [], [], {})
    path.mkdir(parents=True, exist_ok=True)
    (path / "study.json").write_text(json.dumps({**as_json(empty), "rows": rows}))
    return path


def one(*studies: Path, device: str = "local", limits: Limits = NONE, **said: Any) -> Any:
    [found] = recommend(studies, device, limits, **said)
    return found


def choice(found: Recommendation) -> tuple[str | None, str | None]:
    return found.method, found.target


def test_what_survives_goes_before_what_is_more_accurate(tmp_path: Path) -> None:
    study = write(
        tmp_path,
        row("zero-shot", score("q8", 0.2)),
        row("lora", score("q8", 0.6, "survives"), score("q4", 0.7, "partial")),
        row("dora", score("q8", 0.65, "survives")),
    )
    assert choice(one(study)) == ("dora", "q8")


def test_then_the_accuracy_then_the_speed_then_the_size(tmp_path: Path) -> None:
    slow, fast = score("q8", 0.6, "survives"), score("q6", 0.6, "survives", tok_s=120.0)
    assert choice(one(write(tmp_path / "a", row("lora", slow, fast)))) == ("lora", "q6")
    small = score("q4", 0.6, "survives", bytes=90_000_000)
    assert choice(one(write(tmp_path / "b", row("lora", slow, small)))) == ("lora", "q4")


def test_what_helps_most_is_taken_where_nothing_survives(tmp_path: Path) -> None:
    study = write(
        tmp_path,
        row("zero-shot", score("q8", 0.5)),
        row("full", score("q8", 0.1, "negative-transfer")),
        row("lora", score("q8", 0.4, "lost")),
    )
    assert choice(one(study)) == ("zero-shot", "q8")


def test_limits_leave_out_with_a_reason(tmp_path: Path) -> None:
    study = write(
        tmp_path,
        row(
            "lora",
            score("q8", 0.7, "survives", memory_mb=310.0),
            score("q4", 0.6, "survives", memory_mb=250.0, tok_s=200.0),
            score("int8", 0.7, "survives", memory_mb=None, tok_s=None),
        ),
    )
    found = one(study, limits=Limits(max_memory_mb=250, min_tok_s=150))
    assert choice(found) == ("lora", "q4")
    assert found.unmet == [
        "small, lora, q8: 310 MB of memory, 100.0 tok/s",
        "small, lora, int8: its memory was not measured, its speed was not measured",
    ]
    assert choice(one(study, limits=Limits(max_memory_mb=309))) == ("lora", "q4")
    assert choice(one(study, limits=Limits(max_memory_mb=310))) == ("lora", "q8")


def test_nothing_meets_the_limits(tmp_path: Path) -> None:
    study = write(tmp_path, row("lora", score("q8", 0.7, "survives")))
    found = one(study, limits=Limits(min_tok_s=1000))
    assert choice(found) == (None, None) and found.task == "wordmath"
    assert found.evidence == "1 files were measured on local, none meets the limits"
    assert found.unmet == ["small, lora, q8: 100.0 tok/s"]


def test_a_base_has_the_speed_of_a_tuned_file_of_its_shape(tmp_path: Path) -> None:
    study = write(
        tmp_path,
        row("zero-shot", score("q8", 0.9), score("q4", 0.9)),
        row("lora", score("q8", 0.5, "lost")),
        row("lora", score("q4", 0.5, "lost"), model="other"),
    )
    found = one(study, limits=Limits(min_tok_s=50), model="small")
    assert choice(found) == ("zero-shot", "q8")
    assert found.unmet == ["small, zero-shot, q4: its speed was not measured"]
    assert found.expect == "90.0% correct (85.0 to 95.0), 100.0 tok/s, 300 MB of memory"


def test_it_says_what_to_expect_and_on_what_evidence(tmp_path: Path) -> None:
    found = one(write(tmp_path / "s", row("lora", score("q8", 0.7, "survives"))))
    assert found.expect == (
        "70.0% correct (65.0 to 75.0), +40.0 points (+30.0 to +50.0), retention 0.95 (0.90 to "
        "1.01), survives, 100.0 tok/s, 300 MB of memory"
    )
    assert found.evidence == f"{tmp_path / 's'}: 120 questions, 2 seeds"


def test_the_best_of_several_studies(tmp_path: Path) -> None:
    first = write(tmp_path / "a", row("lora", score("q8", 0.6, "survives")))
    second = write(tmp_path / "b", row("dora", score("q8", 0.7, "survives"), model="other"))
    found = one(first, second / "study.json")
    assert (found.model, found.method) == ("other", "dora") and "b/study.json" in found.evidence
    assert one(first, second, model="small").method == "lora"
    assert one(first, second, model="HuggingFaceTB/small").method == "lora"


def test_each_task_has_an_answer(tmp_path: Path) -> None:
    study = write(
        tmp_path,
        row("lora", score("q8", 0.6, "survives")),
        row("dora", score("q8", 0.6, "survives"), task="gsm8k"),
        row("full", score("q8", 0.6, "survives", device="pi"), task="svamp"),
    )
    found = recommend([study], "local", NONE)
    assert [(r.task, r.method) for r in found] == [("wordmath", "lora"), ("gsm8k", "dora")]
    assert [r.method for r in recommend([study], "local", NONE, task="gsm8k")] == ["dora"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"model": "smal"}, "no study has the model smal; did you mean 'small'"),
        ({"task": "wordmaths"}, "no study has the task wordmaths; did you mean 'wordmath'"),
        ({"model": "small", "task": "gsm"}, "no study has the task gsm"),
        ({"parameters": "many"}, "--parameters takes a size as 360M or 1.1B, not 'many'"),
        ({"parameters": "1.2.3M"}, "not '1.2.3M'"),
        ({"parameters": "360"}, "not '360'"),
    ],
)
def test_what_is_not_there(said: dict[str, str], message: str, tmp_path: Path) -> None:
    study = write(tmp_path, row("lora", score("q8", 0.7, "survives")))
    with pytest.raises(UserError, match=message):
        recommend([study], "local", NONE, **said)  # type: ignore[arg-type]


def test_no_study(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text("[]")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "odd.json"):
        with pytest.raises(UserError, match=f"{path.name} holds no study: make one with edgeft st"):
            recommend([path], "local", NONE)


@pytest.mark.parametrize(
    ("parameters", "method", "text"),
    [
        (None, "lora", "LoRA or DoRA below 1B parameters, and no full fine-tuning below 500M; of"),
        ("360M", "lora", "LoRA or DoRA; no full fine-tuning below 500M parameters; of the target"),
        ("0.7b", "lora", "LoRA or DoRA, as for every aligned model below 1B parameters; of"),
        ("700M", "lora", "LoRA or DoRA, as for every aligned model below 1B parameters; of"),
        ("1.1B", None, "nothing: the rule is about less than 1B parameters"),
    ],
)
def test_without_evidence_it_is_the_papers_rule(
    parameters: str | None, method: str | None, text: str, tmp_path: Path
) -> None:
    found = one(parameters=parameters)
    assert found.method == method and found.expect.startswith(text)
    assert found.evidence.startswith("no study was given; the rule is that of arXiv 2606.06920")
    study = write(tmp_path, row("lora", score("q8", 0.7, "survives")))
    elsewhere = one(study, device="raspberry-pi-5", parameters=parameters)
    assert (elsewhere.method, elsewhere.expect) == (method, found.expect)
    assert elsewhere.evidence.startswith("no study has scores on raspberry-pi-5; the rule")


def test_the_host_is_no_device(tmp_path: Path) -> None:
    host = {**score("", 0.9, "benefit"), "target": None, "device": None}
    found = one(write(tmp_path, row("full", host)), device="local")
    assert found.target is None and "no study has scores on local" in found.evidence


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write(tmp_path, row("lora", score("q8", 0.7, "survives"), score("q4", 0.6, "lost")))
    show(recommend([study], "local", Limits()), False)
    assert capsys.readouterr().out.startswith("wordmath on local: small by lora, shipped as q8\n  ")
    show(recommend([study], "local", Limits(min_tok_s=1e9)), False)
    printed = capsys.readouterr().out
    assert printed.startswith("wordmath on local: nothing fits\n") and "left out" in printed
    show(recommend([], "local", Limits()), False)
    assert capsys.readouterr().out.startswith("on local: LoRA or DoRA below 1B")
    show(recommend([study], "local", Limits()), True)
    [data] = json.loads(capsys.readouterr().out)
    assert data["method"] == "lora" and data["target"] == "q8" and data["unmet"] == []
