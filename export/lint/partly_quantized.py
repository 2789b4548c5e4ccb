"""Layers of an INT8 network that run in floating point."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a warning per convolution of a quantized graph with a quantizer on its weight or its data, but not both.

    A convolution without any quantizer was left in float on purpose: a note says so.
    """
    convs = list(graph.ops("Conv"))
    if not any(graph.weight_dq(c) is not None or graph.input_dq(c) is not None for c in convs):
        return
    for node in convs:
        weight, data = graph.weight_dq(node) is not None, graph.input_dq(node) is not None
        if weight and not data:
            yield Issue(
                "warning", label(node), "the weight is INT8 but the data is float: it runs in float", "quantize its input too"
            )
        elif not weight and data and len(graph.consumers.get(node.input[0], [])) == 1:
            yield Issue(
                "warning", label(node), "the data is INT8 but the weight is float: it runs in float", "quantize its weight too"
            )
        elif not weight:
            yield Issue("note", label(node), "this convolution is not quantized", "quantize it, unless accuracy asks for float")
