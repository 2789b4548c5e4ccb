"""`in_integers`: the same quantized network with its sums written as sums of integers, so that any runtime sums exactly.

onnxruntime computes a convolution between Q/DQ in integers only where its output is rounded too; elsewhere it multiplies
dequantized floats, and the order of such a sum shows in its last bits, and sometimes in the next rounding. TensorRT
computes all of them in integers. To see what a file says, and not what a float sum does to it, each INT8 layer

    conv(s_x X, s_w W) + b     becomes     conv(X, W) * (s_x s_w) + b

with X and W the integers, held in float32: every partial sum below 2**24 is exact, in any order.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.graph import DEQUANTIZE, QUANTIZE, GraphView, attribute
from export.passes.int8_weights import drop_unused


def in_integers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose INT8 convolutions and linear layers sum integers and scale the sum once.

    Layers that do not read a Q/DQ pair with one float32 scale and a stored int8 weight without zero point stay as they are.

    Args:
        model: A Q/DQ model.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = GraphView(copy)
    whole: set[str] = set()
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        found = _scales(graph, node) if node.op_type in ("Conv", "Gemm") else None
        if found is None:
            nodes.append(node)
            continue
        pair, step, factor_O, integers = found
        source = f"{pair.input[0]}.whole"
        if source not in whole:
            nodes.append(helper.make_node("Cast", [pair.input[0]], [source], name=source, to=TensorProto.FLOAT))
            whole.add(source)
        name, out = node.name or node.output[0], node.output[0]
        bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        bias_O = np.zeros(len(factor_O), np.float32) if bias is None else bias
        shape = (-1, 1, 1) if node.op_type == "Conv" else (-1,)
        arrays = {
            f"{name}.integers": integers.astype(np.float32),
            f"{name}.factor": (step * factor_O).astype(np.float32).reshape(shape),
            f"{name}.offset": bias_O.astype(np.float32).reshape(shape),
        }
        copy.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
        inputs = [source, f"{name}.integers"]
        del node.input[:]
        node.input.extend(inputs)
        node.output[0] = f"{out}.sum"
        scaled = helper.make_node("Mul", [f"{out}.sum", f"{name}.factor"], [f"{out}.scaled"], name=f"{name}.scaled")
        moved = helper.make_node("Add", [f"{out}.scaled", f"{name}.offset"], [out], name=f"{name}.moved")
        nodes += [node, scaled, moved]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    drop_unused(copy)
    return copy


def _scales(graph: GraphView, node: NodeProto) -> tuple[NodeProto, float, np.ndarray, np.ndarray] | None:
    """Return the data's DequantizeLinear, its scale, the weight's scales (O,) in float64, and the integers; or None."""
    pair, weight = graph.made_by(node.input[0], DEQUANTIZE), graph.weight_dq(node)
    if pair is None or weight is None or graph.made_by(pair.input[0], QUANTIZE) is None:
        return None
    step, scale, integers = graph.scale(pair), graph.scale(weight), graph.constant(weight.input[0])
    if step is None or scale is None or integers is None or step.dtype != np.float32 or integers.dtype != np.int8:
        return None
    outputs = 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1
    per_output = scale.size == 1 or attribute(weight, "axis", 1) % integers.ndim == outputs
    plain = node.op_type == "Conv" or all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if step.size != 1 or not per_output or not plain or graph.zero_point(pair).any() or graph.zero_point(weight).any():
        return None
    factor_O = np.broadcast_to(scale.astype(np.float64).reshape(-1), (integers.shape[outputs],))
    return pair, float(step.reshape(())), factor_O, integers
