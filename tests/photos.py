"""Real images that are always there: crops of the two photographs that scikit-learn brings."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from compress.pixels import normalise
from rescompress.core.spec import ModelSpec


def crops(spec: ModelSpec, count: int, seed: int) -> Tensor:
    """Return preprocessed crops (N, C, H, W) of random places, sizes and brightness, some of them mirrored."""
    rng = np.random.default_rng(seed)
    _, height, width = spec.input_shape
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    made = []
    for i in range(count):
        photo = photos[i % len(photos)]
        side = int(rng.integers(48, min(photo.size) + 1))
        left, top = (int(rng.integers(0, full - side + 1)) for full in photo.size)
        crop = photo.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        pixels = np.asarray(crop).astype(np.float32) * rng.uniform(0.5, 1.2)
        pixels = np.clip(pixels, 0, 255).astype(np.uint8)
        made.append(pixels[:, ::-1] if rng.random() < 0.5 else pixels)
    return normalise(torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2), spec.preprocessing)
