"""The child that trains: transformers' Trainer on accelerate, completion-only loss."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft.helpers import disable_input_dtype_casting
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

from edgeft import child
from edgeft.bench.machine import peak_rss_mb
from edgeft.errors import UserError
from edgeft.prompts import Item, read_items
from edgeft.run import disk_reason, write_json
from edgeft.train import ranks
from edgeft.train.batches import SortedBatches, collate, completion_loss, length
from edgeft.train.fast import quicken
from edgeft.train.heldout import read_heldout
from edgeft.train.memory import advice, is_out_of_memory, limit_memory
from edgeft.train.methods import finish, prepared, training_dtype
from edgeft.train.record import (
    POINT,
    Emit,
    Folders,
    Record,
    best_point,
    last_checkpoint,
    rows,
)
from edgeft.train.rounded import OncePerStep, Plan, round_like
from edgeft.train.settings import TrainSettings


def fit(
    base: Path,
    data: Path,
    out: Path,
    settings: TrainSettings,
    facts: dict[str, Any],
    seed: int,
    emit: Emit,
    track: str | None = None,
    plan: Plan | None = None,
) -> None:
    """Train into ``out/adapter`` or ``out/model``; goes on from the last whole checkpoint there.

    Args:
        base: a transformers folder with safetensors, of any floating-point type.
        data: the stage before: ``train.jsonl``, ``heldout.jsonl`` and the tokenizer.
        facts: ``task``, ``stop``, ``max_new_tokens`` and perhaps ``pattern``, to answer held-out
            questions.
        emit: called with ``"progress"``, ``done``, ``total``, ``text`` after each step.
        track: a tracker that transformers knows.
        plan: how a target will store the weights; the model then computes with these.

    Raises:
        UserError: the base cannot be loaded, there is nothing to train on, the memory does not
            suffice, or the loss is no longer finite.
    """
    set_seed(seed)
    items = _questions(data / "train.jsonl")
    _questions(data / "heldout.jsonl")
    held = read_heldout(data, settings.heldout_answers, facts)
    dtype = training_dtype(settings.dtype)
    model, parameters = prepared(base, settings, dtype)
    quicken(model)
    if plan:
        round_like(model, base, plan)
    folders, state = Folders(out), PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():  # it removes what a kill left half-written
        out.mkdir(parents=True, exist_ok=True)
        if settings.mutates_base and not (folders.start / "adapter_config.json").is_file():
            model.save_pretrained(folders.start)
        checkpoint, step = last_checkpoint(folders.checkpoints)
    record = Record(folders, held, settings, emit, step, main=state.is_main_process)
    trainer = _Trainer(
        model=model,
        args=_arguments(folders, settings, seed, dtype, track),
        train_dataset=items,
        data_collator=lambda batch: collate(batch, held.pad),
        callbacks=[OncePerStep(), record],
    )
    trainer.record = record
    record.report = trainer.log
    trainer.model_accepts_loss_kwargs = True  # count gold tokens whatever the model's forward takes
    trainer.remove_callback(PrinterCallback)
    try:
        _train(trainer, settings, dtype, checkpoint)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_what_fits(trainer, items, settings, held.pad)) from error
    if not state.is_main_process:
        return
    _finish(trainer, settings, folders)
    point = best_point(folders.best) or {"step": trainer.state.global_step}
    summary = _summary(trainer, settings, len(items), dtype)
    write_json(
        out / "train.json", {**summary, "kept_step": point["step"], "parameters": parameters}
    )
    for folder in (folders.checkpoints, folders.start, folders.best):
        shutil.rmtree(folder, ignore_errors=True)


def _train(
    trainer: _Trainer, settings: TrainSettings, dtype: torch.dtype, checkpoint: Path | None
) -> None:
    resume = str(checkpoint) if checkpoint else None
    if settings.method == "full":
        trainer.train(resume_from_checkpoint=resume)
        return
    # Autocast alone puts the adapter's inputs into bfloat16; PEFT would keep float32 copies.
    with disable_input_dtype_casting(trainer.model, active=dtype == torch.bfloat16):
        trainer.train(resume_from_checkpoint=resume)


def _finish(trainer: _Trainer, settings: TrainSettings, folders: Folders) -> None:
    """The kept weights under their final name."""
    trained = folders.out / "last.partial"
    shutil.rmtree(trained, ignore_errors=True)
    if settings.keep == "best":
        shutil.copytree(folders.best, trained, ignore=shutil.ignore_patterns(POINT))
    else:
        trainer.model.save_pretrained(trained)
    name = "model" if settings.method == "full" else "adapter"
    shutil.rmtree(folders.out / name, ignore_errors=True)
    finish(trained, folders.start, settings, folders.out / name)
    shutil.rmtree(trained, ignore_errors=True)


def _what_fits(trainer: _Trainer, items: list[Item], settings: TrainSettings, pad: int) -> str:
    longest = sorted(items, key=length, reverse=True)
    trainer.optimizer = trainer.lr_scheduler = None
    model = trainer.model.train()

    def step(batch_size: int) -> None:
        model.zero_grad(set_to_none=True)
        batch = trainer._prepare_inputs(collate(longest[:batch_size], pad))
        loss, tokens = completion_loss(model, batch)
        (loss / tokens).backward()
        model.zero_grad(set_to_none=True)

    return advice(settings.batch_size, settings.gradient_accumulation_steps, step)


def _questions(path: Path) -> list[Item]:
    items = read_items(path)
    if not items:
        raise UserError(f"{path} is empty: training needs questions there")
    return items


class _Trainer(Trainer):  # type: ignore[misc]
    """Sorted batches, logits at answer tokens only, checkpoints of the adapter only."""

    record: Record
    loss_is_scaled_for_ga = True

    def _get_train_sampler(self, train_dataset: Any = None) -> SortedBatches:
        lengths = [length(item) for item in self.train_dataset]
        # All batches of one step are neighbours, as one batch as large would have them.
        batches = self.args.world_size * self.args.gradient_accumulation_steps
        return SortedBatches(lengths, self.args.train_batch_size * batches, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss, tokens = completion_loss(model, inputs)
        self.record.check_finite(loss.item() / tokens, "loss", self.state.global_step + 1)
        self.record.tokens += int(self.accelerator.reduce(inputs["lengths"].sum()))
        # The gold tokens of all processes and of all batches until the next update; gradients
        # are averaged over processes.
        return loss / num_items_in_batch * self.accelerator.num_processes

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Without training_args.bin, which is a pickle of a Python object.
        self.model.save_pretrained(output_dir or self.args.output_dir)


def _arguments(
    folders: Folders, settings: TrainSettings, seed: int, dtype: torch.dtype, track: str | None
) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    optim = settings.optim
    if optim == "auto":
        optim = "paged_adamw_8bit" if settings.method == "qlora" and cuda else "adamw_torch_fused"
    return TrainingArguments(
        output_dir=str(folders.checkpoints),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        activation_checkpointing=settings.activation_checkpointing,
        optim=optim,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.peak_lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        use_cpu=not cuda,  # or it refuses bfloat16
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        logging_steps=1,
        seed=seed,
        report_to=track or "none",
        run_name=folders.out.resolve().parent.name,
        project=os.environ.get("TRACKIO_PROJECT", "edgeft"),
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda,
    )


def _summary(
    trainer: _Trainer, settings: TrainSettings, examples: int, dtype: torch.dtype
) -> dict[str, Any]:
    written = rows(trainer.record.folders.log)
    last = [row for row in written if "loss" in row][-1]
    trainable = (p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "method": settings.method,
        "keep": settings.keep,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "examples": examples,
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "tokens_per_s": round(last["tokens"] / last["seconds"], 1),
        "peak_rss_mb": round(peak_rss_mb()),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(trainer.args.device),
        "trainable_parameters": sum(trainable),
        "heldout": [
            [r["step"], r["heldout_loss"], r.get("heldout_accuracy")]
            for r in written
            if "heldout_loss" in r
        ],
        "final_loss": last["loss"],
    }


def _work(request: Any, emit: Emit) -> None:
    request = ranks.agreed(request)
    if request is None:
        return
    base, data, out = (Path(request[name]) for name in ("base", "data", "out"))
    settings = TrainSettings(**request["settings"])
    logging.disable_progress_bar()
    limit_memory()
    try:
        known = (request["facts"], request["seed"], emit, request["track"], request["plan"])
        fit(base, data, out, settings, *known)
    except Exception as error:
        reason = _disk_full(error)
        if reason is None:
            raise
        raise UserError(f"cannot write to {out}: {reason}") from error


def _disk_full(error: Exception) -> str | None:
    return disk_reason(error) if isinstance(error, OSError) else None


if __name__ == "__main__":
    child.serve(_work)
