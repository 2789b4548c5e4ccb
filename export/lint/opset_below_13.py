"""Q/DQ in an opset that has no per-channel scales."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error when a quantized file is below opset 13, where Q/DQ got their axis."""
    if graph.opset < 13 and any(True for _ in graph.ops("QuantizeLinear", "DequantizeLinear")):
        yield Issue(
            "error",
            "",
            f"a quantized file of opset {graph.opset}: QuantizeLinear has per-channel scales from opset 13 on",
            "export with opset 13 or later",
        )
