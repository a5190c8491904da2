"""What a study would take: the cells that are left, about how long, and how much disk.

Cells that were done here tell for those like them. For the others: arithmetic operations over this
machine's measured matrix rate, with factors that were measured on 2 cores (README); a GPU is several
times as fast as that says.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from edgeft import catalog, model
from edgeft.catalog import Target
from edgeft.progress import byte_size
from edgeft.report import terminal
from edgeft.report.figures import NONE, Table
from edgeft.study import cell as work
from edgeft.study.settings import Cell
from edgeft.study.stage import Plan

# Operations a parameter and token: forward 2, the input's gradient 2, the weights' 2 (full only).
_OPERATIONS = {"full": 6.0, "lora": 4.0, "dora": 4.0, "qlora": 4.0}
# Of the float32 matrix rate, what training reaches (bfloat16 is faster than float32 where the
# processor has it); and tokens that one question is, roughly.
_EFFICIENCY = {"full": 0.6, "lora": 1.2, "dora": 0.8, "qlora": 0.7}
_TOKENS, _SCORED = 130, 150
_RUNTIME_RATE = 1.0  # of the float32 matrix rate, scoring in a runtime
_EXPORT_S = 25.0  # a target: loading, writing, verifying
_BITS = {"fp32": 32.0, "int8": 8.5, "int4": 5.5}  # of ONNX; a GGUF's type says them
_QUESTIONS = 1000, 7000  # where a task does not say how many there are: scored, trained on
_MATRIX, _ROUNDS = 1024, 4


@dataclass(frozen=True)
class Guess:
    """What one cell would take; None: not known before the model is here.

    Attributes:
        basis: ``measured`` on cells like it, or ``computed``.
    """

    id: str
    state: str
    seconds: float | None
    bytes: int | None
    basis: str


def estimate(plan: Plan) -> list[Guess]:
    """A guess for every cell; those that are done take nothing more."""
    rate = _matrix_rate() if plan.left else 0.0
    sizes: dict[str, int | None] = {}
    guesses = []
    for cell in plan.cells:
        outcome = work.outcome(plan.path, cell.id)
        if cell.id not in plan.left:
            guesses.append(Guess(cell.id, work.DONE, 0.0, 0, "done"))
            continue
        reference = cell.recipe.model
        if reference not in sizes:
            sizes[reference] = parameters(reference)
        seconds, basis = _like(plan, cell), "measured"
        if seconds is None:
            seconds, basis = _seconds(cell, sizes[reference], rate), "computed"
        state = outcome.state if outcome.state == work.FAILED else work.WAITING
        guesses.append(Guess(cell.id, state, seconds, _bytes(cell, sizes[reference]), basis))
    return guesses


def parameters(reference: str) -> int | None:
    """How many weights a model on this machine has; None for one that is not here yet."""
    place = model.source(reference)
    if isinstance(place, str):
        try:
            from huggingface_hub import snapshot_download

            place = Path(snapshot_download(place, local_files_only=True))
        except Exception:  # not here, or no hub client: nothing to say yet
            return None
    try:
        return _in_gguf(place) if place.is_file() else _in_folder(place)
    except (OSError, ValueError, IndexError):  # damaged; the cell will say how
        return None


def _in_gguf(path: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)


def _in_folder(place: Path) -> int | None:
    total = 0
    for path in place.glob("*.safetensors"):
        with path.open("rb") as data:  # a length, then JSON
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        shapes = [facts["shape"] for name, facts in header.items() if name != "__metadata__"]
        total += sum(math.prod(shape) for shape in shapes)
    return total or None


def _like(plan: Plan, cell: Cell) -> float | None:
    """Seconds of the cells that were done with the same model, task and method."""
    seconds = []
    for other in plan.cells:
        same = (other.model, other.task, other.method) == (cell.model, cell.task, cell.method)
        found = work.outcome(plan.path, other.id)
        if same and found.state == work.DONE:
            seconds.append(found.seconds)
    return statistics.mean(seconds) if seconds else None


def _seconds(cell: Cell, size: int | None, rate: float) -> float | None:
    if size is None:
        return None
    task, train = cell.recipe.task, cell.recipe.train
    asked = _at_most(task.limit, task.evaluation or _QUESTIONS[0])
    scoring = 2.0 * size * asked * _SCORED / rate
    total = scoring + _EXPORT_S * len(cell.recipe.export.targets)
    for device in cell.devices:  # as if each were this machine
        share = _at_most(device["said"].get("limit"), asked) / asked
        total += len(device["targets"]) * share * scoring / _RUNTIME_RATE / 2
    if "tuned" not in cell.weights:
        return total
    examples = train.epochs * _at_most(task.limit, task.train or _QUESTIONS[1])
    if train.max_steps:
        a_step = train.batch_size * train.gradient_accumulation_steps
        examples = min(examples, train.max_steps * a_step)
    operations = _OPERATIONS[train.method] * size * examples * _TOKENS
    return total + scoring + operations / (rate * _EFFICIENCY[train.method])


def _at_most(limit: int | None, number: int) -> int:
    return number if limit is None else min(limit, number)


def _bytes(cell: Cell, size: int | None) -> int | None:
    if size is None:
        return None
    bits = [_target_bits(target) for target in catalog.find_targets(cell.recipe.export.targets)]
    # The weights as a folder (merged: float32) and in 16 bits, and each target's file.
    folder = 32 if "tuned" in cell.weights else 16
    whole = folder + 16 + sum(bits)
    if cell.recipe.train.method == "full" and "tuned" in cell.weights:
        whole += 32  # training's own copy is another name of the same file, its start is not
    return round(size * whole / 8)


def _target_bits(target: Target) -> float:
    kind = str(target.settings.get("ftype") or target.settings.get("precision") or "F16")
    bits = re.search(r"\d+", kind)
    if kind in _BITS or bits is None:
        return _BITS.get(kind, 16.0)
    return float(bits[0]) + (0.7 if int(bits[0]) < 16 else 0.0)  # scales, and what is not rounded


def _matrix_rate() -> float:
    """Operations a second in a float32 product, as fast as numpy makes it here."""
    matrix = np.random.default_rng(0).random((_MATRIX, _MATRIX), np.float32)
    matrix @ matrix
    best = np.inf
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return float(2 * _MATRIX**3 / best)


def show(plan: Plan, guesses: list[Guess], as_json: bool) -> None:
    """Print the cells and what they add up to."""
    if as_json:
        print(json.dumps([asdict(guess) for guess in guesses], indent=2))
        return
    rows = [
        [g.id, g.state, _duration(g.seconds), _size(g.bytes), g.basis if g.seconds else ""]
        for g in guesses
    ]
    console = Console()
    table = Table("Cells", "", ["", "state", "time", "disk", ""], rows, (2, 1))
    console.print(terminal.grid(table, console.width))
    left = [g for g in guesses if g.state != work.DONE]
    unknown = [g.id for g in left if g.seconds is None]
    seconds, size = sum(g.seconds or 0 for g in left), sum(g.bytes or 0 for g in left)
    print(
        f"{len(left)} of {len(guesses)} cells to do: about {_duration(seconds)} on this machine's "
        f"CPU, one after the other, and {byte_size(size)} of disk, of which "
        f"{byte_size(_free(plan.path))} are free"
    )
    if unknown:
        print(f"not counted, since their model is not here yet: {', '.join(unknown)}")


def _free(place: Path) -> int:
    """Bytes on the disk of a folder that need not be there yet."""
    there = next(path for path in (place.resolve(), *place.resolve().parents) if path.exists())
    return shutil.disk_usage(there).free


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(size: int | None) -> str:
    return NONE if size is None else byte_size(size)
