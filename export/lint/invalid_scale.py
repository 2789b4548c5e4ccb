"""Scales that are zero, negative or no number."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per scale that is not a positive finite number."""
    for node in graph.ops("QuantizeLinear", "DequantizeLinear"):
        scale = graph.scale(node)
        if scale is None:
            continue
        values = scale.astype(np.float64)
        if not (np.isfinite(values).all() and (values > 0).all()):
            bad = values.flat[int(np.argmin(np.where(np.isfinite(values), values, -np.inf)))]
            yield Issue(
                "error",
                label(node),
                f"a scale is {bad}: scales are positive finite numbers",
                "calibrate on data that reaches this layer; give channels without signal any small positive scale",
            )
