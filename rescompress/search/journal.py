"""The journal: a search's storage in one file, which a kill, a full disk or a cut line cannot spoil."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from rescompress.core.locks import FileLock

_REPEATABLE = frozenset({4, 5, 8, 9})
"""Optuna's codes for what may be lost with the machine's power: a queued slot, choices, words about a trial. Whoever goes on
does it again; the end of a trial, which is not among them, is written through together with everything before it."""


def journal_storage(path: Path) -> JournalStorage:
    """Return the storage in a file, which is made if need be.

    Raises:
        ValueError: The file holds something else, or is damaged.
    """
    storage = JournalStorage(_Journal(path))
    with path.open("rb") as f:  # Optuna passes over a last line that it cannot read, and fails at all that follow it
        f.seek(max(0, f.seek(0, os.SEEK_END) - (1 << 20)))
        last = f.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    if last:
        json.loads(last)
    return storage


class _Lock:
    """A lock of the journal that the system frees with its holder; repairs a line that a crash cut."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._lock = FileLock(journal.with_name(journal.name + ".lock"))
        self._stack = contextlib.ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._stack.enter_context(self._lock.held())
        try:
            with self._journal.open("r+b") as f:
                size = f.seek(0, os.SEEK_END)
                if size:
                    f.seek(size - 1)
                    if f.read(1) != b"\n":
                        f.seek(max(0, size - (1 << 20)))
                        tail = f.read()
                        f.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Give it back."""
        self._stack.close()


class _Journal(JournalFileBackend):
    """Optuna's file, with a lock that dies with its holder, and lines that are there whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._own = _Lock(path)
        super().__init__(str(path), self._own)  # type: ignore[arg-type] # duck-typed: Optuna wants acquire and release

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines; where they do not fit, none of them stays.

        Raises:
            OSError: The disk is full, or away.
        """
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        self._own.acquire()
        try:
            handle = os.open(self._file_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                before = os.fstat(handle).st_size
                try:
                    _write(handle, text)
                    if not all(_repeatable(log) for log in logs):
                        os.fsync(handle)
                except OSError:
                    os.ftruncate(handle, before)
                    raise
            finally:
                os.close(handle)
        finally:
            self._own.release()


def _write(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


def _repeatable(log: dict[str, Any]) -> bool:
    return log.get("op_code") in _REPEATABLE or log.get("state") == 0  # 0: a trial begins
