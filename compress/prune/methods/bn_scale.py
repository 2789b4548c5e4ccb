"""Channels with a small BatchNorm scale go first (network slimming: Liu et al. 2017, arXiv:1708.06519)."""

from __future__ import annotations

import torch

from compress.prune.fold import norm_of
from compress.prune.groups import Sizes
from compress.prune.method import Context, Curves, curve_of
from rescompress.core.errors import BadInput

DESCRIPTION = "smallest BatchNorm scale first; needs no data; made for networks trained with a penalty on the scales"
NEEDS_DATA = False


def curves(context: Context) -> Curves:
    """Return the curves of the squared scales.

    Raises:
        BadInput: A layer that makes channels has no BatchNorm.
    """
    tensors = context.checkpoint.state_dict
    layers = {layer.name: layer for layer in Sizes(context.checkpoint.spec).layers}
    found = {}
    for g in context.groups:
        score = torch.zeros(g.size, dtype=torch.float64)
        for name in g.producers:
            norm = norm_of(context.checkpoint, layers[name])
            scale = None if norm is None else tensors.get(f"{norm.name}.weight")
            if scale is None:
                raise BadInput(
                    f"bn_scale needs BatchNorm, and there is none behind {name}", remedy="use --method magnitude or reconstruct"
                )
            score += scale.double().square()[g.indices(name)].view(g.size, -1).sum(1)
        found[g.name] = curve_of(score)
    return Curves(found, unit="share of squared BatchNorm scales")
