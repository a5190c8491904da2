"""Where questions come from: fixed, disjoint splits; what is wrong with data is named by its line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import GSM8K, Write
from test_jsonl import everything, jsonl, numbered

from edgeft import recipe, stages
from edgeft.errors import UserError
from edgeft.tasks import Question, Splits, TaskSettings, find, normalized
from edgeft.tasks.answers import read_number
from edgeft.tasks.build import build, refuse_contamination
from edgeft.tasks.rows import rows


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not here")
def test_gsm8k_has_its_own_split() -> None:
    splits = build(TaskSettings("gsm8k", data=str(GSM8K), heldout=221), 0)
    assert (len(splits.train), len(splits.heldout), len(splits.evaluation)) == (7252, 221, 1319)
    assert not splits.left_out
    assert splits.evaluation[0].id == "gsm8k-test-0" and splits.evaluation[0].answer == "18"
    for question in everything(splits):
        assert read_number(question.solution) == question.answer
    assert splits == build(TaskSettings("gsm8k", data=str(GSM8K), heldout=221), 1)
    few = build(TaskSettings("gsm8k", data=str(GSM8K), limit=5), 0)
    assert few.train == splits.train[:5] and few.evaluation == splits.evaluation[:5]
    bare = build(TaskSettings("gsm8k", data=str(GSM8K), annotations=False, limit=50), 0)
    assert "<<" in splits.train[0].solution and "<<" not in str(bare)
    assert [q.answer for q in bare.train] == [q.answer for q in splits.train[:50]]


def test_a_copy_of_the_hubs_data_set_is_data(write: Write, tmp_path: Path) -> None:
    """What `hf download --repo-type dataset` leaves, read by the library that reads the hub."""
    import datasets

    for split, made in (("train", numbered(40)), ("test", numbered(10, 100))):
        path = tmp_path / "copy" / "main" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(made).to_parquet(str(path))
    write(
        "copy/README.md",
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*",
        "  - split: test\n    path: main/test-*\n---",
    )
    splits = build(TaskSettings("gsm8k", data=str(tmp_path / "copy")), 0)
    assert len(splits.evaluation) == 10 and len(splits.train) + len(splits.heldout) == 40
    assert splits.evaluation[0].answer == "201"


@pytest.mark.parametrize("name", ["gsm8k", "orca-math", "svamp"])
def test_without_a_network_it_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    # Read from the environment when they are imported, so perhaps too early.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"cannot load .*: offline, fetch it .* --data DIR"
    ) as raised:
        build(TaskSettings(name), 0)
    assert "\n" not in str(raised.value)


def test_a_gated_data_set_says_where_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def gated(*_: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'a/b' is a gated dataset on the Hub."
        )

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(
        UserError, match="a/b is gated: accept its terms at https://.*/a/b, then hf"
    ):
        rows("a/b")


def test_shares_are_fixed_and_disjoint(write: Write) -> None:
    data = write("mine.jsonl", *numbered(400))
    splits = jsonl(data)
    assert 50 < len(splits.evaluation) < 110 and 4 < len(splits.heldout) < 25
    sets = [{q.id for q in part} for part in (splits.train, splits.heldout, splits.evaluation)]
    assert len(set.union(*sets)) == sum(map(len, sets)) == 400
    # More rows and another order: every question stays where it was.
    more = jsonl(write("more.jsonl", *reversed(numbered(800))))
    for part in ("train", "heldout", "evaluation"):
        texts = {q.question for q in getattr(more, part)}
        assert {q.question for q in getattr(splits, part)} <= texts
    assert jsonl(data, evaluation=9).evaluation == splits.evaluation[:9]
    with pytest.raises(
        UserError, match="jsonl has .* for task.train and 1,000 were asked for: lower"
    ):
        jsonl(data, train=1000)


def test_three_rows_are_enough(write: Write) -> None:
    splits = jsonl(write("few.jsonl", *numbered(3)))
    assert [len(splits.train), len(splits.heldout), len(splits.evaluation)] == [1, 1, 1]


def test_files_name_their_splits(write: Write, tmp_path: Path) -> None:
    write("d/train.jsonl", *numbered(20))
    write("d/validation.jsonl", *numbered(4, 50))
    write("d/test.json", json.dumps(numbered(6, 70)))
    write("d/notes.json", "{}")
    splits = jsonl(tmp_path / "d")
    assert [len(splits.train), len(splits.heldout), len(splits.evaluation)] == [20, 4, 6]
    assert splits.evaluation[0].id == "jsonl-test-0"


def test_the_same_question_in_train_and_test_is_refused(write: Write, tmp_path: Path) -> None:
    write("d/train.jsonl", *numbered(20))
    twice = {"question": "  what is 1,003 — and 4 ?", "answer": "1007"}
    write("d/test.jsonl", *numbered(3, 50), twice)
    assert len(jsonl(tmp_path / "d").evaluation) == 4
    write("d/train.jsonl", *numbered(20), {"question": "What is 1003 and 4?", "answer": "1007"})
    with pytest.raises(
        UserError,
        match=r"1 of the evaluation questions are among those of '.*' too, such as jsonl-",
    ):
        jsonl(tmp_path / "d")


def test_held_out_questions_are_not_trained_on_either() -> None:
    one, other = (Question(name, "How many?", "#### 1", "1") for name in "ab")
    refuse_contamination(Splits([one], [], []))
    with pytest.raises(UserError, match="1 of the heldout questions are among those of 'train'"):
        refuse_contamination(Splits([one], [other], []))


def test_the_same_words_about_different_columns_are_two_questions(
    write: Write, tmp_path: Path
) -> None:
    row = {"question": "How many are left?", "answer": 4}
    write("d/train.jsonl", {**row, "story": "Tom had 5."}, {**row, "story": "Tom had 6."})
    write("d/validation.jsonl", {"question": "Who has most?", "answer": 9, "story": ""})
    write("d/test.jsonl", {**row, "story": "Ann had 7."})
    with pytest.raises(UserError, match="1 of the evaluation questions"):
        jsonl(tmp_path / "d")
    splits = jsonl(tmp_path / "d", template="{{ story }} {{ question }}")
    assert [q.prompt for q in splits.evaluation] == ["Ann had 7. How many are left?"]
    write("d/test.jsonl", {**row, "story": "TOM had 5"})
    with pytest.raises(UserError, match="1 of the evaluation questions"):
        jsonl(tmp_path / "d", template="{{ story }} {{ question }}")


def test_what_makes_two_questions_the_same() -> None:
    assert normalized("Tom\u2019s 1,200 hats, \u2163!") == normalized("tom's 1200 HATS - iv")
    assert normalized("一共有多少?") != normalized("还剩多少?")
    assert normalized("1, 2") == "1 2" != normalized("12")


def test_a_template_goes_for_every_task() -> None:
    template = "Question: {{question}}\nAnswer:"
    splits = build(TaskSettings("wordmath", 3, 1, 2, template=template), 0)
    assert all(q.prompt == f"Question: {q.question}\nAnswer:" for q in everything(splits))


def test_orca_math(write: Write) -> None:
    texts = [
        ("There are 5 boxes.\nEach holds 3.\n\nSo there are 5 * 3 = 15 apples.", "15"),
        ("Half of it. Therefore, the answer is $\\boxed{\\frac{1}{2}}$", "1/2"),
        ("It costs $1,250.50.", "1250.5"),
        ("So 3 boxes hold 15 apples.", None),
        ("There are 7. I am not sure.", None),
        ("There are 4 apples. Therefore there are 4 apples, and 4 it is.", "4"),
    ]
    made = [{"question": f"Question {i}?", "answer": text} for i, (text, _) in enumerate(texts)]
    splits = build(TaskSettings("orca-math", data=str(write("orca.jsonl", *made))), 0)
    found = {q.question: q for q in everything(splits)}
    assert splits.left_out == {"no certain final answer": 2}
    for i, (text, answer) in enumerate(texts):
        if answer is not None:
            question = found.pop(f"Question {i}?")
            assert question.answer == answer == read_number(question.solution)
            assert question.solution == f"{text}\n#### {answer}"
    assert not found


def test_svamp_as_the_original_file_has_it(write: Write) -> None:
    entry = {
        "ID": "chal-1",
        "Body": "Each pack of dvds costs 76 dollars. There is a discount of 25 dollars on each pack",
        "Question": "How much do you have to pay to buy each pack?",
        "Equation": "( 76.0 - 25.0 )",
        "Answer": 51.0,
        "Type": "Subtraction",
    }
    two = {**entry, "Equation": "( ( 8.0 + 3.0 ) * ( 2.0 - 0.5 ) )", "Answer": 16.5, "Body": "So."}
    splits = build(
        TaskSettings("svamp", data=str(write("SVAMP.json", json.dumps([entry, two])))), 0
    )
    found = {q.answer: q for q in everything(splits)}
    assert found["51"].solution == "76 - 25 = 51\n#### 51"
    assert found["51"].question.endswith(
        "on each pack. How much do you have to pay to buy each pack?"
    )
    assert found["16.5"].solution == "(8 + 3) * (2 - 0.5) = 16.5\n#### 16.5"


def test_gsm_symbolic_is_made_of_disjoint_seeds() -> None:
    settings = TaskSettings("gsm-symbolic", train=400, heldout=40, evaluation=200)
    splits = build(settings, 0)
    assert [len(splits.train), len(splits.heldout), len(splits.evaluation)] == [400, 40, 200]
    assert splits == build(settings, 0)
    fewer = build(TaskSettings("gsm-symbolic", train=10, heldout=40, evaluation=200), 0)
    assert fewer.train == splits.train[:10]
    other = build(settings, 1)
    texts = [{normalized(q.question) for q in everything(s)} for s in (splits, other)]
    assert len(texts[0] & texts[1]) < 5
    for question in everything(splits):
        assert read_number(question.solution) == question.answer


PLUGIN = """
from edgeft.tasks import Question, Splits, Task

