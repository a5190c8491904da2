"""Training side by side: edgeft and TRL's SFTTrainer, tokens per second and peak memory.

    pip install trl==1.16.0
    python benchmarks/train.py [--method lora] [--steps 40] [--rounds 3] [--json]

Same model, same questions in the same batches in the same order, same starting adapter, optimizer,
schedule and precision (bfloat16 products; float32 adapter, or float32 parameters where all are
trained). The contenders take turns, each in a process of its own:

- edgeft: its own training, as ``edgeft train`` runs it; and the same recomputing activations;
- TRL as it comes: SFTTrainer's defaults, which recompute activations in the backward pass;
- TRL, allocator: the same in edgeft's allocator set-up and without recomputing, its fastest.

``loss`` is how much the curves differ from edgeft's: the mean over all steps, and the largest at one
step. In float32 both are zero but for rounding; bfloat16 rounds differently in every implementation,
which single steps show once the loss is small.

With CUDA, Unsloth too, where it is installed. Tokens are those of the questions and their solutions;
padding does not count, nor do loading and held-out losses. ``steady`` leaves out the first steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgeft import child, model, tasks
from edgeft.allocator import allocator
from edgeft.train.settings import METHODS, TrainSettings

WARM_UP = 5  # steps that ``steady`` leaves out


def prepare(reference: str, steps: int, batch: int, folder: Path) -> dict[str, Any]:
    """The model folder and exactly ``steps`` batches of word problems as token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    base = model.resolve(reference, folder / "base")
    data = folder / "data"
    data.mkdir()
    sizes = tasks.TaskSettings(train=steps * batch, heldout=1, evaluation=1)
    splits = asdict(tasks.find("wordmath").make(sizes, 0))
    request = {"folder": str(base), "out": str(data), "splits": splits}
    stop = child.run("edgeft.prompts", request)[-1]["stop"]
    return {"base": str(base), "data": str(data), "stop": stop}


def settings(method: str, steps: int, batch: int, dtype: str) -> TrainSettings:
    """What every contender trains with."""
    return TrainSettings(
        method=method,
        batch_size=batch,
        max_steps=steps,
        heldout_points=2,
        heldout_answers=0,
        keep="last",
        checkpoint_steps=10**6,
        dtype=dtype,
    )


def run_edgeft(job: dict[str, Any]) -> dict[str, Any]:
    """Train as ``edgeft train`` does, in this process."""
    from transformers import logging

    from edgeft.bench.machine import peak_rss_mb
    from edgeft.train.record import rows
    from edgeft.train.worker import fit

    logging.disable_progress_bar()
    out = Path(job["out"])
    facts = {"task": "wordmath", "stop": job["stop"], "max_new_tokens": 48}
    plan = replace(TrainSettings(**job["settings"]), activation_checkpointing=job["recompute"])
    fit(Path(job["base"]), Path(job["data"]), out, plan, facts, 0, lambda *_, **__: None)
    log = [row for row in rows(out / "log.jsonl") if "loss" in row]
    return {
        "loss": [row["loss"] for row in log],
        "tokens": [row["tokens"] for row in log],
        "seconds": [row["seconds"] for row in log],
        "peak_mb": peak_rss_mb(),
        "peak_gpu_mb": gpu_peak(),
    }


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """SFTTrainer on the same batches; ``defaults``: with whatever else it sets by itself."""
    if job["unsloth"]:
        import unsloth  # noqa: F401  # patches transformers and TRL
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback, logging
    from trl import SFTConfig, SFTTrainer

    from edgeft.bench.machine import peak_rss_mb
    from edgeft.prompts import load_tokenizer, read_items
    from edgeft.train.batches import SortedBatches, length
    from edgeft.train.methods import prepared

    logging.disable_progress_bar()
    plan = TrainSettings(**job["settings"])
    items = read_items(Path(job["data"]) / "train.jsonl")
    order = list(SortedBatches([length(item) for item in items], plan.batch_size, 0))
    columns = {
        "input_ids": [[*items[i].prompt, *items[i].gold] for i in order],
        "labels": [[-100] * len(items[i].prompt) + items[i].gold for i in order],
    }
    cuda = torch.cuda.is_available()
    bf16 = plan.dtype == "bfloat16"
    torch.manual_seed(0)
    trained, _ = prepared(Path(job["base"]), plan, torch.bfloat16 if bf16 else torch.float32)
    start = Path(job["out"]) / "adapter"
    if (start / "adapter_model.safetensors").is_file():  # edgeft's, before its first step
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(trained, load_file(start / "adapter_model.safetensors"))
    own: dict[str, Any] = {} if job["defaults"] else {"gradient_checkpointing": False}
    config = SFTConfig(
        output_dir=job["out"],
        per_device_train_batch_size=plan.batch_size,
        max_steps=plan.max_steps,
        learning_rate=plan.peak_lr,
        lr_scheduler_type=plan.schedule,
        warmup_steps=plan.warmup_ratio,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        bf16=bf16,
        use_cpu=not cuda,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=0,
        **own,
    )
    marks: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])
                marks.append(time.perf_counter())

    trainer = SFTTrainer(
        model=trained,
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=load_tokenizer(Path(job["data"]) / "tokenizer"),
        callbacks=[Clock()],
    )
    trainer.train()
    counts = [len(row) for row in columns["input_ids"]]
    batch = plan.batch_size
    return {
        "loss": losses,
        "tokens": [sum(counts[: (i + 1) * batch]) for i in range(len(losses))],
        "seconds": [mark - marks[0] for mark in marks[1:]],
        "peak_mb": peak_rss_mb(),
        "peak_gpu_mb": gpu_peak(),
    }


