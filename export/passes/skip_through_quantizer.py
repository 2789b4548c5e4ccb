"""Lets a residual Add read its skip through the Q/DQ that the same tensor already has for the next convolution."""

from __future__ import annotations

import onnx

from export.graph import DEQUANTIZE, GraphView
from export.lint import TargetFacts
from export.passes import PassResult

RULES = ("skip-not-quantized",)
EXACT = False


def call(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
    """Return a copy whose skips are quantized where a quantizer of that tensor exists."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = GraphView(copy)
    changed = False
    quantizers: dict[str, onnx.NodeProto] = {}
    for quantize in graph.activation_quantizers():
        quantizers.setdefault(graph.origin(quantize.input[0]), quantize)
    for add, main, skip in graph.residual_adds():
        conv = graph.folded_conv(main)
        quantizer = quantizers.get(graph.origin(skip))
        if conv is None or not graph.is_int8(conv) or quantizer is None:
            continue
        pairs = [n for n in graph.consumers.get(quantizer.output[0], []) if n.op_type == DEQUANTIZE]
        if pairs:
            add.input[list(add.input).index(skip)] = pairs[0].output[0]
            changed = True
    return PassResult(copy, changed)
