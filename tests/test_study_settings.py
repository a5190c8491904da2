"""STUDY.yaml: the cells that it expands to, and what is wrong with it in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgeft.errors import UserError
from edgeft.study import cell as work
from edgeft.study import stage
from edgeft.study.settings import Cell, cells, described, load, parse

HEAD = "models: [smollm2-135m]\n"


def expand(**said: Any) -> dict[str, Cell]:
    """The cells by id, without the model's part of it."""
    text = yaml.safe_dump({"models": ["smollm2-135m"], **said})
    return {cell.id.partition("/")[2]: cell for cell in cells(parse(text))}


def refusal(text: str) -> str:
    with pytest.raises(UserError) as refused:
        cells(parse(HEAD + text, "study.yaml"))
    line = str(refused.value)
    assert "\n" not in line
    return line


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two things that look like model folders."""
    made = [tmp_path / "small", tmp_path / "large"]
    for folder in made:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    return list(map(str, made))


def test_every_combination_is_one_cell() -> None:
    found = expand(
        tasks=["wordmath", "gsm-symbolic"],
        methods=["zero-shot", "5-shot", "full", "lora", "dora", "qlora"],
        seeds=[3, 4],
    )
    of_one_task = ["zero-shot", "5-shot"] + [
        f"{method}-s{seed}" for method in ("full", "lora", "dora", "qlora") for seed in (3, 4)
    ]
    assert list(found) == [
        f"{task}/{name}" for task in ("wordmath", "gsm-symbolic") for name in of_one_task
    ]
    one = found["wordmath/dora-s4"]
    assert (one.model, one.task, one.method, one.seed) == ("smollm2-135m", "wordmath", "dora", 4)
    assert one.recipe.train.method == "dora" and one.recipe.seed == 4
    assert one.weights == ("base", "tuned")
    assert found["wordmath/5-shot"].weights == ("base",)


def test_each_model_has_its_own(folders: list[str]) -> None:
    found = cells(parse(yaml.safe_dump({"models": folders, "methods": ["lora"]})))
    assert [cell.id for cell in found] == [
        *("small/wordmath/zero-shot", "small/wordmath/lora-s0"),
        *("large/wordmath/zero-shot", "large/wordmath/lora-s0"),
    ]
    assert [cell.shares for cell in found] == [None, found[0].id, None, found[2].id]


def test_zero_shot_is_there_whether_asked_for_or_not_and_first() -> None:
    assert list(expand(methods=["lora"])) == ["wordmath/zero-shot", "wordmath/lora-s0"]
    asked = expand(methods=["lora", "zero-shot"])
    assert list(asked) == ["wordmath/zero-shot", "wordmath/lora-s0"]


def test_all_seeds_are_asked_the_same_questions_and_share_zero_shots_base() -> None:
    found = expand(methods=["5-shot", "lora"], seeds=[7, 8])
    assert {cell.recipe.question_seed for cell in found.values()} == {7}
    assert [cell.recipe.seed for cell in found.values()] == [7, 7, 7, 8]
    shared = {cell.shares for name, cell in found.items() if "zero-shot" not in name}
    assert shared == {"smollm2-135m/wordmath/zero-shot"}
    tasks = [replace(cell.recipe.task, shots=0) for cell in found.values()]
    assert all(task == tasks[0] for task in tasks)


def test_a_seed_of_the_questions_is_kept() -> None:
    found = expand(methods=["lora"], seeds=[7, 8], recipe={"task": {"seed": 5}})
    assert {cell.recipe.question_seed for cell in found.values()} == {5}


def test_shots_are_a_method() -> None:
    found = expand(methods=["5-shot", "12-shot"])
    assert [cell.recipe.task.shots for cell in found.values()] == [0, 5, 12]


def test_a_method_with_settings_has_a_name_of_its_own() -> None:
    found = expand(methods=["lora", {"name": "lora-r4", "method": "lora", "rank": 4}])
    own = found["wordmath/lora-r4-s0"]
    assert (own.method, own.recipe.train.method, own.recipe.train.rank) == ("lora-r4", "lora", 4)
    assert found["wordmath/lora-s0"].recipe.train.rank == 16


def test_a_task_with_settings_may_have_a_label() -> None:
    many = {"name": "wordmath", "label": "many", "train": 99}
    found = expand(tasks=["wordmath", many], methods=["lora"])
    assert found["many/lora-s0"].recipe.task.train == 99
    assert found["wordmath/lora-s0"].recipe.task.train == 960


def test_the_recipe_is_shared_and_a_cell_goes_first() -> None:
    shared = {"task": {"train": 5, "limit": 4}, "train": {"rank": 2}, "report": {"keep": 0.9}}
    found = expand(
        tasks=[{"name": "wordmath", "train": 6}],
        methods=["lora", {"name": "own", "method": "lora", "rank": 3}],
        recipe=shared,
    )
    assert [c.recipe.train.rank for c in found.values()][1:] == [2, 3]
    assert {(c.recipe.task.train, c.recipe.task.limit) for c in found.values()} == {(6, 4)}
    assert {c.recipe.report.keep for c in found.values()} == {0.9}


def test_devices_have_limits_threads_and_targets_of_their_own() -> None:
    board = {"name": "generic-ssh", "limit": 24, "threads": 4, "targets": ["gguf-q4_0"]}
    found = expand(targets=["gguf-q8_0", "gguf-q4_0"], devices=["local", {**board, "name": "here"}])
    assert found["wordmath/lora-s0"].devices == [
        {"name": "local", "said": {}, "targets": ["gguf-q8_0", "gguf-q4_0"]},
        {"name": "here", "said": {"threads": 4, "limit": 24}, "targets": ["gguf-q4_0"]},
    ]
    assert found["wordmath/lora-s0"].recipe.bench.devices == ["local", "here"]


@pytest.fixture(autouse=True)
def a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that the command is given in has a device ``here``, as local is."""
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices/here.toml").write_text('like = "local"\n')
    monkeypatch.chdir(tmp_path)


