"""INT8 placed for TensorRT, run by OpenVINO."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.graph import DEQUANTIZE, GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield one note on OpenVINO for a graph with signed activations behind ReLU and float main branches at its Adds.

    Measured on a ResNet-50: 17 % slower than unsigned activations and Q/DQ on both inputs of the Adds.
    """
    if facts.runtime != "openvino":
        return
    for add, main, skip in graph.residual_adds():
        pair = graph.made_by(skip, DEQUANTIZE)
        if pair is None or graph.made_by(main, DEQUANTIZE) is not None or graph.zero_point(pair).dtype != np.int8:
            continue
        yield Issue(
            "note",
            label(add),
            "quantizers are placed for TensorRT: OpenVINO runs this some 17 % slower than its own placement",
            "quantize with --target cpu (profile openvino)",
        )
        return
