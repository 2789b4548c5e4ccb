"""An opset newer than the target's parser."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error when the file's opset is beyond what the target reads."""
    if graph.opset > facts.max_opset:
        yield Issue(
            "error",
            "",
            f"the file is opset {graph.opset}; {facts.title} reads up to {facts.max_opset}",
            f"export with --opset {facts.max_opset}",
        )
