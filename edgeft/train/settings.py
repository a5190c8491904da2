"""How to train, as recipes write it. Light: no torch here."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = ("lora",)
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class TrainSettings:
    """Names as PEFT and transformers have them.

    Attributes:
        lr: peak learning rate. 1e-3 suits rank 16 on models of a few hundred million parameters
            ("LoRA Without Regret", 2025: about ten times that of full fine-tuning).
        batch_size: examples an optimizer step.
        max_steps: ends earlier than ``epochs`` when given.
        warmup_ratio: share of the steps in which the rate rises.
        alpha: LoRA's scaling is ``alpha / rank``.
        target_modules: ``all-linear``, or names as PEFT takes them, separated by commas.
        heldout_points: how often the held-out loss is taken, the start and the end included.
        checkpoint_steps: steps between checkpoints.
        dtype: ``auto``: bfloat16 where the hardware multiplies it, else float32.
    """

    method: str = "lora"
    lr: float = 1e-3
    batch_size: int = 8
    epochs: float = 1.0
    max_steps: int | None = None
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    warmup_ratio: float = 0.05
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    heldout_points: int = 5
    checkpoint_steps: int = 20
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for value, known, name in (
            (self.method, METHODS, "method"),
            (self.schedule, SCHEDULES, "schedule"),
            (self.dtype, DTYPES, "dtype"),
        ):
            if value not in known:
                raise ValueError(f"{name} '{value}' is none of: {', '.join(known)}")
        for name in ("lr", "batch_size", "epochs", "rank", "alpha", "checkpoint_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError("max_steps must be above 0")
        if self.heldout_points < 2:
            raise ValueError("heldout_points must be at least 2: the start and the end")
        if not 0 <= self.dropout < 1 or not 0 <= self.warmup_ratio < 1:
            raise ValueError("dropout and warmup_ratio lie between 0 and 1")
