"""On strongly typed TensorRT, what is not INT8 runs in the type that the file says."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from export.graph import GraphView
from export.lint import Issue, TargetFacts


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield a note for a quantized file whose other layers are float32, where no builder flag makes them float16."""
    if not (facts.strongly_typed and facts.tensorrt and graph.quantized and "fp16" in facts.precisions):
        return
    if any(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.model.graph.initializer):
        return
    yield Issue(
        "note",
        "",
        f"{facts.title} takes types from the file: what is not INT8 runs in float32",
        "export with --precision int8+fp16",
    )
