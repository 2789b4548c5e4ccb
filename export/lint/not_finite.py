"""Weights that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import numpy_helper

from export.graph import GraphView
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per stored float tensor with a value that is no finite number, such as a float16 overflow."""
    scales = {name for node in graph.ops("QuantizeLinear", "DequantizeLinear") for name in node.input[1:2]}
    for tensor in graph.model.graph.initializer:
        if tensor.name in scales or tensor.data_location == tensor.EXTERNAL:
            continue
        array = numpy_helper.to_array(tensor)
        if array.dtype in (np.float16, np.float32, np.float64) and not np.isfinite(array).all():
            yield Issue(
                "error",
                tensor.name,
                f"{int((~np.isfinite(array)).sum())} values are NaN or infinite",
                "look for a diverged training, or a float16 overflow",
            )
