"""Lets all readers of a tensor share one Q/DQ where it has several with the same scale."""

from __future__ import annotations

import numpy as np
import onnx

from export.graph import QUANTIZE, GraphView
from export.lint import TargetFacts
from export.passes import PassResult
from export.passes.int8_weights import drop_unused

RULES = ("duplicate-quantizers",)
EXACT = True


def call(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
    """Return a copy in which equal quantizers of one tensor are one."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = GraphView(copy)
    first: dict[str, list[onnx.NodeProto]] = {}
    renamed: dict[str, str] = {}
    for node in graph.activation_quantizers():
        source = graph.origin(node.input[0])
        for other in first.get(source, []):
            if _equal(graph, node, other) and node.output[0] not in graph.outputs:
                renamed[node.output[0]] = other.output[0]
                break
        else:
            first.setdefault(source, []).append(node)
    for node in copy.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    keep = [n for n in copy.graph.node if not (n.op_type == QUANTIZE and n.output[0] in renamed)]
    del copy.graph.node[:]
    copy.graph.node.extend(keep)
    drop_unused(copy)
    return PassResult(copy, bool(renamed))


def _equal(graph: GraphView, a: onnx.NodeProto, b: onnx.NodeProto) -> bool:
    scale, other = graph.scale(a), graph.scale(b)
    if scale is None or other is None or scale.dtype != other.dtype or not np.array_equal(scale, other):
        return False
    zero, second = graph.zero_point(a), graph.zero_point(b)
    return zero.dtype == second.dtype and np.array_equal(zero, second)
