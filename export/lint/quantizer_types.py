"""Quantizers to types that the target does not read: 16 bits, 4 bits, FP8."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from export.graph import DEQUANTIZE, GraphView, label
from export.lint import Issue, TargetFacts

_READ_BY_OTHER_RULES = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32)
_FP8 = TensorProto.FLOAT8E4M3FN


def check(graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
    """Yield an error per quantizer on TensorRT whose integers, or small floats, its parser or builder refuses.

    As TensorRT for RTX 1.7.1 has it: FP8 (E4M3) from compute capability 8.9 on, INT4 for matrix products from 8.0 on and
    for no convolution, nothing else but INT8.
    """
    if not facts.tensorrt:
        return
    for node in graph.ops("QuantizeLinear", "DequantizeLinear"):
        if node.op_type == DEQUANTIZE and graph.made_by(node.input[0], "QuantizeLinear") is not None:
            continue  # said once, at the QuantizeLinear
        kind = graph.integer_type(node)
        if kind in _READ_BY_OTHER_RULES:
            continue
        why = _why_not(graph, node, kind, facts)
        if why is not None:
            name = TensorProto.DataType.Name(kind).lower()
            yield Issue("error", label(node), f"it quantizes to {name}, {why}", "quantize to int8, symmetric")


def _why_not(graph: GraphView, node: NodeProto, kind: int, facts: TargetFacts) -> str | None:
    """Return why the target refuses a type, or None where it takes it."""
    if kind == _FP8:
        needs = f"which {facts.title} does not compute in (FP8 begins with compute capability 8.9 and TensorRT 10)"
        return None if facts.at_least((8, 9)) else needs
    if kind == TensorProto.INT4:
        if not facts.at_least((8, 0)):
            return f"which {facts.title} does not read (INT4 begins with compute capability 8.0 and TensorRT 10)"
        if any(reader.op_type == "Conv" for reader in _readers(graph, node)):
            return "which TensorRT reads in matrix products only, not in convolutions"
        return None
    return f"which {facts.title} does not read"


def _readers(graph: GraphView, node: NodeProto) -> list[NodeProto]:
    """Return what computes with the values that a Q or DQ hands on."""
    behind = graph.consumers.get(node.output[0], [])
    if node.op_type == DEQUANTIZE:
        return behind
    return [reader for pair in behind for reader in graph.consumers.get(pair.output[0], [])]
