"""How much each group of a model's matrices adds to the held-out loss when it is rounded.

The model computes with what a target leaves of all its matrices; then one group after the other is
given back its own weights and, where that is something else, the coarsest type that it may get.
Between these the loss follows the squared error of the weights, to second order (as in HAWQ-V2,
Dong et al. 2019, arXiv 1911.03852). That fails where a type is the grid that the untuned weights lie
on: its error is small, and it is the very update that training made. So every type is measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeft import child
from edgeft.errors import UserError
from edgeft.prompts import Item, read_items
from edgeft.rounding import block_size, rounded
from edgeft.train.fast import quicken
from edgeft.train.heldout import heldout_loss
from edgeft.train.methods import load, training_dtype
from edgeft.train.rounded import read_weights
from edgeft.train.settings import TrainSettings

QUESTIONS = 128
_EVERY = 8  # of that many rows one tells the error of a matrix
_COARSER = 1.5  # times the error: the loss is measured there, and not drawn out to it

Types = Mapping[str, str]  # a matrix by the model's name, and ggml's name of its type


@dataclass(frozen=True)
class _Opened:
    """A model, its own weights in float32, and where it has them.

    It computes with what is put there.
    """

    model: Any
    weights: Mapping[str, Tensor]
    places: Mapping[str, Tensor]

    def loss(self, items: Sequence[Item]) -> float:
        return heldout_loss(self.model, items, pad=0)

    def put(self, types: Types) -> None:
        """Let it compute with what these types leave of these matrices; of ``""`` all."""
        for key, kind in types.items():
            weight = self.weights[key]
            self.places[key].copy_(rounded(weight, kind, half=True) if kind else weight)


def measure(
    opened: _Opened,
    items: Sequence[Item],
    groups: Mapping[str, Types],
    kinds: Sequence[str],
    known: Container[str] = (),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Held-out losses, mean nats a gold token, and squared errors of the weights.

    Args:
        groups: as the target stores them now.
        kinds: what a group may get instead; one whose blocks do not fill its rows is left out.
        known: names that need not be measured again.

    Yields:
        A name with its facts. First ``""``: the ``loss`` of all as they are now, and ``own``, with
        all their own weights. Then a kind: the ``loss`` with it in every group that it fits. Then
        a group: ``loss`` with its own weights instead, ``error`` now, ``errors`` by kind, and,
        where the coarsest kind is clearly coarser than what is there, ``coarsest`` with its
        ``kind`` and ``loss``.
    """
    own_loss = None if "" in known else opened.loss(items)
    for group in groups.values():
        opened.put(group)
    if own_loss is not None:
        yield "", {"loss": opened.loss(items), "own": own_loss}
    for kind in kinds:
        fitted = [group for group in groups.values() if _fits(opened, group, kind)]
        if kind in known or not fitted:
            continue
        for group in fitted:
            opened.put(dict.fromkeys(group, kind))
        yield kind, {"loss": opened.loss(items)}
        for group in fitted:
            opened.put(group)
    for name, group in groups.items():
        if name in known:
            continue
        own = [opened.weights[key] for key in group]
        fitting = [kind for kind in kinds if _fits(opened, group, kind)]
        errors = {kind: sum(_error(w, kind) for w in own) for kind in fitting}
        now = sum(_error(opened.weights[key], kind) for key, kind in group.items())
        opened.put(dict.fromkeys(group, ""))
        facts: dict[str, Any] = {"loss": opened.loss(items), "error": now, "errors": errors}
        coarsest = max(errors, key=lambda kind: errors[kind], default="")
        if coarsest and errors[coarsest] > _COARSER * now:
            opened.put(dict.fromkeys(group, coarsest))
            facts["coarsest"] = {"kind": coarsest, "loss": opened.loss(items)}
        opened.put(group)
        yield name, facts


def _open(folder: Path, keys: Iterable[str], dtype: str) -> _Opened:
    model = load(folder, TrainSettings(), training_dtype(dtype)).requires_grad_(False)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    quicken(model)
    places = dict(model.named_parameters(remove_duplicate=False))
    return _Opened(model, read_weights(folder, keys), places)


def _fits(opened: _Opened, group: Types, kind: str) -> bool:
    return all(opened.weights[key].shape[1] % block_size(kind) == 0 for key in group)


def _error(weight: Tensor, kind: str) -> float:
    """Sum of squares of what rounding changes, in a share of the rows."""
    if not kind:
        return 0.0
    rows = weight[::_EVERY].contiguous()
    return float((rounded(rows, kind, half=True) - rows).square().sum(dtype=torch.float64))


def _work(request: Any, emit: Callable[..., None]) -> None:
    folder, items = Path(request["folder"]), read_items(Path(request["heldout"]))[:QUESTIONS]
    if not items:
        raise UserError("types are chosen by held-out questions and there are none")
    if "plan" in request:
        opened = _open(folder, request["plan"], request["dtype"])
        opened.put(request["plan"])
        emit("loss", loss=opened.loss(items))
        return
    groups = request["groups"]
    opened = _open(folder, [key for group in groups.values() for key in group], request["dtype"])
    for name, facts in measure(opened, items, groups, request["kinds"], request["known"]):
        emit("group", name=name, **facts)


if __name__ == "__main__":
    child.serve(_work)
