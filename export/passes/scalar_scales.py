"""Makes activation scales and zero points of shape [1] scalars."""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from export.graph import GraphView
from export.lint import TargetFacts
from export.passes import PassResult

RULES = ("scale-not-scalar",)
EXACT = True


def call(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
    """Return a copy whose one-element activation scales are 0-D."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = GraphView(copy)
    changed = False
    for node in graph.ops("QuantizeLinear", "DequantizeLinear"):
        if graph.is_weight_pair(node):
            continue
        for name in node.input[1:]:
            tensor = graph.stored(name) if name else None
            if tensor is not None and list(tensor.dims) == [1]:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).reshape(()), tensor.name))
                changed = True
    del copy.graph.value_info[:]
    return PassResult(copy, changed)
