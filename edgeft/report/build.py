"""From a run directory's files to one result object; every view shows this and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import yaml

from edgeft import survival
from edgeft.bench.latency import NOT_MEASURED
from edgeft.errors import UserError
from edgeft.prompts import read_items
from edgeft.report.advice import advice
from edgeft.report.forgetting import Forgetting, forgetting
from edgeft.report.reading import Readings, readings
from edgeft.report.results import (
    HEADLINE,
    LOCAL,
    benched,
    of_group,
    read_json,
    read_results,
    same_as_local,
)
from edgeft.report.ship import Choice, Limits, choices
from edgeft.report.variant import Difference, Facts, Variant
from edgeft.report.waterfall import attributed
from edgeft.survival import Benefit, Result

SHOWN_DIFFERENCES = 10
_ORDER = ("survives", "partial", "lost", "reversed", "inconclusive")


@dataclass(frozen=True)
class GroupScore:
    """Tuned against base in a group reported apart; ``target`` and ``device`` None: the host."""

    group: str
    target: str | None
    device: str | None
    score: Benefit


@dataclass(frozen=True)
class Training:
    """Facts of ``train.json``, losses as (step, mean nats a gold token), accuracies as (step, share).

    Where an accuracy was taken during training, a part of the held-out questions was answered.
    """

    facts: Facts
    loss: list[tuple[int, float]]
    heldout: list[tuple[int, float]]
    accuracy: list[tuple[int, float]]


@dataclass(frozen=True)
class Report:
    """All that the views show.

    Attributes:
        machine: facts by device, the host's under ``"host"``.
        forgetting: tuned against base on general questions; None where they were not scored.
        advice: what to try where there is no benefit on the host.
        merge: as in ``merge.json``; None for full fine-tuning.
        readings: how answers were read, the host's first.
        questions: as in ``data.json``: how many of each split, and what was left out and why.
        ship: which file for each device; empty where there is no benefit on the host.
    """

    name: str
    edgeft: str
    recipe: Facts
    machine: Facts
    keep: float
    host: Benefit
    variants: list[Variant]
    groups: list[GroupScore]
    train: Training | None
    verdict: str
    forgetting: Forgetting | None = None
    advice: list[str] = field(default_factory=list)
    merge: Facts | None = None
    readings: list[Readings] = field(default_factory=list)
    questions: Facts = field(default_factory=dict)
    ship: list[Choice] = field(default_factory=list)


def build(run: Path, limits: Limits | None = None) -> Report:
    """Read a run directory. What was not benched yet, or with other weights, is left out.

    Args:
        limits: what a file to ship has to meet.

    Raises:
        UserError: the host has no scores yet, or results do not belong together.
    """
    host_base = read_results(run / "bench" / "host" / "base")
    host_tuned = read_results(run / "bench" / "host" / "tuned")
    if host_base is None or host_tuned is None:
        raise UserError(f"{run}: nothing to report yet; run `edgeft bench {run}` first")
    recipe = _yaml(run / "recipe.yaml")
    keep = float((recipe.get("report") or {}).get("keep", survival.KEEP))
    evaluation = run / "data" / "evaluation.jsonl"
    questions = {i.id: i for i in read_items(evaluation)} if evaluation.is_file() else {}
    host = survival.benefit(of_group(host_base), of_group(host_tuned))
    names = sorted({r.group for r in host_tuned} - {HEADLINE})
    groups = [GroupScore(g, None, None, _group_benefit(host_base, host_tuned, g)) for g in names]
    variants: list[Variant] = []
    for device, target, base, tuned in benched(run):
        on_host = (host_base, host_tuned)
        stage = read_json(run / "bench" / device / target / "tuned" / "stage.json") or {}
        if stage.get("limit") is not None:
            here = {r.id for r in tuned}
            on_host = (
                [r for r in host_base if r.id in here],
                [r for r in host_tuned if r.id in here],
            )
        try:
            # The headline is part of all questions, so compare the ids of all first.
            survival.survival(on_host[0], on_host[1], base, tuned)
            compared = survival.survival(
                of_group(on_host[0]),
                of_group(on_host[1]),
                of_group(base),
                of_group(tuned),
                keep=keep,
            )
        except UserError as error:
            raise UserError(f"{target} on {device}: {error}") from error
        if host.verdict is None and compared.verdict == "no-benefit":
            # All questions show a benefit and the device's few do not: it is not gone.
            compared = replace(compared, verdict="inconclusive")
        manifest = read_json(run / "export" / target / "tuned" / "manifest.json") or {}
        latency = read_json(run / "bench" / device / target / "tuned" / "latency.json") or {}
        unmeasured = latency.get(NOT_MEASURED)
        variants.append(
            Variant(
                target=target,
                device=device,
                runtime=manifest.get("runtime"),
                bytes=_bytes(manifest),
                survival=compared,
                lost_after=None,
                latency=latency if latency and not unmeasured else None,
                verify=manifest.get("verify"),
                differences=_differences(questions, of_group(on_host[1]), of_group(tuned)),
                not_measured=unmeasured,
                same_as_local=same_as_local(run, target, of_group(tuned))
                if device != LOCAL
                else None,
                repair=manifest.get("repair"),
                auto=manifest.get("auto"),
                general=forgetting(run, target) if device == LOCAL else None,
                elsewhere=manifest.get("elsewhere"),
            )
        )
        groups += [
            GroupScore(g, target, device, _group_benefit(base, tuned, g))
            for g in names
            if of_group(tuned, g)
        ]
    variants.sort(key=lambda v: (-(v.bytes or 0), v.target, v.device))
    variants = [_with_step(v, variants[:i]) for i, v in enumerate(variants)]
    variants = attributed(run, variants)
    machines = sorted((run / "bench").glob("*/machine.json"))
    return Report(
        name=run.resolve().name,
        edgeft=str((read_json(run / "run.json") or {}).get("edgeft", "")),
        recipe=recipe,
        machine={path.parent.name: read_json(path) for path in machines},
        keep=keep,
        host=host,
        variants=variants,
        groups=groups,
        train=_training(run / "train"),
        verdict=_verdict(host, variants),
        forgetting=forgetting(run),
        advice=advice(host, recipe, read_json(run / "train" / "train.json") or {}),
        merge=read_json(run / "merged" / "merge.json"),
        readings=[
            *readings(run / "bench" / "host", None, None),
            *(
                found
                for v in variants
                for found in readings(run / "bench" / v.device / v.target, v.target, v.device)
            ),
        ],
        questions=_questions(run / "data" / "data.json"),
        ship=[] if host.verdict else choices(variants, limits or Limits()),
    )


def as_json(report: Report) -> Facts:
    """The public format, report.json."""
    return {
        "schema": 1,
        "edgeft": report.edgeft,
        "recipe": report.recipe,
        "machine": report.machine,
        "keep": report.keep,
        "host": {**asdict(report.host), "verdict": report.host.verdict},
        "variants": [_variant_json(v) for v in report.variants],
        "groups": [
            {"group": g.group, "target": g.target, "device": g.device, **asdict(g.score)}
            for g in report.groups
        ],
        "train": asdict(report.train) if report.train else None,
        "merge": report.merge,
        "questions": report.questions,
        "readings": [asdict(r) for r in report.readings],
        "forgetting": asdict(report.forgetting) if report.forgetting else None,
        "advice": report.advice,
        "ship": [asdict(c) for c in report.ship],
        "verdict": report.verdict,
    }


def _variant_json(variant: Variant) -> Facts:
    compared = asdict(variant.survival)
    here = compared.pop("here")
    return {
        "target": variant.target,
        "device": variant.device,
        "runtime": variant.runtime,
        "bytes": variant.bytes,
        **here,
        **compared,
        "lost_after": variant.lost_after,
        "latency": variant.latency,
        "not_measured": variant.not_measured,
        "same_as_local": variant.same_as_local,
        "verify": variant.verify,
        "repair": variant.repair,
        "auto": variant.auto,
        "elsewhere": variant.elsewhere,
        "general": asdict(variant.general) if variant.general else None,
        "steps": [asdict(s) for s in variant.steps],
        "causes": [asdict(c) for c in variant.causes],
        "differences": [asdict(d) for d in variant.differences],
    }


def _group_benefit(base: Sequence[Result], tuned: Sequence[Result], group: str) -> Benefit:
    return survival.benefit(of_group(base, group), of_group(tuned, group))


def _bytes(manifest: Facts) -> int | None:
    """Size of the artifact, which is a file or a folder of files."""
    artifact = str(manifest.get("artifact"))
    sizes = [
        int(facts["bytes"])
        for name, facts in manifest.get("files", {}).items()
        if name == artifact or name.startswith(artifact + "/")
    ]
    return sum(sizes) if sizes else None


def _differences(
    questions: Facts, host_tuned: Sequence[Result], tuned: Sequence[Result]
) -> list[Difference]:
    there = {r.id: r for r in tuned}
    found = [
        Difference(
            id=here.id,
            question=questions[here.id].question if here.id in questions else here.id,
            gold=questions[here.id].answer if here.id in questions else "",
            host=here.text,
            target=there[here.id].text,
            host_correct=here.correct,
            target_correct=there[here.id].correct,
        )
        for here in host_tuned
        if here.answer != there[here.id].answer
    ]
    order = {id_: i for i, id_ in enumerate(questions)}
    found.sort(key=lambda d: (not d.host_correct, not d.target_correct, order.get(d.id, 0)))
    return found[:SHOWN_DIFFERENCES]


def _with_step(variant: Variant, larger: Sequence[Variant]) -> Variant:
    ci = variant.survival.retention_ci
    if variant.survival.verdict == "survives" or ci is None or ci[1] >= 1:
        return variant
    here = (variant.device, variant.runtime)
    alive = [
        v.target
        for v in larger
        if (v.device, v.runtime) == here
        and v.survival.verdict == "survives"
        and v.repair is None  # whose weights are others
        and v.elsewhere is None
    ]
    return Variant(**{**vars(variant), "lost_after": alive[-1] if alive else "host"})


def _verdict(host: Benefit, variants: Sequence[Variant]) -> str:
    if host.verdict:
        return f"{host.verdict} on the host"
    if not variants:
        return "a benefit on the host; no target benched yet"
    several = len({v.device for v in variants}) > 1
    parts = []
    for word in _ORDER:
        at: dict[str, list[str]] = {}
        for v in reversed(variants):  # smallest first: what one would ship
            if v.survival.verdict == word:
                at.setdefault(v.target, []).append(v.device)
        names = [f"{t} on {' and '.join(sorted(d))}" if several else t for t, d in at.items()]
        if names:
            parts.append(f"{word} at {', '.join(names)}")
    return "; ".join(parts)


def _training(folder: Path) -> Training | None:
    log = folder / "log.jsonl"
    if not log.is_file():
        return None
    loss: dict[int, float] = {}
    heldout: dict[int, float] = {}
    accuracy: dict[int, float] = {}
    kinds = (("loss", loss), ("heldout_loss", heldout), ("heldout_accuracy", accuracy))
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name, curve in kinds:
            # A resumed run repeats steps: the later line counts.
            if entry.get(name) is not None and math.isfinite(entry[name]):
                curve[int(entry["step"])] = float(entry[name])
    facts = read_json(folder / "train.json") or {}
    facts.pop("heldout", None)
    return Training(facts, *(sorted(curve.items()) for _, curve in kinds))


def _questions(path: Path) -> Facts:
    data = read_json(path) or {}
    return {name: data[name] for name in ("questions", "left_out") if data.get(name)}


def _yaml(path: Path) -> Facts:
    data = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return data if isinstance(data, dict) else {}
