"""A study's cells on a Ray cluster: Ray places them and does those of a lost worker again.

Nodes share the study's folder under one path. What crosses is JSON text.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeft.errors import UserError
from edgeft.progress import say
from edgeft.study import cell as work
from edgeft.study.cell import FAILED, Order, Outcome
from edgeft.study.stage import Plan, Tell, attempt

_HERE = "local"
_PATIENCE_S = 10.0


def execute(this: Plan, tell: Tell, address: str | None = None) -> None:
    """Do what is left of the plan; see :func:`edgeft.study.stage.execute`.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(f"Ray is not installed ({error}): pip install 'edgeft[ray]'") from error
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what its workers say
        _connected(ray, this, tell, address)


def _connected(ray: Any, this: Plan, tell: Tell, address: str | None) -> None:
    ours = not ray.is_initialized()
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    if ours:
        address = address or os.environ.get("RAY_ADDRESS") or _HERE
        if address == _HERE:  # what is started here tells nobody
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            _reach(address)
            ray.init(address=address, include_dashboard=False)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"no Ray cluster at {address}: {reason}") from error
    try:
        _execute(ray, this, tell)
    finally:
        if ours:
            ray.shutdown()


def _reach(address: str) -> None:
    """Where nobody answers Ray tries for several minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), _PATIENCE_S).close()


def _execute(ray: Any, this: Plan, tell: Tell) -> None:
    _check_room(ray, this)
    wanted, here = this.study.resources, str(Path.cwd())
    given = {
        "num_cpus": wanted.cpus,
        "num_gpus": wanted.gpus,
        "max_retries": max(1, this.study.retries),  # of a worker that is lost
    }
    task, at_work = ray.remote(**given)(_work), dict[Any, str]()

    def begin(i: str) -> None:
        order = json.dumps(asdict(this.orders[i]))
        at_work[task.options(name=i).remote(order, this.study.retries, here)] = i

    held: dict[str, list[str]] = {}  # until the cell is done whose base they take over
    for cell in (cell for cell in this.cells if cell.id in this.left):
        if cell.shares in this.left:
            held.setdefault(str(cell.shares), []).append(cell.id)
        else:
            begin(cell.id)
    while at_work:
        [ready], _ = ray.wait(list(at_work), num_returns=1)
        i = at_work.pop(ready)
        try:
            found = Outcome(**json.loads(ray.get(ready)))
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"its worker was lost: {lines[0]}"
            if isinstance(error, ray.exceptions.RayTaskError):  # it cannot even begin there
                reason = lines[-1]
            found = Outcome(i, FAILED, reason, 0.0, 1, this.orders[i].fingerprint)
        tell(found)
        for waiting in held.pop(i, []):
            begin(waiting)


def _check_room(ray: Any, this: Plan) -> None:
    """Ray would wait for ever for what no node has."""
    wanted = this.study.resources
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
    if not any(cpus >= wanted.cpus and gpus >= wanted.gpus for cpus, gpus in has):
        there = ", ".join(f"{cpus:g} CPU and {gpus:g} GPU" for cpus, gpus in sorted(set(has)))
        raise UserError(
            f"a cell wants {wanted.cpus:g} CPU and {wanted.gpus:g} GPU (resources), and no node of "
            f"the cluster has that; there are nodes with {there}"
        )
    cpus, gpus = (sum(counts) for counts in zip(*has, strict=True))
    say(f"· Ray: {cpus:g} CPUs, {gpus:g} GPUs")


def _work(given: str, retries: int, folder: str) -> str:
    """The worker's side. ``folder``: where the command was given, which relative paths begin at."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
    found = attempt(Order(**json.loads(given)), retries, work.do)
    return json.dumps(asdict(found))
