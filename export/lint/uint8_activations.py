"""Activations stored as uint8: TensorRT reads int8 only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per uint8 quantizer on TensorRT.

    A parser that does not refuse it may read the bytes as int8, so that everything above 127 saturates.
    """
    if not facts.tensorrt:
        return
    for node in graph.ops("QuantizeLinear", "DequantizeLinear"):
        stored = graph.stored(node.input[0])
        weight = node.op_type == "DequantizeLinear" and stored is not None
        if (node.op_type == "QuantizeLinear" or weight) and graph.zero_point(node).dtype == np.uint8:
            what = "weights" if weight else "activations"
            yield Issue(
                "error", label(node), f"{what} are uint8, which {facts.title} does not read", "quantize to int8, symmetric"
            )
