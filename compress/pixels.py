"""The pixels that a network is shown: image files and arrays, brought to its input size as its preprocessing says.

Shape suffixes: N batch, H height, W width, C channels.
"""

from __future__ import annotations

import functools
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


def normalise(x_NCHW: Tensor, p: Preprocessing) -> Tensor:
    """Return uint8 pixels as the network's float32 input: ``(x * scale - mean) / std`` in the spec's channel order."""
    x = x_NCHW.to(torch.float32)
    if p.channel_order == "bgr":
        x = x.flip(1)
    gain = torch.tensor([p.scale / s for s in p.std])[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(p.mean, p.std, strict=True)])[:, None, None]
    return torch.addcmul(shift, x, gain).contiguous()


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(path: Path, size: tuple[int, int, int], p: Preprocessing) -> Pixels:
    """Return one image (H, W, C) uint8 at the network's input size.

    The content says what an image is, whatever its suffix; it is one of `FORMATS`.

    Args:
        path: The file.
        size: Channels, height, width of the network's input.
        p: The preprocessing.

    Raises:
        DataError: The file is no readable image.
    """
    where, remedy = str(path), "remove or replace the file"
    try:
        with Image.open(path, formats=_formats()) as image:
            image.info.pop("transparency", None)  # what lies under it is shown; Pillow warns about palettes that have it
            picture = _of_8_bits(image).convert("RGB" if size[0] == 3 else "L")
    except UnidentifiedImageError as e:
        raise DataError(f"is damaged, or no image of a known kind ({', '.join(_formats())})", where=where, remedy=remedy) from e
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as e:
        raise DataError(f"is no readable image: {e}", where=where, remedy=remedy) from e
    return fit(picture, size, p, where=where)


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
