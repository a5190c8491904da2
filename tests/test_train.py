"""Training on a tiny random Llama: the log, resuming, and what users see when it fails."""

from __future__ import annotations

import json
import os
import pickletools
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from train_runs import FACTS, SETTINGS, check_same, curve, items, llama, plain, same_adapter, silent
from transformers import LlamaForCausalLM

from edgeft import train as training
from edgeft.errors import UserError
from edgeft.prompts import write_items
from edgeft.train import worker
from edgeft.train.record import last_checkpoint
from edgeft.train.settings import TrainSettings


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Such small tensors take longer on several threads, here and in children."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().to(torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_items(folder / "train.jsonl", items(38, 1))  # 10 steps, the last of them smaller
    write_items(folder / "heldout.jsonl", items(10, 2))
    words = Tokenizer(WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    (folder / "tokenizer").mkdir()
    words.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


Fit = Callable[..., Path]


@pytest.fixture
def fit(base: Path, data: Path, tmp_path: Path) -> Fit:
    """Train in this process: ``fit(settings, seed, name)`` is the folder with the result."""

    def run(
        settings: TrainSettings = SETTINGS,
        seed: int = 0,
        name: str = "out",
        emit: Callable[..., None] = silent,
    ) -> Path:
        out = tmp_path / name
        worker.fit(base, data, out, settings, FACTS, seed, emit)
        return out

    return run


def test_training_learns_and_says_how(fit: Fit) -> None:
    told: list[dict[str, Any]] = []
    out = fit(replace(SETTINGS, epochs=6), emit=lambda event, **f: told.append(f))
    summary = json.loads((out / "train.json").read_text())
    steps = [step for step, _ in curve(out)]
    assert steps == list(range(1, 61))
    assert [(t["done"], t["total"]) for t in told] == [(s, 60) for s in steps]
    assert "tok/s" in told[-1]["text"]
    points = summary["heldout"]
    assert [step for step, _, _ in points] == [0, 15, 30, 45, 60]
    assert points[-1][1] < 0.8 * points[0][1]
    assert summary["final_loss"] == curve(out)[-1][1] < 0.8 * curve(out)[0][1]
    tokens = sum(len(i.prompt) + len(i.gold) for i in items(38, 1))
    assert summary["tokens"] == 6 * tokens and summary["examples"] == 38
    assert summary["steps"] == 60 and summary["epochs"] == 6
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    assert sum(w.numel() for w in weights.values()) == summary["trainable_parameters"]
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert not (out / "checkpoints").exists()


def test_the_heldout_curve_is_the_models(fit: Fit, base: Path) -> None:
    from peft import PeftModel

    out = fit(replace(SETTINGS, dtype="float32"))
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    held = items(10, 2)
    (_, before, _), *_, (_, after, _) = json.loads((out / "train.json").read_text())["heldout"]
    total, tokens = plain(model, held)
    assert before == pytest.approx(total / tokens, rel=1e-4)
    total, tokens = plain(PeftModel.from_pretrained(model, out / "adapter"), held)
    assert after == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_curve(fit: Fit) -> None:
    first, second, other = (fit(seed=seed, name=f"{i}") for i, seed in enumerate((5, 5, 6)))
    assert curve(first) == curve(second) != curve(other)
    assert same_adapter(first, second) and not same_adapter(first, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "killed_at"),
    [
        (SETTINGS, 2),  # before the first checkpoint
        (SETTINGS, 8),
        (SETTINGS, 17),  # in the second epoch
        (replace(SETTINGS, max_steps=5), 5),  # after the last step, in the middle of an epoch
        (replace(SETTINGS, dropout=0.3, dtype="float32"), 14),  # random numbers go on too
    ],
)
def test_going_on_is_as_if_never_cut_off(fit: Fit, settings: TrainSettings, killed_at: int) -> None:
    """Bitwise, on one machine."""
    whole = fit(settings, name="whole")

    class Cut(Exception):
        pass

    def cut(event: str, **fields: Any) -> None:
        if fields["done"] == killed_at:
            raise Cut

    with pytest.raises(Cut):
        fit(settings, name="cut", emit=cut)
    again = fit(settings, name="cut")
    check_same(whole, again)


