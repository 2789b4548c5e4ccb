"""Locks that the system frees when their holder ends, however it ends.

The one place that knows how files are locked. Where a system has no shared locks (Windows), a lock is an exclusive one of a
byte far beyond any content, so that what is locked can be read; where a file system has no locks at all, none is held.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.05
_FAR = 1 << 40
"""Offset of the byte that stands for a file where ranges are locked."""

if sys.platform == "win32":
    import msvcrt

    RENAMES_OPEN_FILES = False

    def lock(handle: int, *, shared: bool = False, wait: bool = False) -> bool:
        """Lock an open file for as long as it is open; return whether it is held now.

        Args:
            handle: Of the file.
            shared: Together with others that hold it shared.
            wait: Until it is free.
        """
        while True:
            at = os.lseek(handle, 0, os.SEEK_CUR)
            os.lseek(handle, _FAR, os.SEEK_SET)
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            except OSError:
                if not wait:
                    return False
                time.sleep(_POLL_S)
            else:
                return True
            finally:
                os.lseek(handle, at, os.SEEK_SET)

else:
    try:
        import fcntl
    except ModuleNotFoundError:  # a POSIX system without it: nothing is locked
        fcntl = None  # type: ignore[assignment]

    RENAMES_OPEN_FILES = True

    def lock(handle: int, *, shared: bool = False, wait: bool = False) -> bool:
        """Lock an open file for as long as it is open; return whether it is held now.

        Args:
            handle: Of the file.
            shared: Together with others that hold it shared.
            wait: Until it is free.
        """
        if fcntl is None:
            return True
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(handle, kind)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True


@dataclass(frozen=True)
class FileLock:
    """A lock by the name of a file, which is made if need be and stays.

    Attributes:
        path: The file.
    """

    path: Path

    @contextlib.contextmanager
    def held(self, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
        """Hold the lock; yields whether it is held.

        Args:
            shared: Together with others that hold it shared.
            wait: Until it is free; otherwise yield False at once where it is not.
        """
        with self.path.open("ab") as handle:
            yield lock(handle.fileno(), shared=shared, wait=wait)


@contextlib.contextmanager
def folder_held(folder: Path) -> Iterator[None]:
    """Hold a folder itself, which leaves no file behind; waits until it is free.

    Where folders cannot be opened (Windows), a file beside its content stands for it.
    """
    directory = getattr(os, "O_DIRECTORY", None)
    if directory is None:
        with FileLock(folder / ".manifest.lock").held():
            yield
        return
    handle = os.open(folder, os.O_RDONLY | directory | getattr(os, "O_CLOEXEC", 0))
    try:
        lock(handle, wait=True)
        yield
    finally:
        os.close(handle)
