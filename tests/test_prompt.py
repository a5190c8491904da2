"""`edgeft prompt`: what the model sees, token by token; and how questions are put."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import edgeft, refused

from edgeft import prompts
from edgeft.errors import UserError
from edgeft.prompts import Form, Room, own_answer, read_items
from edgeft.tasks import TaskSettings, draw_shots
from edgeft.tasks.build import build

SMALL = ("--set", "task.evaluation=4", "--set", "task.train=20", "--set", "task.heldout=2")


@pytest.fixture(scope="module")
def shown(tiny: Path) -> list[dict[str, Any]]:
    done = edgeft("prompt", "--model", tiny, "--shots", "2", "-n", "2", "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_it_shows_what_a_run_trains_on_and_scores(
    tiny: Path, shown: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = edgeft(
        *("train", "--model", tiny, "--shots", "2", "--out", tmp_path / "run", *SMALL),
        *(
            "--set",
            "task.train=64",
            "--set",
            "train.max_steps=1",
            "--set",
            "bench.max_new_tokens=8",
        ),
    )
    assert run.returncode == 0, run.stderr
    assert [(q["split"]) for q in shown] == ["train", "train", "evaluation", "evaluation"]
    for split in ("train", "evaluation"):
        items = read_items(tmp_path / "run/data" / f"{split}.jsonl")
        for question, item in zip((q for q in shown if q["split"] == split), items, strict=False):
            tokens = question["tokens"]
            assert (question["id"], question["text"]) == (item.id, item.text)
            assert [t["id"] for t in tokens if not t["loss"]] == item.prompt
            assert [t["id"] for t in tokens if t["loss"]] == item.gold
            assert "".join(t["text"] for t in tokens).startswith(item.text)


@pytest.mark.slow
def test_colour_and_plain(tiny: Path, shown: list[dict[str, Any]]) -> None:
    done = edgeft("prompt", "--model", tiny, "--shots", "2")
    train, evaluation = shown[0], shown[2]
    assert train["text"] in done.stdout and evaluation["text"] in done.stdout
    assert f"answer {train['answer']}" in done.stdout and "\x1b[" not in done.stdout
    learnt = sum(token["loss"] for token in train["tokens"])
    assert f"{len(train['tokens']) - learnt} tokens + {learnt} (learnt)" in done.stdout


@pytest.mark.slow
def test_a_character_of_several_tokens_is_whole(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"question": f"{i} 🦆?", "answer": str(i)}) + "\n" for i in range(9))
    )
    done = edgeft(
        "prompt", "--model", tiny, "--task", "jsonl", "--data", tmp_path / "q.jsonl", "--json"
    )
    assert done.returncode == 0, done.stderr
    texts = ["".join(t["text"] for t in q["tokens"]) for q in json.loads(done.stdout)]
    assert all("🦆" in text and "\ufffd" not in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [6, 40])
def test_a_limit_is_the_runs_own(tiny: Path, limit: int) -> None:
    """Worked examples come from the training questions that there are."""
    settings = TaskSettings("wordmath", 100, 4, 4, limit=limit)
    shot = draw_shots(build(settings, 0).train, 1, 0)[0]
    limited = ("--shots", "1", "--set", f"task.limit={limit}", "--set", "task.train=100")
    done = edgeft("prompt", "--model", tiny, *limited, "--json")
    assert done.returncode == 0, done.stderr
    assert shot.question in json.loads(done.stdout)[1]["text"]


def test_a_recipe_by_name_and_what_is_wrong(tiny: Path, tmp_path: Path) -> None:
    line = refused("prompt", "--model", tiny, "--task", "jsonl")
    assert "the task jsonl needs its questions: --data" in line
    line = refused("prompt", "--model", tiny, "--task", "jsonl", "--data", tmp_path / "no.jsonl")
    assert "no data at" in line
    assert "unknown recipe 'nothing'" in refused("prompt", "nothing", cwd=tmp_path)


def bare(tiny: Path, out: Path) -> Path:
    folder = shutil.copytree(tiny, out)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_system_prompt_only_if_given(tiny: Path, tmp_path: Path) -> None:
    made = build(TaskSettings("wordmath", 4, 1, 2), 0)
    splits: dict[str, Any] = {"train": made.train, "evaluation": made.evaluation}
    prompts.encode(tiny, splits, tmp_path, Form(made.train[:1], "Be brief."))
    for split in splits:
        for item in read_items(tmp_path / f"{split}.jsonl"):
            assert item.text.startswith(
                "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
            )
    plain = bare(tiny, tmp_path / "bare")
    prompts.encode(plain, splits, tmp_path, Form(made.train[:1], "Be brief."))
    shot = f"Question: {made.train[0].question}\nAnswer: {made.train[0].solution}\n\n"
    item = read_items(tmp_path / "evaluation.jsonl")[0]
    assert item.text == f"Be brief.\n\n{shot}Question: {item.question}\nAnswer:"
    prompts.encode(plain, splits, tmp_path)
    assert read_items(tmp_path / "train.jsonl")[0].text.startswith("Question: ")


def test_a_template_is_the_whole_of_a_plain_prompt(tiny: Path, tmp_path: Path) -> None:
    made = build(TaskSettings("wordmath", 4, 1, 2, template="Q: {{ question }}\nA:"), 0)
    prompts.encode(bare(tiny, tmp_path / "bare"), {"evaluation": made.evaluation}, tmp_path)
    item = read_items(tmp_path / "evaluation.jsonl")[0]
    assert item.text == f"Q: {made.evaluation[0].question}\nA:"
    prompts.encode(tiny, {"evaluation": made.evaluation}, tmp_path)
    item = read_items(tmp_path / "evaluation.jsonl")[0]
    assert f"<|im_start|>user\nQ: {made.evaluation[0].question}\nA:<|im_end|>" in item.text
    assert item.question == made.evaluation[0].question


def test_too_long_questions_are_counted_and_not_cut(tiny: Path, tmp_path: Path) -> None:
    made = build(TaskSettings("wordmath", 30, 1, 30), 0)
    splits: dict[str, Any] = {"train": made.train, "evaluation": made.evaluation}
    prompts.encode(tiny, splits, tmp_path)
    whole = {split: read_items(tmp_path / f"{split}.jsonl") for split in splits}
    lengths = sorted(len(item.prompt) for item in whole["evaluation"])
    context = lengths[20] + 40  # where 40 tokens may follow, nine or fewer are too long
    encoded = prompts.encode(tiny, splits, tmp_path, room=Room(context, 40))
    kept = read_items(tmp_path / "evaluation.jsonl")
    assert kept == [
        item
        for item in whole["evaluation"]
        if len(item.prompt) + max(40, len(item.gold)) <= context
    ]
    assert encoded.too_long["evaluation"] == 30 - len(kept) > 0
    trained = [i for i in whole["train"] if len(i.prompt) + len(i.gold) <= context]
    assert read_items(tmp_path / "train.jsonl") == trained
    with pytest.raises(UserError, match=r"no question of 'train' fits: .* made for 20 in all"):
        prompts.encode(tiny, splits, tmp_path, room=Room(20, 40))


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("4\n\nQuestion: what", "4"),
        ("4\nQuestion: what\n\nQuestion:", "4"),
        ("Question: what?\nAnswer: 4", "Question: what?\nAnswer: 4"),
        ("4 Question: x", "4 Question: x"),
        ("", ""),
    ],
)
def test_an_answer_ends_where_the_next_question_begins(text: str, own: str) -> None:
    assert own_answer(text) == own


@pytest.mark.slow
def test_left_out_questions_are_said_and_reported(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {"question": f"What is {i} and 1? " + "So " * (200 * (i % 10 == 3)), "answer": str(i + 1)}
        for i in range(300)
    ]
    rows += [{"question": "How many?", "answer": "Then 3 boxes would hold 15 apples."}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = make_model("Llama", seed=5, max_position_embeddings=160)
    done = edgeft(
        *("train", "--model", small, "--task", "jsonl", "--data", tmp_path / "q.jsonl"),
        *("--out", tmp_path / "run", "--set", "bench.max_new_tokens=8"),
        *("--set", "train.max_steps=1", "--set", "train.heldout_answers=0"),
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run/data/data.json").read_text())
    assert facts["left_out"].pop("no certain final answer") == 1
    too_long = facts["left_out"]
    assert sum(too_long.values()) == 30
    assert sum(facts["questions"].values()) == 270
    for reason, count in too_long.items():
        assert f"· {count} questions left out: {reason}" in done.stderr
    assert "longer than the model's context" in done.stderr
