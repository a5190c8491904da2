"""A wheel of the edgeft that is running, for a device: checkout or installed, it needs no build."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from edgeft import __version__, catalog
from edgeft.run import fingerprint

NAME = f"edgeft-{__version__}-py3-none-any.whl"
_KINDS = ("devices", "export", "recipes")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files make the same wheel


def build() -> bytes:
    """The wheel (PyPA's binary distribution format 1.0); the same files give the same bytes."""
    files = _package()
    info = f"edgeft-{__version__}.dist-info"
    files[f"{info}/METADATA"] = _metadata().encode()
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\nedgeft = edgeft.cli:main\n"
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: edgeft\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return out.getvalue()


@lru_cache
def sha256() -> str:
    """SHA-256 of all that the package holds, hexadecimal; how it was installed is no part of it."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in _package().items()}
    return fingerprint(digests)


def _package() -> dict[str, bytes]:
    """Names in the wheel to contents."""
    package = Path(__file__).parent
    files = {
        f"edgeft/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.suffix in (".py", ".toml") and "__pycache__" not in path.parts
    }
    for kind in _KINDS:
        shipped = catalog.folders(kind)[-1]
        for path in sorted(shipped.glob("*.*")):
            if path.suffix in (".toml", *catalog.YAML):
                files[f"edgeft/_{kind}/{path.name}"] = path.read_bytes()
    return files


def _metadata() -> str:
    known = metadata.distribution("edgeft")
    # A checkout has it under the other name.
    return known.read_text("METADATA") or known.read_text("PKG-INFO") or ""


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
