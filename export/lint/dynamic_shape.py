"""Inputs of unknown size."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a warning per input whose shape is not fixed, on TensorRT, and per image size that is not, anywhere."""
    stored = {i.name for i in graph.model.graph.initializer}
    for value in graph.model.graph.input:
        if value.name in stored:
            continue
        unknown = [i for i, d in enumerate(value.type.tensor_type.shape.dim) if not d.dim_value]
        if unknown and facts.tensorrt:
            yield Issue(
                "warning",
                value.name,
                f"dimensions {unknown} of the input are open: without --shapes, older trtexec silently runs them as 1",
                "export with a fixed batch, or build with --minShapes, --optShapes and --maxShapes",
            )
        elif any(i > 0 for i in unknown):
            yield Issue("warning", value.name, f"dimensions {unknown} of the input are open", "fix the size of the image")
