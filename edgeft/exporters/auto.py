"""Types by measurement: under a budget, each group of tensors gets the type that pays.

A group is one kind of matrix in a quarter of the blocks. What rounding it costs on held-out
questions is measured once for an ``ftype`` (:mod:`edgeft.exporters.sensitivity`); the choice for a
budget is then a multiple-choice knapsack over the groups.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeft import child, model, run
from edgeft.allocator import allocator
from edgeft.bench.accuracy import appending, read_rows
from edgeft.errors import UserError
from edgeft.exporters.gguf_settings import MEASURED, UNQUANTIZED, AutoSettings, GgufSettings
from edgeft.exporters.storage import gguf_tensors
from edgeft.progress import Update, say
from edgeft.stages import Run, cached

FILE = "choice.json"
_PARTS = 4  # of the blocks, in order
_BUCKETS = 20_000  # that a budget is cut into: at most a thousandth of it stays unused
_ALIGNMENT = 32  # bytes; GGUF's own
_TRIES = 5
_MOST_HARM, _HALVINGS = 1e9, 60
_TIE = 1e-6  # nats: so that of equals the finer is taken


@dataclass(frozen=True)
class Group:
    """Matrices that get one type together.

    Attributes:
        keys: the model's own names of them, to ggml's name of the type that ``ftype`` gives each.
        tensors: their names in the file.
        weights: how many numbers they hold.
        bytes: what they take now.
    """

    keys: dict[str, str]
    tensors: list[str]
    weights: list[int]
    bytes: int


@dataclass(frozen=True)
class Option:
    """What a group may get: a type, or ``""``, what ``ftype`` gives it.

    Attributes:
        loss: what it adds to the held-out loss, nats a token.
        cost: what it adds to the budget's quantity, bytes or seconds.
    """

    kind: str
    loss: float
    cost: float


def choose(
    this: Run, name: str, settings: GgufSettings, folder: Path, sixteen_bit: Path
) -> dict[str, Any]:
    """What a target's tensors are quantized to, chosen once for base and tuned.

    Args:
        name: the target's.
        folder: the tuned model.
        sixteen_bit: the GGUF of it.

    Returns:
        ``types`` as :func:`edgeft.exporters.quantize.quantize` takes them, ``groups`` for people,
        and ``loss``: of ``ftype`` alone, as ``predicted`` and as ``measured`` for the choice.

    Raises:
        UserError: no choice keeps to the budget.
    """
    assert settings.auto
    measured = this.path / "auto" / settings.ftype
    common = {
        "model": this.sha256(model.weight_files(folder)),
        "heldout": this.sha256([this.path / "data" / "heldout.jsonl"]),
        "ftype": settings.ftype,
        "types": list(settings.auto.types),
        "dtype": this.recipe.train.dtype,
    }
    request = {
        "folder": str(folder),
        "heldout": str(this.path / "data" / "heldout.jsonl"),
        "dtype": this.recipe.train.dtype,
    }

    def measure(out: Path, update: Update) -> None:
        _measure(out, request, settings, sixteen_bit, update)

    def work(out: Path, _: Update) -> None:
        found = json.loads((measured / "groups.json").read_text())
        losses = {row["name"]: row for row in read_rows(measured / "measured.jsonl")}
        groups = {key: Group(**facts) for key, facts in found["groups"].items()}
        timing = _Timing(sixteen_bit, settings.ftype, out / "timed")
        chosen = _chosen(settings, groups, losses, found["bytes"], timing)
        plan = {
            key: chosen[group] or now
            for group, facts in groups.items()
            for key, now in facts.keys.items()
        }
        [after] = child.run("edgeft.exporters.sensitivity", {**request, "plan": plan}, allocator())
        before = losses[""]["loss"]
        options = _options(groups, losses, _extra_bytes)
        added = [o.loss for g, each in options.items() for o in each if o.kind == chosen[g]]
        loss = {"ftype": before, "predicted": before + sum(added), "measured": after["loss"]}
        if loss["measured"] >= before:
            say(f"· {name}: no better than {settings.ftype} alone on held-out questions")
        run.write_json(
            out / FILE,
            {
                "types": patterns(groups, chosen),
                "groups": {g: kind for g, kind in chosen.items() if kind},
                "loss": loss,
            },
        )

    inputs, place = {**common, "auto": asdict(settings.auto)}, this.path / "auto" / name
    if not run.is_done(place, run.fingerprint(inputs)):  # what was measured may be for others now
        cached(f"sensitivity at {settings.ftype}", measured, common, measure)
    cached(f"types for {name}", place, inputs, work)
    choice: dict[str, Any] = json.loads((place / FILE).read_text())
    return choice


def _measure(
    out: Path, request: Mapping[str, Any], settings: GgufSettings, source: Path, update: Update
) -> None:
    """``groups.json``, and ``measured.jsonl`` with a line a group, where a killed call goes on."""
    assert settings.auto
    floor = out / "floor.gguf"
    quantized = {"source": str(source), "out": str(floor), "ftype": settings.ftype}
    child.run("edgeft.exporters.quantize", quantized)
    groups = grouped(Path(request["folder"]), floor)
    size = floor.stat().st_size
    floor.unlink()
    run.write_json(
        out / "groups.json",
        {"bytes": size, "groups": {name: asdict(group) for name, group in groups.items()}},
    )
    rows = out / "measured.jsonl"
    known = [row["name"] for row in read_rows(rows)]
    total = 1 + len(settings.auto.types) + len(groups)
    asked = {
        **request,
        "groups": {name: group.keys for name, group in groups.items()},
        "kinds": list(settings.auto.types),
        "known": known,
    }
    done = len(known)
    with appending(rows) as keep:
        for event in child.call("edgeft.exporters.sensitivity", asked, allocator()):
            del event["event"]
            keep(event)
            update(done := done + 1, total, "groups of tensors")


def grouped(folder: Path, artifact: Path) -> dict[str, Group]:
    """A model's matrices by kind and quarter of the blocks, such as ``ffn_down 0-7``.

    Raises:
        UserError: a matrix has a type whose rounding is not known here.
    """
    layers = model.config(folder)["num_hidden_layers"]
    tensors = gguf_tensors(artifact, layers, model.matrices(folder))
    members: dict[str, list[tuple[str, Any]]] = {}
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].name):
        kind = tensor.tensor_type.name
        if kind not in (*MEASURED, *UNQUANTIZED):
            raise UserError(f"gguf.auto cannot measure {kind}, which {tensor.name} has by ftype")
        members.setdefault(_group(tensor.name, layers), []).append((key, tensor))
    return {
        name: Group(
            {key: _kind(tensor) for key, tensor in own},
            [tensor.name for _, tensor in own],
            [int(tensor.n_elements) for _, tensor in own],
            sum(_aligned(int(tensor.n_bytes)) for _, tensor in own),
        )
        for name, own in members.items()
    }


def _kind(tensor: Any) -> str:
    kind = str(tensor.tensor_type.name)
    return "" if kind in UNQUANTIZED else kind


def _group(tensor: str, layers: int) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", tensor)
    if not match:
        return tensor.removesuffix(".weight")
    part = int(match[1]) * _PARTS // layers
    first, last = -(-part * layers // _PARTS), -(-(part + 1) * layers // _PARTS) - 1
    return f"{match[2]} {first}-{last}"


def patterns(groups: Mapping[str, Group], chosen: Mapping[str, str]) -> dict[str, str]:
    """Regular expressions for whole tensor names, to the type chosen for them."""
    return {
        "^(" + "|".join(re.escape(name) for name in groups[group].tensors) + ")$": kind
        for group, kind in chosen.items()
        if kind
    }


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _extra_bytes(group: Group, kind: str) -> float:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return sum(_aligned(count // block * size) for count in group.weights) - group.bytes


def _options(
    groups: Mapping[str, Group],
    losses: Mapping[str, Mapping[str, Any]],
    extra: Callable[[Group, str], float],
) -> dict[str, list[Option]]:
    """``extra``: what a group in a type costs more than now."""
    floor, own = losses[""]["loss"], losses[""]["own"]
    saved = sum(max(0.0, floor - losses[name]["loss"]) for name in groups)
    share = min(1.0, max(0.0, floor - own) / saved) if saved else 1.0

    def added(name: str, kind: str, harm: float) -> float:
        return added_loss(losses[name], floor, harm * losses[name]["errors"][kind], share)

    def harm_of(kind: str) -> float:
        """How much worse than its error tells a type is: then all groups in it cost what they do."""
        names = [name for name in groups if kind in losses[name]["errors"]]
        measured = losses[kind]["loss"] - floor
        low, high = 1.0, _MOST_HARM
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5
            costs = sum(added(name, kind, middle) for name in names)
            low, high = (middle, high) if costs < measured else (low, middle)
        return low

    harm = {kind: harm_of(kind) for kind in {k for name in groups for k in losses[name]["errors"]}}
    return {
        name: [
            Option("", 0.0, 0.0),
            *(
                Option(kind, added(name, kind, harm[kind]), extra(group, kind))
                for kind in losses[name]["errors"]
                if set(group.keys.values()) != {kind}
            ),
        ]
        for name, group in groups.items()
    }


def added_loss(facts: Mapping[str, Any], floor: float, error: float, share: float = 1.0) -> float:
    """What a group adds to the loss ``floor`` if its squared error is ``error`` instead of now.

    Linear between what was measured, and more for more error however little that showed.

    Args:
        facts: of the group, as :func:`edgeft.exporters.sensitivity.measure` yields them.
        share: of what giving back its own weights saved alone; groups save less together.
    """
    now: float = facts["error"]
    if error > now and "coarsest" in facts:
        at: float = facts["errors"][facts["coarsest"]["kind"]]
        above: float = max(_TIE, facts["coarsest"]["loss"] - floor)
        return above * (error - now) / (at - now)
    below: float = max(_TIE, share * (floor - facts["loss"]))
    return below * (error / now - 1) if now else 0.0


def _chosen(
    settings: GgufSettings,
    groups: Mapping[str, Group],
    losses: Mapping[str, Mapping[str, Any]],
    size: int,
    timing: _Timing,
) -> dict[str, str]:
    """Group to type; ``size``: bytes of the file by ``ftype`` alone."""
    auto = settings.auto
    assert auto
    if auto.min_tok_s is not None:
        return _fast_enough(auto, groups, losses, timing)
    limit = auto.max_mb * 1e6 if auto.max_mb is not None else (auto.max_size or 0) * size
    options = _options(groups, losses, _extra_bytes)
    taken = knapsack(list(options.values()), limit - size)
    if taken is None:
        least = size + sum(min(o.cost for o in each) for each in options.values())
        raise UserError(
            f"no choice of types makes it {limit / 1e6:.1f} MB: at least {least / 1e6:.1f} MB; "
            "raise the budget or allow more types (gguf.auto.types)"
        )
    return dict(zip(options, (option.kind for option in taken), strict=True))


def _fast_enough(
    auto: AutoSettings,
    groups: Mapping[str, Group],
    losses: Mapping[str, Mapping[str, Any]],
    timing: _Timing,
) -> dict[str, str]:
    """Predicted from files in which all groups have one type, and timed before it is taken."""
    wanted = float(auto.min_tok_s or 0)
    fitting = {k: [name for name in groups if k in losses[name]["errors"]] for k in auto.types}
    alone = {
        kind: patterns(groups, dict.fromkeys(names, kind))
        for kind, names in fitting.items()
        if names
    }
    seconds = timing.of({"": {}, **alone})
    count = {name: sum(group.weights) for name, group in groups.items()}

    def extra(group: Group, kind: str) -> float:
        whole = sum(count[name] for name in fitting[kind])
        return (seconds[kind] - seconds[""]) * sum(group.weights) / whole

    options = _options(groups, losses, extra)
    allowed, fastest = 1 / wanted - seconds[""], 1 / min(seconds.values())
    for _ in range(_TRIES):
        taken = knapsack(list(options.values()), allowed)
        if taken is None:
            break
        chosen = dict(zip(options, (option.kind for option in taken), strict=True))
        took = timing.of({"chosen": patterns(groups, chosen)})["chosen"]
        if 1 / took >= wanted:
            return chosen
        fastest = max(fastest, 1 / took)
        allowed -= took - 1 / wanted
    raise UserError(
        f"no choice of types reaches {wanted:g} tok/s here: the fastest file that was tried has "
        f"{fastest:.0f}; lower the budget or allow more types (gguf.auto.types)"
    )


@dataclass(frozen=True)
class _Timing:
    """See :func:`edgeft.exporters.speed.seconds_per_token`, which works in a child."""

    source: Path
    ftype: str
    scratch: Path

    def of(self, plans: Mapping[str, Any]) -> dict[str, float]:
        request = {
            "source": str(self.source),
            "ftype": self.ftype,
            "plans": plans,
            "scratch": str(self.scratch),
        }
        seconds: dict[str, float] = child.run("edgeft.exporters.speed", request)[-1]["seconds"]
        return seconds


def knapsack(groups: Sequence[Sequence[Option]], budget: float) -> list[Option] | None:
    """One option a group, the least loss in all whose costs in all keep to the budget.

    Dynamic programming over the budget in equal steps; costs are rounded up to one.

    Returns:
        None where even the cheapest options cost more.
    """
    cheapest = [min(option.cost for option in group) for group in groups]
    room = budget - sum(cheapest)
    if room < 0:
        return None
    step = max(room / _BUCKETS, 1e-15)
    best = np.zeros(_BUCKETS + 1)  # the least loss so far that costs at most so many steps
    picks = []
    for group, least in zip(groups, cheapest, strict=True):
        table = np.full((len(group), _BUCKETS + 1), np.inf)
        for row, option in zip(table, group, strict=True):
            steps = int(np.ceil((option.cost - least) / step - 1e-9))
            if steps <= _BUCKETS:
                row[steps:] = best[: _BUCKETS + 1 - steps] + option.loss
        picks.append(table.argmin(0))
        best = table.min(0)
    at, taken = _BUCKETS, []
    for group, least, pick in reversed(list(zip(groups, cheapest, picks, strict=True))):
        option = group[pick[at]]
        taken.append(option)
        at -= int(np.ceil((option.cost - least) / step - 1e-9))
    return taken[::-1]
