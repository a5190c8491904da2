"""A model card's text: what it is, what it scores, how to run it, how it was made and measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeft import __version__, survival
from edgeft.card.contents import About, Shipped
from edgeft.card.usage import usage
from edgeft.report import tables
from edgeft.report.build import Report
from edgeft.report.figures import (
    NONE,
    Table,
    megabytes,
    number,
    percent,
    ratio_interval,
)
from edgeft.report.forgetting import sentence
from edgeft.report.markdown import as_table, escaped
from edgeft.report.ship import decode
from edgeft.report.variant import Variant
from edgeft.train.settings import TrainSettings

# Of the recipe's training settings, those that make a training what it is, by what people call them.
_SETTINGS = {
    "lr": "learning rate",
    "schedule": "schedule",
    "warmup_ratio": "warmup, share of steps",
    "batch_size": "batch size",
    "gradient_accumulation_steps": "batches a step",
    "epochs": "epochs",
    "max_steps": "steps at most",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradients cut at",
    "keep": "weights kept",
}
_ADAPTER = {
    "rank": "rank",
    "alpha": "alpha",
    "rslora": "rank-stabilized",
    "init": "initialized",
    "dropout": "dropout",
    "target_modules": "on",
}
_FACTS = {
    "steps": "steps",
    "kept_step": "step kept",
    "examples": "examples",
    "tokens": "tokens",
    "dtype": "products in",
    "parameters": "parameters",
    "trainable_parameters": "of them trained",
}
_MACHINE = ("cpu", "board", "architecture")
_RUNTIME_PACKAGES = ("llama-cpp-python", "onnxruntime-genai", "onnxruntime")


def body(about: About, report: Report, shipped: Sequence[Shipped]) -> str:
    """Everything below the metadata."""
    task = report.recipe.get("task") or {}
    places = {one.target: one.place for one in shipped}
    parts = [
        f"# {escaped(about.name)}",
        *_what(about, report),
        "## Files and scores",
        *_scores(report, places),
        "## How to run it",
        *usage(about, task, shipped, _recommended(report)),
        "## How it was trained",
        *_training(about, report),
        "## What it costs",
        *_costs(report, places),
        "## How it was measured",
        *_measured(about, report),
        "## Limitations",
        _bullets(_limitations(report, places)),
    ]
    return "\n\n".join(parts) + "\n"


def _what(about: About, report: Report) -> list[str]:
    base = escaped(about.base or about.model)
    if about.base:
        base = f"[{base}](https://huggingface.co/{about.base})"
    how = f"fine-tuned on {escaped(about.source.name)}"
    if not about.trained:
        how = f"with an adapter trained elsewhere, looked at on {escaped(about.source.name)}"
    intro = (
        f"{base} {how}, exported by edgeft for small devices, and scored again as exported, on the "
        "runtime that executes it. "
    )
    parts = [intro + escaped(tables.lead(report)), f"**{escaped(report.verdict)}**"]
    parts += [escaped(choice.sentence) for choice in report.ship if choice.target]
    if about.license is None:
        parts.append("License: that of the base model.")
    return parts


def _scores(report: Report, places: dict[str, str]) -> list[str]:
    host = report.host
    rows = [
        [
            *("full precision", "host", NONE),
            *(percent(host.base.accuracy), percent(host.tuned.accuracy)),
            *(NONE, NONE, host.verdict or NONE),
        ]
    ]
    rows += [_score(v, places[v.target]) for v in report.variants]
    header = ["file", "on", "size", "base", "tuned", "retention (95% interval)", "tok/s", "verdict"]
    note = (
        "Base and tuned: share of the questions answered correctly, before and after fine-tuning, "
        "both in this format. Retention: the gain in this format over the gain on the host in full "
        "precision. tok/s: decoding one stream."
    )
    devices = dict.fromkeys(v.device for v in report.variants)
    return [
        as_table(Table("", "", header, rows, (2, 1))),
        note,
        _bullets([f"{name}: {_machine(report, name)}" for name in ("host", *devices)]),
        f"Survives: retention is at least {report.keep:g} for sure. Partial: a part of the gain is "
        "left for sure. Lost, reversed: no gain, or harm. `edgeft.json` has every file's SHA-256.",
    ]


def _score(variant: Variant, place: str) -> list[str]:
    s = variant.survival
    kept = NONE
    if s.retention is not None and s.retention_ci is not None:
        kept = f"{s.retention:z.2f} ({ratio_interval(s.retention_ci)})"
    return [
        *(place, variant.device, megabytes(variant.bytes)),
        *(percent(s.here.base.accuracy), percent(s.here.tuned.accuracy)),
        *(kept, number(decode(variant), "{:.1f}"), s.verdict),
    ]


def _machine(report: Report, name: str) -> str:
    facts = report.machine.get(name) or {}
    said = [str(facts[key]) for key in _MACHINE if facts.get(key)]
    if facts.get("cores"):
        said.append(f"{facts['cores']} cores")
    if facts.get("memory_gb"):
        said.append(f"{facts['memory_gb']} GB of memory")
    said += [f"{name} {facts[name]}" for name in _RUNTIME_PACKAGES if facts.get(name)]
    return ", ".join(said) or "not known"


def _recommended(report: Report) -> str:
    """The target whose file stands in examples: the one to ship, else the most accurate."""
    if chosen := next((c.target for c in report.ship if c.target), None):
        return chosen
    return max(report.variants, key=lambda v: v.survival.here.tuned.accuracy).target


def _training(about: About, report: Report) -> list[str]:
    recipe = report.recipe
    train: dict[str, Any] = recipe.get("train") or {}
    weights = (
        f" The base's weights were dequantized from {escaped(about.gguf)}." if about.gguf else ""
    )
    if not about.trained:
        name = escaped(Path(str(recipe["adapter"])).name)
        return [f"A PEFT adapter trained elsewhere ({name}), on the base model.{weights}"]
    method = train.get("method", TrainSettings().method)
    asked = (report.questions.get("questions") or {}).get("train")
    some = f"{asked:,} questions" if asked else "questions"
    said = [f"Method: {escaped(str(method))}, on {some} of {escaped(about.source.name)}.{weights}"]
    if train.get("target"):
        said.append(
            f"Every step saw the weights rounded as {escaped(str(train['target']))} has them."
        )
    if chosen := (report.merge or {}).get("chosen"):
        said.append(f"The adapter is merged into the {escaped(str(chosen))} weights.")
    names = _SETTINGS if method == "full" else _SETTINGS | _ADAPTER
    rows = [[said_as, _value(train[key])] for key, said_as in names.items() if _says(train, key)]
    facts = report.train.facts if report.train else {}
    rows += [[said_as, _value(facts[key])] for key, said_as in _FACTS.items() if _says(facts, key)]
    rows.append(["seed", str(recipe.get("seed", NONE))])
    return [" ".join(said), as_table(Table("", "", ["", ""], rows, (2, 0)))]


def _says(settings: dict[str, Any], key: str) -> bool:
    return settings.get(key) not in (None, False, "", "default")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _costs(report: Report, places: dict[str, str]) -> list[str]:
    """What was forgotten, and which files have weights or types of their own."""
    said = [escaped(sentence(report.forgetting))] if report.forgetting else []
    if not said:
        said.append("What fine-tuning did to other abilities was not measured.")
    general = tables.general(report)
    if general.rows:
        said += [escaped(general.note), as_table(general)]
    if own := _own(report, places):
        said.append(_bullets(own))
    return said


def _own(report: Report, places: dict[str, str]) -> list[str]:
    """Files whose weights or types fit them alone."""
    said = []
    variants = {v.target: v for v in report.variants}
    for target, variant in variants.items():
        if repair := variant.repair:
            how = ", seeing its rounding" if repair.get("rounded") else ""
            said.append(
                f"{places[target]} has weights of its own, trained {repair['steps']} steps further"
                f"{how}: they are for this file and no other."
            )
        if auto := variant.auto:
            loss = auto["loss"]
            said.append(
                f"{places[target]} has the types that measuring chose for these weights: held-out "
                f"loss {loss['ftype']:.3f} -> {loss['measured']:.3f} nats a token."
            )
    return said


def _measured(about: About, report: Report) -> list[str]:
    n = report.host.tuned.n
    shots = (report.recipe.get("task") or {}).get("shots") or 0
    unseen = " that training never saw" if about.trained else ""
    before = f", behind {shots} worked examples" if shots else ""
    said = (
        f"By edgeft {report.edgeft or __version__}, on {n} questions of {about.source.name} "
        f"({about.source.split}{before}){unseen}. Every runtime got the same token ids as the host "
        "and decoded greedily. Base and tuned are compared question by question. "
        f"Intervals are 95%: of retention a paired Bayesian bootstrap with {survival.RESAMPLES:,} "
        "resamples, of one accuracy Wilson's."
    )
    parts = [escaped(said)]
    for table in (tables.accuracy(report), tables.verification(report)):
        if table.rows:
            parts += [f"### {escaped(table.title)}", escaped(table.note), as_table(table)]
    for name in dict.fromkeys(g.group for g in report.groups):
        found = tables.group(report, name)
        parts += [f"### {escaped(found.title)}", escaped(found.note), as_table(found)]
    return parts


def _limitations(report: Report, places: dict[str, str]) -> list[str]:
    n = report.host.tuned.n
    said = [
        f"The scores are of {n} questions of one task. They say nothing of other tasks, other "
        "languages or other ways to ask.",
        "An answer may be wrong, and its steps may be wrong where the answer is right.",
        "Speeds are those of the machines named above. Another machine rounds in another order, and "
        "a few answers may differ there.",
    ]
    for device in dict.fromkeys(v.device for v in report.variants):
        asked = min(v.survival.here.tuned.n for v in report.variants if v.device == device)
        if asked < n:
            said.append(f"On {device} {asked} of the {n} questions were asked.")
    for v in report.variants:
        if needed := v.survival.needed_questions:
            said.append(
                f"{places[v.target]} on {v.device}: about {needed:,} questions would decide whether "
                "it keeps the gain."
            )
    for reason in dict.fromkeys(v.not_measured for v in report.variants if v.not_measured):
        said.append(f"Speed was not measured everywhere: {reason}.")
    return said


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)
