"""A study's cells on a Ray cluster: Ray places them, retries lost workers, and keeps the order.

Nodes share the study's folder under one path. What crosses is JSON text.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from edgeft.errors import UserError
from edgeft.progress import say
from edgeft.study import cell as work
from edgeft.study.cell import FAILED, Order, Outcome
from edgeft.study.stage import Plan, Tell, attempt


def execute(this: Plan, tell: Tell, address: str | None = None) -> None:
    """Do what is left of the plan; see :func:`edgeft.study.stage.execute`.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(f"Ray is not installed ({error}): pip install 'edgeft[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, log_to_driver=True, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"no Ray cluster at {address or 'this machine'}: {reason}") from error
    try:
        _execute(ray, this, tell)
    finally:
        if ours:
            ray.shutdown()


def _execute(ray: Any, this: Plan, tell: Tell) -> None:
    cells = {cell.id: cell for cell in this.cells}
    _check_room(ray, this)
    waiting: dict[Any, str] = {}
    by_id: dict[str, Any] = {}
    for i in this.left:
        shares = cells[i].shares
        after = [by_id[shares]] if shares in by_id else []
        task = ray.remote(_work).options(
            name=i,
            num_cpus=this.study.resources.cpus,
            num_gpus=this.study.resources.gpus if "tuned" in cells[i].weights else 0,
            max_retries=max(1, this.study.retries),  # of a worker that is lost
        )
        given = json.dumps(asdict(this.orders[i]))
        by_id[i] = task.remote(given, this.study.retries, *after)
        waiting[by_id[i]] = i
    while waiting:
        [ready], _ = ray.wait(list(waiting), num_returns=1)
        i = waiting.pop(ready)
        try:
            found = Outcome(**json.loads(ray.get(ready)))
        except ray.exceptions.RayError as error:
            reason = f"its worker was lost: {str(error).strip().splitlines()[0]}"
            found = Outcome(i, FAILED, reason, 0.0, 1, this.orders[i].fingerprint)
        tell(found)


def _check_room(ray: Any, this: Plan) -> None:
    """Ray would wait for ever for what no node has."""
    cluster, wanted = ray.cluster_resources(), this.study.resources
    for name, count in (("CPU", wanted.cpus), ("GPU", wanted.gpus)):
        most = max((node["Resources"].get(name, 0) for node in ray.nodes()), default=0)
        if count > most:
            raise UserError(
                f"a cell wants {count:g} {name} (resources), and no node of the cluster has more "
                f"than {most:g}"
            )
    say(f"· Ray: {cluster.get('CPU', 0):g} CPUs, {cluster.get('GPU', 0):g} GPUs")


def _work(given: str, retries: int, *_: Any) -> str:
    """The worker's side. What stands behind the arguments is what had to be done first."""
    read = json.loads(given)
    found = attempt(Order(**read), retries, work.do)
    return json.dumps(asdict(found))
