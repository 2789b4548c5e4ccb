"""Makes activation scales and zero points scalars where all their values are one."""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from export.graph import GraphView
from export.lint import TargetFacts
from export.passes import PassResult

RULES = ("scale-not-scalar",)
EXACT = True


def call(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
    """Return a copy whose activation scales are 0-D where they hold one value, once or many times."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = GraphView(copy)
    changed = False
    for node in graph.ops("QuantizeLinear", "DequantizeLinear"):
        if graph.is_weight_pair(node):
            continue
        arrays = {name: graph.constant(name) for name in node.input[1:3] if name}
        if all(a is not None and a.size and (a == a.flat[0]).all() for a in arrays.values()):
            for name, array in arrays.items():
                tensor = graph.stored(name)
                if tensor is not None and array is not None and array.ndim:
                    tensor.CopyFrom(numpy_helper.from_array(array.reshape(-1)[:1].reshape(()), tensor.name))
                    changed = True
    del copy.graph.value_info[:]
    return PassResult(copy, changed)
