"""More than one process, started by ``torchrun`` or ``accelerate launch``.

Rank 0 does everything as if it were alone, and is the only one that writes or prints; each other
rank starts a training child and waits for it. The children find each other by the launcher's
environment variables, and rank 0's tells the others what to train. Light: no torch until then.
"""

from __future__ import annotations

import json
import os
from typing import Any

from edgeft import child
from edgeft.allocator import allocator

WORKER = "edgeft.train.worker"
_NOTHING = {"nothing": True}  # to train: it was done before


def is_follower() -> bool:
    """Whether another process does everything but the training."""
    return os.environ.get("RANK", "0") != "0"


def follow() -> None:
    """Train along with rank 0 until it is done.

    Raises:
        UserError: training failed here.
    """
    child.run(WORKER, _NOTHING, allocator())


def release() -> None:
    """Rank 0 trains nothing: the others need not wait."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        child.run(WORKER, _NOTHING, allocator())


def agreed(request: dict[str, Any]) -> dict[str, Any] | None:
    """In a training child: rank 0's request, or None if there is nothing to train."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        request = _broadcast(request)
    return None if request == _NOTHING else request


def _broadcast(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    text = json.dumps(request).encode()
    size = torch.tensor([len(text)], device=state.device)
    torch.distributed.broadcast(size, src=0)
    data = torch.zeros(int(size), dtype=torch.uint8, device=state.device)
    if state.is_main_process:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    torch.distributed.broadcast(data, src=0)
    rank0: dict[str, Any] = json.loads(bytes(data.tolist()))
    return rank0