def run_rate(job: dict[str, Any]) -> dict[str, Any]:
    """GFLOP/s of the machine's own matrix products in the training dtype, at the model's shapes."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(job["base"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, job["settings"]["dtype"])
    a = torch.randn(1024, config.hidden_size, dtype=dtype, device=device)
    b = torch.randn(config.intermediate_size, config.hidden_size, dtype=dtype, device=device)
    rates = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(40):
            torch.nn.functional.linear(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        flop = 40 * 2 * a.shape[0] * b.numel()
        rates.append(flop / (time.perf_counter() - start) / 1e9)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"gflop_per_s": max(rates), "device": name}


def run_start(job: dict[str, Any]) -> dict[str, Any]:
    """Save the adapter that edgeft begins with, and count a token's FLOP; see :func:`flop`."""
    import torch
    from transformers import set_seed

    from edgeft.prompts import read_items
    from edgeft.train.methods import prepared

    set_seed(0)
    plan = TrainSettings(**job["settings"])
    trained, _ = prepared(Path(job["base"]), plan, getattr(torch, plan.dtype))
    if plan.method != "full":
        trained.save_pretrained(Path(job["out"]) / "adapter")
    items = read_items(Path(job["data"]) / "train.jsonl")
    gold = sum(len(i.gold) for i in items) / sum(len(i.gold) + len(i.prompt) for i in items)
    return {"gflop_per_token": flop(trained, gold) / 1e9}


def flop(trained: Any, gold: float) -> float:
    """Least floating-point operations to train on a token, attention's own products left out.

    A product with a weight is 2 operations a weight forward and 2 for the gradient of its input;
    2 more where the weight itself is trained. The head is needed at gold tokens only (their share
    is ``gold``). The first layer's input needs no gradient where the embedding is frozen: ignored.
    """
    import torch

    head = trained.get_output_embeddings()
    total = 0.0
    for module in trained.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, torch.nn.Linear) or weight is None:
            continue
        size = module.in_features * module.out_features
        total += size * (6 if weight.requires_grad else 4) * (gold if module is head else 1)
    return total


