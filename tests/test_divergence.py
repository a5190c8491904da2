"""How far a model is from the host's, by the distributions that travel with a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bench import digest, silent
from test_exporters import encode

from edgeft import bench
from edgeft.bench import divergence
from edgeft.errors import UserError
from edgeft.exporters import gguf
from edgeft.prompts import Item, read_items, write_items
from edgeft.runtimes import open_session

COUNT, COMPARED = 24, 5


def full_kl(ours: Any, theirs: Any) -> float:
    logs = [scipy.special.log_softmax(x.astype(np.float64), axis=1) for x in (ours, theirs)]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean())


@st.composite
def two_models(draw: st.DrawFn, least: int, most: int) -> tuple[Any, Any]:
    """Logits of two models at a few tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 4)), draw(st.integers(least, most))
    scale, apart = draw(st.floats(0.1, 20)), draw(st.floats(0, 5))
    ours = rng.normal(0, scale, shape).astype(np.float32)
    return ours, (ours + rng.normal(0, apart, shape)).astype(np.float32)


@given(two_models(2, divergence.TOP))
def test_of_a_small_vocabulary_it_is_the_whole_divergence(logits: tuple[Any, Any]) -> None:
    coarse = divergence.kl(*divergence.likeliest(logits[0]), logits[1])
    assert coarse == pytest.approx(full_kl(*logits), rel=1e-4, abs=1e-5)


@settings(deadline=None)
@given(two_models(divergence.TOP + 1, 400))
def test_of_a_large_one_it_is_at_most_that(logits: tuple[Any, Any]) -> None:
    coarse = divergence.kl(*divergence.likeliest(logits[0]), logits[1])
    assert 0 <= coarse <= full_kl(*logits) * (1 + 1e-4) + 1e-5


def test_of_a_model_that_is_sure_it_is_nearly_that() -> None:
    rng = np.random.default_rng(0)
    ours = rng.normal(0, 10, (50, 5000)).astype(np.float32)
    theirs = ours + rng.normal(0, 0.5, ours.shape).astype(np.float32)
    coarse, whole = divergence.kl(*divergence.likeliest(ours), theirs), full_kl(ours, theirs)
    assert 0.9 * whole < coarse < whole


def test_the_likeliest_are_the_likeliest() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, 300)).astype(np.float32)
    tokens, logprobs = divergence.likeliest(logits)
    assert tokens.shape == logprobs.shape == (5, divergence.TOP)
    for row, ids, said in zip(logits, tokens, logprobs, strict=True):
        assert set(ids) == set(np.argsort(-row)[: divergence.TOP])
        assert said == pytest.approx(scipy.special.log_softmax(row)[ids], abs=1e-5)


def test_a_broken_models_divergence_is_not_zero() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (2, 100)).astype(np.float32)
    found = divergence.kl(*divergence.likeliest(logits), np.full_like(logits, np.nan))
    assert np.isnan(found)


