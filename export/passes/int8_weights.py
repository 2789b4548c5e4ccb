"""Stores weights as int8 that a file quantizes when it is loaded."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from export.graph import DEQUANTIZE, QUANTIZE, GraphView, attribute
from export.lint import TargetFacts
from export.passes import PassResult

RULES = ("float-weights",)
EXACT = True


def call(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
    """Return a copy in which the QuantizeLinear of every stored float weight is computed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = GraphView(copy)
    done: dict[str, str] = {}
    for layer in graph.weighted():
        pair = graph.made_by(layer.input[1], DEQUANTIZE)
        quantize = graph.made_by(pair.input[0], QUANTIZE) if pair is not None else None
        if pair is None or quantize is None:
            continue
        weight, scale = graph.constant(quantize.input[0]), graph.scale(quantize)
        if weight is None or scale is None or len(graph.consumers[quantize.output[0]]) != 1:
            continue
        zero = graph.zero_point(quantize)
        if zero.dtype not in (np.int8, np.uint8):
            continue
        per_channel = [1] * weight.ndim
        if scale.size > 1:
            per_channel[attribute(quantize, "axis", 1) % weight.ndim] = -1
        s, z = scale.reshape(per_channel), zero.astype(np.float64)
        z = z.reshape(per_channel) if z.size > 1 else z.reshape(())
        limits = np.iinfo(zero.dtype)
        integers = np.clip(np.rint(weight.astype(np.float32) / s.astype(np.float32)) + z, limits.min, limits.max).astype(
            zero.dtype
        )
        name = f"{quantize.input[0]}.{zero.dtype}"
        copy.graph.initializer.append(numpy_helper.from_array(integers, name))
        pair.input[0] = name
        done[quantize.output[0]] = name
    keep = [n for n in copy.graph.node if not (n.op_type == QUANTIZE and n.output[0] in done)]
    del copy.graph.node[:]
    copy.graph.node.extend(keep)
    drop_unused(copy)
    return PassResult(copy, bool(done))


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove initializers and constants that nothing reads, and stale shape information, in place."""
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    kept = [i for i in model.graph.initializer if i.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    nodes = [n for n in model.graph.node if n.op_type != "Constant" or n.output[0] in used]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    inputs = [i for i in model.graph.input if i.name in used]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    del model.graph.value_info[:]
