"""Turns uint8 quantizers with zero point 128 into int8 ones with zero point 0: the same numbers, shifted."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from export.graph import DEQUANTIZE, QUANTIZE, GraphView
from export.lint import TargetFacts
from export.passes import PassResult
from export.passes.int8_weights import drop_unused

RULES = ("uint8-activations",)
EXACT = True


def call(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
    """Return a copy in which symmetric uint8 is int8; uint8 with another zero point stays, for it would lose a bit."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = GraphView(copy)
    changed = False
    shifted: dict[str, str] = {}
    for node in graph.ops(QUANTIZE, DEQUANTIZE):
        zero = graph.zero_point(node)
        if zero.dtype != np.uint8 or len(node.input) < 3 or not (zero == 128).all():
            continue
        weight = graph.constant(node.input[0]) if node.op_type == DEQUANTIZE else None
        if weight is not None and weight.dtype == np.uint8:
            if node.input[0] not in shifted:
                shifted[node.input[0]] = f"{node.input[0]}.int8"
                signed = (weight.astype(np.int16) - 128).astype(np.int8)
                copy.graph.initializer.append(numpy_helper.from_array(signed, shifted[node.input[0]]))
            node.input[0] = shifted[node.input[0]]
        name = f"{node.input[2]}.int8"
        if all(i.name != name for i in copy.graph.initializer):
            copy.graph.initializer.append(numpy_helper.from_array(np.zeros(zero.shape, np.int8), name))
        node.input[2] = name
        changed = True
    drop_unused(copy)
    return PassResult(copy, changed)
