"""How a bundle reaches a device and results come back. A transport knows nothing of models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from edgeft.catalog import Device
from edgeft.child import Event
from edgeft.errors import UserError, near

TRANSPORTS = ("local", "ssh")
_WAITS_S = (1, 2, 4, 8, 15, 30, 60)  # a small board starts anew within them


class ConnectionLost(UserError):
    """The device cannot be reached, or no longer; what came back is kept."""


class Transport(Protocol):
    def place(self, folder: Path, files: Mapping[str, Any], update: Callable[..., None]) -> Path:
        """Bring a folder's files to the device, once, and check each there.

        Args:
            files: name to its ``bytes`` and ``sha256``.
            update: ``update(done, total, text)``, in bytes.

        Returns:
            The folder's path on the device.
        """
        ...

    def call(
        self, module: str, request: Mapping[str, Any], env: Mapping[str, str] | None = None
    ) -> Iterator[Event]:
        """As :func:`edgeft.child.call`, on the device.

        Raises:
            ConnectionLost: besides what that raises.
        """
        ...


def open_transport(device: Device) -> Transport:
    """The transport that a device's profile names; nothing is connected yet.

    Raises:
        UserError: there is no such transport, or the profile lacks what it needs.
    """
    from edgeft.transports import local, ssh

    if device.transport == "local":
        return local.Local()
    if device.transport == "ssh":
        return ssh.Ssh(device)
    raise UserError(
        f"device {device.name}: unknown transport '{device.transport}'"
        + near(device.transport, list(TRANSPORTS))
    )


def patiently(
    work: Callable[[], None],
    progress: Callable[[], int],
    tell: Callable[[str], None],
    *,
    reached: bool = True,
) -> None:
    """Do ``work`` again when its connection was lost, for about two minutes without ``progress``.

    Args:
        progress: a number that grows while the work gets on.
        tell: told why there is a wait.
        reached: whether the device was reached before; if not, it is not waited for.
    """
    tries = 0
    while True:
        before = progress()
        try:
            work()
            return
        except ConnectionLost as lost:
            if progress() > before:
                reached, tries = True, 0
            if not reached or tries == len(_WAITS_S):
                raise
            tell(f"{lost}; trying again in {_WAITS_S[tries]} s")
            time.sleep(_WAITS_S[tries])
            tries += 1
