"""Few-shot: the same examples before every question, drawn by seed, computed once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import edgeft, refused

from edgeft import prompts, tasks
from edgeft.errors import UserError
from edgeft.exporters import gguf
from edgeft.prompts import Item, read_items
from edgeft.runtimes import common_prefix, open_session
from edgeft.tasks.answers import read_number

SHOTS = 3
NEW = 8


@pytest.fixture(scope="module")
def wordmath() -> tasks.Splits:
    return tasks.find("wordmath").make(tasks.TaskSettings("wordmath", 100, 4, 6), 0)


@pytest.fixture(scope="module")
def roomy(make_model: Callable[..., Path]) -> Path:
    """A Llama that holds more than the tiny one's 512 tokens."""
    return make_model("Llama", seed=3, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def few(wordmath: tasks.Splits) -> list[tasks.Question]:
    return tasks.draw_shots(wordmath.train, SHOTS, 0)


@pytest.fixture(scope="module")
def items(
    roomy: Path,
    wordmath: tasks.Splits,
    few: list[tasks.Question],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Item]:
    out = tmp_path_factory.mktemp("shots")
    prompts.encode(roomy, {"evaluation": wordmath.evaluation}, out, prompts.Form(few))
    return read_items(out / "evaluation.jsonl")


def test_the_draw_follows_the_seed_and_not_the_size(wordmath: tasks.Splits) -> None:
    few = tasks.draw_shots(wordmath.train, 5, 0)
    assert few == tasks.draw_shots(wordmath.train[:64], 5, 0)
    assert few[:3] == tasks.draw_shots(wordmath.train, 3, 0)
    assert few != tasks.draw_shots(wordmath.train, 5, 1)
    assert len({q.id for q in few}) == 5 and few != wordmath.train[:5]
    assert len(tasks.draw_shots(wordmath.train, 100, 0)) == 100
    with pytest.raises(UserError, match="task.shots=5 .* there are 4: lower task.shots or raise"):
        tasks.draw_shots(wordmath.train[:4], 5, 0)


def test_examples_are_turns_of_the_models_own_template(
    roomy: Path, items: list[Item], wordmath: tasks.Splits, few: list[tasks.Question]
) -> None:
    tokenizer = prompts.load_tokenizer(roomy)
    for item, question in zip(items, wordmath.evaluation, strict=True):
        head, *turns = item.text.split("<|im_start|>user\n")
        asked = [
            f"{q.question}<|im_end|>\n<|im_start|>assistant\n{q.solution}<|im_end|>\n" for q in few
        ]
        assert turns == [*asked, f"{question.question}<|im_end|>\n<|im_start|>assistant\n"]
        assert head.startswith("<|im_start|>system")
        assert item.prompt == tokenizer.encode(item.text, add_special_tokens=False)


def test_without_a_template_they_are_paragraphs(
    roomy: Path, wordmath: tasks.Splits, few: list[tasks.Question], tmp_path: Path
) -> None:
    bare = shutil.copytree(roomy, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    prompts.encode(bare, {"evaluation": wordmath.evaluation}, tmp_path, prompts.Form(few))
    item = read_items(tmp_path / "evaluation.jsonl")[0]
    examples = [f"Question: {q.question}\nAnswer: {q.solution}\n\n" for q in few]
    assert item.text == "".join(examples) + f"Question: {item.question}\nAnswer:"
    # Such a model goes on with a question of its own, whose answer is not the one asked for.
    went_on = f" {few[0].solution}\n\n{examples[1]}"
    assert read_number(went_on) == few[1].answer != few[0].answer
    assert read_number(prompts.own_answer(went_on)) == few[0].answer


def test_what_is_trained_on_has_none(
    roomy: Path, wordmath: tasks.Splits, few: list[tasks.Question], tmp_path: Path
) -> None:
    splits: dict[str, Any] = {
        "train": wordmath.train,
        "heldout": wordmath.heldout,
        "evaluation": wordmath.evaluation,
    }
    for name, shots in (("none", []), ("few", few)):
        (tmp_path / name).mkdir()
        prompts.encode(roomy, splits, tmp_path / name, prompts.Form(shots))
    same = [
        (tmp_path / "none" / f"{split}.jsonl").read_bytes()
        == (tmp_path / "few" / f"{split}.jsonl").read_bytes()
        for split in splits
    ]
    assert same == [True, True, False]
    plain, behind = (read_items(tmp_path / name / "evaluation.jsonl") for name in ("none", "few"))
    assert [item.gold for item in plain] == [item.gold for item in behind]


@pytest.fixture(scope="module", params=["llama.cpp", "transformers"])
def counted(
    request: pytest.FixtureRequest, roomy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Callable[[], int]]]:
    """The runtime's session, and how many positions it has computed since last asked."""
    patch = pytest.MonkeyPatch()
    seen = [0]
    artifact = roomy
    if request.param == "llama.cpp":
        from edgeft.runtimes.llama_batch import Sequences

        artifact = tmp_path_factory.mktemp("gguf") / "model.gguf"
        gguf.convert(roomy, artifact, "roomy")
        feed = Sequences.feed

        def counting(self: Sequences, sequence: int, at: int, tokens: Any, wanted: int) -> None:
            seen[0] += len(tokens)
            feed(self, sequence, at, tokens, wanted)

        patch.setattr(Sequences, "feed", counting)
    session: Any = open_session(request.param, artifact, threads=1, context=1000, parallel=4)
    if request.param == "transformers":

        def count(_: Any, __: Any, given: dict[str, Any]) -> None:
            # Padding is no work that sharing could save.
            rows, length = given["input_ids"].shape
            seen[0] += int(given["attention_mask"][:, -length:].sum())
            assert rows <= 4

        session.model.register_forward_pre_hook(count, with_kwargs=True)

    def since() -> int:
        found, seen[0] = seen[0], 0
        return found

    yield session, since
    session.close()
    patch.undo()


def test_the_examples_are_computed_once(
    items: list[Item], counted: tuple[Any, Callable[[], int]]
) -> None:
    session, since = counted
    asked = [item.prompt for item in items]
    shared = common_prefix(asked)
    longest = max(len(prompt) - shared for prompt in asked)
    assert shared > 4 * longest / 2  # three examples and the system's turn against one question
    assert all(prompt[:shared] == asked[0][:shared] for prompt in asked)
    pairs = [(item.prompt, item.gold) for item in items]
    together = list(session.score(pairs))
    behind = sum(len(prompt) - shared + len(gold) - 1 for prompt, gold in pairs)
    assert since() == shared + behind
    # With one text that begins otherwise there is nothing to share.
    alone = list(session.score([*pairs, ([7, 8], [9])]))[:-1]
    assert since() == len(items) * shared + behind + 2
    assert together == pytest.approx(alone, abs=2e-3)


def test_answers_are_the_same_without_sharing(
    items: list[Item], counted: tuple[Any, Callable[[], int]]
) -> None:
    session, since = counted
    asked = [item.prompt for item in items]
    shared = common_prefix(asked)
    together = {done.index: done.tokens for done in session.generate(asked, NEW, frozenset())}
    behind = sum(len(prompt) - shared for prompt in asked) + len(asked) * (NEW - 1)
    assert since() == shared + behind
    every = session.generate([*asked, [7, 8]], NEW, frozenset())
    alone = {done.index: done.tokens for done in every}
    assert since() == len(asked) * shared + behind + 2 + NEW - 1
    alone.pop(len(asked))
    assert together == alone


def _chosen(model: Path, *more: str) -> list[str | Path]:
    settings = ("task.train=16", "task.heldout=4", "task.evaluation=6", "task.unseen=0")
    settings += ("train.heldout_answers=0", "bench.max_new_tokens=8", *more)
    return ["--model", model, *(part for setting in settings for part in ("--set", setting))]


@pytest.mark.slow
def test_other_shots_do_not_train_again(roomy: Path, tmp_path: Path) -> None:
    first = edgeft("train", *_chosen(roomy), "--out", tmp_path / "run")
    assert first.returncode == 0, first.stderr
    plain = read_items(tmp_path / "run/data/evaluation.jsonl")
    again = edgeft(
        "run", *_chosen(roomy), "--out", tmp_path / "run", "--shots", "2", "--target", "gguf-f16"
    )
    assert again.returncode == 0, again.stderr
    assert "✓ questions" in again.stderr
    assert "· train lora: up to date" in again.stderr and "· merge: up to date" in again.stderr
    behind = read_items(tmp_path / "run/data/evaluation.jsonl")
    for one, other in zip(plain, behind, strict=True):
        assert other.text.endswith(one.text[one.text.index("<|im_start|>user") :])
        assert other.text.count("<|im_start|>user") == 3
    longest = max(len(item.prompt) for item in behind)
    for weights in ("base", "tuned"):
        bundle = tmp_path / "run/export/gguf-f16" / weights
        manifest = json.loads((bundle / "manifest.json").read_text())
        assert manifest["context"] > longest + 8
        assert read_items(bundle / "evaluation.jsonl") == behind
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["recipe"]["task"]["shots"] == 2
    assert "shots 2" in (tmp_path / "run/report.md").read_text()


@pytest.mark.slow
def test_what_cannot_be_is_one_line(tiny: Path, tmp_path: Path) -> None:
    assert "task.shots=20 needs as many" in refused(
        "train", *_chosen(tiny), "--out", tmp_path / "a", "--shots", "20"
    )
    line = refused("train", *_chosen(tiny), "--out", tmp_path / "b", "--shots", "8")
    assert "was made for 512 in all: lower task.shots (8) or bench.max_new_tokens (8)" in line
    assert not (tmp_path / "b/train").exists() and not (tmp_path / "b/train.partial").exists()
    assert "shots must not be negative" in refused("run", "--shots=-1", cwd=tmp_path)
    line = refused("export", tmp_path / "b", "--shots", "0")
    assert "brings its own" in line
