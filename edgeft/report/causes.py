"""What can be proved about a loss, by the checks of merge and export and by the files themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeft.attribution import DEVICE, EXPORT, MERGE, Step
from edgeft.exporters.faults import WEIGHTS
from edgeft.exporters.merge import DEQUANTIZED, ORIGINAL
from edgeft.report.figures import megabytes, number, percent
from edgeft.report.results import LOCAL
from edgeft.report.variant import Cause, Facts, Variant

_LARGER = 1.1  # times the size: still a file for the same place
_ENGINES = ("llama-cpp-python", "onnxruntime-genai", "onnxruntime", "edgeft")


def causes(
    variant: Variant, variants: Sequence[Variant], merge: Facts, machines: Mapping[str, Facts]
) -> list[Cause]:
    """What is wrong with a target's file, and what explains each step that lost something.

    Args:
        variant: with its steps.
        variants: all of the run, without them.
        merge: as in ``merge.json``; ``scored_on``: the kind of base that the adapter was scored on.
        machines: facts by device.
    """
    found = [Cause(EXPORT, fault["text"], fault["remedy"]) for fault in variant.faults]
    for step in variant.steps:
        if step.costs and (cause := _explained(step, variant, variants, merge, machines)):
            found.append(cause)
    return found


def _explained(
    step: Step,
    variant: Variant,
    variants: Sequence[Variant],
    merge: Facts,
    machines: Mapping[str, Facts],
) -> Cause | None:
    if step.kind == MERGE:
        return _merge(merge)
    if step.kind == EXPORT:
        return _export(step, variant, variants)
    if step.kind == DEVICE:
        return _device(variant, machines)
    return _quantize(step, variant, variants)


def _merge(merge: Facts) -> Cause | None:
    if merge.get("scored_on") == DEQUANTIZED and merge.get("chosen", ORIGINAL) == ORIGINAL:
        text = (
            "the adapter was trained on NF4 weights and merged into the original ones, which it "
            "never saw"
        )
        if merges := merge.get("merges"):
            losses = [f"{kind} {number(m['heldout_loss'], '{:.4f}')}" for kind, m in merges.items()]
            text += f" (held-out loss: {', '.join(losses)})"
        return Cause(MERGE, text, "--set export.merge=dequantized")
    if merge.get("max_logit_diff") is None:
        return None
    text = (
        f"the merged weights are verified (logits within {merge['max_logit_diff']:.2g} of the "
        "adapter's on 8 prompts): what differs is near ties that tip"
    )
    return Cause(MERGE, text, "more questions (task.evaluation)")


def _export(step: Step, variant: Variant, variants: Sequence[Variant]) -> Cause | None:
    """Of the target in full precision, which a quantized one passes on its way."""
    passed = [v for v in variants if v.target == step.after and v.device == LOCAL]
    exported = passed[0] if passed else variant
    verify = exported.verify or {}
    if exported.faults or verify.get("mean_kl") is None:
        return None  # a fault that was found says more
    text = (
        f"the file is verified (KL divergence {verify['mean_kl']:.2g} nats from the host on "
        f"{verify.get('positions', 0):,} positions): 16-bit rounding tips near ties"
    )
    return Cause(EXPORT, text, "more questions (task.evaluation), or a base less unsure")


def _quantize(step: Step, variant: Variant, variants: Sequence[Variant]) -> Cause | None:
    if any(fault["kind"] == WEIGHTS for fault in variant.faults):
        return None  # these are other weights, not rounded ones
    tensors = (variant.verify or {}).get("tensors") or {}
    text = "the weights are rounded"
    if worst := tensors.get("worst"):
        names = ", ".join(f"{t['name']} {percent(t['error'])} ({t['type']})" for t in worst[:3])
        text = (
            f"quantization error: weights {percent(tensors['error'])} off in all, the worst "
            f"tensors {names}"
        )
    elif (kl := (variant.verify or {}).get("mean_kl")) is not None:
        text = f"quantization error: KL divergence {kl:.2g} nats from the host"
    return Cause(step.kind, text, _instead(variant, variants))


def _instead(variant: Variant, variants: Sequence[Variant]) -> str:
    """What was measured to be better at about that size, else what usually helps."""
    limit = _LARGER * (variant.bytes or 0)
    better = [
        v
        for v in variants
        if v.device == variant.device
        and v.target != variant.target
        and v.survival.verdict == "survives"
        and v.survival.here.tuned.accuracy > variant.survival.here.tuned.accuracy
        and not v.faults
        and v.bytes is not None
        and v.bytes <= limit
    ]
    if better:
        best = max(better, key=lambda v: v.survival.here.tuned.accuracy)
        right = percent(best.survival.here.tuned.accuracy)
        return f"{best.target}, which survives with {right} correct at {megabytes(best.bytes)}"
    from edgeft import catalog

    known = catalog.targets()
    done = {v.target for v in variants}
    ways = [f"{variant.target}-repaired", f"{variant.target}-imatrix"]
    if variant.runtime == "llama.cpp":
        ways.append("gguf-auto")
    left = [name for name in ways if name in known and name not in done]
    if not left:
        return "more bits"
    return f"exporting {' or '.join(filter(None, [', '.join(left[:-1]), left[-1]]))}"


def _device(variant: Variant, machines: Mapping[str, Facts]) -> Cause:
    there, here = machines.get(variant.device, {}), machines.get(LOCAL, {})
    versions = [
        f"{name} {there[name]} there and {here[name]} here"
        for name in _ENGINES
        if name in there and name in here and there[name] != here[name]
    ]
    if versions:
        text = f"other software: {', '.join(versions)}"
        return Cause(DEVICE, text, f"edgeft devices setup {variant.device}")
    kinds = [facts.get("architecture") for facts in (there, here)]
    text = (
        "the file is the same byte for byte (SHA-256), so another kernel adds up in another order"
    )
    if all(kinds):
        text += f" ({kinds[0]} there, {kinds[1]} here)"
    return Cause(DEVICE, text, "more bits, or a model surer of its answers; near ties tip")
