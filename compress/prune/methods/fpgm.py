"""Filters near the geometric median go first, since the others can stand in for them (He et al. 2019, arXiv:1811.00250)."""

from __future__ import annotations

import torch

from compress.prune.fold import folded
from compress.prune.groups import Sizes
from compress.prune.method import Context, Curves, curve_of

DESCRIPTION = "filters most like the others first (geometric median); needs no data"
NEEDS_DATA = False


def curves(context: Context) -> Curves:
    """Return the curves of the squared summed distance of each filter to all others."""
    layers = {layer.name: layer for layer in Sizes(context.checkpoint.spec).layers}
    found = {}
    for g in context.groups:
        score = torch.zeros(g.size, dtype=torch.float64)
        for name in g.producers:
            w_KD = folded(context.checkpoint, layers[name]).weight_OIKK.double()[g.indices(name)].reshape(g.size, -1)
            distance = torch.cdist(w_KD, w_KD).sum(1)
            score += (distance / distance.sum().clamp_min(1e-300)).square()
        found[g.name] = curve_of(score)
    return Curves(found, unit="share of squared distances")
