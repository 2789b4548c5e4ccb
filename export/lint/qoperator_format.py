"""QLinearConv and its kin: a format of onnxruntime's, not read by TensorRT."""

from __future__ import annotations

from collections.abc import Iterator

from export.graph import GraphView, label
from export.lint import Issue, TargetFacts

_OPERATORS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per kind of integer operator, on TensorRT."""
    if not facts.tensorrt:
        return
    for kind in _OPERATORS:
        nodes = list(graph.ops(kind))
        if nodes:
            yield Issue(
                "error",
                label(nodes[0]),
                f"{len(nodes)} nodes {kind}: {facts.title} reads INT8 as Q/DQ only",
                "quantize into QDQ format (onnxruntime: quant_format=QuantFormat.QDQ, static)",
            )
