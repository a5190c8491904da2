"""The folder of ``edgeft card``: its files are the run's, and nobody's work is overwritten."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from card_runs import (
    ARTIFACTS,
    TASK,
    bench,
    export,
    head_of,
    make_card_run,
    row_of,
    scores,
    text_of,
)
from report_runs import make_run, write_json

from edgeft import card
from edgeft import run as runs
from edgeft.errors import UserError
from edgeft.report.build import build


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_card_run(tmp_path / "math")


def test_files_have_the_names_that_people_look_for(run: Path) -> None:
    folder = card.write(run)
    assert folder == run / "card"
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {
        *("README.md", "edgeft.json"),
        *(f"{TASK}-{name}.gguf" for name in ("F16", "Q8_0", "Q4_K_M-imatrix")),
        *(f"gguf-q4_0+lora/{name}.gguf" for name in ("model", "adapter")),
        *(f"onnx-int4/{name}" for name in ("genai_config.json", "model.onnx")),
        *(f"onnx-int4/{name}" for name in ("tokenizer.json", "tokenizer_config.json")),
        "onnx-int4/chat_template.jinja",
        *(f"onnx-portable-int8/{name}" for name in ("model.onnx", "chat_template.jinja")),
        *(f"onnx-portable-int8/{name}" for name in ("tokenizer.json", "tokenizer_config.json")),
    }
    source = run / "export/gguf-q8_0/tuned/model.gguf"
    assert (folder / f"{TASK}-Q8_0.gguf").samefile(source), "a link takes no room"
    assert (
        folder / "gguf-q4_0+lora/adapter.gguf"
    ).read_bytes() == b"gguf-q4_0+lora/model/adapter.gguf"
    listed = json.loads((folder / "edgeft.json").read_text())["files"]
    assert set(listed) == files - {"edgeft.json"}
    for name, facts in listed.items():
        assert facts["sha256"] == runs.sha256(folder / name)
        assert facts["bytes"] == (folder / name).stat().st_size


def test_targets_with_one_quantization_have_names_of_their_own(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench(run, "q8_0", like="gguf-f16")
    monkeypatch.setitem(ARTIFACTS, "q8_0", ("llama.cpp", ("model.gguf",)))
    export(run, "q8_0", {"model.gguf": b"another"})
    folder = card.write(run)
    found = {path.name: path.read_bytes() for path in folder.glob("*Q8_0*")}
    assert set(found) == {f"{TASK}-Q8_0.gguf", f"{TASK}-Q8_0-2.gguf"}
    assert set(found.values()) == {b"another", b"gguf-q8_0/model.gguf"}
    [ours] = [name for name, content in found.items() if content == b"another"]
    assert row_of(text_of(folder), ours)[1:] == scores(build(run), "q8_0")


def test_without_links_files_are_copied(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    copied = card.write(run) / f"{TASK}-Q8_0.gguf"
    source = run / "export/gguf-q8_0/tuned/model.gguf"
    assert copied.read_bytes() == source.read_bytes() and not copied.samefile(source)


def changed_after_scoring(run: Path) -> None:
    manifest = run / "export/gguf-q8_0/tuned/manifest.json"
    write_json(manifest, {**json.loads(manifest.read_text()), "made_from": "newer weights"})


def never_verified(run: Path) -> None:
    export(run, "gguf-q8_0", verify=None)


def damaged(run: Path) -> None:
    (run / "export/gguf-q8_0/tuned/model.gguf").write_bytes(b"gguf-q8_0/model.gguX")


def not_there(run: Path) -> None:
    shutil.rmtree(run / "export/gguf-q8_0/tuned")


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (changed_after_scoring, "its file is not the one that was scored: edgeft bench"),
        (never_verified, "its export was not verified"),
        (damaged, "model.gguf is not the file that was exported"),
        (not_there, "its tuned bundle is not in the run"),
    ],
)
def test_what_was_not_scored_as_it_is_stays_out(
    run: Path, break_it: Callable[[Path], None], why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    break_it(run)
    folder = card.write(run)
    assert not list(folder.glob("*Q8_0*")) and "gguf-q8_0" not in text_of(folder)
    assert len(head_of(folder)["model-index"][0]["results"]) == len(ARTIFACTS) - 1
    assert why in "".join(capfd.readouterr().err.split("\n"))
    with pytest.raises(UserError, match=f"gguf-q8_0 cannot go into a card: .*{why}"):
        card.write(run, ["gguf-q8_0"])


def test_results_of_other_weights_stay_out(run: Path) -> None:
    stage = run / "bench/local/gguf-q8_0/tuned/stage.json"
    write_json(stage, {**json.loads(stage.read_text()), "made_from": "earlier weights"})
    assert "Q8_0" not in text_of(card.write(run))
    with pytest.raises(UserError, match="gguf-q8_0 has no scores with the run's weights"):
        card.write(run, ["gguf-q8_0"])
    with pytest.raises(UserError, match="gguf-q4_km has no scores .*did you mean 'gguf-q4_k_m"):
        card.write(run, ["gguf-q4_km"])


def test_nothing_benched_is_the_users_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", [])
    with pytest.raises(UserError, match="nothing is benched that could go into a card"):
        card.write(run)
    assert not (run / "card").exists()


def test_again_replaces_what_was_written_before(run: Path) -> None:
    card.write(run)
    folder = card.write(run, ["gguf-q8_0"])
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "edgeft.json", f"{TASK}-Q8_0.gguf")
    }
    assert (run / "export/gguf-f16/tuned/model.gguf").is_file(), "the run keeps its files"
    assert not (run / "card.partial").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("README.md", "README.md was edited"), ("notes.txt", "notes.txt is not from edgeft")],
)
def test_what_people_wrote_is_not_removed(run: Path, name: str, said: str) -> None:
    folder = card.write(run)
    with (folder / name).open("a") as out:
        out.write("mine\n")
    with pytest.raises(UserError, match=f"{said}.* move it away"):
        card.write(run, ["gguf-q8_0"])
    assert "mine" in (folder / name).read_text() and len(list(folder.glob("*.gguf"))) == 3
    (folder / name).unlink()
    card.write(run, ["gguf-q8_0"])


def test_another_folder_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    for place, said in (
        (tmp_path / "photos", "is no card folder of edgeft and not empty"),
        (run, "is no card folder of edgeft and not empty"),
        (tmp_path / "photos" / "a.jpg", "is a file"),
    ):
        with pytest.raises(UserError, match=f"{said}: give another folder with --out"):
            card.write(run, out=place)
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="mine.partial is in the way"):
        card.write(run, out=tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    assert (card.write(run, out=tmp_path / "empty") / "README.md").is_file()
    assert (card.write(run, out=tmp_path / "deep" / "er") / "README.md").is_file()


def test_a_full_disk_leaves_the_card_that_was_there(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = text_of(card.write(run))

    def full(source: Path, out: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(card, "_link", full)
        with pytest.raises(UserError, match="the disk is full"):
            card.write(run, ["gguf-q8_0"])
    assert text_of(run / "card") == before and (run / "card.partial").is_dir()
    card.write(run, ["gguf-q8_0"])
    assert not (run / "card.partial").exists(), "what a kill leaves is cleared away"
