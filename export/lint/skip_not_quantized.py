"""A residual Add whose skip is floating point: the fused kernel falls back to float16."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import DEQUANTIZE, PASSING, GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a warning per residual Add that follows an INT8 convolution but adds a float skip, on TensorRT."""
    if not facts.tensorrt:
        return
    for add, main, skip in graph.residual_adds():
        conv = graph.folded_conv(main)
        if conv is None or not graph.is_int8(conv):
            continue
        name = skip
        while (node := graph.made_by(name, *PASSING - {"Relu"})) is not None:
            name = node.input[0]
        if graph.made_by(name, DEQUANTIZE) is None:
            yield Issue(
                "warning",
                label(add),
                "the skip of the Add is not quantized: the fused Conv+Add kernel falls back to floating point",
                "let the Add read the skip through the Q/DQ that feeds the next convolution",
            )
