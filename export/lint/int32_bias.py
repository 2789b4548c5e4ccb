"""Biases as int32 behind DequantizeLinear: TensorRT's parsers refuse them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.graph import DEQUANTIZE, GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per int32 tensor behind a DequantizeLinear, on TensorRT."""
    if not facts.tensorrt:
        return
    for node in graph.ops(DEQUANTIZE):
        stored = graph.constant(node.input[0])
        if stored is not None and stored.dtype == np.int32:
            yield Issue(
                "error",
                label(node),
                f"an int32 bias behind DequantizeLinear, which {facts.title} refuses",
                "store the bias in float (onnxruntime: QuantizeBias=False)",
            )
