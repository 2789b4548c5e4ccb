"""Per-channel weight scales along the wrong axis."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.graph import GraphView, attribute, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per layer whose weight scales do not run along its output channels (the default axis is 1)."""
    for node in graph.ops("Conv", "Gemm"):
        pair = graph.weight_dq(node)
        weight = graph.weight(node)
        shape = graph.shapes.get(weight) if weight is not None else None
        scale = graph.scale(pair) if pair is not None else None
        if pair is None or scale is None or shape is None or np.size(scale) < 2:
            continue
        expected = 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1
        axis = attribute(pair, "axis", 1) % len(shape)
        if axis != expected:
            yield Issue(
                "error",
                label(pair),
                f"the weight scales run along axis {axis}, the output channels along axis {expected}",
                f"set axis={expected} and compute the scales per output channel",
            )
