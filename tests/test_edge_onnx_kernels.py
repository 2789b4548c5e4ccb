"""MACs and precision read off ONNX files of many encodings, against torch's own count; what is not understood is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import ENCODINGS, Net, Writer, nets
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edge_targets.onnx_kernels import input_of, kernels_of, precision_of
from rescompress.core.errors import ModelFileError


def check(folder: Path, net: Net, encoding: str, sprinkle: list[bool], shuffle: bool) -> None:
    found = kernels_of(Writer(net, encoding, sprinkle).write(folder / "m.onnx", shuffle=shuffle))
    assert sum(k.macs for k in found.kernels) == net.macs()
    assert found.precision == ENCODINGS[encoding]
    assert found.batch == net.batch


draws = given(
    net=nets, encoding=st.sampled_from(list(ENCODINGS)), sprinkle=st.lists(st.booleans(), max_size=12), shuffle=st.booleans()
)


@draws
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_macs_and_precision_of_any_encoding_are_those_of_the_network(tmp_path, net, encoding, sprinkle, shuffle):
    check(tmp_path, net, encoding, sprinkle, shuffle)


@pytest.mark.slow
@draws
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_macs_and_precision_of_many_encodings_are_those_of_the_network(tmp_path, net, encoding, sprinkle, shuffle):
    check(tmp_path, net, encoding, sprinkle, shuffle)


FIXED = Net([8, 8, 12], [3, 3, 1], [1, 1, 1], [1, 1, 2], 16, 1)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_is_counted(tmp_path, encoding):
    check(tmp_path, FIXED, encoding, [True, False] * 6, False)


def test_integer_operators_take_as_long_as_the_same_network_between_quantizers(tmp_path):
    """QLinearConv against Q/DQ: the same kernels, sum for sum."""
    net = Net([8, 12, 16], [3, 3, 3], [1] * 3, [1, 2, 2], 16, 1)
    pairs = [
        [
            (k.kind, k.pixels, k.in_width, k.width, k.taps, k.skip)
            for k in kernels_of(Writer(net, e, []).write(tmp_path / e)).kernels
        ]
        for e in ("qdq", "qoperator")
    ]
    assert pairs[0] == pairs[1]


def surgery(change: Callable[[onnx.GraphProto], None], path: Path) -> Path:
    model = onnx.load(Writer(FIXED, "plain", []).write(path))
    change(model.graph)
    known = {o.domain for o in model.opset_import}
    model.opset_import.extend(helper.make_opsetid(d, 1) for d in {n.domain for n in model.graph.node} - known)
    onnx.save(model, path)
    return path


def replaced(op: str, domain: str = "", **attributes: Any) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        node = next(n for n in graph.node if n.op_type == "Conv")
        node.op_type, node.domain = op, domain
        if op == "DeformConv":  # which has three inputs
            node.input[:] = [*node.input[:2], node.input[1]]
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())

    return change


def inside_an_if(graph: onnx.GraphProto) -> None:
    conv = next(n for n in graph.node if n.op_type == "Conv")
    inner = copy.deepcopy(conv)
    inner.output[0] = "inner"
    body = helper.make_graph([inner], "body", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)])
    condition = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
    branch = helper.make_node("If", ["yes"], list(conv.output), "either", then_branch=body, else_branch=body)
    place = list(graph.node).index(conv)
    nodes = [*graph.node[:place], condition, branch, *graph.node[place + 1 :]]
    del graph.node[:]
    graph.node.extend(copy.deepcopy(nodes))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (replaced("Einsum", equation="bchw,dcij->bdhw"), "Einsum"),
        (replaced("Conv", "com.microsoft.nchwc"), "com.microsoft.nchwc.Conv"),
        (replaced("DeformConv"), "DeformConv"),
        (replaced("Winograd", "somebody"), "somebody.Winograd"),
        (inside_an_if, "If, whose body holds Conv"),
    ],
)
def test_what_may_compute_and_is_not_known_is_refused_by_name(tmp_path, change, named):
    path = surgery(change, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=named):
        kernels_of(path)
    assert input_of(path).input_shape == (3, 16, 16)  # what has to be known to measure it is


def test_a_transposed_convolution_is_counted(tmp_path):
    layer = nn.ConvTranspose2d(8, 4, 3, stride=2, bias=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = layer(torch.zeros(1, 8, 5, 5))
    graph = helper.make_graph(
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up", strides=[2, 2])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(out.shape))],
        [numpy_helper.from_array(layer.weight.detach().numpy(), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    kernels = kernels_of(tmp_path / "m.onnx").kernels
    assert sum(k.macs for k in kernels) == counter.get_total_flops() // 2 == 5 * 5 * 8 * 4 * 9


@pytest.mark.parametrize("bits", [np.int16, np.uint16])
def test_activations_of_16_bits_are_no_int8(tmp_path, bits):
    path = Writer(FIXED, "qdq", []).write(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(0, bits), "wide"))
    model.opset_import[0].version, model.ir_version = 21, 10  # the first that has 16 bits
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and not node.input[0].startswith("w")):
            node.input[2] = "wide"
    onnx.save(model, path)
    assert precision_of(path) == "fp32"


def test_weights_in_int8_alone_are_no_int8(tmp_path):
    path = Writer(FIXED, "qdq", []).write(tmp_path / "m.onnx")
    model = onnx.load(path)
    rounded = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    back = {n.output[0]: rounded[n.input[0]] for n in model.graph.node if n.input and n.input[0] in rounded}
    for node in model.graph.node:
        if node.op_type == "Conv":
            node.input[0] = back[node.input[0]]
    onnx.save(model, path)
    assert precision_of(path) == "fp32"


def test_predict_says_what_it_does_not_know(rescompress, tmp_path):
    path = surgery(replaced("Einsum", equation="bchw,dcij->bdhw"), tmp_path / "m.onnx")
    done = rescompress("predict", path, "--target", "jetson", code=5)
    assert "Einsum" in done.stderr
    done = rescompress("predict", Writer(FIXED, "qoperator", []).write(path), "--target", "jetson", "--json")
    assert json.loads(done.stdout)["precision"] == "int8"
