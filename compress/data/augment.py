"""What training does to images: presets by name, on torchvision's ``transforms.v2``.

``cifar`` moves a whole batch on the device of the batch; ``photo`` and ``photo+`` work on one picture each, in the process
that decodes it. What happens to a sample is drawn from (seed, epoch, sample), so it does not depend on who reads it.

Shape suffixes: N batch, H height, W width, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.pixels import Pixels, Reduce

if TYPE_CHECKING:
    from PIL import Image


def shifted(x_NCHW: Tensor, *, flip: bool) -> Tensor:
    """Return randomly shifted (up to an eighth of each side, zeros move in) and perhaps mirrored images.

    Args:
        x_NCHW: Pixels.
        flip: Whether half of the images are mirrored.
    """
    n, _, h, w = x_NCHW.shape
    pad_h, pad_w = max(1, h // 8), max(1, w // 8)
    padded = F.pad(x_NCHW, (pad_w, pad_w, pad_h, pad_h))
    top = torch.randint(0, 2 * pad_h + 1, (n, 1)) + torch.arange(h)
    left = torch.randint(0, 2 * pad_w + 1, (n, 1)) + torch.arange(w)
    if flip:
        mirrored = torch.rand(n, 1) < 0.5
        left = torch.where(mirrored, left.flip(1), left)
    n_index = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[n_index, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)


_ERASED = 0.1
"""Part of the pictures of ``photo+`` that lose a rectangle."""


class PhotoTransform:
    """A random part of a picture, mirrored or not; ``photo+`` also distorts it by TrivialAugment and erases a rectangle."""

    def __init__(self, name: str, size: tuple[int, int], *, min_area: float, flip: bool) -> None:
        """Look up the transforms.

        Args:
            name: ``photo`` or ``photo+``.
            size: Height and width of the result.
            min_area: Least part of the picture's area that is cut out.
            flip: Whether half of the pictures are mirrored.
        """
        from torchvision.transforms import v2  # seconds to import

        self.size = size
        self._crop = v2.RandomResizedCrop(size, scale=(min_area, 1.0), antialias=True)
        steps: list[Any] = [v2.RandomHorizontalFlip(0.5)] if flip else []
        if name == "photo+":
            steps += [v2.TrivialAugmentWide(), v2.PILToTensor(), v2.RandomErasing(_ERASED)]
        self._steps = steps

    def reduce(self, image: Image.Image) -> int:
        """Draw the part of the picture, and return by which of 1, 2, 4 and 8 it may be decoded smaller.

        Decoded so, the part still has twice the pixels of the result in each direction: what is left out is not to be seen.
        """
        self._part = self._crop.make_params([image])
        self._whole = image.size
        height, width = self._part["height"], self._part["width"]
        least = 2 * self.size[0], 2 * self.size[1]
        return next((by for by in (8, 4, 2) if height >= by * least[0] and width >= by * least[1]), 1)

    def __call__(self, image: Image.Image) -> Pixels:
        """Return the augmented pixels (H, W, C); `reduce` was called with this image, or with its header."""
        from PIL.Image import Resampling
        from torchvision.transforms.v2 import functional

        result: Any
        part, result = self._part, image
        if image.size == self._whole:
            result = functional.resized_crop(image, **part, size=list(self.size), antialias=True)
        else:
            by_x, by_y = image.width / self._whole[0], image.height / self._whole[1]
            right, bottom = part["left"] + part["width"], part["top"] + part["height"]
            box = part["left"] * by_x, part["top"] * by_y, right * by_x, bottom * by_y
            result = image.resize(self.size[::-1], Resampling.BILINEAR, box=box)
        for step in self._steps:
            result = step(result)
        if isinstance(result, Tensor):
            return result.permute(1, 2, 0).numpy()
        pixels = np.asarray(result, dtype=np.uint8)
        return pixels.reshape(*self.size, -1)


def seed_of(seed: int, epoch: int, sample: int) -> int:
    """Return 64 bits that depend on all three numbers, by the finaliser of SplitMix64 over each in turn."""
    state = 0
    for number in (seed, epoch, sample):
        state = (state ^ number) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


def draw(transform: PhotoTransform, picture: Any, seed: int) -> Pixels:
    """Return a picture under a transform with all that is random drawn from `seed`.

    Args:
        transform: The transform.
        picture: Reads it: called with `Reduce`.
        seed: 64 bits.
    """
    torch.default_generator.manual_seed(seed)
    return transform(picture(transform.reduce))


__all__ = ["PhotoTransform", "Reduce", "draw", "seed_of", "shifted"]
