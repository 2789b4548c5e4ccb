"""Float16 biases that onnxruntime turns into infinities when it makes integers of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts

LARGEST = float(np.finfo(np.float16).max)


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per INT8 convolution whose float16 bias is beyond 65,504 steps of its accumulator, on onnxruntime.

    Its optimizer ``WeightBiasQuantization`` divides such a bias by (input scale x weight scale) in float16.
    """
    if facts.runtime != "onnxruntime":
        return
    for node in graph.ops("Conv", "Gemm"):
        bias = graph.constant(node.input[2]) if len(node.input) > 2 else None
        data, weight = graph.input_dq(node), graph.weight_dq(node)
        if bias is None or bias.dtype != np.float16 or data is None or weight is None:
            continue
        s_x, s_w = graph.scale(data), graph.scale(weight)
        if s_x is None or s_w is None or np.size(s_x) != 1:
            continue
        step = s_x.astype(np.float64).reshape(()) * s_w.astype(np.float64).reshape(-1)
        steps = float((np.abs(bias.astype(np.float64)) / np.maximum(step, np.finfo(np.float64).tiny)).max())
        if steps > LARGEST:
            yield Issue(
                "error",
                label(node),
                f"the float16 bias is {steps:.0f} steps of the integers: onnxruntime counts them in float16 and gets infinity",
                "keep scales and biases in float32 for onnxruntime, or disable its optimizer WeightBiasQuantization",
            )
