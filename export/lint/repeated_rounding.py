"""A DequantizeLinear that feeds a QuantizeLinear directly."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import DEQUANTIZE, GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a warning per activation that is rounded again without any computation between."""
    for node in graph.activation_quantizers():
        before = graph.made_by(node.input[0], DEQUANTIZE)
        if before is not None and not graph.is_weight_pair(before):
            yield Issue(
                "warning", label(node), f"it rounds again what {label(before)} just read", "remove one of the two pairs"
            )
