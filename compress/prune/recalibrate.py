"""BatchNorm statistics measured again, for pruned networks that nothing else has repaired."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.checkpoints.base import Checkpoint
from compress.resnet import build_model, tensors_of


@torch.no_grad()
def recalibrate(checkpoint: Checkpoint, x_NCHW: Tensor, batch_size: int = 64) -> Checkpoint:
    """Return the checkpoint with every BatchNorm's running mean and variance measured on the images.

    Args:
        checkpoint: A network.
        x_NCHW: Preprocessed images.
        batch_size: Images per step; all batches count alike.
    """
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    for start in range(0, len(x_NCHW), batch_size):
        batch = x_NCHW[start : start + batch_size]
        if len(batch) > 1 or len(x_NCHW) == 1:
            model(batch)
    return Checkpoint(checkpoint.spec, tensors_of(model), None, checkpoint.provenance)
