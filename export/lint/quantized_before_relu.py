"""A quantizer between a convolution and its ReLU."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import DEQUANTIZE, QUANTIZE, GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a warning per ReLU that reads a rounded convolution: the two do not fuse, and half the levels are wasted."""
    for node in graph.ops("Relu", "Clip"):
        pair = graph.made_by(node.input[0], DEQUANTIZE)
        quantize = graph.made_by(pair.input[0], QUANTIZE) if pair is not None else None
        if quantize is not None and graph.made_by(quantize.input[0], "Conv", "BatchNormalization", "Add", "Gemm") is not None:
            yield Issue(
                "warning",
                label(node),
                f"{label(quantize)} rounds in front of the activation function: convolution and ReLU do not fuse",
                "quantize behind the ReLU",
            )
