"""Float weights that are quantized when the file is loaded: no smaller than the float file."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import DEQUANTIZE, QUANTIZE, GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a warning per weight that is stored in float in front of Q and DQ."""
    for node in graph.weighted():
        pair = graph.made_by(node.input[1], DEQUANTIZE)
        quantize = graph.made_by(pair.input[0], QUANTIZE) if pair is not None else None
        if quantize is not None:
            yield Issue(
                "warning",
                label(node),
                "the weight is stored in float and quantized at load time: the file is four times larger than it need be",
                "store int8 weights in front of the DequantizeLinear",
            )
