"""The report's sentences and tables as text, so that every view shows the same figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from edgeft.attribution import DEVICE, EXPORT, MERGE, QUANTIZE, REPAIR
from edgeft.report.build import Report
from edgeft.report.device import device, latency, memory_limit
from edgeft.report.figures import (
    NONE,
    Table,
    megabytes,
    number,
    percent,
    points,
    points_interval,
    ratio_interval,
)
from edgeft.report.forgetting import sentence
from edgeft.report.reading import NONE as NO_ANSWER
from edgeft.report.variant import Variant, place
from edgeft.survival import Benefit, Score
from edgeft.tasks.grading import HOWS


def lead(report: Report) -> str:
    """What happened on the host, in one sentence."""
    host = report.host
    rose = "raised" if host.benefit > 0 else "lowered" if host.benefit < 0 else "left"
    return (
        f"On the host, fine-tuning {rose} accuracy from {percent(host.base.accuracy)} to "
        f"{percent(host.tuned.accuracy)} on {host.base.n} questions: {points(host.benefit)} points "
        f"(95% interval {points_interval(host.benefit_ci)})."
    )


def remarks(report: Report) -> list[str]:
    """What to try, what was forgotten, after which step the benefit was lost, what would decide."""
    said = [*report.advice, *(choice.sentence for choice in report.ship)]
    if report.forgetting:
        said.append(sentence(report.forgetting))
    for after in dict.fromkeys(v.lost_after for v in report.variants if v.lost_after):
        names = [place(v, report.variants) for v in report.variants if v.lost_after == after]
        kept = "the host" if after == "host" else f"{after}, which still survives"
        said.append(f"{', '.join(names)}: the loss comes after {kept}.")
    further: dict[str, list[str]] = {}
    for target, facts in {v.target: v.repair for v in report.variants if v.repair}.items():
        how = "seeing its rounding" if facts["rounded"] else "as before"
        further.setdefault(f"{facts['steps']} steps further {how}", []).append(target)
    for how, names in further.items():
        has = "has weights of its" if len(names) == 1 else "have each weights of their"
        said.append(
            f"{', '.join(names)} {has} own, trained {how}: they are for this file and no other."
        )
    for target, facts in {v.target: v.auto for v in report.variants if v.auto}.items():
        loss, kinds = facts["loss"], Counter(facts["groups"].values())
        said.append(
            f"{target} has types chosen by measuring: held-out loss {loss['ftype']:.3f} -> "
            f"{loss['measured']:.3f} nats a token (predicted {loss['predicted']:.3f}); groups of "
            f"tensors: {', '.join(f'{n} in {kind}' for kind, n in kinds.most_common()) or 'as it was'}."
        )
    said += _causes(report)
    for name in dict.fromkeys(v.device for v in report.variants):
        counts = {v.survival.here.tuned.n for v in report.variants if v.device == name}
        if min(counts) < report.host.tuned.n:
            said.append(f"On {name} {min(counts)} of {report.host.tuned.n} questions were asked.")
    for variant in report.variants:
        if variant.survival.needed_questions:
            name = place(variant, report.variants)
            needed = variant.survival.needed_questions
            said.append(f"{name}: about {needed:,} questions would decide it.")
    return said


def _causes(report: Report) -> list[str]:
    """Each cause once, with the targets that it explains."""
    names: dict[tuple[str, str], list[str]] = {}
    for v in report.variants:
        for cause in v.causes:
            names.setdefault((cause.text, cause.remedy), []).append(place(v, report.variants))
    return [
        f"{', '.join(found)}: {text}. To try: {remedy}." for (text, remedy), found in names.items()
    ]


def tables(report: Report) -> list[Table]:
    """Every table that has rows, in the order in which views show them."""
    found = [accuracy(report), retention(report), way(report)]
    found += [device(report, name) for name in dict.fromkeys(v.device for v in report.variants)]
    found += [likelihood(report), latency(report), memory_limit(report)]
    found.append(general(report))
    found += [group(report, name) for name in dict.fromkeys(g.group for g in report.groups)]
    found += [reading(report), training(report), verification(report), facts(report)]
    return [table for table in found if table.rows]


def accuracy(report: Report) -> Table:
    """Base against tuned, on the host and at each target."""
    rows = [_benefit_row("host", report.host)]
    rows += [_benefit_row(place(v, report.variants), v.survival.here) for v in report.variants]
    return Table(
        "Accuracy",
        "Share of questions answered correctly, 95% Wilson intervals; benefit in points, paired "
        "by question. p: exact McNemar test.",
        ["", "base", "tuned", "benefit", "p"],
        rows,
    )


def likelihood(report: Report) -> Table:
    """How likely each model finds the gold solutions."""
    places = [(place(v, report.variants), v.survival.here) for v in report.variants]
    rows = [
        [name, number(found.base.nll, "{:.3f}"), number(found.tuned.nll, "{:.3f}")]
        for name, found in [("host", report.host), *places]
    ]
    return Table(
        "Likelihood",
        "Mean negative log-likelihood of a gold token, nats: less is better. It moves before the "
        "accuracy does.",
        ["", "base", "tuned"],
        rows,
    )


def way(report: Report) -> Table:
    """What each step on the way to the device did; steps that several targets share stand once."""
    rows: dict[tuple[str, ...], list[str]] = {}
    asked = {s.n for variant in report.variants for s in variant.steps}
    some = len(asked) > 1  # a device was asked fewer
    for variant in report.variants:
        for s in variant.steps:
            nats = kl = NONE
            if s.nats is not None and s.nats_ci is not None:
                nats = f"{s.nats:+z.3f} ({s.nats_ci[0]:+z.3f} to {s.nats_ci[1]:+z.3f})"
            if s.kl is not None and s.kl_ci is not None:
                kl = f"{s.kl:z.4f} ({s.kl_ci[0]:z.4f} to {s.kl_ci[1]:z.4f})"
            change = f"{points(s.change)} ({points_interval(s.change_ci)})"
            row = [s.after, _STEPS[s.kind], *([str(s.n)] if some else []), change]
            row += [str(s.broken), str(s.fixed), nats, kl]
            rows.setdefault((s.before, s.after, str(s.n)), [*row, "costs" if s.costs else ""])
    return Table(
        WAY,
        "Tuned on the same questions, from the adapter on the host step by step to here, 95% "
        "intervals. Change: accuracy in points; broken: right before and wrong after; fixed: the "
        "other way. Nats: of a gold token's negative log-likelihood, more is worse. KL: mean "
        "divergence from the merged weights on the host, nats a gold token.",
        ["to", "step", *(["asked"] if some else []), "change", "broken", "fixed", "nats", "KL", ""],
        list(rows.values()),
        (2, 1),
    )


WAY = "Where it went"
_STEPS = {
    MERGE: "merged",
    EXPORT: "exported",
    QUANTIZE: "quantized",
    REPAIR: "repaired",
    DEVICE: "moved",
}


def general(report: Report) -> Table:
    """What fine-tuning did to general questions on the host and at each target."""
    places = [(place(v, report.variants), v.general) for v in report.variants]
    rows = [
        [
            name,
            f"{found.nll_change:+.2f} ({found.nll_change_ci[0]:+.2f} to "
            f"{found.nll_change_ci[1]:+.2f})",
            f"{found.base.nll:.2f}",
            f"{found.tuned.nll:.2f}",
            percent(found.base.accuracy),
            percent(found.tuned.accuracy),
        ]
        for name, found in [("host", report.forgetting), *places]
        if found
    ]
    return Table(
        "General questions",
        "Questions without mathematics: nats a token that the right answer costs, tuned minus "
        "base with a paired 95% interval, and how often it is the likeliest.",
        ["", "change", "base", "tuned", "base right", "tuned right"],
        rows if len(rows) > 1 else [],
    )


def retention(report: Report) -> Table:
    """What is left of the host's benefit at each target."""
    rows = []
    for v in report.variants:
        s = v.survival
        left = NONE
        if s.retention is not None and s.retention_ci is not None:
            left = f"{s.retention:z.2f} ({ratio_interval(s.retention_ci)})"
        rows.append(
            [
                place(v, report.variants),
                megabytes(v.bytes),
                left,
                percent(s.agreement),
                str(s.lost),
                str(s.gained),
                s.verdict,
            ]
        )
    return Table(
        "Retention",
        f"Benefit at the target over benefit on the host, 95% interval; it survives where the "
        f"interval's lower end reaches {report.keep:g}. Same answer: as the tuned model on the "
        "host. Lost, gained: questions right only on the host, only at the target.",
        ["", "size", "retention", "same answer", "lost", "gained", "verdict"],
        rows,
        (1, 1),
    )


