"""Float16 scales in an opset that has none: TensorRT reads them, nobody else does."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView
from export.lint import Issue, TargetFacts
from export.shapes import HALF_SCALES, half_quantizers


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error for a file of an opset below 19 with float16 scales: outside TensorRT, runtimes refuse it."""
    if not facts.tensorrt and half_quantizers(graph.model):
        yield Issue(
            "error",
            "",
            f"float16 scales in opset {graph.opset}: quantizers take them from opset {HALF_SCALES} on",
            f"export with opset {HALF_SCALES}, or keep scales in float32",
        )
