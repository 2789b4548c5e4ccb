"""Folds BatchNorm into the convolution in front of it: into the weight's scales where they are quantized."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from export.graph import GraphView, attribute
from export.lint import TargetFacts
from export.passes import PassResult
from export.passes.int8_weights import drop_unused

RULES = ("batch-norm-unfolded",)
EXACT = True


def call(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
    """Return a copy without the BatchNorms behind INT8 convolutions whose weights are symmetric and stored as int8.

    ``BN(conv(x, s_c W_c) + b_c) = conv(x, (s_c |g_c|) sign(g_c) W_c) + (b_c - mean_c) g_c + beta_c``: no weight is rounded
    again.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = GraphView(copy)
    gone: set[str] = set()
    for norm in graph.ops("BatchNormalization"):
        conv = graph.made_by(norm.input[0], "Conv")
        pair = graph.weight_dq(conv) if conv is not None else None
        if conv is None or pair is None or len(graph.consumers.get(norm.input[0], [])) != 1:
            continue
        weight, scale = graph.constant(pair.input[0]), graph.scale(pair)
        parts = [graph.constant(name) for name in norm.input[1:5]]
        bias = graph.constant(conv.input[2]) if len(conv.input) > 2 and conv.input[2] else np.float32(0)
        if weight is None or weight.dtype != np.int8 or (weight == -128).any() or scale is None or bias is None:
            continue
        if any(p is None for p in parts) or graph.zero_point(pair).any() or len(graph.consumers[pair.output[0]]) != 1:
            continue
        gamma_O, beta_O, mean_O, var_O = (np.asarray(p, np.float64) for p in parts)
        gain_O = gamma_O / np.sqrt(var_O + attribute(norm, "epsilon", 1e-5))
        scale_O = (np.broadcast_to(scale.reshape(-1), gain_O.shape) * np.abs(gain_O)).astype(scale.dtype)
        dead_O = scale_O == 0
        sign_O = np.where(dead_O, 0, np.sign(gain_O)).astype(np.int8).reshape(-1, *[1] * (weight.ndim - 1))
        scale_O = np.where(dead_O, scale_O[~dead_O].min() if (~dead_O).any() else scale.min(), scale_O)
        name = conv.output[0]
        arrays = {
            f"{name}.folded.weight": weight * sign_O,
            f"{name}.folded.scale": scale_O.astype(scale.dtype),
            f"{name}.folded.bias": (beta_O + (bias - mean_O) * gain_O).astype(scale.dtype),
        }
        copy.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
        integers, scales, biases = arrays
        del pair.input[:]
        pair.input.extend([integers, scales])
        del pair.attribute[:]
        pair.attribute.append(onnx.helper.make_attribute("axis", 0))
        inputs = [conv.input[0], conv.input[1], biases]
        del conv.input[:]
        conv.input.extend(inputs)
        conv.output[0] = norm.output[0]
        gone.add(norm.output[0])
    keep = [n for n in copy.graph.node if not (n.op_type == "BatchNormalization" and n.output[0] in gone)]
    del copy.graph.node[:]
    copy.graph.node.extend(keep)
    drop_unused(copy)
    return PassResult(copy, bool(gone))
