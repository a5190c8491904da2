"""A model card's metadata as the Hugging Face Hub specifies it.

See https://github.com/huggingface/hub-docs/blob/main/modelcard.md?plain=1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgeft.card.contents import About, Shipped
from edgeft.report.build import Report
from edgeft.report.variant import Variant

Facts = dict[str, Any]

_GENERATION = "text-generation"
_LIBRARIES = {"llama.cpp": "gguf", "onnxruntime-genai": "onnx", "onnxruntime": "onnx"}
_ENGLISH = ("wordmath", "gsm8k", "orca-math", "svamp", "gsm-symbolic")
_DECIMALS = 4


def metadata(about: About, report: Report, shipped: Sequence[Shipped]) -> Facts:
    """What stands between the card's ``---`` lines; what is not known is left out.

    The relation to the base is ``finetune`` and not ``quantized``: the weights are others.
    """
    recipe = report.recipe
    task = recipe.get("task") or {}
    runtimes = sorted({one.runtime for one in shipped})
    libraries = sorted({_LIBRARIES.get(runtime, runtime) for runtime in runtimes})  # gguf first
    method = (recipe.get("train") or {}).get("method") if about.trained else None
    tags = ["edgeft", *libraries, *runtimes, method, about.task]
    english = about.task in _ENGLISH and not task.get("data")
    found = {
        "language": ["en"] if english else None,
        "license": about.license,
        "library_name": libraries[0],
        "pipeline_tag": _GENERATION,
        "base_model": about.base,
        "base_model_relation": "finetune" if about.base else None,
        "tags": list(dict.fromkeys(str(tag) for tag in tags if tag)),
        "datasets": [about.source.hub] if about.source.hub and about.trained else None,
        "metrics": ["accuracy"],
        "model-index": [{"name": about.name, "results": _results(about, report, shipped)}],
    }
    return {key: value for key, value in found.items() if value is not None}


def _results(about: About, report: Report, shipped: Sequence[Shipped]) -> list[Facts]:
    """One result a target; each of its devices has an accuracy and perhaps a retention."""
    source = about.source
    dataset = {"name": source.name, "type": source.hub or about.task, "split": source.split}
    if source.config:
        dataset["config"] = source.config
    return [
        {
            "task": {"type": _GENERATION, "name": f"{about.task}, {one.target}"},
            "dataset": dict(dataset),
            "metrics": [
                metric
                for variant in report.variants
                if variant.target == one.target
                for metric in _metrics(variant)
            ],
        }
        for one in shipped
    ]


def _metrics(variant: Variant) -> list[Facts]:
    s = variant.survival
    where = f"{variant.target} on {variant.device}, {s.here.tuned.n} questions"
    found = [("accuracy", f"accuracy ({where})", s.here.tuned.accuracy)]
    if s.retention is not None:
        found.append(("retention", f"share of the host's benefit kept ({where})", s.retention))
    return [
        {"type": kind, "name": name, "value": round(value, _DECIMALS), "verified": False}
        for kind, name, value in found
    ]
