"""Channels with small weights go first: the L2 norm over everything that makes or reads them.

The weights count with the BatchNorm that follows them folded in, and every layer of a group counts relative to its own
energy, so that no single layer decides for all (group norm of Fang et al. 2023, arXiv:2301.12900, section 3.3, in spirit).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.prune.fold import folded
from compress.prune.groups import ChannelGroup, Sizes
from compress.prune.method import Context, Curves, curve_of

DESCRIPTION = "smallest weights first; needs no data"
NEEDS_DATA = False


def scores(checkpoint: Checkpoint, group: ChannelGroup, sizes: Sizes) -> Tensor:
    """Return the share of the group's squared weights that each unit holds (float64)."""
    layers = {layer.name: layer for layer in sizes.layers}
    total = torch.zeros(group.size, dtype=torch.float64)
    for name in group.producers:
        w = folded(checkpoint, layers[name]).weight_OIKK
        rows = w.square().flatten(1).sum(1, dtype=torch.float64)
        energy = rows[group.indices(name)].view(group.size, -1).sum(1)
        total += energy / energy.sum().clamp_min(1e-300)
    for name in group.consumers:
        layer = layers[name]
        w = folded(checkpoint, layer).weight_OIKK
        if w.shape[1] < layer.in_shape[0]:
            continue  # a grouped convolution is a producer of the same group
        columns = w.square().reshape(*w.shape[:2], -1).sum(2).sum(0, dtype=torch.float64)
        energy = columns[group.indices(layer.inputs[0])].view(group.size, -1).sum(1)
        total += energy / energy.sum().clamp_min(1e-300)
    return total


def curves(context: Context) -> Curves:
    """Return the curves of the squared weights."""
    sizes = Sizes(context.checkpoint.spec)
    return Curves(
        {g.name: curve_of(scores(context.checkpoint, g, sizes)) for g in context.groups}, unit="share of squared weights"
    )
