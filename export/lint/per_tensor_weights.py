"""One scale for a whole weight tensor: channels with small weights lose their precision."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a warning per convolution with several output channels and a single weight scale."""
    for node in graph.ops("Conv"):
        pair = graph.weight_dq(node)
        weight = graph.weight(node)
        shape = graph.shapes.get(weight) if weight is not None else None
        scale = graph.scale(pair) if pair is not None else None
        if scale is None or shape is None or shape[0] == 1 or np.size(scale) != 1:
            continue
        yield Issue(
            "warning",
            label(node),
            f"one scale for all {shape[0]} output channels: channels with small weights are left with few levels",
            "quantize weights per output channel (onnxruntime: per_channel=True)",
        )
