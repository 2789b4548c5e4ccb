"""How the system gives memory out, and how the C library gives it back."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

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


def sparse_array(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return zeros (shape) uint8 that take memory where they are written alone, by pages of the smallest size.

    numpy asks Linux for pages of 2 MB: 256 images of 12 KB, anywhere among 50,000, would take 300 MB instead of 4.
    """
    size = max(math.prod(shape), 1)
    memory = mmap.mmap(-1, size) if sys.platform == "win32" else mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8, count=math.prod(shape)).reshape(shape)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
