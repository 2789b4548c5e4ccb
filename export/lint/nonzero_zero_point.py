"""Zero points other than 0: TensorRT's INT8 is symmetric."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per int8 quantizer with a zero point that is not 0, on TensorRT.

    uint8 quantizers are left to `uint8_activations`: making them int8 moves the zero point too.
    """
    if not facts.tensorrt:
        return
    for node in graph.ops("QuantizeLinear", "DequantizeLinear"):
        if node.op_type == "DequantizeLinear" and graph.made_by(node.input[0], "QuantizeLinear") is not None:
            continue  # said once, at the QuantizeLinear
        zero = graph.zero_point(node)
        if zero.dtype == np.int8 and zero.any():
            worst = int(zero.flat[np.abs(zero.astype(int)).argmax()])
            yield Issue(
                "error",
                label(node),
                f"the zero point is {worst}; {facts.title} reads symmetric INT8 only",
                "quantize symmetrically (onnxruntime: ActivationSymmetric and WeightSymmetric)",
            )