@pytest.fixture(scope="module")
def items(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    return read_items(encode(tiny, tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def f16(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("f16") / "model.gguf"
    gguf.convert(tiny, out, "tiny")
    return out


@pytest.fixture(scope="module")
def host(tiny: Path) -> Iterator[Any]:
    session = open_session("transformers", tiny, threads=1, context=300, parallel=4)
    yield session
    session.close()


@pytest.fixture(scope="module")
def file(f16: Path) -> Iterator[Any]:
    session = open_session("llama.cpp", f16, threads=1, context=300, parallel=4)
    yield session
    session.close()


def test_through_another_runtime_a_model_is_itself(
    host: Any, file: Any, items: list[Item], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    reference = divergence.reference_of(host, items)
    same = divergence.divergences(file, items, reference)
    assert same.keys() == {item.id for item in items}
    assert max(same.values()) < 1e-3
    assert max(divergence.divergences(host, items, reference).values()) < 1e-6
    other = open_session(
        "transformers", make_model("Llama", seed=1), threads=1, context=300, parallel=4
    )
    assert min(divergence.divergences(other, items[:4], reference).values()) > 0.5


def alike(host: Any, items: list[Item]) -> None:
    """Each question's rows are those that it has in a batch that shares nothing."""
    assert len(items) == len(list(divergence.gold_logits(host, items)))
    for item, rows in zip(items, divergence.gold_logits(host, items), strict=True):
        text = [*item.prompt, *item.gold[:-1]]
        [whole, _] = host.logits([text, [item.prompt[0] + 1]])
        assert rows.shape == (len(item.gold), whole.shape[1])
        assert np.abs(rows - whole[-len(item.gold) :]).max() < 2e-2


def twins(item: Item) -> list[Item]:
    """Questions that share more than their prompts."""
    one = {**vars(item), "gold": [*item.gold, 5, 6, 7]}
    other = {**vars(item), "gold": [*item.gold, 5, 9]}
    return [Item(**{**one, "id": "one"}), Item(**{**other, "id": "other"}), item]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_few_questions_are_compared_over_their_solutions(
    count: int, host: Any, file: Any, items: list[Item]
) -> None:
    for session in (host, file):
        alike(session, items[:count])
        alike(session, twins(items[0])[:count])


def test_no_questions_are_no_divergence(file: Any, host: Any, items: list[Item]) -> None:
    reference = divergence.reference_of(host, items[:2])
    assert divergence.divergences(file, items[2:4], reference) == {}
    assert divergence.divergences(file, [], reference) == {}


@pytest.fixture(scope="module")
def bundle(
    tiny: Path,
    f16: Path,
    host: Any,
    items: list[Item],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """As an export leaves it; only some of the questions are compared."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "model.gguf").symlink_to(f16)
    shutil.copyfile(tiny / "tokenizer.json", folder / "tokenizer.json")
    rest = [Item(**{**vars(item), "group": "apart"}) for item in items[COMPARED:]]
    write_items(folder / "evaluation.jsonl", [*items[:COMPARED], *rest])
    reference = divergence.reference_of(host, items[:COMPARED])
    divergence.write(reference, folder / divergence.FILE)
    facts = {
        "runtime": "llama.cpp",
        "artifact": "model.gguf",
        "task": "wordmath",
        "max_new_tokens": 4,
        "stop": [2],
        "context": 300,
        "files": {path.name: digest(path) for path in folder.iterdir()},
    }
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def divergences(folder: Path) -> dict[str, float]:
    return {row["id"]: row["kl"] for row in rows(folder) if "kl" in row}


@pytest.fixture(scope="module")
def whole(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    bench.accuracy(bench.job_of_bundle(bundle, threads=1, parallel=4), out, silent)
    return out


def test_headline_questions_are_compared(whole: Path, items: list[Item]) -> None:
    assert divergences(whole).keys() == {item.id for item in items[:COMPARED]}
    assert len(rows(whole)) == COUNT
    assert 0 < max(divergences(whole).values()) < 1e-3


def test_what_a_kill_left_keeps_its_divergence(whole: Path, bundle: Path, tmp_path: Path) -> None:
    """Two questions answered, two more scored: the rest is compared as if never cut off."""
    done = sorted(rows(whole), key=lambda row: row["id"] not in divergences(whole))[:4]
    marked = [{**row, "kl": 0.5 + i} for i, row in enumerate(done)]
    kept = ("id", "gold_logprob", "gold_tokens", "kl")
    scores = [{name: row[name] for name in kept} for row in marked]
    for name, some in (("results", marked[:2]), ("scores", scores)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    bench.accuracy(bench.job_of_bundle(bundle, threads=1, parallel=4), tmp_path, silent)
    before, after = divergences(whole), divergences(tmp_path)
    assert {i: after[i] for i in (row["id"] for row in done)} == {r["id"]: r["kl"] for r in marked}
    [last] = before.keys() - {row["id"] for row in done}
    assert after.keys() == before.keys() and after[last] == before[last]


def test_without_a_reference_nothing_is_compared(bundle: Path, tmp_path: Path) -> None:
    job = bench.job_of_bundle(bundle, threads=1, parallel=4)
    bench.accuracy(bench.Job(**{**job.__dict__, "reference": None}), tmp_path, silent, limit=2)
    assert len(rows(tmp_path)) == 2 and divergences(tmp_path) == {}


def test_a_changed_reference_is_named(bundle: Path, tmp_path: Path) -> None:
    for path in bundle.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    (tmp_path / divergence.FILE).unlink()
    (tmp_path / divergence.FILE).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"reference\.npz is not the file that was exported"):
        bench.job_of_bundle(tmp_path)
