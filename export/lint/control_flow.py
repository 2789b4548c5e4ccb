"""Graphs inside nodes, which no rule looks into."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a warning per node that holds graphs (If, Loop, Scan): what they do is not checked."""
    for node in graph.nodes:
        inner = [g for a in node.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)]
        if inner:
            count = sum(len(g.node) for g in inner)
            yield Issue(
                "warning",
                label(node),
                f"the {count} nodes inside {node.op_type} are not looked at",
                "export the network without control flow, for one fixed path",
            )
