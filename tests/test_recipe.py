"""Recipes: what is wrong is said with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeft import recipe
from edgeft.errors import UserError


def test_an_empty_recipe_is_the_default_one() -> None:
    assert recipe.parse("") == recipe.Recipe()


def test_a_dumped_recipe_reads_back() -> None:
    given = recipe.parse("seed: 3\ntask:\n  evaluation: 10\n")
    assert recipe.parse(recipe.dump(given)) == given
    assert given.task.evaluation == 10


def test_overrides_reach_inside() -> None:
    given = recipe.parse("train:\n  lr: 0.5\n", ["train.lr=1e-4", "export.targets=[gguf-f16]"])
    assert given.train.lr == 1e-4
    assert given.export.targets == ["gguf-f16"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 0\ntrain:\n  lrr: 1\n", r"r\.yaml, line 3: unknown key 'train\.lrr'.*'lr'"),
        ("sead: 0\n", r"r\.yaml, line 1: unknown key 'sead'; did you mean 'seed'"),
        ("seed: soon\n", r"r\.yaml, line 1: seed: .*integer"),
        ("seed: 0\ntask: wordmath\n", r"r\.yaml, line 2: task: "),
        ("train:\n  method: loro\n", r"r\.yaml, line \d: train.*loro"),
        ("a: [1\n", r"r\.yaml, line \d"),
        ("- 1\n", "a recipe is a mapping"),
    ],
)
def test_mistakes_are_named_with_their_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        recipe.load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "key=value"),
        ("train.lrr=1", "--set train.lrr=1: unknown key 'train.lrr'"),
        ("seed.x=1", "no settings inside|seed"),
        ("bench.parallel=0", "bench: parallel must be at least 1"),
        ("task.limit=0", "task: limit must be at least 1"),
        ("task.pattern='('", "task: pattern is no regular expression"),
        ("train.lr=fast", "--set train.lr=fast: train.lr"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe.parse("seed: 1\n", [override])


def test_a_missing_file() -> None:
    with pytest.raises(UserError, match="cannot read the recipe"):
        recipe.load(Path("no.yaml"))
