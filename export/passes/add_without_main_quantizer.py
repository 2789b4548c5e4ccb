"""Removes the Q/DQ between the last convolution of a main branch and its Add."""

from __future__ import annotations

import onnx

from export.graph import DEQUANTIZE, QUANTIZE, GraphView
from export.lint import TargetFacts
from export.passes import PassResult
from export.passes.int8_weights import drop_unused

RULES = ("both-add-inputs",)
EXACT = False


def call(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
    """Return a copy in which only the skip of each residual Add is rounded."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = GraphView(copy)
    gone: set[str] = set()
    for add, main, skip in graph.residual_adds():
        pair = graph.made_by(main, DEQUANTIZE)
        quantize = graph.made_by(pair.input[0], QUANTIZE) if pair is not None else None
        if pair is None or quantize is None or graph.made_by(skip, DEQUANTIZE) is None:
            continue
        add.input[list(add.input).index(main)] = quantize.input[0]
        if len(graph.consumers[pair.output[0]]) == 1:
            gone.add(pair.output[0])
            if len(graph.consumers[quantize.output[0]]) == 1:
                gone.add(quantize.output[0])
    keep = [n for n in copy.graph.node if n.output[0] not in gone]
    changed = len(keep) < len(copy.graph.node)
    del copy.graph.node[:]
    copy.graph.node.extend(keep)
    drop_unused(copy)
    return PassResult(copy, changed)
