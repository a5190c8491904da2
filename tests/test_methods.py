"""Full, LoRA, DoRA and QLoRA on a tiny random Llama: what is trained, kept and merged."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from train_runs import FACTS, SETTINGS, check_same, curve, items, plain, silent
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from edgeft.errors import UserError
from edgeft.exporters import merge
from edgeft.prompts import write_items
from edgeft.train import methods, worker
from edgeft.train.heldout import heldout_loss
from edgeft.train.record import last_checkpoint
from edgeft.train.settings import TrainSettings

FLOAT = replace(SETTINGS, epochs=3, dtype="float32")
METHODS = {
    "full": replace(FLOAT, method="full", lr=2e-3),
    "lora": FLOAT,
    "dora": replace(FLOAT, method="dora"),
    "qlora": replace(FLOAT, method="qlora"),
    "rslora": replace(FLOAT, rslora=True),
    "pissa": replace(FLOAT, init="pissa"),
    "pissa_niter": replace(FLOAT, init="pissa_niter_4", rslora=True),
    "olora": replace(FLOAT, init="olora"),
    "orthogonal": replace(FLOAT, init="orthogonal"),
    "recomputing": replace(FLOAT, activation_checkpointing=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 64 and more: NF4 has blocks of 64."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(**shape, **heads, pad_token_id=2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_items(folder / "train.jsonl", items(40, 1))
    write_items(folder / "heldout.jsonl", items(10, 2))
    (folder / "tokenizer").mkdir()
    words = Tokenizer(WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    words.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def loss_of(model: Any) -> float:
    total, tokens = plain(model.eval(), items(10, 2))
    return total / tokens


def points(out: Path) -> list[list[Any]]:
    found: list[list[Any]] = json.loads((out / "train.json").read_text())["heldout"]
    return found


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("full", "lora", "qlora") else pytest.param(name, marks=pytest.mark.slow)
        for name in METHODS
    ],
)
def test_it_learns_and_what_is_saved_is_what_was_trained(
    name: str, base: Path, data: Path, tmp_path: Path
) -> None:
    settings = METHODS[name]
    worker.fit(base, data, tmp_path, settings, FACTS, 0, silent)
    (_, before, _), *_, (_, after, _) = points(tmp_path)
    assert after < 0.8 * before
    kept = json.loads((tmp_path / "train.json").read_text())["kept_step"]
    lowest = min(points(tmp_path)[1:], key=lambda point: point[1])
    assert kept == lowest[0]
    if settings.method == "full":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    else:
        plain_base = methods.load(base, settings, torch.float32)  # QLoRA's in NF4
        model = PeftModel.from_pretrained(plain_base, tmp_path / "adapter")
    assert loss_of(model) == pytest.approx(lowest[1], rel=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("log.jsonl", "train.json"),
        "model" if settings.method == "full" else "adapter",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora", "dora", "qlora"])
def test_in_bfloat16_it_learns_as_in_float32(
    name: str, base: Path, data: Path, tmp_path: Path
) -> None:
    for dtype in ("float32", "bfloat16"):
        settings = replace(METHODS[name], dtype=dtype)
        worker.fit(base, data, tmp_path / dtype, settings, FACTS, 0, silent)
    exact, found = (points(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert [p[0] for p in found] == [p[0] for p in exact]
    assert [p[1] for p in found] == pytest.approx([p[1] for p in exact], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "dora", "qlora", "pissa"])
def test_each_goes_on_as_if_never_cut_off(
    name: str, base: Path, data: Path, tmp_path: Path
) -> None:
    settings = replace(METHODS[name], checkpoint_steps=3)

    class Cut(Exception):
        pass

    def cut(event: str, **fields: Any) -> None:
        if fields["done"] == 17:
            raise Cut

    worker.fit(base, data, tmp_path / "whole", settings, FACTS, 0, silent)
    with pytest.raises(Cut):
        worker.fit(base, data, tmp_path / "cut", settings, FACTS, 0, cut)
    worker.fit(base, data, tmp_path / "cut", settings, FACTS, 0, silent)
    if settings.method == "full":
        one, two = (
            load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "cut")
        )
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert curve(tmp_path / "whole") == curve(tmp_path / "cut")
    else:
        check_same(tmp_path / "whole", tmp_path / "cut")


def test_looking_at_4_bit_weights_does_not_change_them(base: Path) -> None:
    model = methods.load(base, METHODS["qlora"], torch.bfloat16)
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == 14
    before = [(m.weight.data.clone(), m.weight.quant_state.absmax.clone()) for m in layers]
    heldout_loss(model, items(4, 2), pad=0)
    for module, (weight, scales) in zip(layers, before, strict=True):
        assert torch.equal(module.weight.data, weight)
        assert torch.equal(module.weight.quant_state.absmax, scales)


def test_a_qlora_adapter_has_two_merges_and_the_better_one_stays(
    base: Path, data: Path, tmp_path: Path
) -> None:
    worker.fit(base, data, tmp_path, METHODS["qlora"], FACTS, 0, silent)
    both = [merge.ORIGINAL, merge.DEQUANTIZED]
    found = {}
    for kinds in (both, both[:1], both[1:]):
        out = tmp_path / "-".join(kinds)
        out.mkdir()
        merge.merge(
            base, tmp_path / "adapter", data / "heldout.jsonl", out, kinds, METHODS["qlora"].dtype
        )
        found[len(kinds), kinds[0]] = json.loads((out / "merge.json").read_text())
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        facts = json.loads((out / "merge.json").read_text())
        assert loss_of(merged) == pytest.approx(facts["heldout_loss"], rel=1e-5)
        assert facts["max_logit_diff"] < facts["allowed"]
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        assert not (out / merge.ORIGINAL).exists() and not (out / merge.DEQUANTIZED).exists()
    chosen = found[2, merge.ORIGINAL]
    losses = {kind: facts["heldout_loss"] for kind, facts in chosen["merges"].items()}
    assert losses[merge.ORIGINAL] == found[1, merge.ORIGINAL]["heldout_loss"]
    assert losses[merge.DEQUANTIZED] == found[1, merge.DEQUANTIZED]["heldout_loss"]
    assert chosen["chosen"] == min(losses, key=lambda kind: losses[kind])
    # It was trained on the dequantized weights: nothing is added there.
    assert losses[merge.DEQUANTIZED] == pytest.approx(points(tmp_path)[-1][1], rel=1e-4)
    assert losses[merge.ORIGINAL] != pytest.approx(losses[merge.DEQUANTIZED], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_weights_are_kept(keep: str, base: Path, data: Path, tmp_path: Path) -> None:
    """Eight questions learnt by heart: the held-out loss rises again."""
    few = tmp_path / "few"
    few.mkdir()
    for name in ("heldout.jsonl", "tokenizer"):
        (few / name).symlink_to(data / name)
    write_items(few / "train.jsonl", items(8, 1))
    settings = replace(FLOAT, epochs=60, schedule="constant", keep=keep, heldout_points=9)
    worker.fit(base, few, tmp_path, settings, FACTS, 0, silent)
    losses = {step: loss for step, loss, _ in points(tmp_path)[1:]}
    best, last = min(losses, key=lambda step: losses[step]), max(losses)
    assert best != last and losses[last] > 1.05 * losses[best]
    kept = best if keep == "best" else last
    assert json.loads((tmp_path / "train.json").read_text())["kept_step"] == kept
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    )
    assert loss_of(model) == pytest.approx(losses[kept], rel=1e-4)


@pytest.mark.slow
def test_gradient_accumulation_is_a_larger_batch(base: Path, data: Path, tmp_path: Path) -> None:
    whole = replace(FLOAT, batch_size=8)
    parts = replace(whole, batch_size=4, gradient_accumulation_steps=2)
    for name, settings in (("whole", whole), ("parts", parts)):
        worker.fit(base, data, tmp_path / name, settings, FACTS, 0, silent)
    one, two = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    assert len(one) == 15 and [step for step, _ in one] == [step for step, _ in two]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    ends = [points(tmp_path / name)[-1][1] for name in ("whole", "parts")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


def test_a_loss_that_breaks_down_keeps_the_last_good_checkpoint(
    base: Path, data: Path, tmp_path: Path
) -> None:
    settings = replace(FLOAT, lr=1e30, warmup_ratio=0.9, checkpoint_steps=1, max_steps=40)
    with pytest.raises(UserError, match=r"at step \d+: .*; step \d+ is kept in .*checkpoint-\d+"):
        worker.fit(base, data, tmp_path, settings, FACTS, 0, silent)
    checkpoint, step = last_checkpoint(tmp_path / "checkpoints")
    assert checkpoint and step > 0
    weights = load_file(checkpoint / "adapter_model.safetensors")
    assert all(bool(w.isfinite().all()) for w in weights.values())


def test_an_adapter_needs_a_linear_layer() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = torch.nn.Linear(4, 4)

        def get_output_embeddings(self) -> torch.nn.Linear:
            return self.lm_head

    with pytest.raises(UserError, match="no linear layer besides its head.*method=full"):
        methods._check_targets(Bare(), Path("bare"), "all-linear")


_STARVED = """
import json, resource, sys
from pathlib import Path
limit = int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from edgeft import train
from edgeft.errors import UserError
from edgeft.train.settings import TrainSettings
base, data, out = map(Path, sys.argv[2:5])
settings = TrainSettings(batch_size=4096, dtype="float32", heldout_answers=0)
facts = {"task": "wordmath", "stop": [2], "max_new_tokens": 8}
try:
    train.train(base, data, out, settings, facts, 0, lambda *a: None)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sets Linux's limit on memory")
