"""One target on one device, as the views know it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from edgeft.attribution import Step
from edgeft.report.forgetting import Forgetting
from edgeft.survival import Survival

Facts = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """A question that the tuned model answers differently on the host and at a target."""

    id: str
    question: str
    gold: str
    host: str
    target: str
    host_correct: bool
    target_correct: bool


@dataclass(frozen=True)
class Cause:
    """Why something was lost, or would be lost by a user's own program, and what to try.

    Attributes:
        step: the kind of the step that it explains, see :mod:`edgeft.attribution`.
    """

    step: str
    text: str
    remedy: str


@dataclass(frozen=True)
class Variant:
    """One target on one device.

    Attributes:
        bytes: the artifact's size; None if the bundle is not in the run.
        survival: the comparison with the host.
        lost_after: where retention is below 1 for sure, the smallest larger target of the
            same device, runtime and weights that still survives, or ``"host"``: the benefit went between
            that and this one.
        latency: as in ``latency.json``; None if it was not timed.
        not_measured: why it was not, if there is a reason.
        same_as_local: how many of how many questions the same file answers as on this machine;
            None if it was not scored here.
        verify: the export's checks, as in the manifest; None without a bundle.
        differences: some of the questions answered differently, those that cost accuracy first.
        general: tuned against base on general questions at this target; None where they were not
            scored.
        auto: the types chosen by measuring, as in the manifest; None: none were.
        repair: how its own weights were trained further, as in the manifest; None: they were not.
        elsewhere: the name of the file that stands for tuned, if edgeft did not make it.
        steps: from the adapter on the host to here, on the questions asked at all of these places.
        causes: what explains a loss on the way, or is wrong with the file.
    """

    target: str
    device: str
    runtime: str | None
    bytes: int | None
    survival: Survival
    lost_after: str | None
    latency: Facts | None
    verify: Facts | None
    differences: list[Difference]
    not_measured: str | None = None
    same_as_local: tuple[int, int] | None = None
    repair: Facts | None = None
    auto: Facts | None = None
    general: Forgetting | None = None
    elsewhere: str | None = None
    steps: list[Step] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)

    @property
    def faults(self) -> list[Facts]:
        """What the export's checks found wrong with the file."""
        return list((self.verify or {}).get("faults") or [])


def place(variant: Variant, variants: Iterable[Variant]) -> str:
    """What the views call a variant: its target, and the device where there are several."""
    several = len({v.device for v in variants}) > 1
    return f"{variant.target} on {variant.device}" if several else variant.target
