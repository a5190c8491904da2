"""Small real models: random weights, real tokenizers; made once for the session."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sshd
import study_runs
from xdist.scheduler import LoadFileScheduling

from edgeft import model, tokenizer
from edgeft.exporters import portable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Each of pytest-xdist's workers has cores of its own, and so have its children: threads of several
# that wait for each other on one core would take many times as long.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[int(worker[2:]) % len(cores) :: count])

# The longest files, as `make test` tells.
FIRST = (
    *("test_study", "test_study_ray", "test_end_to_end", "test_auto", "test_imatrix"),
    *("test_where_it_went", "test_ssh_runs", "test_lora_target", "test_repair", "test_recipes"),
    "test_ranks",
)
# The second takes minutes to make what the first has made.
TOGETHER = {"tests/test_study_ray.py": "tests/test_study.py"}

GSM8K = Path(__file__).parent.parent.parent / "shared" / "data" / "gsm8k"

Write = Callable[..., Path]

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    # Spread out, so that the top token is not decided by the last bit.
    "initializer_range": 0.3,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker begins one when the others are done."""
    rank = {name: at for at, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(FIRST)))


class ByFile(LoadFileScheduling):
    """A file's tests to one worker, for the sake of its fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return TOGETHER.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Of ``--dist loadfile``."""
    return ByFile(config, log)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Sshd]:
    """A real sshd on the loopback."""
    running = sshd.start(tmp_path_factory.mktemp("sshd"))
    yield running
    running.process.terminate()
    running.process.wait()


@pytest.fixture(scope="session")
def embedded_gguf() -> Path:
    return model.embedded("smollm2-135m")


@pytest.fixture(scope="session")
def gguf_fields(embedded_gguf: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: f.contents() for name, f in GGUFReader(embedded_gguf).fields.items()}


@pytest.fixture(scope="session")
def make_model(
    tmp_path_factory: pytest.TempPathFactory, gguf_fields: dict[str, Any]
) -> Callable[..., Path]:
    """``make_model("Llama", seed=0, pre="smollm", **config)``: a model folder with random weights."""

    def make(family: str, seed: int = 0, pre: str = "smollm", **config: Any) -> Path:
        import torch
        import transformers

        folder = tmp_path_factory.mktemp(f"{family}-{pre}-{seed}")
        tokenizer.from_gguf({**gguf_fields, "tokenizer.ggml.pre": pre}, folder)
        torch.manual_seed(seed)
        architecture = getattr(transformers, f"{family}ForCausalLM")
        settings = architecture.config_class(
            vocab_size=len(gguf_fields["tokenizer.ggml.tokens"]),
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            **{**SHAPE, **config},
        )
        architecture(settings).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(make_model: Callable[..., Path]) -> Path:
    """A Llama of two layers with SmolLM2's tokenizer and chat template."""
    return make_model("Llama")


@pytest.fixture(scope="session")
def vowels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions for :mod:`study_runs`."""
    return study_runs.write_questions(tmp_path_factory.mktemp("questions") / "vowels")


@pytest.fixture(scope="session")
def whole_study(tiny: Path, vowels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nobody disturbed, done by the command; what it printed is beside it."""
    folder = tmp_path_factory.mktemp("study")
    file = study_runs.write_study(folder / "whole.yaml", tiny, vowels)
    done = study_runs.study(file, folder / "whole", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder / "whole"


@pytest.fixture(scope="session")
def portable_graph(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path, str], Path]:
    """``portable_graph(folder, precision)``: exported once, by the real optimum."""
    made: dict[tuple[Path, str], Path] = {}

    def make(folder: Path, precision: str) -> Path:
        if (folder, precision) not in made:
            out = tmp_path_factory.mktemp(f"portable-{precision}")
            portable.convert(folder, out, precision)
            made[folder, precision] = out
        return made[folder, precision]

    return make


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """Real text to tokenize: GSM8K where it is at hand, else what the repository has."""
    if (GSM8K / "test.jsonl").is_file():
        lines = (GSM8K / "test.jsonl").read_text().splitlines()[:300]
        return [json.loads(line)["question"] for line in lines]
    return [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write("name.jsonl", row, ...)``; a row is an object, or a line as it stands."""

    def file(name: str, *lines: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{text}\n" for text in texts))
        return path

    return file