def make(settings, seed):
    made = [Question(f"p{i}", f"Say {i}", f"<{i}>", str(i)) for i in range(10)]
    return Splits(made[:6], made[6:8], made[8:])

def read(text):
    return text.partition("<")[2].partition(">")[0] or None

TASK = Task("mine", "from another package", make, read)
WRONG = 1
"""


def test_another_package_brings_a_task(tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    info = tmp_path / "plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")

    def entry(points: str, code: str) -> str:
        (info / "entry_points.txt").write_text(f"[edgeft.tasks]\n{points}\n")
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    use = (
        "from edgeft.tasks import TaskSettings, tasks; from edgeft.tasks.build import build\n"
        "from edgeft.tasks.grading import reader; print(list(tasks())[-1])\n"
        "print(build(TaskSettings('say', limit=1), 0).evaluation[0].question)\n"
        "print(reader('say')('so <12> or 3', '12'))"
    )
    said = entry("say = plugin:TASK", use).splitlines()
    assert said == ["say", "Say 8", "Reading(answer='12', how='task')"]
    beside = "broken = plugin:NO\nsay = plugin:TASK"
    found = entry(beside, "from edgeft.tasks import find; print(find('say').about)")
    assert found.splitlines() == ["from another package"]
    assert "the task 'say' (plugin:WRONG) is no edgeft.tasks.Task" in entry(
        "say = plugin:WRONG", use
    )
    assert "the task 'say' (plugin:NO) does not load" in entry("say = plugin:NO", use)


def test_a_task_in_a_file_of_its_own(write: Write, tmp_path: Path) -> None:
    write("d/own.jsonl", *numbered(10))
    path = write(
        "d/own.yaml", "data: own.jsonl", "pattern: '#### (.+)'", "evaluation: 1", "train: 3"
    )
    given = recipe.completed(recipe.parse(f"task: {{name: {path}, train: 2}}"))
    assert given.task.name == "jsonl" and given.task.data == str(tmp_path / "d/own.jsonl")
    assert (given.task.train, given.task.evaluation) == (2, 1)
    assert given.task.pattern == "#### (.+)" and given.bench.max_new_tokens == 256
    assert recipe.completed(recipe.parse(recipe.dump(given))) == given
    with pytest.raises(UserError, match=r"bad.yaml, line 2: unknown key 'patern'.*'pattern'"):
        bad = write("bad.yaml", "data: x", "patern: y")
        recipe.completed(recipe.parse(f"task: {{name: {bad}}}"))
    with pytest.raises(UserError, match="cannot read the task no.yaml"):
        recipe.completed(recipe.parse("task: {name: no.yaml}"))


def test_numbers_left_out_are_the_tasks() -> None:
    given = recipe.completed(recipe.parse(""))
    assert (given.task.train, given.task.evaluation, given.task.unseen) == (960, 200, 24)
    assert given.bench.max_new_tokens == 48
    given = recipe.completed(recipe.parse("task: {name: gsm8k, evaluation: 5}"))
    assert (given.task.train, given.task.evaluation) == (None, 5)
    assert given.bench.max_new_tokens == 256


def test_what_is_shipped_says_what_it_is() -> None:
    for name in ("wordmath", "gsm8k", "orca-math", "svamp", "gsm-symbolic", "jsonl"):
        assert find(name).name == name and find(name).about
    with pytest.raises(UserError, match="did you mean 'gsm-symbolic'"):
        find("gsm_symbolic")


def test_changed_data_is_noticed(write: Write, tmp_path: Path) -> None:
    write(".mine/train.jsonl", *numbered(3))
    write(".mine/.cache/lock.json", "1")
    for data in (".mine", ".mine/train.jsonl"):
        given = recipe.parse(f"task: {{name: jsonl, data: {tmp_path / data}}}")
        write(".mine/train.jsonl", *numbered(3))
        before = stages._data_files(stages.Run(tmp_path, given, {}))
        write(".mine/.cache/lock.json", "2")
        assert stages._data_files(stages.Run(tmp_path, given, {})) == before != {}
        write(".mine/train.jsonl", *numbered(4))
        assert stages._data_files(stages.Run(tmp_path, given, {})) != before