def group(report: Report, name: str) -> Table:
    """The scores of a group that the headline leaves out."""
    scores = {(g.target, g.device): g.score for g in report.groups if g.group == name}
    rows = [_benefit_row("host", scores[None, None])]
    rows += [
        _benefit_row(place(v, report.variants), scores[v.target, v.device])
        for v in report.variants
        if (v.target, v.device) in scores
    ]
    n = scores[None, None].base.n
    return Table(
        name[:1].upper() + name[1:],
        f"{n} questions that the headline figures leave out.",
        ["", "base", "tuned", "benefit", "p"],
        rows,
    )


def verification(report: Report) -> Table:
    """The checks that each export passed."""
    rows = []
    for v in report.variants:
        if v.verify:
            template = {True: "carried", False: "missing", None: NONE}
            rows.append(
                [
                    place(v, report.variants),
                    number(v.verify.get("tokenizer_prompts"), "{}"),
                    template[v.verify.get("chat_template")],
                    number(v.verify.get("max_logit_diff"), "{:.3g}"),
                    number(v.verify.get("top1_agreement"), "{:.2%}"),
                    number(v.verify.get("mean_kl"), "{:.2g}"),
                    str(v.verify.get("positions") or NONE),
                ]
            )
    return Table(
        "Verification",
        "At export: prompts that the runtime's own tokenizer reads as the host does, the chat "
        "template, and logits against the host's in float32. KL: mean divergence of next tokens "
        "from the host's, nats.",
        [
            "",
            "prompts",
            "chat template",
            "largest logit difference",
            "same top token",
            "KL",
            "positions",
        ],
        rows,
    )