def test_a_format_stands_for_its_plain_targets_on_devices_too() -> None:
    found = expand(targets=["gguf", "onnx-int4"], devices=[{"name": "local", "targets": ["gguf"]}])
    targets = found["wordmath/lora-s0"].recipe.export.targets
    assert {"gguf-q8_0", "gguf-q4_0", "onnx-int4"} < set(targets)
    [device] = found["wordmath/lora-s0"].devices
    assert device["targets"] == [name for name in targets if name != "onnx-int4"]


def test_a_target_is_left_out_where_a_method_cannot_have_it() -> None:
    found = expand(
        targets=["gguf-q4_0", "gguf-q4_0+lora", "gguf-auto"],
        methods=["5-shot", "full", "lora", "dora", "qlora"],
    )
    targets = {name: cell.recipe.export.targets for name, cell in found.items()}
    every, beside = ["gguf-q4_0", "gguf-q4_0+lora", "gguf-auto"], ["gguf-q4_0", "gguf-q4_0+lora"]
    assert targets == {
        "wordmath/zero-shot": beside,  # types are chosen by tuned weights
        "wordmath/5-shot": beside,
        "wordmath/full-s0": ["gguf-q4_0", "gguf-auto"],  # no adapter that llama.cpp can apply
        "wordmath/lora-s0": every,
        "wordmath/dora-s0": ["gguf-q4_0", "gguf-auto"],
        "wordmath/qlora-s0": every,
    }
    assert found["wordmath/full-s0"].devices[0]["targets"] == ["gguf-q4_0", "gguf-auto"]


def test_what_it_says_is_written_as_it_can_be_read_again() -> None:
    text = HEAD + "methods: [lora, {name: x, method: full}]\nresources: {gpus: 0.5}\nretries: 3\n"
    study = parse(text)
    assert parse(yaml.safe_dump(described(study))) == study


