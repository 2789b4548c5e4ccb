"""Channels go in random order: the baseline that every method must beat."""

from __future__ import annotations

import torch

from compress.device import drawn
from compress.prune.method import Context, Curves, curve_of

DESCRIPTION = "a random order, by the seed; needs no data; the baseline to beat"
NEEDS_DATA = False


def curves(context: Context) -> Curves:
    """Return curves of random scores."""
    generator = torch.Generator("cpu").manual_seed(context.seed)
    return Curves({g.name: curve_of(drawn((g.size,), generator)) for g in context.groups}, unit="share of chance")
