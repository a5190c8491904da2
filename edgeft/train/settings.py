"""How to train, as recipes write it. Light: no torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

METHODS = ("full", "lora", "dora", "qlora")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
DTYPES = ("auto", "bfloat16", "float32")
ATTENTION = ("auto", "sdpa", "flash_attention_2", "eager")
KEEP = ("best", "last")
# What PEFT needs no data for; the second group takes its part out of the base's own weights.
INITS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora")
_MUTATING = re.compile(r"pissa|pissa_niter_\d+|olora")

_DEFAULTS: dict[str, dict[str, Any]] = {
    "full": {"lr": 1e-4, "max_grad_norm": 1.0, "checkpoint_steps": 50},
    "lora": {"lr": 1e-3, "max_grad_norm": 1.0, "checkpoint_steps": 20},
    "dora": {"lr": 1e-3, "max_grad_norm": 1.0, "checkpoint_steps": 20},
    "qlora": {"lr": 1e-3, "max_grad_norm": 0.3, "checkpoint_steps": 20},
}


@dataclass(frozen=True)
class TrainSettings:
    """Names as PEFT and transformers have them; what is None here takes the method's value.

    Sources of the methods' values:

    * LoRA (Hu et al. 2021, arXiv 2106.09685) on every linear layer with ten times full
      fine-tuning's rate, whatever the rank ("LoRA Without Regret", Schulman et al. 2025); 1e-3
      suits models of a few hundred million parameters.
    * DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA's settings, which its authors tuned little
      away from, so that the two are compared and not their rates.
    * QLoRA (Dettmers et al. 2023, arXiv 2305.14314): NF4 with double quantization, gradients cut
      at 0.3, a paged optimizer on a GPU; the rate is LoRA's.
    * Full: a tenth of LoRA's rate; the parameters are float32 and only products are bfloat16, so
      that small updates are not rounded away (Micikevicius et al. 2017, arXiv 1710.03740).

    Attributes:
        lr: peak learning rate.
        batch_size: examples in one forward pass of one process. Where the questions do not fill
            the last step of several processes, some of them come twice there.
        gradient_accumulation_steps: forward passes an optimizer step.
        max_steps: ends earlier than ``epochs`` when given.
        alpha: LoRA's scaling is ``alpha / rank``, with ``rslora`` ``alpha / sqrt(rank)``
            (Kalajdzievski 2023, arXiv 2312.03732).
        init: how the adapter begins: ``default`` (A random, B zero), or a name that PEFT knows:
            ``gaussian``, ``orthogonal``, ``pissa``, ``pissa_niter_N``, ``olora``. What the last
            three take out of the base is put into the saved adapter, which fits the base as it is.
        target_modules: ``all-linear``, or names as PEFT takes them, separated by commas.
        optim: as in transformers; ``auto``: fused AdamW, for QLoRA on a GPU paged 8-bit AdamW.
        attention: ``auto`` is the model's own choice, SDPA for nearly all, which takes PyTorch's
            flash kernel wherever there is one.
        warmup_ratio: share of the steps in which the rate rises.
        keep: the weights of the point with the lowest held-out loss, or the last ones.
        heldout_points: how often held-out loss and accuracy are taken, the start and the end
            included.
        heldout_answers: how many of the held-out questions are answered for the accuracy.
        checkpoint_steps: optimizer steps between checkpoints.
        dtype: of products. ``auto``: bfloat16 where the hardware multiplies it, else float32.
        target: an export target for which to train: every step sees base and adapter rounded as
            its quantizer will round them, gradients pass straight through (LoRA only).
    """

    method: str = "lora"
    lr: float | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    init: str = "default"
    dropout: float = 0.0
    target_modules: str = "all-linear"
    optim: str = "auto"
    attention: str = "auto"
    activation_checkpointing: bool = False
    warmup_ratio: float = 0.05
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    keep: str = "best"
    heldout_points: int = 5
    heldout_answers: int = 24
    checkpoint_steps: int | None = None
    dtype: str = "auto"
    target: str | None = None

    def __post_init__(self) -> None:
        for value, known, name in (
            (self.method, METHODS, "method"),
            (self.schedule, SCHEDULES, "schedule"),
            (self.dtype, DTYPES, "dtype"),
            (self.attention, ATTENTION, "attention"),
            (self.keep, KEEP, "keep"),
        ):
            if value not in known:
                raise ValueError(f"{name} '{value}' is none of: {', '.join(known)}")
        for name, value in _DEFAULTS[self.method].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check_numbers()
        self._check_init()
        if self.target and (self.method != "lora" or self.dropout or self.mutates_base):
            raise ValueError(
                f"training for {self.target} takes method lora with the default init and no dropout"
            )

    def _check_numbers(self) -> None:
        above = "lr batch_size gradient_accumulation_steps epochs rank alpha checkpoint_steps"
        for name in (*above.split(), "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError("max_steps must be above 0")
        if self.heldout_points < 2:
            raise ValueError("heldout_points must be at least 2: the start and the end")
        if self.heldout_answers < 0:
            raise ValueError("heldout_answers must not be negative")
        if not 0 <= self.dropout < 1 or not 0 <= self.warmup_ratio < 1:
            raise ValueError("dropout and warmup_ratio lie between 0 and 1")

    def _check_init(self) -> None:
        if self.init not in INITS and not re.fullmatch(r"pissa_niter_\d+", self.init):
            raise ValueError(f"init '{self.init}' is none of: {', '.join(INITS)}")
        if self.mutates_base and self.method in ("dora", "qlora"):
            raise ValueError(
                f"init '{self.init}' takes its part out of the base's weights, which "
                f"{self.method} has no place for: use method lora"
            )

    @property
    def mutates_base(self) -> bool:
        """Whether the adapter begins with a part taken out of the base's own weights."""
        return self.method != "full" and bool(_MUTATING.fullmatch(self.init))

    @property
    def peak_lr(self) -> float:
        """The learning rate, the method's where none was given."""
        assert self.lr is not None  # __post_init__
        return self.lr
