"""The pixels that a network is shown: image files and arrays, brought to its input size as its preprocessing says.

Shape suffixes: N batch, H height, W width, C channels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rescompress.core.errors import DataError
from rescompress.core.spec import Preprocessing

Pixels = NDArray[np.uint8]


def normalise(x_NCHW: Tensor, p: Preprocessing) -> Tensor:
    """Return uint8 pixels as the network's float32 input: ``(x * scale - mean) / std`` in the spec's channel order."""
    x = x_NCHW.to(torch.float32)
    if p.channel_order == "bgr":
        x = x.flip(1)
    gain = torch.tensor([p.scale / s for s in p.std])[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(p.mean, p.std, strict=True)])[:, None, None]
    return torch.addcmul(shift, x, gain).contiguous()


def decode(path: Path, size: tuple[int, int, int], p: Preprocessing) -> Pixels:
    """Return one image (H, W, C) uint8 at the network's input size.

    The shorter side is resized to ``p.resize`` and the centre cut out; without it the image is resized as a whole.

    Args:
        path: The file.
        size: Channels, height, width of the network's input.
        p: The preprocessing.

    Raises:
        DataError: The file is no readable image.
    """
    try:
        with Image.open(path) as image:
            picture = _of_8_bits(image).convert("RGB" if size[0] == 3 else "L")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as e:
        raise DataError(f"is no readable image: {e}", where=str(path), remedy="remove or replace the file") from e
    return fit(picture, size, p)


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


def fit(image: Image.Image, size: tuple[int, int, int], p: Preprocessing) -> Pixels:
    """Return the image resized and centre-cropped to (H, W, C)."""
    channels, height, width = size
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}
    if image.size != (width, height):
        if p.resize is None:
            image = image.resize((width, height), filters[p.interpolation])
        else:
            ratio = max(p.resize, height, width) / min(image.size)
            image = image.resize((round(image.width * ratio), round(image.height * ratio)), filters[p.interpolation])
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