@pytest.mark.slow
def test_a_half_written_checkpoint_is_passed_over(fit: Fit, tmp_path: Path) -> None:
    whole = fit(name="whole")

    class Cut(Exception):
        pass

    def cut(event: str, **fields: Any) -> None:
        if fields["done"] == 7:
            raise Cut

    with pytest.raises(Cut):
        fit(name="cut", emit=cut)
    checkpoints = tmp_path / "cut" / "checkpoints"
    newest, step = last_checkpoint(checkpoints)
    assert newest and step == 6
    # As a kill leaves it while the Trainer writes: the adapter cut off, nothing behind it.
    half = checkpoints / "checkpoint-7"
    half.mkdir()
    weights = (newest / "adapter_model.safetensors").read_bytes()
    (half / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "lo')
    check_same(whole, fit(name="cut"))


def test_checkpoints_are_small_and_hold_no_python_objects(fit: Fit, tmp_path: Path) -> None:
    def look(event: str, **fields: Any) -> None:
        if fields["done"] == 13:
            for path in (tmp_path / "out" / "checkpoints").rglob("*.*"):
                if path.suffix in (".pt", ".pth", ".bin"):
                    assert named_in(path) <= {
                        "torch",
                        "torch._utils",
                        "numpy",
                        "collections",
                        *CODECS,
                    }
            found = sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir())
            assert found == ["checkpoint-12", "checkpoint-9"]
            assert not list(tmp_path.rglob("training_args.bin"))
            assert not list(tmp_path.rglob("model.safetensors"))
            looked.append(True)

    looked: list[bool] = []
    fit(emit=look)
    assert looked


CODECS = {"_codecs", "numpy.core.multiarray", "numpy._core.multiarray"}


def named_in(path: Path) -> set[str]:
    """Modules whose names stand in what torch wrote; looked at, not loaded."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        operations = list(pickletools.genops(archive.read(name)))
    assert not [op for op, _, _ in operations if op.name == "STACK_GLOBAL"]
    return {str(arg).split()[0] for op, arg, _ in operations if op.name == "GLOBAL"}


def children() -> Iterator[psutil.Process]:
    for child in psutil.Process().children(recursive=True):
        if "edgeft.train.worker" in child.cmdline():
            yield child


@pytest.mark.slow
def test_a_real_kill_minus_9(base: Path, data: Path, tmp_path: Path) -> None:
    """Bitwise too."""
    settings = replace(SETTINGS, epochs=8, checkpoint_steps=1)
    silent_update = lambda done, total, text: None  # noqa: E731
    training.train(base, data, tmp_path / "whole", settings, FACTS, 0, silent_update)
    kills = 0
    for delay in (0.0, 0.003, 0.011):

        def kill(done: int, total: int, text: str, delay: float = delay) -> None:
            nonlocal kills
            if done > 20 * (kills + 1):
                time.sleep(delay)
                for child in children():
                    os.kill(child.pid, signal.SIGKILL)
                kills += 1

        with pytest.raises(UserError, match="killed by SIGKILL"):
            training.train(base, data, tmp_path / "cut", settings, FACTS, 0, kill)
    assert kills >= 3
    training.train(base, data, tmp_path / "cut", settings, FACTS, 0, silent_update)
    check_same(tmp_path / "whole", tmp_path / "cut")


def test_a_loss_that_is_not_finite_is_one_clear_line(fit: Fit) -> None:
    with pytest.raises(UserError, match=r"at step \d+: try a train\.lr far below 1e\+30"):
        fit(replace(SETTINGS, lr=1e30, warmup_ratio=0.0))


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line(base: Path, data: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.json.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write to .*: the disk is full"):
        training.train(base, data, out, SETTINGS, FACTS, 0, lambda done, total, text: None)


def test_what_cannot_be_trained_is_one_clear_line(fit: Fit, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="names nowhere, which no linear layer of .* is called: it has .*q_proj"
    ):
        fit(replace(SETTINGS, target_modules="nowhere"))
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"train\.jsonl is empty"):
        worker.fit(tmp_path, tmp_path, tmp_path, SETTINGS, FACTS, 0, silent)
    with pytest.raises(UserError, match="cannot train .*no-model"):
        worker.fit(tmp_path / "no-model", data, tmp_path, SETTINGS, FACTS, 0, silent)


def test_training_is_light_until_it_starts() -> None:
    import subprocess
    import sys

    code = "import edgeft.train, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
