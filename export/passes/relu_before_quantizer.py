"""Moves a quantizer from in front of a ReLU to behind it."""

from __future__ import annotations

import onnx

from export.graph import DEQUANTIZE, QUANTIZE, GraphView
from export.lint import TargetFacts
from export.passes import PassResult

RULES = ("quantized-before-relu",)
EXACT = True


def call(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
    """Return a copy in which ``relu(dq(q(x)))`` is ``dq(q(relu(x)))``: equal, as rounding is monotone and keeps 0."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = GraphView(copy)
    changed = False
    for relu in graph.ops("Relu"):
        pair = graph.made_by(relu.input[0], DEQUANTIZE)
        quantize = graph.made_by(pair.input[0], QUANTIZE) if pair is not None else None
        if pair is None or quantize is None or graph.zero_point(quantize).any():
            continue
        if len(graph.consumers[pair.output[0]]) > 1 or len(graph.consumers[quantize.output[0]]) > 1:
            continue
        source, old, out = quantize.input[0], pair.output[0], relu.output[0]
        relu.input[0], relu.output[0] = source, old
        quantize.input[0] = old
        pair.output[0] = out
        changed = True
    if changed:
        _sort(copy)
    return PassResult(copy, changed)


def _sort(model: onnx.ModelProto) -> None:
    """Bring the nodes into an order of computation, in place."""
    waiting = list(model.graph.node)
    made = {""} | {i.name for i in model.graph.initializer} | {i.name for i in model.graph.input}
    ordered: list[onnx.NodeProto] = []
    while waiting:
        ready = [n for n in waiting if all(name in made for name in n.input)]
        assert ready, "the graph has a cycle"
        ordered += ready
        made.update(out for n in ready for out in n.output)
        ids = {id(n) for n in ready}
        waiting = [n for n in waiting if id(n) not in ids]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in ordered]
    del model.graph.node[:]
    model.graph.node.extend(copies)