def test_out_of_memory_names_a_batch_that_fits(base: Path, data: Path, tmp_path: Path) -> None:
    much = tmp_path / "data"
    much.mkdir()
    (much / "tokenizer").symlink_to(data / "tokenizer")
    (much / "heldout.jsonl").symlink_to(data / "heldout.jsonl")
    write_items(much / "train.jsonl", items(4096, 1))
    command = [sys.executable, "-c", _STARVED, "2500", base, much, tmp_path / "out"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    assert "out of memory at train.batch_size=4096: " in done.stdout, done.stdout + done.stderr
    assert " fits; with --set train.batch_size=" in done.stdout


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "magic"}, "method 'magic' is none of: full, lora, dora, qlora"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"max_steps": 0}, "max_steps"),
        ({"heldout_points": 1}, "at least 2"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"init": "loftq"}, "init 'loftq' is none of"),
        ({"init": "pissa", "method": "qlora"}, "use method lora"),
        ({"init": "olora", "method": "dora"}, "use method lora"),
        ({"keep": "worst"}, "keep 'worst' is none of: best, last"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(**wrong)


def test_methods_have_their_own_defaults() -> None:
    assert TrainSettings(method="full").peak_lr == TrainSettings().peak_lr / 10
    assert TrainSettings(method="qlora").max_grad_norm == 0.3
    assert TrainSettings(method="full", lr=5e-5).peak_lr == 5e-5
