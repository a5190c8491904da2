"""``edgeft card``: a model card beside the files it is about, as a folder to upload.

The folder holds ``README.md`` for the Hugging Face Hub, the tuned files of the targets under the
names that people look for there, and ``edgeft.json`` with each file's SHA-256, by which edgeft
knows the folder as its own. Files are links to those of the run where the file system has links.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from edgeft import __version__
from edgeft import run as runs
from edgeft.card.contents import About, Shipped, check_repo_id, describe, select
from edgeft.card.metadata import metadata
from edgeft.card.text import body
from edgeft.errors import UserError
from edgeft.progress import say
from edgeft.report.build import Report, build

CARD, MARK = "README.md", "edgeft.json"
_DOWNLOADS = ".cache"  # what the hub's own programs leave in a folder


def write(
    run: Path, targets: Sequence[str] = (), out: Path | None = None, repo_id: str | None = None
) -> Path:
    """Write the card's folder, or replace the one that was written before.

    Args:
        targets: names or formats; none: every target whose tuned file was scored as it is now.
        out: the folder; None: ``card`` in the run.
        repo_id: ``ORG/NAME`` on the hub, for the title and the commands.

    Returns:
        The folder.

    Raises:
        UserError: it is no run, a target cannot go into a card, ``out`` holds other things, or it
            cannot be written.
    """
    check_repo_id(repo_id)
    place = out or run / "card"
    try:
        with runs.locked(runs.check(run)), runs.hash_cache(run) as hashes:
            report = build(run)
            about = describe(run, report, repo_id)
            prefix = f"{about.model}-{about.task}"
            report, shipped, left_out = select(run, report, targets, prefix, hashes)
            for target, why in left_out.items():
                say(f"· without {target}: {why}")
            _check_place(place)
            _replace(place, render(about, report, shipped), shipped)
    except OSError as error:
        reason = runs.disk_reason(error)
        raise UserError(f"cannot write {error.filename or place}: {reason}") from error
    if about.license is None:
        say("· the base model's license is not known here: say license: in README.md's first lines")
    if repo_id:
        say(f"· to upload it: hf upload {repo_id} {place}")
    return place


def render(about: About, report: Report, shipped: Sequence[Shipped]) -> str:
    """The card: metadata between ``---`` lines, and the text."""
    head = yaml.safe_dump(metadata(about, report, shipped), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{body(about, report, shipped)}"


def _replace(place: Path, text: str, shipped: Sequence[Shipped]) -> None:
    """Make the folder beside its place and put it there when it is whole."""
    partial = place.resolve().with_name(place.resolve().name + ".partial")
    if partial.exists():
        if _listed(partial) is None:
            raise UserError(f"{partial} is in the way: move it, or give another folder with --out")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    runs.write_json(partial / MARK, {"schema": 1, "files": {}})
    (partial / CARD).write_text(text, encoding="utf-8")
    hashes = {CARD: runs.sha256(partial / CARD)}
    for one in shipped:
        for name, source in one.files.items():
            _link(source, partial / name)
            hashes[name] = one.sha256.get(name) or runs.sha256(source)
    files = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": digest}
        for name, digest in sorted(hashes.items())
    }
    runs.write_json(partial / MARK, {"schema": 1, "edgeft": __version__, "files": files})
    if place.exists():
        shutil.rmtree(place.resolve())
    partial.rename(place.resolve())


def _link(source: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        out.hardlink_to(source)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, out)


def _check_place(place: Path) -> None:
    """Refuse to remove what edgeft did not write.

    Raises:
        UserError: there is something else.
    """
    other = "give another folder with --out"
    if place.exists() and not place.is_dir():
        raise UserError(f"{place} is a file: {other}")
    if not place.is_dir() or not any(place.iterdir()):
        return
    listed = _listed(place)
    if listed is None:
        raise UserError(f"{place} is no card folder of edgeft and not empty: {other}")
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place)
        if path.is_file() and str(name) not in (*listed, MARK) and name.parts[0] != _DOWNLOADS:
            raise UserError(f"{path} is not from edgeft: move it away, or {other}")
    card = place / CARD
    if card.is_file() and CARD in listed and runs.sha256(card) != listed[CARD]["sha256"]:
        raise UserError(f"{card} was edited: move it away to have a new one, or {other}")


def _listed(folder: Path) -> dict[str, Any] | None:
    """The files that edgeft wrote into a card's folder; None: it is none."""
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return dict(found["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
