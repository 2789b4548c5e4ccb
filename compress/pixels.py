"""The pixels that a network is shown: image files and arrays, brought to its input size as its preprocessing says.

Shape suffixes: N batch, H height, W width, C channels.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rescompress.core.errors import DataError
from rescompress.core.spec import Preprocessing

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "PPM", "TIFF", "JPEG2000", "AVIF")
"""What images may be, in Pillow's words: all that is decoded here. Pillow would hand PostScript to another program."""
MOST_PIXELS = 1 << 27
"""Of an image on its way to the input's size."""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
"""Of half as many pixels as it refuses: such an image is read, and a warning of Python is no message of ours."""
_READ_AT_ONCE = 32 << 20
"""Largest file that is read whole: Pillow asks for it in small parts."""


def normalise(x_NCHW: Tensor, p: Preprocessing, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Return pixels of 0..255 as the network's float32 input: ``(x * scale - mean) / std`` in the spec's channel order.

    Args:
        x_NCHW: On any device; it is computed there.
        p: The preprocessing.
        layout: Order of the result in memory.
    """
    x = x_NCHW.flip(1) if p.channel_order == "bgr" else x_NCHW
    there = x.is_contiguous(memory_format=layout)  # then its strides stay, also where a channel alone makes them ambiguous
    x = x.to(torch.float32, copy=True, memory_format=torch.preserve_format if there else layout)
    gain = torch.tensor([p.scale / s for s in p.std], device=x.device)[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(p.mean, p.std, strict=True)], device=x.device)[:, None, None]
    return torch.addcmul(shift, x, gain, out=x)  # in place: memory for one more batch costs more than the sum


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


Reduce = Callable[[Image.Image], int]
"""Says of an image whose header alone was read by which of 1, 2, 4 and 8 its sides may be divided where that is cheap."""


def picture(
    file: Path | bytes | Image.Image, channels: int, *, where: str | None = None, reduce: Reduce | None = None
) -> Image.Image:
    """Return one image as RGB or grey, whole.

    The content says what an image is, whatever its suffix; it is one of `FORMATS`.

    Args:
        file: The file, what it holds, or the image where it is decoded already.
        channels: Of the network's input: 1 gives grey.
        where: What to call it in an error; the path by default.
        reduce: Asked for a JPEG, whose decoder can leave out detail: the sides may come back divided, rounded up.

    Raises:
        DataError: It is no readable image.
    """
    return _picture(file, channels, where or str(file), reduce, _whole)


def _picture(
    file: Path | bytes | Image.Image,
    channels: int,
    name: str,
    reduce: Reduce | None,
    read: Callable[[Path], Path | io.BytesIO],
) -> Image.Image:
    remedy = "remove or replace the file; --skip-corrupt leaves such files out"
    mode = "RGB" if channels == 3 else "L"
    try:
        with _opened(file, read) as image:
            by = reduce(image) if reduce is not None else 1
            if by > 1 and image.format == "JPEG":
                image.draft(None, (image.width // by, image.height // by))
            image.info.pop("transparency", None)  # what lies under it is shown; Pillow warns about palettes that have it
            image = _of_8_bits(image)
            image.load()
            alone = image.format == "JPEG" and image.mode == mode  # complete, and nobody else's: `convert` would copy it
            return image if alone else image.convert(mode)
    except UnidentifiedImageError as e:
        raise DataError(f"is damaged, or no image of a known kind ({', '.join(_formats())})", where=name, remedy=remedy) from e
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as e:
        raise DataError(f"is no readable image: {e}", where=name, remedy=remedy) from e


def _opened(
    file: Path | bytes | Image.Image, read: Callable[[Path], Path | io.BytesIO]
) -> contextlib.AbstractContextManager[Image.Image]:
    if isinstance(file, Image.Image):
        return contextlib.nullcontext(file.copy())
    return Image.open(read(file) if isinstance(file, Path) else io.BytesIO(file), formats=_formats())


def _whole(path: Path) -> Path | io.BytesIO:
    """Return what a file holds, or the file where it is large or none with an end."""
    with path.open("rb", buffering=0) as f:
        about = os.fstat(f.fileno())
        return io.BytesIO(f.read()) if stat.S_ISREG(about.st_mode) and about.st_size <= _READ_AT_ONCE else path


def dimensions(file: Path | bytes | Image.Image, *, where: str | None = None) -> tuple[int, int]:
    """Return height and width of an image, of which only the header is read.

    Raises:
        DataError: It is no readable image.
    """
    found: list[tuple[int, int]] = []

    def note(image: Image.Image) -> int:
        found.append((image.height, image.width))
        raise _Enough

    with contextlib.suppress(_Enough):
        _picture(file, 3, where or str(file), note, lambda path: path)
    return found[0]


class _Enough(Exception):
    """The header was read."""


def decode(
    file: Path | bytes | Image.Image, size: tuple[int, int, int], p: Preprocessing, *, where: str | None = None
) -> Pixels:
    """Return one image (H, W, C) uint8 at the network's input size.

    Args:
        file: The file, or what it holds.
        size: Channels, height, width of the network's input.
        p: The preprocessing.
        where: What to call it in an error; the path by default.

    Raises:
        DataError: It is no readable image.
    """
    name = where or str(file)
    return fit(picture(file, size[0], where=name), size, p, where=name)


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Return the image with 16-bit grey values as 8-bit ones, where Pillow would cut all above 255 off.

    Raises:
        ValueError: Its values have another range, which the file does not tell.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 or 16 bits")
    if 0 < values.max() < 256 and image.format != "PPM":  # which says its range
        raise ValueError(
            f"16 bits for each pixel, and none above {values.max()}: all black; save it with 8 bits if that is its range"
        )
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def fit(image: Image.Image, size: tuple[int, int, int], p: Preprocessing, *, where: str | None = None) -> Pixels:
    """Return an image (H, W, C) as `p` brings it to the network's input size.

    The pixels are those of torchvision's ``Resize`` and ``CenterCrop`` for Pillow images. Every image goes through both, also
    one that has the input's size already: which part of a picture a network sees is no matter of how large it was stored.

    Args:
        image: RGB or grey.
        size: Channels, height, width of the network's input.
        p: The preprocessing.
        where: Of the image, for the error.

    Raises:
        DataError: The image is so oblong that it would not fit into memory.
    """
    channels, height, width = size
    wide, high = resized_size(image.size, (width, height), p.resize)
    if wide * high > MOST_PIXELS:
        raise DataError(
            f"is {image.width}x{image.height} pixels: resized for this network it would be {wide}x{high}",
            where=where,
            remedy="remove the image, or state another resize with --preprocess",
        )
    if image.size != (wide, high):
        if p.antialias:
            image = image.resize((wide, high), Image.Resampling[p.interpolation.upper()])
        else:
            image = Image.fromarray(sampled(np.asarray(image), high, wide))
    if (wide, high) != (width, height):
        left, top = round((wide - width) / 2), round((high - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, dtype=np.uint8).reshape(height, width, channels)


def resized_size(image: tuple[int, int], least: tuple[int, int], resize: int | tuple[int, int] | None) -> tuple[int, int]:
    """Return the width and height that an image is resized to before its centre is cut out.

    Args:
        image: Its width and height.
        least: Width and height of the input, which the result covers.
        resize: See `Preprocessing`.
    """
    if resize is None:
        return least
    if isinstance(resize, tuple):
        return max(resize[1], least[0]), max(resize[0], least[1])
    short, long = min(image), max(image)
    side = max(resize, *least)
    other = int(side * long / short)
    return (side, other) if image[0] <= image[1] else (other, side)


def sampled(pixels: Pixels, height: int, width: int) -> Pixels:
    """Return pixels (H, W) or (H, W, C) resized by bilinear interpolation between four of them, whatever the ratio."""
    for axis, wanted in ((0, height), (1, width)):
        here = pixels.shape[axis]
        place = np.maximum((np.arange(wanted) + 0.5) * (here / wanted) - 0.5, 0.0)
        low = np.minimum(place.astype(np.int64), here - 1)
        share = (place - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(pixels.ndim)])
        first = np.take(pixels, low, axis).astype(np.float32)
        pixels = first + share * (np.take(pixels, np.minimum(low + 1, here - 1), axis) - first)
    result: Pixels = np.floor(pixels + 0.5).astype(np.uint8)
    return result
