"""Files: `Artifact`, reading that never waits for a pipe, and writing that never leaves half a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from rescompress.core.errors import BadInput, EnvironmentFailed
from rescompress.core.locks import RENAMES_OPEN_FILES, lock
from rescompress.core.spec import Frozen

PARTIAL_PREFIX = ".partial-rescompress-"
_PARTIAL = re.compile(re.escape(PARTIAL_PREFIX) + r"[a-z0-9_]{8}(\..*)?", re.DOTALL)
LARGEST_TEXT = 64 * 2**20
"""Bytes; a text that people or this package write (a config, a manifest, a plan) is smaller."""


class NoRegularFile(OSError):
    """What was to be read is a folder, a pipe, a device, or too large for what it should be."""


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file to read its bytes, once it is seen to be a regular one: a pipe may never end, and a device never does.

    Raises:
        NoRegularFile: It is something else.
        OSError: It is missing or may not be read.
    """
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags)
    except ValueError as e:  # a NUL in the name
        raise NoRegularFile(f"is no name of a file: {e}") from e
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise NoRegularFile(f"is {kind}, a file was expected")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_text(path: Path) -> str:
    """Return the UTF-8 text of a regular file of a size that a text has, without the mark some editors put in front.

    Raises:
        OSError: There is no such file (see `open_regular`), or it is too large.
        UnicodeDecodeError: It is no text.
    """
    with open_regular(path) as f:
        content = f.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise NoRegularFile(f"is larger than {LARGEST_TEXT >> 20} MiB, a text was expected")
    return content.decode("utf-8-sig")


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
        """Whether the file is there, below the folder, with this size and content.

        Raises:
            EnvironmentFailed: It may not be read, so nobody knows.
        """
        path, parts = root / self.path, PurePosixPath(self.path)
        if parts.is_absolute() or ".." in parts.parts:
            return False  # a record that was edited: no stage writes there
        try:
            return path.is_file() and path.stat().st_size == self.size_bytes and file_sha256(path) == self.sha256
        except PermissionError as e:
            raise unreadable(path, e) from e
        except OSError:
            return False


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a regular file's content, in hex.

    Raises:
        OSError: There is no such file (see `open_regular`).
    """
    with open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def unreadable(path: Path, error: OSError) -> EnvironmentFailed:
    """Return the error of a file of ours that may not be read."""
    return EnvironmentFailed(f"cannot be read: {error.strerror}", where=str(path), remedy="correct its owner or its rights")


@contextlib.contextmanager
def atomic_path(path: Path, *, follow: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it takes the place of `path`, on failure it vanishes.

    The content is flushed to the disk before the rename, so a crash at any moment leaves the old file or the new one. The
    temporary file is locked for as long as it is written, so that `sweep_partial` can tell it from one that was left.

    Args:
        path: The final name. Missing parent folders are made; a link stays one, the file it points at is replaced.
        follow: Whether a link is followed so; else the link itself is replaced.

    Raises:
        EnvironmentFailed: The disk is full, or the folder cannot be written.
        BadInput: `path` is a folder, a device or a pipe.
    """
    path = path if path.is_symlink() and not follow else _file_at(path)
    temporary: Path | None = None
    held: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held, name = tempfile.mkstemp(prefix=PARTIAL_PREFIX, suffix=path.suffix, dir=path.parent)
        if RENAMES_OPEN_FILES:
            lock(held)
        else:
            os.close(held)
            held = None
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
        if held is not None:
            os.close(held)


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
    remedy = "choose another place with -o, or correct its permissions"
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
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders, and keeps their entries by itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes, *, follow: bool = True) -> None:
    """Write `content` to `path`, whole or not at all (see `atomic_path`)."""
    with atomic_path(path, follow=follow) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str, *, follow: bool = True) -> None:
    """Write UTF-8 text to `path`, whole or not at all (see `atomic_path`)."""
    write_bytes(path, content.encode(), follow=follow)


def sweep_partial(folders: Iterable[Path]) -> None:
    """Remove what killed processes of ours left half-written directly in these folders, and nothing that is still written."""
    for folder in folders:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            for path in [] if folder.is_symlink() else list(folder.iterdir()):
                if _PARTIAL.fullmatch(path.name) and path.is_file() and not path.is_symlink() and _is_left(path):
                    path.unlink(missing_ok=True)


def _is_left(partial: Path) -> bool:
    """Whether no process writes this file any more."""
    try:
        with open_regular(partial) as f:
            return lock(f.fileno())
    except FileNotFoundError:
        return False
