"""Which code an outcome was made by: hashes of plugin files, and of the whole package where it can be edited."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

from rescompress.core import plugins

METHODS = "compress.prune.methods"
BACKENDS = "edge_targets.backends"
FORMATS = (("compress.checkpoints.formats", "*"),)
"""Every format: which one reads a file shows when it is read."""
PACKAGES = ("rescompress", "compress", "export", "edge_targets")


def of(*used: tuple[str, str]) -> dict[str, str]:
    """Return what a stage's code contributes to its key.

    The version of the package is in every key, and stands for its code as it was released. Plugins come with other packages,
    and in a checkout any file may have been edited; so their content counts.

    Args:
        used: Package and name of each plugin; ``*`` for all of a package.
    """
    found: dict[str, str] = {}
    for package, name in used:
        for one in plugins.listed(package) if name == "*" else [name]:
            path = plugins.file_of(package, one)
            if path is not None:
                found[f"{package}.{one}"] = _hash(path)
    edited = package_hash()
    return found | ({"package": edited} if edited else {})


def package_hash() -> str | None:
    """Return the hash of the package's own files where it was not installed but is used from a checkout; else None."""
    roots = [root for name in PACKAGES if (root := _root(name)) is not None]
    if any(part in ("site-packages", "dist-packages") for root in roots for part in root.parts):
        return None
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root.parent)}\0{_hash(path)}\n".encode())
    return digest.hexdigest()


def _root(package: str) -> Path | None:
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found is not None and found.origin else None


def _hash(path: Path) -> str:
    state = path.stat()
    return _hashed(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1024)
def _hashed(path: Path, mtime_ns: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
