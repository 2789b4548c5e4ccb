"""Locks that the system frees when their holder ends, however it ends.

The one place that knows how files are locked; elsewhere than on POSIX systems a lock is an exclusive one of one byte.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_POLL_S = 0.05


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
            shared: Together with others that hold it shared (exclusive where the system knows no shared locks).
            wait: Until it is free; otherwise yield False at once where it is not.
        """
        with self.path.open("ab") as handle:
            got = _lock(handle, shared=shared, wait=wait)
            try:
                yield got
            finally:
                if got:
                    _unlock(handle)


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: IO[bytes], *, shared: bool, wait: bool) -> bool:
        while True:
            try:
                handle.seek(0)
                msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
            except OSError:
                if not wait:
                    return False
                time.sleep(_POLL_S)
            else:
                return True

    def _unlock(handle: IO[bytes]) -> None:
        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(handle: IO[bytes], *, shared: bool, wait: bool) -> bool:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(handle, kind | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def _unlock(handle: IO[bytes]) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)