def test_the_shipped_study_expands() -> None:
    found = cells(load(Path(__file__).parent.parent / "docs" / "smollm2-135m.yaml"))
    assert len(found) == 2 + 4 * 2
    assert all(cell.recipe.task.evaluation == 120 for cell in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sedes: [0]", "study.yaml, line 2: unknown key 'sedes'; did you mean 'seeds'"),
        ("seeds: [a]", "study.yaml, line 2: seeds.0: Input should be a valid integer"),
        ("seeds: []", "seeds is empty"),
        ("seeds: [1, 1]", "seeds has 1 twice"),
        ("seeds: [-1]", "seeds must not be negative"),
        ("retries: -1", "retries must not be negative"),
        ("resources: {cpu: 1}", "unknown key 'resources.cpu'; did you mean 'cpus'"),
        ("resources: {gpus: -1}", "cpus and gpus must not be negative"),
        ("methods: [lora, lora]", "methods has lora twice"),
        ("methods: [loro]", "unknown method 'loro'; did you mean 'lora'"),
        ("methods: [{name: own, method: loro}]", "unknown method 'loro'; did you mean 'lora'"),
        ("methods: [{method: lora}]", "'name' is missing"),
        ("methods: [{name: own, method: lora, rnk: 1}]", "unknown key 'train.rnk'; did you mean"),
        ("methods: [{name: 5-shot, rank: 4}]", "5-shot trains nothing, so 'rank' is not for it"),
        ("methods: [{name: zero-shot, rank: 4}]", "zero-shot trains nothing"),
        ("methods: [{name: a b, method: lora}]", "'a b' cannot name a folder"),
        ("methods: [{name: ../up, method: lora}]", "'../up' cannot name a folder"),
        ("tasks: [wordmaths]", "unknown task 'wordmaths'; did you mean 'wordmath'"),
        ("tasks: [{name: wordmath, label: a/b}]", "'a/b' cannot name a folder"),
        ("tasks: [{name: wordmath, trian: 5}]", "unknown key 'task.trian'; did you mean 'train'"),
        ("tasks: [{name: wordmath, shots: 5}]", "wordmath has shots: give methods as 5-shot"),
        ("tasks: [wordmath, {name: wordmath, train: 5}]", "are called smollm2-135m/wordmath/zero"),
        ("targets: [gguf-q4_km]", "unknown target 'gguf-q4_km'; did you mean 'gguf-q4_k_m'"),
        ("targets: [gguf-q4_0+lora]\nmethods: [full]", "full can have none of the targets"),
        ("devices: [loacl]", "unknown device 'loacl'; did you mean 'local'"),
        ("devices: [{name: local, limti: 5}]", "unknown key 'limti'; did you mean 'limit'"),
        ("devices: [{limit: 5}]", "study: devices: name: "),
        ("devices: [{name: local, limit: 0}]", "limit must be at least 1"),
        ("devices: [{name: local, limit: many}]", "study: devices: limit: Input should be"),
        ("devices: [{name: local, threads: some}]", "a number or auto, not 'some'"),
        ("devices: [local, {name: local, limit: 5}]", "local is there twice"),
        ("devices: [{name: local, targets: gguf}]", "study: devices: targets: Input should be"),
        ("devices: [{name: local, targets: [gguf-q2_k]}]", "to run gguf-q2_k, the study's targets"),
        ("devices: [{name: local, targets: []}]", "to run nothing, the study's targets"),
        ("recipe:\n  seed: 4", "study.yaml, line 3: recipe.seed: the study says that"),
        ("recipe:\n  model: x", "recipe.model: the study says that for every cell"),
        ("recipe:\n  train: {method: full}", "recipe.train.method: the study says that"),
        ("recipe:\n  task: {name: gsm8k}", "recipe.task.name: the study says that"),
        ("recipe:\n  export: {targets: [gguf]}", "recipe.export.targets: the study says that"),
        ("recipe:\n  train:\n    lrr: 1", "study.yaml, line 4: unknown key 'train.lrr'; did you"),
        ("recipe:\n  train:\n    rank: 0", "study.yaml, line 3: train: rank must be above 0"),
        ("recipe: 5", "study.yaml, line 2: recipe: Input should be a valid dictionary"),
    ],
)
def test_what_is_wrong_is_one_line(text: str, message: str) -> None:
    assert message in refusal(text)


def test_without_a_model_there_is_no_study() -> None:
    with pytest.raises(UserError, match=r"study\.yaml: models is missing, such as models: \["):
        parse("seeds: [0]", "study.yaml")
    with pytest.raises(UserError, match="a study is a mapping such as 'models:"):
        parse("- smollm2-135m", "study.yaml")
    with pytest.raises(UserError, match=r"study\.yaml, line 2: "):
        parse("models: [a\nseeds: [0]", "study.yaml")


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="no model 'smollm'"):
        cells(parse("models: [smollm]"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the study .*nowhere.yaml: No such file"):
        load(tmp_path / "nowhere.yaml")


def left(path: Path, text: str) -> list[str]:
    return stage.plan(path, parse(text)).left


def test_only_cells_that_a_change_is_about_are_left(folders: list[str], tmp_path: Path) -> None:
    data = tmp_path / "q.jsonl"
    data.write_text('{"question": "2 + 2?", "answer": "4"}\n')
    said: dict[str, Any] = {
        "models": folders,
        "tasks": ["wordmath", {"name": "jsonl", "data": str(data)}],
        "methods": ["lora", "full"],
    }
    out, text = tmp_path / "study", yaml.safe_dump(said)
    plan = stage.plan(out, parse(text))
    assert plan.left == [cell.id for cell in plan.cells] and not out.exists()
    for given in plan.orders.values():
        work.keep(out, work.Outcome(given.id, work.DONE, fingerprint=given.fingerprint))
    (out / stage.FILE).write_text(text)
    assert left(out, text) == []
    more = {**said, "seeds": [0, 1], "methods": ["lora", "full", "5-shot"]}
    fresh = left(out, yaml.safe_dump(more))
    assert len(fresh) == 4 * 3 and all(i.endswith(("-s1", "/5-shot")) for i in fresh)
    trained = left(out, yaml.safe_dump({**said, "recipe": {"train": {"rank": 4}}}))
    assert len(trained) == 2 * 2 * 2 and not any("zero-shot" in i for i in trained)
    data.write_text('{"question": "2 + 3?", "answer": "5"}\n')
    assert left(out, text) == [i for i in plan.orders if "/jsonl/" in i] != []
    (Path(folders[1]) / "model.safetensors").write_text("")
    assert {i.partition("/")[0] for i in left(out, text) if "wordmath" in i} == {"large"}
    (tmp_path / "devices/local.toml").write_text('transport = "local"\nthreads = 1\n')
    assert len(left(out, text)) == len(plan.cells)
