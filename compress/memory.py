"""How the C library treats memory that computing gives back."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER, _NO_MAPS = -1, 0
_USUAL_TRIM, _USUAL_MAPS = 64 << 20, 65536
"""What glibc comes to by itself where large blocks are freed, and what it begins with (malloc.c; mallopt(3))."""


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Let the process keep what is freed inside for what is asked for next; at the end all of it goes back to the system.

    glibc returns large blocks at once. A training step asks for the same blocks again, and the kernel hands them out page by
    page, each filled with zeros: some 5 % of a step on photographs. Without glibc nothing happens.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_M_MMAP_MAX, _NO_MAPS)
    library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_MAX, _USUAL_MAPS)
        library.mallopt(_M_TRIM_THRESHOLD, _USUAL_TRIM)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