def gpu_peak() -> float | None:
    """Peak GPU memory of this process, MB."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None


ROLES = {"edgeft": run_edgeft, "trl": run_trl, "rate": run_rate, "start": run_start}


def in_child(job: dict[str, Any], tuned: bool) -> dict[str, Any]:
    """One contender in a fresh process; ``tuned``: with edgeft's allocator set-up."""
    environment = {**os.environ, **(allocator() if tuned else {})}
    with tempfile.NamedTemporaryFile("r+", suffix=".json") as answer:
        request = json.dumps({**job, "answer": answer.name})
        done = subprocess.run(
            [sys.executable, __file__, "--child", request],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{job['role']} failed:\n{done.stderr[-3000:]}")
        facts: dict[str, Any] = json.load(answer)
        return facts


def contenders() -> dict[str, tuple[dict[str, Any], bool]]:
    """Name to what the child is told, and whether its allocator is set up as ours."""
    found: dict[str, tuple[dict[str, Any], bool]] = {
        "edgeft": ({"role": "edgeft", "recompute": False}, True),
        "edgeft, recomputing": ({"role": "edgeft", "recompute": True}, True),
        "TRL as it comes": ({"role": "trl", "defaults": True, "unsloth": False}, False),
        "TRL, allocator": ({"role": "trl", "defaults": False, "unsloth": False}, True),
    }
    if importlib.util.find_spec("unsloth"):
        found["Unsloth"] = ({"role": "trl", "defaults": True, "unsloth": True}, False)
    return found


def compare(method: str, arguments: argparse.Namespace, made: dict[str, Any]) -> dict[str, Any]:
    """All contenders on one method, in turns."""
    plan = settings(method, arguments.steps, arguments.batch, arguments.dtype)
    common = {**made, "settings": asdict(plan)}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders()}
    with tempfile.TemporaryDirectory() as start:
        needs = in_child({**common, "role": "start", "out": start}, True)
        rates = []
        for number in range(arguments.rounds):
            rates.append(in_child({**common, "role": "rate"}, True))
            for name, (job, tuned) in contenders().items():
                with tempfile.TemporaryDirectory() as out:
                    where = out if job["role"] == "edgeft" else start
                    facts = in_child({**common, **job, "out": where}, tuned)
                results[name].append(facts)
                print(
                    f"{method} round {number + 1}: {name} {whole(facts):.0f} tok/s",
                    file=sys.stderr,
                )
    rate = max(r["gflop_per_s"] for r in rates)
    ours = results["edgeft"]
    rows = {}
    for name, found in results.items():
        theirs, own = found[0]["loss"], ours[0]["loss"]
        rows[name] = {
            "tok_s": statistics.median(map(whole, found)),
            "steady_tok_s": statistics.median(map(steady, found)),
            "ratio": statistics.median(
                whole(a) / whole(b) for a, b in zip(ours, found, strict=True)
            ),
            "peak_mb": statistics.median(f["peak_gpu_mb"] or f["peak_mb"] for f in found),
            "mean_loss_difference": abs(sum(theirs) - sum(own)) / sum(own),
            "largest_loss_difference": max(
                abs(a - b) / b for a, b in zip(theirs, own, strict=True)
            ),
            "matrix_share": statistics.median(map(steady, found)) * needs["gflop_per_token"] / rate,
        }
    return {
        "method": method,
        "device": rates[0]["device"],
        "gflop_per_s": rate,
        "gflop_per_token": needs["gflop_per_token"],
        "rows": rows,
    }


def whole(facts: dict[str, Any]) -> float:
    """Tokens per second from the first step to the last."""
    return float(facts["tokens"][-1] / facts["seconds"][-1])


def steady(facts: dict[str, Any]) -> float:
    """The same without the first steps."""
    tokens, seconds = facts["tokens"], facts["seconds"]
    return float((tokens[-1] - tokens[WARM_UP - 1]) / (seconds[-1] - seconds[WARM_UP - 1]))


def show(found: dict[str, Any]) -> None:
    """One method as a Markdown table."""
    print(
        f"\n{found['method']} on {found['device']}: {found['gflop_per_s']:.0f} GFLOP/s of its own, "
        f"{found['gflop_per_token']:.2f} GFLOP a token\n"
    )
    print("| | tok/s | steady | edgeft is | peak memory | loss: mean, largest | matrix rate |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, row in found["rows"].items():
        print(
            f"| {name} | {row['tok_s']:.0f} | {row['steady_tok_s']:.0f} | {row['ratio']:.2f}x "
            f"| {row['peak_mb']:.0f} MB | {100 * row['mean_loss_difference']:.2f}%, "
            f"{100 * row['largest_loss_difference']:.2f}% "
            f"| {100 * row['matrix_share']:.0f}% |"
        )


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        job = json.loads(arguments.child)
        Path(job["answer"]).write_text(json.dumps(ROLES[job["role"]](job)))
        return
    with tempfile.TemporaryDirectory() as folder:
        made = prepare(arguments.model, arguments.steps, arguments.batch, Path(folder) / "made")
        found = [compare(method, arguments, made) for method in arguments.method or ["lora"]]
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for one in found:
        show(one)


if __name__ == "__main__":
    main()
