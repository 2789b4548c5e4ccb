"""What users report of the TensorRT version that the target has."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a note per report that is about files of this kind."""
    kind = "int8" if graph.quantized else "float"
    for report in facts.reports:
        if kind in report.kinds:
            yield Issue("note", "", report.message, report.remedy)
