"""Channels go first whose removal changes the loss least to first order (Molchanov et al. 2019, arXiv:1906.10771).

The score of a channel is the mean over images of ``(sum over pixels of activation * gradient)^2``, summed over the
places that make it. Labels are drawn from the network's own predictions, so none are needed.
"""

from __future__ import annotations

import torch

from compress.prune.fold import folded
from compress.prune.gradients import sampled_gradients
from compress.prune.groups import Sizes
from compress.prune.method import Context, Curves, ErrorCurve
from compress.resnet import build_model

DESCRIPTION = "smallest first-order change of the loss first; needs images, no labels"
NEEDS_DATA = True


def curves(context: Context) -> Curves:
    """Return the curves of squared first-order changes of the loss."""
    x = context.images()
    dense = build_model(context.checkpoint.spec, context.checkpoint.state_dict).requires_grad_(False)
    layers = {layer.name: layer for layer in Sizes(context.checkpoint.spec).layers}
    makes = {g.name: [folded(context.checkpoint, layers[p]).output for p in g.producers] for g in context.groups}
    columns = {
        (g.name, folded(context.checkpoint, layers[p]).output): g.indices(p) for g in context.groups for p in g.producers
    }
    score = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in context.groups}
    for seen in sampled_gradients(context, dense, x, [t for names in makes.values() for t in names]):
        for group, names in makes.items():
            for name in names:
                value_NCHW, g_NCHW = seen[name]
                change_NC = (value_NCHW * g_NCHW).sum((2, 3)) if value_NCHW.dim() == 4 else value_NCHW * g_NCHW
                change_NK = change_NC[:, columns[group, name]].view(len(g_NCHW), len(score[group]), -1).sum(2)
                score[group] += change_NK.double().square().sum(0) / len(x)
    found = {}
    for group, score_K in score.items():
        order = torch.argsort(score_K, stable=True)
        error = torch.cumsum(score_K[order], 0)
        found[group] = ErrorCurve(tuple(order.tolist()), (0.0, *error[:-1].tolist()))
    return Curves(found, unit="squared first-order change of the loss")
