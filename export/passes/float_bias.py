"""Stores biases in float that a file keeps as int32 behind DequantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from export.graph import DEQUANTIZE, GraphView
from export.lint import TargetFacts
from export.passes import PassResult
from export.passes.int8_weights import drop_unused

RULES = ("int32-bias",)
EXACT = True


def call(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
    """Return a copy in which every int32 DequantizeLinear is computed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = GraphView(copy)
    gone: set[str] = set()
    for node in graph.ops(DEQUANTIZE):
        integers, scale = graph.constant(node.input[0]), graph.scale(node)
        if integers is None or integers.dtype != np.int32 or scale is None:
            continue
        zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.int32(0)
        values = ((integers - (zero if zero is not None else 0)) * scale.astype(np.float32)).astype(scale.dtype)
        copy.graph.initializer.append(numpy_helper.from_array(values.reshape(integers.shape), node.output[0]))
        gone.add(node.output[0])
    keep = [n for n in copy.graph.node if not (n.op_type == DEQUANTIZE and n.output[0] in gone)]
    del copy.graph.node[:]
    copy.graph.node.extend(keep)
    drop_unused(copy)
    return PassResult(copy, bool(gone))
