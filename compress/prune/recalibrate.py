"""BatchNorm statistics measured again, for pruned networks that nothing else has repaired."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compress.checkpoints.base import Checkpoint
from compress.resnet import FrozenBatchNorm, build_model, tensors_of
from rescompress.core.layers import walk


@torch.no_grad()
def recalibrate(checkpoint: Checkpoint, x_NCHW: Tensor, batch_size: int = 64) -> Checkpoint:
    """Return the checkpoint with every BatchNorm's running mean and variance measured on the images.

    A BatchNorm that sees a single value per channel keeps what it has: one image, and feature maps of one pixel.

    Args:
        checkpoint: A network.
        x_NCHW: Preprocessed images.
        batch_size: Images per step, at most. All steps count alike, so they are of the same size, give or take an image.
    """
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    pixels = {layer.name: math.prod(layer.out_shape[1:]) for layer in walk(checkpoint.spec)}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and not isinstance(module, FrozenBatchNorm) and len(x_NCHW) * pixels[name] > 1:
            module.reset_running_stats()
            module.momentum = None
            module.train()
    for batch in x_NCHW.tensor_split(math.ceil(len(x_NCHW) / batch_size)):
        model(batch)
    return Checkpoint(checkpoint.spec, tensors_of(model), None, checkpoint.provenance)
