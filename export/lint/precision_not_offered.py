"""A file in a precision that the device does not compute in."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView
from export.lint import Issue, TargetFacts

_RTX_INT8 = (8, 0)
"""Compute capability from which TensorRT for RTX 1.7.1 has INT8 kernels."""


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error for a quantized file on a device without INT8, or whose TensorRT has no INT8 kernels for it."""
    if graph.quantized and "int8" not in facts.precisions:
        yield Issue(
            "error", "", f"{facts.title} has no INT8; it offers {', '.join(facts.precisions)}", "export with --precision fp16"
        )
    elif graph.quantized and facts.runtime == "tensorrt_rtx" and not facts.at_least(_RTX_INT8):
        yield Issue(
            "error",
            "",
            f"TensorRT for RTX runs INT8 convolutions in float on {facts.title}, and refuses INT8 matrix products",
            "export with --precision fp16",
        )
