"""A file in a precision that the device does not compute in."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error for a quantized file on a device without INT8."""
    if graph.quantized and "int8" not in facts.precisions:
        yield Issue(
            "error", "", f"{facts.title} has no INT8; it offers {', '.join(facts.precisions)}", "export with --precision fp16"
        )
