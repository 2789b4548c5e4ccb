"""Content keys: what a stage's outcome depends on, as one hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.data import sources
from compress.files import shown
from edge_targets.backends import PACKAGE as BACKENDS
from edge_targets.backends import load_backend
from edge_targets.benchmark import cpu_name
from rescompress.core import plugins
from rescompress.core.artifact import file_sha256
from rescompress.core.errors import BadInput, DataError


def key_of(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON values, equal for equal values on every machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_identity(path: str) -> str:
    """Return the SHA-256 of a regular file.

    Raises:
        BadInput: There is no such file.
    """
    try:
        return file_sha256(Path(path))
    except OSError as e:
        reason = "no such file" if isinstance(e, FileNotFoundError) else e.strerror or str(e)
        raise BadInput(reason, where=path, remedy="check the path") from e


@contextlib.contextmanager
def held_to(path: Path, sha256: str) -> Iterator[None]:
    """Make sure that what is read from a file inside is the content that a key was made of.

    Raises:
        BadInput: The file is another one now, or it was written to while it was read.
    """
    changed = BadInput(
        "was changed after this command began", where=str(path), remedy="call the command again once the file is complete"
    )
    before = _state(path)
    if file_identity(str(path)) != sha256:
        raise changed
    yield
    if _state(path) != before:
        raise changed


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def data_identity(source: str) -> str:
    """Return a hash that changes when a data set does.

    Raises:
        BadInput: There is no such data set, or a part of it cannot be read.
    """
    if source == "builtin:digits":
        return source
    try:
        plugin = sources.find(source)
    except DataError as e:
        raise BadInput(e.what, where=shown(source), remedy="check the path of --data") from e
    return plugin.identity(source)


def environment() -> dict[str, Any]:
    """Return what a reader needs to know to repeat a figure: versions, system, processor."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    runtimes = [load_backend(name).PACKAGE.replace("-", "_") for name in plugins.names(BACKENDS)]
    for name in dict.fromkeys(["torch", "torchvision", "onnx", "nncf", "numpy", *runtimes]):
        try:
            packages[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "packages": packages,
    }
