"""This machine: nothing to send, and a child is a child."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeft import child


class Local:
    """See :class:`edgeft.transports.Transport`."""

    def place(self, folder: Path, files: Mapping[str, Any], update: Callable[..., None]) -> Path:
        return folder

    def call(
        self, module: str, request: Mapping[str, Any], env: Mapping[str, str] | None = None
    ) -> Iterator[child.Event]:
        return child.call(module, request, env)
