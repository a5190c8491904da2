"""`edgeft study --executor ray` on a local Ray with two workers; one of them is killed at work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from study_runs import ENVIRONMENT, answers, command, outcomes, runs, study, write_study

from edgeft.errors import UserError
from edgeft.study import on_ray, settings, stage
from edgeft.study.cell import Outcome

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray with two CPUs, that stands in another folder."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@dataclass
class Watched:
    """A study on the cluster, and what was seen while it was at work."""

    out: Path
    done: subprocess.CompletedProcess[str]
    before_base: list[str] = field(default_factory=list)
    together: bool = False
    killed: int = 0
    when_killed: list[int] = field(default_factory=list)


def watch(process: subprocess.Popen[str], seen: Watched) -> None:
    base, lora, full = (
        seen.out / "runs/model/vowels" / name for name in ("zero-shot", "lora-s0", "full-s0")
    )
    while process.poll() is None:
        there = [cell.name for cell in (lora, full) if cell.exists()]
        ended = outcomes(seen.out)
        if base.name not in ended:
            seen.before_base += there
        seen.together |= len(there) == 2 and len(ended) == 1
        if not seen.killed and (lora / "merged").exists():
            seen.when_killed = trained(lora)
            seen.killed = int((lora / ".lock").read_text())
            os.kill(seen.killed, signal.SIGKILL)
        time.sleep(0.02)


def trained(cell: Path) -> list[int]:
    """When it was."""
    return [(cell / name / "stage.json").stat().st_mtime_ns for name in ("train", "merged")]


@pytest.fixture(scope="module")
def watched(
    cluster: str, tiny: Path, vowels: Path, tmp_path_factory: pytest.TempPathFactory
) -> Watched:
    """Two methods, by relative paths; the worker of one is killed once it has trained."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "model").symlink_to(tiny)
    methods = ["lora", "full"]
    write_study(folder / "x.yaml", Path("./model"), vowels, methods=methods, seeds=[0])
    arguments = command(Path("x.yaml"), Path("x"), "--json", "--executor", "ray")
    process = subprocess.Popen(
        [*arguments, "--address", cluster],
        env={**ENVIRONMENT, "RAY_AUTH_MODE": "token"},  # as the cluster has it by default
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
    )
    seen = Watched(folder / "x", subprocess.CompletedProcess([], 0))
    try:
        watch(process, seen)
    finally:
        process.kill()
    assert process.stdout
    seen.done.returncode, seen.done.stdout = process.returncode, process.stdout.read()
    seen.done.stderr = (folder / "stderr").read_text()
    assert process.returncode == 0, seen.done.stderr
    return seen


@pytest.mark.slow
def test_the_answers_are_those_of_one_machine(watched: Watched, whole_study: Path) -> None:
    for name, files in (("zero-shot", 2), ("lora-s0", 5), ("full-s0", 4)):
        ours, theirs = (answers(runs(out) / name) for out in (watched.out, whole_study))
        assert ours == theirs and len(ours) == files


@pytest.mark.slow
def test_standard_output_is_json_alone(watched: Watched) -> None:
    data = json.loads(watched.done.stdout)
    assert [row["method"] for row in data["rows"]] == ["zero-shot", "lora", "full"]
    assert [cell["state"] for cell in data["cells"]] == ["done"] * 3
    assert "worker" in watched.done.stderr and "\x1b" not in watched.done.stderr


@pytest.mark.slow
def test_base_is_done_first_and_then_two_cells_at_a_time(watched: Watched) -> None:
    assert watched.before_base == [] and watched.together
    for name in ("lora-s0", "full-s0"):
        result = "bench/host/base/results.jsonl"
        assert (runs(watched.out) / name / result).samefile(
            runs(watched.out) / "zero-shot" / result
        )


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_cell_goes_on(watched: Watched) -> None:
    assert watched.killed not in (0, os.getpid())
    cell = runs(watched.out) / "lora-s0"
    assert trained(cell) == watched.when_killed
    assert outcomes(watched.out)["lora-s0"]["state"] == "done"
    assert int((cell / ".lock").read_text()) != watched.killed


@pytest.mark.slow
def test_what_is_done_needs_no_cluster(watched: Watched) -> None:
    done = study(
        Path("x.yaml"), Path("x"), "--executor", "ray", "--address", "none", cwd=watched.out.parent
    )
    assert done.returncode == 0 and "3 of 3 cells: up to date" in done.stderr


def plan(file: Path, resources: str, out: Path) -> stage.Plan:
    file.write_text(f"models: [smollm2-135m]\nresources: {resources}\n")
    return stage.plan(out, settings.load(file))


@pytest.mark.slow
@pytest.mark.parametrize("resources", ["{cpus: 3}", "{gpus: 1}", "{cpus: 1, gpus: 0.5}"])
def test_what_no_node_has_is_refused(resources: str, cluster: str, tmp_path: Path) -> None:
    given = plan(tmp_path / "x.yaml", resources, tmp_path / "x")
    with pytest.raises(UserError, match="no node of the cluster has that; there are nodes with 2"):
        on_ray.execute(given, lambda _: None)


def told_of(
    work: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Outcome]:
    """How the cells of a study ended, whose worker's side is ``work``."""
    monkeypatch.setattr(on_ray, "_work", work)
    told: list[Outcome] = []
    on_ray.execute(plan(folder / "x.yaml", "{}", folder / "x"), told.append)
    assert [found.id.rpartition("/")[2] for found in told] == ["zero-shot", "lora-s0"]
    assert {found.state for found in told} == {"failed"}
    return told


@pytest.mark.slow
def test_a_worker_that_is_always_lost_is_a_failed_cell(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells that wait for its base are tried all the same."""

    def work(*_: object) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    for found in told_of(work, tmp_path, monkeypatch):
        assert str(found.error).startswith("its worker was lost: ")


@pytest.mark.slow
def test_a_node_that_cannot_begin_says_why(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> str:
        raise ModuleNotFoundError("No module named 'edgeft'")

    for found in told_of(work, tmp_path, monkeypatch):
        assert found.error == "ModuleNotFoundError: No module named 'edgeft'"


@pytest.mark.parametrize(
    ("address", "reason"),
    [("127.0.0.1:1", "Connection refused"), ("none", "Invalid address format: none")],
)
def test_no_cluster_at_the_address(
    address: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    given = plan(tmp_path / "x.yaml", "{}", tmp_path / "x")
    with pytest.raises(UserError, match=f"^no Ray cluster at {address}: .*{reason}"):
        on_ray.execute(given, lambda _: None, address)


def test_a_ray_of_our_own_tells_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def init(**said: object) -> None:
        asked.update(said, usage=os.environ.get("RAY_USAGE_STATS_ENABLED"))
        raise ConnectionError("as far as this test goes\nand no further")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for name in ("RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    given = plan(tmp_path / "x.yaml", "{}", tmp_path / "x")
    with pytest.raises(UserError, match="^no Ray cluster at local: as far as this test goes$"):
        on_ray.execute(given, lambda _: None)
    assert asked["address"] == "local" and asked["usage"] == "0"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UserError, match="^no Ray cluster at auto: as far"):
        on_ray.execute(given, lambda _: None)
