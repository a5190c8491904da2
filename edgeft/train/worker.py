"""The child that trains: transformers' Trainer on accelerate, completion-only loss."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import (
    AutoModelForCausalLM,
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
from edgeft.train.batches import SortedBatches, collate, completion_loss, length
from edgeft.train.record import Emit, Record, check_finite, last_checkpoint, rows
from edgeft.train.settings import TrainSettings


def fit(
    base: Path,
    train: Path,
    heldout: Path,
    out: Path,
    settings: TrainSettings,
    seed: int,
    emit: Emit,
) -> None:
    """Train an adapter into ``out/adapter``; goes on from the last whole checkpoint in ``out``.

    Args:
        base: a transformers folder with safetensors, of any floating-point type.
        train, heldout: questions as :func:`edgeft.prompts.read_items` reads them.
        emit: called with ``"progress"``, ``done``, ``total``, ``text`` after each step.

    Raises:
        UserError: the base cannot be loaded, there is nothing to train on, or the loss is no
            longer finite.
    """
    set_seed(seed)
    items, held = _questions(train), _questions(heldout)
    dtype = training_dtype(settings.dtype)
    model = adapted(base, settings, dtype)
    pad = model.config.pad_token_id or 0  # any id will do: nothing sees it
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, step = last_checkpoint(out / "checkpoints")
    record = Record(out / "log.jsonl", held, settings.heldout_points, pad, emit, step)
    trainer = _Trainer(
        model=model,
        args=_arguments(out, settings, seed, dtype),
        train_dataset=items,
        data_collator=lambda batch: collate(batch, pad),
        callbacks=[record],
    )
    trainer.record = record
    trainer.model_accepts_loss_kwargs = True  # count gold tokens whatever the model's forward takes
    trainer.remove_callback(PrinterCallback)
    # Autocast alone puts the adapter's inputs into bfloat16; PEFT would keep float32 copies.
    with disable_input_dtype_casting(model, active=dtype == torch.bfloat16):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.save_pretrained(out / "adapter")
    write_json(out / "train.json", _summary(trainer, settings, len(items), dtype))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def adapted(base: Path, settings: TrainSettings, dtype: torch.dtype) -> Any:
    """The base in ``dtype`` with a fresh adapter on it, whose weights are float32."""
    modules = settings.target_modules.split(",")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules if len(modules) > 1 else modules[0],
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True)
        return get_peft_model(model, config)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot train {base}: {str(error).splitlines()[0]}") from error


def training_dtype(wanted: str) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies it, else float32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        try:
            flags = set(Path("/proc/cpuinfo").read_text().split())
        except OSError:
            flags = set()
        fast = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})  # the last one is ARM's
    return torch.bfloat16 if fast else torch.float32


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
        return SortedBatches(lengths, self.args.train_batch_size, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss, tokens = completion_loss(model, inputs)
        step = self.state.global_step + 1
        check_finite(loss.item() / tokens, "loss", step, self.args.learning_rate)
        self.record.tokens += int(inputs["lengths"].sum())
        # The gold tokens of all processes and of all batches until the next update; gradients
        # are averaged over processes.
        return loss / num_items_in_batch * self.accelerator.num_processes

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Without training_args.bin, which is a pickle of a Python object.
        self.model.save_pretrained(output_dir or self.args.output_dir)


def _arguments(
    out: Path, settings: TrainSettings, seed: int, dtype: torch.dtype
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),  # or it refuses bfloat16
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        logging_steps=1,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _summary(
    trainer: _Trainer, settings: TrainSettings, examples: int, dtype: torch.dtype
) -> dict[str, Any]:
    written = rows(trainer.record.log)
    last = [row for row in written if "loss" in row][-1]
    trainable = (p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "method": settings.method,
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
        "heldout": [[r["step"], r["heldout_loss"]] for r in written if "heldout_loss" in r],
        "final_loss": last["loss"],
    }


def _work(request: Any, emit: Emit) -> None:
    base, train, heldout, out = (
        Path(request[name]) for name in ("base", "train", "heldout", "out")
    )
    settings = TrainSettings(**request["settings"])
    logging.disable_progress_bar()
    try:
        fit(base, train, heldout, out, settings, request["seed"], emit)
    except Exception as error:
        reason = _disk_full(error)
        if reason is None:
            raise
        raise UserError(f"cannot write to {out}: {reason}") from error


def _disk_full(error: Exception) -> str | None:
    return disk_reason(error) if isinstance(error, OSError) else None


if __name__ == "__main__":
    child.serve(_work)
