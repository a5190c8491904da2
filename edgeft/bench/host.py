"""The stage bench on the host: the reference, in full precision, where training was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeft import bench, run
from edgeft.exporters import merge
from edgeft.progress import Update
from edgeft.stages import (
    HOST,
    WEIGHTS,
    Run,
    base_folder,
    cached,
    context,
    new_tokens,
    reference,
    trained_whole,
)


def score(this: Run, weights: Sequence[str] = WEIGHTS) -> None:
    """Score base and tuned in full precision where they were trained: the reference.

    An adapter is scored beside it too, before anything is merged, so that a merge that loses
    something is seen; general questions show forgetting.
    """
    for name in weights:
        inputs = {"made_from": this.weights_id(name)}
        _score(this, name, this.folder(name), inputs)
    if "tuned" in weights and this.adapter_files()[0].is_file() and not trained_whole(this):
        _score_adapter(this)
    run.write_json(this.path / "bench" / HOST / "machine.json", bench.machine_facts())
    _score_general(this, weights)


def _score_adapter(this: Run) -> None:
    """The adapter on the base that it was trained on, which of QLoRA is NF4's."""
    settings = this.recipe.train
    place = this.path / "bench" / HOST
    qlora = settings.method == "qlora" and not this.recipe.adapter
    described = {
        "base": str(base_folder(this).resolve()),
        "adapter": str(this.adapter.resolve()),
        "kind": merge.DEQUANTIZED if qlora else merge.ORIGINAL,
        "dtype": settings.dtype,
    }
    run.write_json(place / "adapter.json", described)
    inputs = {
        "adapter": this.sha256(this.adapter_files()),
        "base": this.weights_id("base"),
        "merged": this.weights_id("tuned"),
        "kind": described["kind"],
        "dtype": settings.dtype if qlora else None,
    }
    _score(this, "adapter", place / "adapter.json", inputs, reference(this))


def _score(
    this: Run, name: str, artifact: Path, inputs: dict[str, Any], compared: Path | None = None
) -> None:
    data = this.path / "data"
    facts = json.loads((data / "data.json").read_text())
    job = bench.Job(
        runtime="transformers",
        artifact=artifact,
        evaluation=data / "evaluation.jsonl",
        tokenizer=data / "tokenizer" / "tokenizer.json",
        task=facts["task"],
        pattern=facts.get("pattern"),
        max_new_tokens=new_tokens(this),
        stop=facts["stop"],
        context=context(this),
        parallel=this.recipe.bench.host_parallel,
        reference=compared,
    )
    inputs = {
        **inputs,
        "evaluation": this.sha256([job.evaluation]),
        "max_new_tokens": job.max_new_tokens,
        "stop": job.stop,
        "parallel": job.parallel,
    }

    def work(out: Path, update: Update) -> None:
        bench.accuracy(job, out, update)

    cached(f"score {name} on the host", this.path / "bench" / HOST / name, inputs, work)


def _score_general(this: Run, weights: Sequence[str]) -> None:
    items = this.path / "data" / "general.jsonl"
    if not items.is_file():  # made before there were any
        return
    for name in weights:
        cached(
            f"general questions, {name}",
            this.path / "bench" / "general" / HOST / name,
            {"made_from": this.weights_id(name), "items": this.sha256([items])},
            lambda out, _, name=name: bench.general("transformers", this.folder(name), items, out),
        )
