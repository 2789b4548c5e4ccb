"""Stores of encoded images that are not files of their own: parts of larger files, and items of an object."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compress.data.splits import EncodedStore
from compress.files import shown
from rescompress.core.errors import DataError
from rescompress.core.spec import Preprocessing


@dataclasses.dataclass(frozen=True)
class SliceStore(EncodedStore):
    """Images that are parts of files.

    Attributes:
        paths: The files.
        at: Number of the file, offset and size of each image (N, 3).
    """

    paths: tuple[str, ...]
    at: NDArray[np.int64]
    size: tuple[int, int, int]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        """How many there are."""
        return len(self.at)

    def encoded(self, i: int) -> bytes:
        """Return what the part holds."""
        number, begin, size = (int(v) for v in self.at[i])
        path = self.paths[number]
        try:
            with open(path, "rb", buffering=0) as f:  # noqa: PTH123
                f.seek(begin, os.SEEK_SET)
                content = f.read(size)
        except OSError as e:
            raise DataError(f"cannot be read: {e.strerror}", where=shown(path), remedy="put it back") from e
        if len(content) != size:
            raise DataError("is shorter than it was", where=shown(path), remedy="put the whole file back")
        return content

    def name(self, i: int) -> str:
        """Return the file and where the image begins there."""
        number, begin, _ = (int(v) for v in self.at[i])
        return f"{shown(self.paths[number])} at byte {begin}"


@dataclasses.dataclass(frozen=True)
class ItemStore(EncodedStore):
    """Images that an object hands out, each encoded, as a Pillow image, or as an array.

    Attributes:
        items: Has the images by number.
        index: The number of each there.
        called: What the object is called in errors.
    """

    items: Any
    index: NDArray[np.int64]
    called: str
    size: tuple[int, int, int]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        """How many there are."""
        return len(self.index)

    def encoded(self, i: int) -> bytes | Image.Image:
        """Return the image as the object has it.

        Raises:
            DataError: It is no image.
        """
        try:
            found = self.items[int(self.index[i])]
        except DataError:
            raise
        except Exception as e:  # whatever code of others raises
            raise DataError(f"cannot be read: {type(e).__name__}: {e}", where=self.name(i), remedy="correct the data") from e
        if isinstance(found, bytes | Image.Image):
            return found
        pixels = np.asarray(found)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
            raise DataError(
                f"is {pixels.dtype} of shape {pixels.shape}, no image",
                where=self.name(i),
                remedy="give Pillow images, or uint8 arrays (H, W) or (H, W, C), C 1 or 3, before any transform",
            )
        return Image.fromarray(pixels.squeeze(2) if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)

    def name(self, i: int) -> str:
        """Return the object's name and the number."""
        return f"{self.called}[{int(self.index[i])}]"
