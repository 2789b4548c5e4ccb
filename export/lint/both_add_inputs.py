"""Q/DQ on both inputs of a residual Add: the convolution cannot swallow the Add."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import DEQUANTIZE, GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a warning per residual Add whose main branch is rounded before the Add, on TensorRT.

    Conv+Add+ReLU is one INT8 kernel only without Q/DQ between Conv and Add (NVIDIA TensorRT,
    tools/tensorflow-quantization/docs/add_custom_qdq_cases.md).
    """
    if not facts.tensorrt:
        return
    for add, main, skip in graph.residual_adds():
        if graph.made_by(main, DEQUANTIZE) is not None and graph.made_by(skip, DEQUANTIZE) is not None:
            yield Issue(
                "warning",
                label(add),
                "both inputs of the Add are quantized, so it does not fuse into the convolution: often no faster than float16",
                "keep the Q/DQ of the skip branch only",
            )