def reading(report: Report) -> Table:
    """Where the answers were found."""
    names: dict[Any, str] = {(None, None): "host"}
    names |= {(v.target, v.device): place(v, report.variants) for v in report.variants}
    hows = [how for how in (*HOWS, NO_ANSWER) if any(how in r.counts for r in report.readings)]
    rows = []
    for r in report.readings:
        if name := names.get((r.target, r.device)):
            counts = [str(r.counts.get(how, 0)) for how in hows]
            rows.append([f"{name}, {r.weights}", *counts])
    return Table(
        "How answers were read",
        "Questions by where the answer was found: behind ####, in \\boxed{}, behind 'the answer is', "
        "else the last number. None: no answer, which counts as wrong.",
        ["", *hows],
        rows,
    )


def training(report: Report) -> Table:
    """The held-out points of training, and the merge."""
    rows = []
    if report.train:
        accuracies = dict(report.train.accuracy)
        kept = report.train.facts.get("kept_step")
        for step, nats in report.train.heldout:
            share = accuracies.get(step)
            answered = NONE if share is None else percent(share)
            rows.append([f"step {step}", f"{nats:.4f}", answered, "", _kept(step == kept)])
    for kind, found in _merges(report.merge or {}).items():
        heldout = number(found.get("heldout_loss"), "{:.4f}")
        chosen = _kept(kind == (report.merge or {}).get("chosen"))
        difference = number(found.get("max_logit_diff"), "{:.2g}")
        rows.append([f"merged into the {kind} weights", heldout, NONE, difference, chosen])
    return Table(
        "Held-out questions",
        "Mean nats a gold token of questions that are never trained on, and the share of the first "
        "ones answered correctly. A merge's largest difference in logits is that to the adapter on "
        "the same base.",
        ["", "loss", "accuracy", "largest logit difference", ""],
        rows,
        (1, 1),
    )


def _kept(is_kept: bool) -> str:
    return "kept" if is_kept else ""


def _merges(merge: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return merge.get("merges") or ({"original": merge} if "max_logit_diff" in merge else {})


def facts(report: Report) -> Table:
    """What ran where."""
    recipe = report.recipe
    rows = [
        ["model", str(recipe.get("model", NONE))],
        ["task", _flat(_said(recipe.get("task", NONE)))],
    ]
    if report.train:
        rows += [[f"train: {k.replace('_', ' ')}", _flat(v)] for k, v in report.train.facts.items()]
    for what, counts in report.questions.items():
        rows.append([what.replace("_", " "), _flat(counts)])
    rows.append(["seed", str(recipe.get("seed", NONE))])
    rows += [[f"machine: {name}", _flat(about)] for name, about in report.machine.items()]
    rows.append(["edgeft", report.edgeft or NONE])
    return Table("Run", "", ["", ""], rows, (2, 0))


def _said(settings: Any) -> Any:
    """Settings without those that say nothing."""
    if not isinstance(settings, dict):
        return settings
    return {k: v for k, v in settings.items() if v not in (None, {}, "")}


def worst(report: Report) -> Variant | None:
    """The variant that agrees least with the host."""
    return min(report.variants, key=lambda v: v.survival.agreement, default=None)


def _benefit_row(name: str, found: Benefit) -> list[str]:
    return [
        name,
        _accuracy(found.base),
        _accuracy(found.tuned),
        f"{points(found.benefit)} ({points_interval(found.benefit_ci)})",
        f"{found.mcnemar_p:.2g}",
    ]


def _accuracy(found: Score) -> str:
    return f"{percent(found.accuracy)} ({100 * found.ci[0]:.1f} to {100 * found.ci[1]:.1f})"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_flat(v)}" for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_flat(v) for v in value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return NONE if value is None else str(value)
