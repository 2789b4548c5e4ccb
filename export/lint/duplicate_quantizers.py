"""Several quantizers for one tensor."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a warning per tensor that more than one QuantizeLinear reads: the same values are rounded twice."""
    seen: dict[str, str] = {}
    for node in graph.activation_quantizers():
        source = graph.origin(node.input[0])
        if source in seen:
            yield Issue(
                "warning",
                label(node),
                f"{source} is quantized a second time ({seen[source]} does it already): one more kernel, and another copy",
                "let all readers share one Q/DQ",
            )
        seen.setdefault(source, label(node))
