"""Files: `Artifact`, and writing that never leaves half a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rescompress.core.errors import BadInput, EnvironmentFailed
from rescompress.core.spec import Frozen

PARTIAL_PREFIX = ".partial-"


class Artifact(Frozen):
    """One file.

    Attributes:
        kind: ``checkpoint``, ``onnx``, ``engine``, ``plan``, ``outcomes``, ``log``, ``script``, ``report``.
        path: Relative to the folder of the manifest, with forward slashes.
        sha256: Of the content, in hex.
        size_bytes: Of the content.
    """

    kind: str
    path: str
    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, kind: str, path: Path, root: Path) -> Artifact:
        """Return the artifact for the file `path` below the folder `root`."""
        return cls(kind=kind, path=path.relative_to(root).as_posix(), sha256=file_sha256(path), size_bytes=path.stat().st_size)

    def intact(self, root: Path) -> bool:
        """Whether the file is there with this size and content."""
        path = root / self.path
        return path.is_file() and path.stat().st_size == self.size_bytes and file_sha256(path) == self.sha256


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it takes the place of `path`, on failure it vanishes.

    The content is flushed to the disk before the rename, so a crash at any moment leaves the old file or the new one.

    Args:
        path: The final name. Missing parent folders are made; a link stays one, the file it points at is replaced.

    Raises:
        EnvironmentFailed: The disk is full, or the folder cannot be written.
        BadInput: `path` is a folder, a device or a pipe.
    """
    path = _file_at(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=PARTIAL_PREFIX, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EnvironmentFailed("the disk is full", where=str(path), remedy="free some space and run again") from e
        if temporary is None or e.errno in _UNWRITABLE:
            raise _unwritable(path, e) from e
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _file_at(path: Path) -> Path:
    """Return the file that a name stands for, there or not yet; links are followed.

    Raises:
        BadInput: It is something else, which a file must not take the place of.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.is_dir():
        raise BadInput("is a folder, a file was expected", where=str(path), remedy="name a file to write")
    if path.exists() and not path.is_file():
        raise BadInput("is a device or a pipe, a file was expected", where=str(path), remedy="name a file to write")
    return path


_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EIO)


def _unwritable(path: Path, error: OSError) -> EnvironmentFailed:
    remedy = "choose another place with -o, or mend the rights"
    return EnvironmentFailed(f"cannot write: {error.strerror}", where=str(path), remedy=remedy)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        EnvironmentFailed: It cannot be made, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise _unwritable(path, e) from e


def check_writable(path: Path) -> None:
    """Make sure that a file can be written there, before work is spent on it; nothing is left behind.

    Raises:
        BadInput: It is a folder, a device or a pipe.
        EnvironmentFailed: Its folder, or the nearest that there is, may not be written.
    """
    path = _file_at(path)
    folder = next(p for p in path.absolute().parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise _unwritable(path, e) from e


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all (see `atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text to `path`, whole or not at all (see `atomic_path`)."""
    write_bytes(path, content.encode())


def sweep_partial(folder: Path) -> None:
    """Remove what a killed process left half-written below `folder`; call it only when no other process writes there."""
    for path in folder.rglob(f"{PARTIAL_PREFIX}*"):
        if path.is_file():
            path.unlink(missing_ok=True)
