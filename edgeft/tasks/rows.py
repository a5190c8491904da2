"""Rows of a data set: from JSON or JSON-lines files, from a copy of a hub data set, or from the hub.

A file is the split that its name begins with (``train.jsonl``, ``test.json``, ``validation-1.jsonl``);
one that names none is ``all``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import UserError

ALL = "all"  # rows that no split was named for
_SPLITS = {
    "train": "train",
    "test": "test",
    "eval": "test",
    "validation": "heldout",
    "valid": "heldout",
    "dev": "heldout",
    "heldout": "heldout",
}
_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Row:
    """One row: where it stands, as people say it, and its columns."""

    where: str
    columns: dict[str, Any]

    def text(self, column: str) -> str:
        """A column as text.

        Raises:
            UserError: it is missing, empty, or neither text nor a number.
        """
        value = self.columns.get(column)
        if value is None:
            there = ", ".join(self.columns) or "none"
            raise UserError(f"{self.where}: there is no field '{column}'; there are: {there}")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise UserError(f"{self.where}: the field '{column}' is neither text nor a number")
        if not str(value).strip():
            raise UserError(f"{self.where}: the field '{column}' is empty")
        return str(value).strip()


Splits = dict[str, list[Row]]


def rows(data: str | None, hub: str | None = None, config: str | None = None) -> Splits:
    """The rows by split: ``train``, ``test``, ``heldout`` or ``all``; what is not there is missing.

    Args:
        data: a file, a folder or a hub id.
        hub: the hub id to take without ``data``; ``config``: its configuration.

    Raises:
        UserError: there is no such data, or it cannot be read; file and line are named.
    """
    if data is None:
        assert hub
        return _from_hub(hub, config)
    path = Path(data).expanduser()
    if path.is_file():
        return {_split(path) or ALL: read_file(path)}
    if path.is_dir():
        return _from_folder(path, config)
    is_id = data.count("/") == 1 and not data.startswith((".", "/", "~"))
    if is_id and path.suffix not in _SUFFIXES:
        return _from_hub(data, config)
    raise UserError(f"no data at {data}: give a file, a folder or a hub id (org/name)")


def read_file(path: Path) -> list[Row]:
    """The rows of a JSON-lines file, or of a JSON file that holds a list of objects.

    Raises:
        UserError: it is malformed or has no rows; the line is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    found = list(_array(path, text) if path.suffix == ".json" else _lines(path, text))
    if not found:
        raise UserError(f"{path} is empty: it must hold one question a line")
    return found


def _lines(path: Path, text: str) -> Iterator[Row]:
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _row(f"{path}, line {i}", _json(f"{path}, line {i}", line))


def _array(path: Path, text: str) -> Iterator[Row]:
    data = _json(str(path), text)
    if not isinstance(data, list):
        raise UserError(f"{path} is no list of questions; one JSON object a line goes into .jsonl")
    for i, value in enumerate(data, 1):
        yield _row(f"{path}, entry {i}", value)


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is no JSON: {error}") from error


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f'{where} is no JSON object such as {{"question": ..., "answer": ...}}')
    return Row(where, value)


def _split(path: Path) -> str | None:
    name = path.name.lower()
    return next((split for word, split in _SPLITS.items() if name.startswith(word)), None)


def _from_folder(folder: Path, config: str | None) -> Splits:
    files = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES and _split(p))
    if not files:
        return _from_hub(str(folder), config)
    found: Splits = {}
    for path in files:
        found.setdefault(_split(path) or ALL, []).extend(read_file(path))
    return found


def _from_hub(place: str, config: str | None) -> Splits:
    """A data set of the hub, or a folder that is a copy of one."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{place} needs datasets: pip install 'edgeft[train]'") from error
    try:
        datasets.disable_progress_bars()
        loaded = datasets.load_dataset(place, config)
    except Exception as error:  # the library raises a dozen kinds
        raise UserError(_why_not(place, error)) from error
    return {
        _SPLITS.get(name.split("-")[0].split("_")[0], ALL): [
            Row(f"{place}, {name} {i}", dict(row)) for i, row in enumerate(split)
        ]
        for name, split in loaded.items()
    }


def _why_not(place: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(place).is_dir():
        return (
            f"{place} holds neither train.jsonl and test.jsonl (or .json) nor a copy of a hub data "
            f"set: {reason}"
        )
    if "gated" in str(error).lower():
        return (
            f"{place} is gated: accept its terms at https://huggingface.co/datasets/{place}, then "
            "hf auth login"
        )
    return (
        f"cannot load {place} from the hub ({reason}): offline, fetch it where there is a network, "
        f"hf download --repo-type dataset {place} --local-dir DIR, and give --data DIR"
    )
