"""Which method and which target for a device: by what studies measured there, else by the paper."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import UserError, near
from edgeft.model import name_of
from edgeft.report.figures import percent, points, points_interval, ratio_interval
from edgeft.report.ship import Limits
from edgeft.study.results import read

# arXiv 2606.06920: PEFT for every aligned model below 1B, no full fine-tuning below 500M.
PEFT_BELOW, NO_FULL_BELOW = 1e9, 500e6
_SURVIVES = "survives"


@dataclass(frozen=True)
class Recommendation:
    """One answer.

    Attributes:
        model, task, method, target: None where nothing measured fits.
        expect: what was measured there.
        evidence: on what it rests.
        unmet: why what was measured does not do, by model, method and target.
    """

    device: str
    model: str | None
    task: str | None
    method: str | None
    target: str | None
    expect: str | None
    evidence: str
    unmet: list[str]


def recommend(
    studies: Sequence[Path],
    device: str,
    limits: Limits,
    *,
    model: str | None = None,
    task: str | None = None,
    parameters: str | None = None,
) -> list[Recommendation]:
    """One answer for each task that was studied on the device; the paper's rule where none was.

    Of what meets the limits, what survives goes first, then the highest accuracy, then the speed.

    Args:
        model, task: only these; a model by its reference or its last part.
        parameters: of the user's model, such as ``360M``, for the rule.

    Raises:
        UserError: a path holds no study, none has the model or task, or ``parameters`` is no number.
    """
    size = None if parameters is None else count(parameters)
    wanted = [(path, row) for path in studies for row in read(path)["rows"]]
    for key, name in (("model", model and name_of(model)), ("task", task)):
        known = {row[key] for _, row in wanted}
        wanted = [(path, row) for path, row in wanted if name in (None, row[key])]
        if known and not wanted:
            raise UserError(f"no study has the {key} {name}{near(str(name), sorted(known))}")
    found = []
    for name in dict.fromkeys(row["task"] for _, row in wanted):
        here = [(path, row) for path, row in wanted if row["task"] == name]
        if answer := _measured(here, name, device, limits):
            found.append(answer)
    return found or [_rule(device, size, bool(studies))]


def count(text: str) -> float:
    """``360M`` or ``1.1B`` as a number.

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"([\d.]+)\s*([MB])", text.strip(), re.I)
    try:
        assert match
        return float(match[1]) * (1e9 if match[2].upper() == "B" else 1e6)
    except (AssertionError, ValueError):
        raise UserError(f"--parameters takes a size as 360M or 1.1B, not '{text}'") from None


def _measured(
    rows: Sequence[tuple[Path, dict[str, Any]]], task: str, device: str, limits: Limits
) -> Recommendation | None:
    """None where nothing was scored on the device."""
    scored = [
        (path, row, score)
        for path, row in rows
        for score in row["scores"]
        if score["device"] == device
    ]
    if not scored:
        return None
    unmet, fit = [], []
    for path, row, score in scored:
        why = _unmet(score, _timed(score, scored, row), limits)
        name = f"{row['model']}, {row['method']}, {score['target']}"
        if why:
            unmet.append(f"{name}: {', '.join(why)}")
        else:
            fit.append((path, row, score))
    if not fit:
        text = f"{len(scored)} files were measured on {device}, none meets the limits"
        return Recommendation(device, None, task, None, None, None, text, unmet)
    path, row, score = max(fit, key=lambda item: _rank(item[2], _timed(item[2], scored, item[1])))
    return Recommendation(
        device,
        row["model"],
        task,
        row["method"],
        score["target"],
        _expect(score, _timed(score, scored, row)),
        _evidence(path, row, score),
        unmet,
    )


def _rank(score: dict[str, Any], timed: dict[str, Any]) -> tuple[bool, float, float, float]:
    survives = score["verdict"] == _SURVIVES
    size = score["bytes"] or 0
    return survives, score["accuracy"], timed.get("tok_s") or 0.0, -float(size)


def _timed(score: dict[str, Any], scored: Sequence[Any], row: dict[str, Any]) -> dict[str, Any]:
    """Speed and memory; base files are not timed, but a tuned one of the same shape is."""
    if score["tok_s"]:
        return score
    same = [
        s
        for _, r, s in scored
        if r["model"] == row["model"] and s["target"] == score["target"] and s["tok_s"]
    ]
    return same[0] if same else {}


def _unmet(score: dict[str, Any], timed: dict[str, Any], limits: Limits) -> list[str]:
    said = []
    memory, speed = timed.get("memory_mb"), timed.get("tok_s")
    if limits.max_memory_mb is not None and not (memory and memory <= limits.max_memory_mb):
        said.append(f"{memory:.0f} MB of memory" if memory else "its memory was not measured")
    if limits.min_tok_s is not None and not (speed and speed >= limits.min_tok_s):
        said.append(f"{speed:.1f} tok/s" if speed else "its speed was not measured")
    return said


def _expect(score: dict[str, Any], timed: dict[str, Any]) -> str:
    low, high = score["accuracy_ci"]
    said = [f"{percent(score['accuracy'])} correct ({100 * low:.1f} to {100 * high:.1f})"]
    if score["benefit"] is not None:
        said.append(f"{points(score['benefit'])} points ({points_interval(score['benefit_ci'])})")
    if score["retention"] is not None:
        said.append(
            f"retention {score['retention']:z.2f} ({ratio_interval(score['retention_ci'])})"
        )
    if score["verdict"]:
        said.append(score["verdict"])
    if timed.get("tok_s"):
        said.append(f"{timed['tok_s']:.1f} tok/s")
    if timed.get("memory_mb"):
        said.append(f"{timed['memory_mb']:.0f} MB of memory")
    return ", ".join(said)


def _evidence(path: Path, row: dict[str, Any], score: dict[str, Any]) -> str:
    seeds = len(row["seeds"]) or 1
    return f"{path}: {score['n']} questions, {seeds} seed{'s' if seeds > 1 else ''}"


def _rule(device: str, size: float | None, studied: bool) -> Recommendation:
    nothing = f"no study has scores on {device}" if studied else "no study was given"
    evidence = f"{nothing}; the rule is that of arXiv 2606.06920, which stops on the host"
    if size is None:
        text = "LoRA or DoRA below 1B parameters, and no full fine-tuning below 500M"
    elif size < NO_FULL_BELOW:
        text = "LoRA or DoRA; no full fine-tuning below 500M parameters"
    elif size < PEFT_BELOW:
        text = "LoRA or DoRA, as for every aligned model below 1B parameters"
    else:
        return Recommendation(
            device,
            None,
            None,
            None,
            None,
            "nothing: the rule is about less than 1B parameters",
            evidence,
            [],
        )
    text += "; of the target nothing is known: measure it with edgeft bench"
    return Recommendation(device, None, None, "lora", None, text, evidence, [])


def show(found: Sequence[Recommendation], as_json: bool) -> None:
    """Print the answers."""
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False))
        return
    for one in found:
        if one.target:
            print(
                f"{one.task} on {one.device}: {one.model} by {one.method}, shipped as {one.target}"
            )
        elif one.task:
            print(f"{one.task} on {one.device}: nothing fits")
        else:
            print(f"on {one.device}: {one.expect}")
        if one.target:
            print(f"  expect    {one.expect}")
        print(f"  evidence  {one.evidence}")
        for line in one.unmet:
            print(f"  left out  {line}")
