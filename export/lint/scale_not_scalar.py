"""Activation scales of shape [1] instead of a scalar: the engine builds, and the convolutions run in float."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per activation quantizer whose scale or zero point has shape [1], on TensorRT."""
    if not facts.tensorrt:
        return
    for node in graph.ops("QuantizeLinear", "DequantizeLinear"):
        if graph.is_weight_pair(node):
            continue
        arrays = [graph.constant(name) for name in node.input[1:] if name]
        if any(a is not None and a.ndim == 1 and a.size == 1 for a in arrays):
            yield Issue(
                "error",
                label(node),
                "scale or zero point has shape [1] instead of (); the build gives no warning and convolutions run in float",
                "make them scalars (0-D)",
            )
