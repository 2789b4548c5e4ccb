"""Decoded images in a memory-mapped file that all processes of a training share."""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.pixels import Pixels

_VALID = 1 << 32
"""Marks a stored CRC-32, so that 0, which a new file is full of, is none."""
_SPARE_BYTES = 1 << 30
"""Of the disk, which the cache leaves free."""


class PixelCache:
    """Images (H, W, C) uint8 of known sizes, each with a checksum; what was not stored whole is not there.

    Several processes may read and write at a time: two that store one image store the same bytes, and an image that is half
    written does not have its checksum.
    """

    def __init__(self, path: Path, shapes: NDArray[np.int64]) -> None:
        """Lay out the file; call `create` once before anybody reads or writes.

        Args:
            path: Where the file is.
            shapes: Height, width and channels of each image, or one row for all and `count` rows by broadcasting.
        """
        self.path = path
        self.shapes = shapes
        ends = np.cumsum(shapes.prod(1, dtype=np.int64))
        self._begin = np.concatenate([[0], ends])
        self._maps: tuple[NDArray[np.uint64], Pixels] | None = None

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return 8 * len(self.shapes) + int(self._begin[-1])

    def fits_disk(self) -> bool:
        """Whether there is room for the file where it would be."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_size == self.size_bytes:
                return True
        try:
            return shutil.disk_usage(self.path.parent).free > self.size_bytes + _SPARE_BYTES
        except OSError:
            return False

    def create(self) -> None:
        """Make the file, empty, unless it is there with this size."""
        with contextlib.suppress(OSError):
            if not self.path.is_symlink() and self.path.stat().st_size == self.size_bytes:
                return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.remove()
        with self.path.open("xb") as f:
            os.truncate(f.fileno(), self.size_bytes)

    def remove(self) -> None:
        """Delete the file."""
        self._maps = None
        self.path.unlink(missing_ok=True)

    def get(self, i: int) -> Pixels | None:
        """Return image `i`, or None where it is not stored."""
        sums, pixels = self._open()
        known = int(sums[i])
        if not known:
            return None
        flat = pixels[self._begin[i] : self._begin[i + 1]]
        if zlib.crc32(flat.data) | _VALID != known:
            return None
        return flat.reshape(tuple(self.shapes[i]))

    def put(self, i: int, image: Pixels) -> None:
        """Store image `i`; one of another size than was laid out for it is not stored."""
        if image.shape != tuple(self.shapes[i]):
            return
        sums, pixels = self._open()
        flat = np.ascontiguousarray(image).reshape(-1)
        pixels[self._begin[i] : self._begin[i + 1]] = flat
        sums[i] = zlib.crc32(flat.data) | _VALID

    def _open(self) -> tuple[NDArray[np.uint64], Pixels]:
        if self._maps is None:
            whole = np.memmap(self.path, np.uint8, "r+", shape=(self.size_bytes,))
            head = 8 * len(self.shapes)
            self._maps = whole[:head].view(np.uint64), whole[head:]
        return self._maps

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapping out: each process maps the file itself."""
        return self.__dict__ | {"_maps": None}
