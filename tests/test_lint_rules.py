"""Every lint rule: a foreign file that triggers it alone, a near miss that triggers nothing; repairs are proven."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Command
from export_zoo import ZOO, arrays, imagenet_bottleneck, images, network, quantization_of
from onnx import TensorProto, helper, numpy_helper

from edge_targets.backends import onnxruntime as backend
from export.lint import Finding, Report, TargetFacts, lint, rule_names
from export.parity import OrtRunner
from export.passes import repair
from export.proof import difference
from export.session import has_float16_scales
from export.to_onnx import PRECISIONS, ExportOptions, to_onnx
from rescompress.core import plugins
from rescompress.core.spec import ModelSpec

BOARD = TargetFacts("a board", "tensorrt", 17, ("fp32", "fp16", "int8"), {"fp32": 1, "fp16": 1, "int8": 1})
ALIGNED = TargetFacts("a board", "tensorrt", 17, ("fp32", "fp16", "int8"), {"fp32": 1, "fp16": 8, "int8": 32})
NANO = TargetFacts("a Nano", "tensorrt", 13, ("fp32", "fp16"), {"fp32": 1, "fp16": 1})
TYPED = TargetFacts("a typed board", "tensorrt", 19, ("fp32", "fp16", "int8"), {"int8": 1}, strongly_typed=True)
REPORTED = dataclasses.replace(BOARD, reports=(Report(frozenset({"int8"}), "builds fail", "measure"),))
ORT = TargetFacts("onnxruntime", "onnxruntime", 25, ("fp32", "int8"), {"int8": 1})
NEW = TargetFacts(
    "a new board", "tensorrt", 21, ("fp32", "fp16", "int8"), {"int8": 1}, compute_capability=(8, 7), version=(10, 3)
)
NEWER = TargetFacts(
    "a newer board", "tensorrt", 21, ("fp32", "fp16", "int8"), {"int8": 1}, compute_capability=(11, 0), version=(10, 13)
)
OPENVINO = TargetFacts("a CPU", "openvino", 25, ("fp32", "int8"), {"int8": 1})

Change = Callable[["File"], None]


class File:
    """A small residual INT8 network as a careful foreign tool would write it; changes make it trip one rule each."""

    def __init__(self, *, opset: int = 17, batch: int | str = 1, width: int = 32) -> None:
        rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, np.ndarray] = {"zero": np.asarray(0, np.int8)}
        self.functions: list[onnx.FunctionProto] = []
        self.tensors: list[TensorProto] = []  # of types that numpy does not have
        self.input_type = TensorProto.FLOAT
        self.opset, self.batch, self.width = opset, batch, width
        self.pair("image", 0.02)
        self.conv("stem", "image.dq", 3, rng)
        self.node("Relu", "stem.relu", ["stem"])
        self.pair("stem.relu", 0.04)
        self.conv("a", "stem.relu.dq", width, rng)
        self.node("Relu", "a.relu", ["a"])
        self.pair("a.relu", 0.05)
        self.conv("b", "a.relu.dq", width, rng)
        self.node("Add", "sum", ["b", "stem.relu.dq"])
        self.node("Relu", "out", ["sum"])

    def node(self, op: str, name: str, inputs: list[str], **attributes: object) -> onnx.NodeProto:
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return self.nodes[-1]

    def pair(self, tensor: str, scale: float, *, at: str | None = None) -> None:
        name = at or tensor
        self.stored[f"{name}.scale"] = np.asarray(scale, np.float32)
        self.node("QuantizeLinear", f"{name}.q", [tensor, f"{name}.scale", "zero"])
        self.node("DequantizeLinear", f"{name}.dq", [f"{name}.q", f"{name}.scale", "zero"])

    def conv(self, name: str, source: str, channels: int, rng: np.random.Generator) -> None:
        self.stored[f"{name}.w"] = rng.integers(-127, 128, (self.width, channels, 3, 3)).astype(np.int8)
        spread = 0.7 / 127 / np.sqrt(9 * channels)
        self.stored[f"{name}.ws"] = (spread * rng.uniform(0.5, 1.5, self.width)).astype(np.float32)
        self.stored[f"{name}.b"] = (0.1 * rng.standard_normal(self.width)).astype(np.float32)
        self.node("DequantizeLinear", f"{name}.wdq", [f"{name}.w", f"{name}.ws"], axis=0)
        self.node("Conv", name, [source, f"{name}.wdq", f"{name}.b"], pads=[1, 1, 1, 1])

    def named(self, name: str) -> onnx.NodeProto:
        return next(n for n in self.nodes if n.name == name)

    def after(self, name: str, *nodes: onnx.NodeProto) -> None:
        i = next(i for i, n in enumerate(self.nodes) if n.name == name)
        self.nodes[i + 1 : i + 1] = nodes

    def model(self, output: str = "out") -> onnx.ModelProto:
        image = helper.make_tensor_value_info("image", self.input_type, [self.batch, 3, 8, 8])
        out = helper.make_tensor_value_info(output, TensorProto.FLOAT, [self.batch, self.width, 8, 8])
        stored = [numpy_helper.from_array(a, n) for n, a in self.stored.items()]
        stored += self.tensors
        graph = helper.make_graph(self.nodes, "foreign", [image], [out], stored)
        opsets = [helper.make_opsetid("", self.opset)] + [
            helper.make_opsetid(d, 1) for d in sorted({n.domain for n in self.nodes} - {""})
        ]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=self.functions)


def uint8(file: File) -> None:
    file.stored["zero.u"] = np.asarray(128, np.uint8)
    for name in ("a.relu.q", "a.relu.dq"):
        file.named(name).input[2] = "zero.u"


def moved_zero(file: File) -> None:
    file.stored["zero.m"] = np.asarray(-128, np.int8)
    for name in ("a.relu.q", "a.relu.dq"):
        file.named(name).input[2] = "zero.m"


def vector_scale(file: File) -> None:
    file.stored["a.relu.scale"] = file.stored["a.relu.scale"].reshape(1)


def vector_scale_of_weight(file: File) -> None:
    """Shape [1] at a weight with one output channel is what per-channel means there."""
    file.stored["a.ws"] = file.stored["a.ws"].copy()


def both_inputs(file: File) -> None:
    i = file.nodes.index(file.named("sum"))
    tail = file.nodes[i:]
    del file.nodes[i:]
    file.pair("b", 0.04)
    file.nodes += tail
    file.named("sum").input[0] = "b.dq"


def unsigned(file: File) -> None:
    """Unsigned activations with zero point 0, where a ReLU made them."""
    file.stored["zero.u"] = np.asarray(0, np.uint8)
    for name in ("stem.relu", "a.relu"):
        for node in ("q", "dq"):
            file.named(f"{name}.{node}").input[2] = "zero.u"


def as_onnxruntime_wants_it(file: File) -> None:
    unsigned(file)
    both_inputs(file)


def both_inputs_of_no_residual(file: File) -> None:
    """Q/DQ on both inputs of an Add of two activations that no convolution makes."""
    i = file.nodes.index(file.named("out"))
    tail = file.nodes[i + 1 :]
    del file.nodes[i + 1 :]
    file.node("Add", "twice", ["a.relu.dq", "stem.relu.dq"])
    file.node("Add", "all", ["twice", "out"])
    file.nodes += tail


def float_skip(file: File) -> None:
    file.named("sum").input[1] = "stem.relu"


def batch_norm(file: File, *, after: str = "a", reader: str = "a.relu") -> None:
    rng = np.random.default_rng(1)
    w = file.width
    gamma = rng.uniform(0.5, 1.5, w) * np.where(rng.random(w) < 0.3, -1, 1)
    parts = {"g": gamma, "be": rng.standard_normal(w), "m": rng.standard_normal(w), "v": rng.uniform(0.5, 2, w)}
    file.stored |= {f"bn.{k}": v.astype(np.float32) for k, v in parts.items()}
    inputs = [after, *(f"bn.{k}" for k in parts)]
    file.after(after, helper.make_node("BatchNormalization", inputs, ["bn"], name="bn"))
    file.named(reader).input[0] = "bn"


def batch_norm_elsewhere(file: File) -> None:
    batch_norm(file, after="sum", reader="out")


def float_weights(file: File) -> None:
    scale = file.stored["a.ws"].reshape(-1, 1, 1, 1)
    file.stored["a.w"] = file.stored["a.w"].astype(np.float32) * scale
    file.stored["a.wz"] = np.zeros(file.width, np.int8)
    i = file.nodes.index(file.named("a.wdq"))
    file.nodes.insert(i, helper.make_node("QuantizeLinear", ["a.w", "a.ws", "a.wz"], ["a.wq"], name="a.wq", axis=0))
    file.named("a.wdq").input[0] = "a.wq"


def per_tensor(file: File) -> None:
    file.stored["a.ws"] = np.asarray(file.stored["a.ws"].max())
    del file.named("a.wdq").attribute[:]


def wrong_axis(file: File) -> None:
    del file.named("a.wdq").attribute[:]  # the default is 1, which has as many channels here


def right_axis_counted_from_the_end(file: File) -> None:
    file.named("a.wdq").attribute[0].i = -4


def int32_bias(file: File) -> None:
    scale = file.stored["stem.relu.scale"] * file.stored["a.ws"]
    file.stored["a.bq"] = np.rint(file.stored["a.b"] / scale).astype(np.int32)
    file.stored["a.bs"] = scale.astype(np.float32)
    del file.stored["a.b"]
    i = file.nodes.index(file.named("a"))
    file.nodes.insert(i, helper.make_node("DequantizeLinear", ["a.bq", "a.bs"], ["a.b"], name="a.bdq", axis=0))


def custom(file: File) -> None:
    file.named("a.relu").domain = "somebody"
    file.named("a.relu").op_type = "Rectify"


def called_like_a_standard_operator(file: File) -> None:
    file.named("a.relu").domain = "somebody"


def qoperator(file: File) -> None:
    node = file.named("a")
    inputs = ["stem.relu.q", "stem.relu.scale", "zero", "a.w", "a.ws", "a.wz", "a.relu.scale", "zero"]
    file.stored["a.wz"] = np.zeros(file.width, np.int8)
    file.stored["a.os"] = np.asarray(0.05, np.float32)
    index = file.nodes.index(node)
    file.nodes[index] = helper.make_node("QLinearConv", inputs, ["a.int"], name="a", pads=[1, 1, 1, 1])
    file.nodes.insert(index + 1, helper.make_node("DequantizeLinear", ["a.int", "a.os", "zero"], ["a"], name="a.dq"))
    file.nodes.remove(file.named("a.wdq"))
    del file.stored["a.b"]


def weight_only(file: File) -> None:
    file.named("b").input[0] = "a.relu"
    file.nodes = [n for n in file.nodes if n.name not in ("a.relu.q", "a.relu.dq")]


def duplicate(file: File) -> None:
    i = file.nodes.index(file.named("a.wdq"))
    tail = file.nodes[i:]
    del file.nodes[i:]
    file.pair("stem.relu", 0.04, at="again")
    file.nodes += tail
    file.named("a").input[0] = "again.dq"


def repeated(file: File) -> None:
    i = file.nodes.index(file.named("b.wdq"))
    tail = file.nodes[i:]
    del file.nodes[i:]
    file.pair("a.relu.dq", 0.04, at="again")
    file.nodes += tail
    file.named("b").input[0] = "again.dq"


def early(file: File) -> None:
    relu, q = file.named("a.relu"), file.named("a.relu.q")
    q.input[0], relu.input[0], relu.output[0] = "a", "a.relu.dq", "rectified"
    file.nodes.remove(relu)
    file.after("a.relu.dq", relu)
    file.named("b").input[0] = "rectified"


def no_scale(file: File) -> None:
    file.stored["a.ws"][3] = 0.0


def nan(file: File) -> None:
    file.stored["a.b"][0] = np.nan


def outliers(file: File) -> None:
    file.stored["a.relu.scale"] = np.asarray(2.0, np.float32)


def a_bit_wide(file: File) -> None:
    file.stored["a.relu.scale"] = np.asarray(0.15, np.float32)


def nothing(file: File) -> None:
    pass


def written_zeros(file: File) -> None:
    """Zero points that are spelled out: a vector of zeros at a weight, and one more 0-D zero at an activation."""
    file.stored["a.wz"] = np.zeros(file.width, np.int8)
    file.named("a.wdq").input.append("a.wz")
    file.stored["zero.again"] = np.asarray(0, np.int8)
    for name in ("a.relu.q", "a.relu.dq"):
        file.named(name).input[2] = "zero.again"


def rounded_constant(file: File) -> None:
    """A float constant behind Q and DQ that is no weight: an offset, added to an activation."""
    file.stored |= {"shift": np.full((1, file.width, 1, 1), 0.3, np.float32), "shift.scale": np.asarray(0.01, np.float32)}
    i = file.nodes.index(file.named("a.relu"))
    tail = file.nodes[i:]
    del file.nodes[i:]
    file.node("QuantizeLinear", "shift.q", ["shift", "shift.scale", "zero"])
    file.node("DequantizeLinear", "shift.dq", ["shift.q", "shift.scale", "zero"])
    file.node("Add", "shifted", ["a", "shift.dq"])
    file.nodes += tail
    file.named("a.relu").input[0] = "shifted"


def called_like_an_integer_operator(file: File) -> None:
    for old, new in (("a", "QLinearConv"), ("b", "ConvInteger")):
        file.named(old).name = new


def equal_scales(file: File) -> None:
    """Two quantizers of two tensors that share their scale."""
    for name in ("a.relu.q", "a.relu.dq"):
        file.named(name).input[1] = "stem.relu.scale"


def between(file: File, before: str, op: str, source: str, **attributes: object) -> str:
    """Insert a node in front of another one; return its output."""
    i = file.nodes.index(file.named(before))
    tail = file.nodes[i:]
    del file.nodes[i:]
    file.node(op, f"{before}.between", [source], **attributes)
    file.nodes += tail
    return f"{before}.between"


WINDOW = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


def rounded_after_pooling(file: File) -> None:
    """An average of rounded values has values of its own, and is rounded on its own scale."""
    pooled = between(file, "b.wdq", "AveragePool", "a.relu.dq", **WINDOW)
    i = file.nodes.index(file.named("b.wdq"))
    tail = file.nodes[i:]
    del file.nodes[i:]
    file.pair(pooled, 0.03)
    file.nodes += tail
    file.named("b").input[0] = f"{pooled}.dq"


def largest_of_rounded(file: File) -> None:
    """The maximum of rounded values is a rounded value: convolution and Add read it without a quantizer of its own."""
    file.named("b").input[0] = between(file, "b.wdq", "MaxPool", "a.relu.dq", **WINDOW)
    file.named("sum").input[1] = between(file, "sum", "MaxPool", "stem.relu.dq", **WINDOW)


def relu_of_the_image(file: File) -> None:
    """A ReLU behind a quantizer of something that no convolution made."""
    file.named("stem").input[0] = between(file, "stem.wdq", "Relu", "image.dq")


def largest_float(file: File) -> None:
    file.stored["a.b"][0] = -np.finfo(np.float32).max


def smallest_scale(file: File) -> None:
    file.stored["a.ws"][3] = np.finfo(np.float32).tiny


def half(file: File) -> None:
    """All floats of the file as float16, opset 19; the input stays float32."""
    file.stored = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in file.stored.items()}
    i = file.nodes.index(file.named("image.q"))
    file.nodes.insert(i, helper.make_node("Cast", ["image"], ["image.half"], name="image.half", to=TensorProto.FLOAT16))
    file.named("image.q").input[0] = "image.half"
    file.named("out").output[0] = "out.half"
    file.nodes.append(helper.make_node("Cast", ["out.half"], ["out"], name="out.float", to=TensorProto.FLOAT))


def half_with_bias(file: File, *, steps: float) -> None:
    as_onnxruntime_wants_it(file)
    half(file)
    step = file.stored["stem.relu.scale"].astype(np.float64) * file.stored["a.ws"].astype(np.float64)
    file.stored["a.b"] = (steps * step).astype(np.float16)


def half_with_a_bias_out_of_reach(file: File) -> None:
    half_with_bias(file, steps=70_000)


def half_with_a_bias_in_reach(file: File) -> None:
    half_with_bias(file, steps=60_000)


def own_function(file: File) -> None:
    file.named("a.relu").domain = "somebody"
    body = helper.make_node("Relu", ["x"], ["y"])
    file.functions.append(helper.make_function("somebody", "Relu", ["x"], ["y"], [body], [helper.make_opsetid("", file.opset)]))


def float_only(file: File) -> None:
    for name in ("stem", "a", "b"):
        file.stored[f"{name}.w"] = file.stored[f"{name}.w"].astype(np.float32) * file.stored[f"{name}.ws"].reshape(-1, 1, 1, 1)
        file.named(name).input[1] = f"{name}.w"
    renamed = {"image.dq": "image", "stem.relu.dq": "stem.relu", "a.relu.dq": "a.relu"}
    file.nodes = [n for n in file.nodes if n.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    for node in file.nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    used = {name for n in file.nodes for name in n.input}
    file.stored = {k: v for k, v in file.stored.items() if k in used}


def sixteen_bits(file: File) -> None:
    file.stored["zero.s"] = np.asarray(0, np.int16)
    for name in ("a.relu.q", "a.relu.dq"):
        file.named(name).input[2] = "zero.s"


def fp8(file: File) -> None:
    file.tensors.append(helper.make_tensor("zero.f", TensorProto.FLOAT8E4M3FN, (), [0.0]))
    for name in ("a.relu.q", "a.relu.dq"):
        file.named(name).input[2] = "zero.f"


def per_channel_activation(file: File) -> None:
    """Scales of shape [C] along the channels of an activation, each of another size."""
    file.stored["a.relu.scale"] = np.linspace(0.04, 0.06, file.width, dtype=np.float32)
    file.stored["zero.c"] = np.zeros(file.width, np.int8)
    for name in ("a.relu.q", "a.relu.dq"):
        file.named(name).input[2] = "zero.c"
        file.named(name).attribute.append(helper.make_attribute("axis", 1))


def vector_of_equal_scales(file: File) -> None:
    per_channel_activation(file)
    file.stored["a.relu.scale"] = np.full(file.width, 0.05, np.float32)


def cast_input(file: File, kind: int) -> None:
    file.input_type = kind
    i = file.nodes.index(file.named("image.q"))
    file.nodes.insert(i, helper.make_node("Cast", ["image"], ["image.float"], name="image.float", to=TensorProto.FLOAT))
    file.named("image.q").input[0] = "image.float"


def uint16_input(file: File) -> None:
    cast_input(file, TensorProto.UINT16)


def uint8_input(file: File) -> None:
    cast_input(file, TensorProto.UINT8)


def uint8_input_moved_first(file: File) -> None:
    cast_input(file, TensorProto.UINT8)
    file.nodes.insert(0, helper.make_node("Transpose", ["image"], ["image.moved"], name="image.moved", perm=[0, 1, 3, 2]))
    file.named("image.float").input[0] = "image.moved"


def batch_norm_in_training(file: File, *, mode: int = 1) -> None:
    batch_norm_elsewhere(file)
    file.named("bn").attribute.append(helper.make_attribute("training_mode", mode))


def batch_norm_out_of_training(file: File) -> None:
    batch_norm_in_training(file, mode=0)


def dilated_maximum(file: File) -> None:
    window = {"kernel_shape": [3, 3], "pads": [2, 2, 2, 2], "dilations": [2, 2]}
    file.named("b").input[0] = between(file, "b.wdq", "MaxPool", "a.relu.dq", **window)


def half_as_onnxruntime_wants_it(file: File) -> None:
    as_onnxruntime_wants_it(file)
    half(file)


def choice(file: File) -> None:
    """The last ReLU in both branches of an If."""
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Relu", ["sum"], ["inner"])], "branch", [], [value])
    file.stored["yes"] = np.asarray(True)
    file.nodes[-1] = helper.make_node("If", ["yes"], ["out"], name="out", then_branch=branch, else_branch=branch)


def floats_in_half(file: File, *, largest: float) -> None:
    """The network without quantizers, in float16, with a bias that brings its last sums that far."""
    float_only(file)
    file.stored["stem.b"][:] = 300.0
    file.stored["b.b"][:] = largest
    file.stored = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in file.stored.items()}
    file.nodes.insert(0, helper.make_node("Cast", ["image"], ["image.half"], name="image.half", to=TensorProto.FLOAT16))
    file.named("stem").input[0] = "image.half"
    file.named("out").output[0] = "out.half"
    file.nodes.append(helper.make_node("Cast", ["out.half"], ["out"], name="out.float", to=TensorProto.FLOAT))


def half_beyond_its_range(file: File) -> None:
    floats_in_half(file, largest=65_400.0)


def half_within_its_range(file: File) -> None:
    floats_in_half(file, largest=60_000.0)


Case = tuple[File, Change, TargetFacts]

TRAPS: dict[str, tuple[Case, Case]] = {
    # rule: (file that triggers it and nothing else, near miss that triggers nothing)
    "uint8-activations": ((File(), uint8, BOARD), (File(), uint8, OPENVINO)),
    "nonzero-zero-point": ((File(), moved_zero, BOARD), (File(), written_zeros, BOARD)),
    "scale-not-scalar": ((File(), vector_scale, BOARD), (File(), vector_scale_of_weight, BOARD)),
    "both-add-inputs": ((File(), both_inputs, BOARD), (File(), both_inputs_of_no_residual, BOARD)),
    "skip-not-quantized": ((File(), float_skip, BOARD), (File(), largest_of_rounded, BOARD)),
    "batch-norm-unfolded": ((File(), batch_norm, BOARD), (File(), batch_norm_elsewhere, BOARD)),
    "float-weights": ((File(), float_weights, BOARD), (File(), rounded_constant, BOARD)),
    "per-tensor-weights": ((File(), per_tensor, BOARD), (File(width=1), per_tensor, BOARD)),
    "weight-axis": ((File(), wrong_axis, BOARD), (File(), right_axis_counted_from_the_end, BOARD)),
    "int32-bias": ((File(), int32_bias, BOARD), (File(), int32_bias, OPENVINO)),
    "opset-unreadable": ((File(opset=18), nothing, BOARD), (File(opset=17), nothing, BOARD)),
    "reported-version": ((File(), nothing, REPORTED), (File(), float_only, REPORTED)),
    "opset-below-13": ((File(opset=12), nothing, BOARD), (File(opset=12), float_only, BOARD)),
    "custom-operators": ((File(), custom, BOARD), (File(), own_function, BOARD)),
    "qoperator-format": ((File(), qoperator, BOARD), (File(), called_like_an_integer_operator, BOARD)),
    "dynamic-shape": ((File(batch="N"), nothing, BOARD), (File(batch=4), nothing, BOARD)),
    "misaligned-channels": ((File(width=40), nothing, ALIGNED), (File(width=64), nothing, ALIGNED)),
    "partly-quantized": ((File(), weight_only, BOARD), (File(), largest_of_rounded, BOARD)),
    "duplicate-quantizers": ((File(), duplicate, BOARD), (File(), equal_scales, BOARD)),
    "repeated-rounding": ((File(), repeated, BOARD), (File(), rounded_after_pooling, BOARD)),
    "quantized-before-relu": ((File(), early, BOARD), (File(), relu_of_the_image, BOARD)),
    "invalid-scale": ((File(), no_scale, BOARD), (File(), smallest_scale, BOARD)),
    "not-finite": ((File(), nan, BOARD), (File(), largest_float, BOARD)),
    "float16-bias-overflow": (
        (File(opset=19), half_with_a_bias_out_of_reach, ORT),
        (File(opset=19), half_with_a_bias_in_reach, ORT),
    ),
    "float16-overflow": ((File(), half_beyond_its_range, BOARD), (File(), half_within_its_range, BOARD)),
    "precision-not-offered": ((File(opset=13), nothing, NANO), (File(opset=13), float_only, NANO)),
    "float32-remainder": ((File(), nothing, TYPED), (File(), float_only, TYPED)),
    "placement-of-other-runtime": ((File(), nothing, OPENVINO), (File(), unsigned, OPENVINO)),
    "main-branch-not-quantized": ((File(), unsigned, ORT), (File(), as_onnxruntime_wants_it, ORT)),
    "quantizer-types": ((File(opset=21), sixteen_bits, NEW), (File(opset=21), fp8, NEWER)),
    "input-type": ((File(), uint16_input, BOARD), (File(), uint8_input, BOARD)),
    "training-mode": ((File(), batch_norm_in_training, BOARD), (File(), batch_norm_out_of_training, BOARD)),
    "unsupported-operators": ((File(), dilated_maximum, BOARD), (File(), largest_of_rounded, BOARD)),
    "float16-scales": ((File(), half_as_onnxruntime_wants_it, ORT), (File(opset=19), half_as_onnxruntime_wants_it, ORT)),
    "control-flow": ((File(), choice, BOARD), (File(), nothing, BOARD)),
    "wide-activation-scale": ((File(), outliers, BOARD), (File(), a_bit_wide, BOARD)),
}

LEFT_BY_OTHERS = {
    # These files cannot help tripping a neighbour: the rule on the left, then what else fires.
    "uint8-activations near miss": {"placement-of-other-runtime"},
    "int32-bias near miss": {"placement-of-other-runtime"},
}


def scales_in_constants(model: onnx.ModelProto) -> None:
    """Scales as nodes: other exporters write them so."""
    scales = {n.input[1] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    moved = [i for i in model.graph.initializer if i.name in scales]
    nodes = [helper.make_node("Constant", [], [i.name], value=i) for i in moved] + list(model.graph.node)
    for tensor in moved:
        model.graph.initializer.remove(tensor)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@pytest.mark.parametrize("constants", [False, True])
def test_the_float16_bias_trap_is_real_and_our_runners_step_around_it(tmp_path: Path, constants: bool) -> None:
    """onnxruntime computes something else where the rule says so, and what it should without its optimizer.

    The runner of parity and the runtime `cpu-ort` are one in this.
    """
    import copy

    import onnxruntime as ort

    x = np.random.default_rng(5).standard_normal((1, 3, 8, 8)).astype(np.float32)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    off = {}
    for change in (half_with_a_bias_out_of_reach, half_with_a_bias_in_reach):
        file = copy.deepcopy(File(opset=19))
        change(file)
        model = file.model()
        expected = OrtRunner(model, optimize=False)(x)
        as_it_comes = ort.InferenceSession(model.SerializeToString(), options).run(None, {"image": x})[0]
        spread = expected.max() - expected.min()
        off[change] = float(np.abs(as_it_comes - expected).mean() / spread)
        assert float(np.abs(OrtRunner(model)(x) - expected).mean() / spread) < 2 / 255
        if constants:
            scales_in_constants(model)
        path = tmp_path / f"{change.__name__}.onnx"
        onnx.save(model, path)
        assert has_float16_scales(model)
        np.testing.assert_array_equal(backend.runner(path, threads=1)._run(x), OrtRunner(model)(x))
        assert float(np.abs(backend.runner(path, threads=1)._run(x) - expected).mean() / spread) < 2 / 255
    assert off[half_with_a_bias_out_of_reach] > 0.05 > 5 * off[half_with_a_bias_in_reach], off


def test_a_skip_and_a_second_quantizer_are_seen_through_what_exporters_leave_behind() -> None:
    """BatchNorm between the main branch's convolution and the Add; a Cast to float32 in front of a second quantizer."""
    file = File()
    float_skip(file)
    batch_norm(file, after="b", reader="sum")
    assert {f.rule for f in lint(file.model(), BOARD)} == {"skip-not-quantized", "batch-norm-unfolded"}
    file = File()
    duplicate(file)
    at = file.nodes.index(file.named("again.q"))
    file.nodes.insert(at, helper.make_node("Cast", ["stem.relu"], ["cast"], name="cast", to=TensorProto.FLOAT))
    file.named("again.q").input[0] = "cast"
    assert {f.rule for f in lint(file.model(), BOARD)} == {"duplicate-quantizers"}
    mended = repair(file.model(), BOARD)
    assert lint(mended.model, BOARD) == []
    file.named("cast").attribute[0].i = TensorProto.FLOAT16  # values of its own, so no duplicate
    assert "duplicate-quantizers" not in {f.rule for f in lint(file.model(), BOARD)}


def test_a_repair_that_makes_another_one_possible_is_followed_by_it() -> None:
    """BatchNorm behind a convolution whose weight is stored in float: first integers, then folding."""
    file = File()
    float_weights(file)
    batch_norm(file)
    mended = repair(file.model(), BOARD)
    assert [s.name for s in mended.steps if s.applied] == ["int8_weights", "fold_batch_norm"]
    assert lint(mended.model, BOARD) == []


def found(case: Case) -> list[Finding]:
    import copy

    file, change, facts = copy.deepcopy(case)
    change(file)
    return lint(file.model(), facts)


@pytest.mark.parametrize(("width", "told"), [(16, 0), (31, 0), (32, 0), (33, 1), (48, 1)])
def test_widths_that_no_pruning_can_align_are_left_alone(width: int, told: int) -> None:
    findings = found((File(width=width), nothing, ALIGNED))
    assert [f.rule for f in findings].count("misaligned-channels") == told


@pytest.mark.parametrize(
    ("rule", "case"),
    [
        ("scale-not-scalar", (File(), per_channel_activation, BOARD)),
        ("input-type", (File(), uint8_input_moved_first, BOARD)),
        ("quantizer-types", (File(opset=21), fp8, NEW)),
    ],
)
def test_other_faces_of_a_trap_trigger_it_alone(rule: str, case: Case) -> None:
    assert {f.rule for f in found(case)} == {rule}


def test_tensorrt_takes_a_standard_name_of_another_domain_for_onnxs_own() -> None:
    (finding,) = found((File(), called_like_a_standard_operator, BOARD))
    assert (finding.rule, finding.severity) == ("custom-operators", "error")
    assert "takes for ONNX's own Relu" in finding.message


def test_a_vector_of_equal_scales_is_made_a_scalar() -> None:
    file = File()
    vector_of_equal_scales(file)
    assert {f.rule for f in lint(file.model(), BOARD)} == {"scale-not-scalar"}
    mended = repair(file.model(), BOARD)
    assert [(s.name, s.applied) for s in mended.steps] == [("scalar_scales", True)]
    assert lint(mended.model, BOARD) == []


def test_every_rule_has_its_pair_of_files() -> None:
    assert sorted(TRAPS) == rule_names(), "each rule has a trap here, and each trap a rule"


@pytest.mark.parametrize("rule", TRAPS)
def test_the_trap_triggers_its_rule_alone(rule: str) -> None:
    findings = found(TRAPS[rule][0])
    assert {f.rule for f in findings} == {rule}, findings
    for f in findings:
        assert f.message
        assert f.remedy


@pytest.mark.parametrize("rule", TRAPS)
def test_the_near_miss_triggers_nothing(rule: str) -> None:
    findings = found(TRAPS[rule][1])
    assert {f.rule for f in findings} - LEFT_BY_OTHERS.get(f"{rule} near miss", set()) == set(), findings


@pytest.mark.parametrize("spec", [make() for make in ZOO.values()], ids=list(ZOO))
def test_our_own_files_have_no_error_and_no_warning(spec: ModelSpec) -> None:
    model = network(spec)
    quantization = quantization_of(model, images(spec, 16))
    for precision in PRECISIONS[1:]:
        opset = 19 if precision == "int8+fp16" else 17
        exported = to_onnx(spec, arrays(model), quantization, ExportOptions(1, opset, precision))
        facts = TYPED if opset == 19 else BOARD
        assert [f for f in lint(exported, facts) if f.severity != "note"] == []
    for_cpu = to_onnx(spec, arrays(model), quantization_of(model, images(spec, 16), "openvino"), ExportOptions(1))
    assert lint(for_cpu, OPENVINO) == []
    assert only_notes(lint(for_cpu, ORT)) == {"main-branch-not-quantized"}
    for_ort = to_onnx(spec, arrays(model), quantization_of(model, images(spec, 16), "onnxruntime"), ExportOptions(1))
    assert lint(for_ort, ORT) == []
    assert only_notes(lint(for_ort, OPENVINO)) == {"both-add-inputs"}
    for_board = to_onnx(spec, arrays(model), quantization, ExportOptions(1))
    assert only_notes(lint(for_board, OPENVINO)) == {"placement-of-other-runtime"}
    assert only_notes(lint(for_board, ORT)) == {"placement-of-other-runtime", "main-branch-not-quantized"}


def only_notes(findings: list[Finding]) -> set[str]:
    assert {f.severity for f in findings} == {"note"}
    return {f.rule for f in findings}


def test_openvino_is_told_that_it_leaves_out_a_rounding_and_the_repair_takes_it_out() -> None:
    file = File()
    as_onnxruntime_wants_it(file)
    findings = lint(file.model(), OPENVINO)
    assert [(f.rule, f.severity, f.node) for f in findings] == [("both-add-inputs", "note", "sum")]
    mended = repair(file.model(), OPENVINO)
    assert [s.name for s in mended.steps if s.applied] == ["add_without_main_quantizer"]
    assert lint(mended.model, OPENVINO) == []


def test_main_branches_in_float_anyway_are_no_fault_of_the_placement() -> None:
    """Neither a float network nor one whose last convolution was left in float is told to quantize its Adds."""
    file = File()
    float_only(file)
    assert lint(file.model(), ORT) == []
    file = File()
    unsigned(file)
    file.stored["b.w"] = file.stored["b.w"].astype(np.float32) * file.stored["b.ws"].reshape(-1, 1, 1, 1)
    file.nodes.remove(file.named("b.wdq"))
    file.named("b").input[1] = "b.w"
    assert "main-branch-not-quantized" not in {f.rule for f in lint(file.model(), ORT)}


REPAIRED = {
    "scale-not-scalar", "float-weights", "int32-bias", "uint8-activations", "dynamic-shape", "duplicate-quantizers",
    "skip-not-quantized", "batch-norm-unfolded", "quantized-before-relu", "both-add-inputs", "opset-unreadable",
}  # fmt: skip


@pytest.mark.parametrize("rule", sorted(REPAIRED))
def test_a_repair_mends_the_finding_and_is_proven(rule: str) -> None:
    import copy

    file, change, facts = copy.deepcopy(TRAPS[rule][0])
    change(file)
    broken = file.model()
    before = broken.SerializeToString()
    repaired = repair(broken, facts)
    assert broken.SerializeToString() == before
    assert repaired.modified, repaired.steps
    assert lint(repaired.model, facts) == []
    one = plugins.load("export.passes", next(s.name for s in repaired.steps if s.applied))
    error = difference(broken, repaired.model)
    assert error is not None
    assert error.largest <= (1e-6 if one.EXACT else 2 / 255)


def test_every_pass_mends_something_here() -> None:
    rules = {rule for name in plugins.names("export.passes") for rule in plugins.load("export.passes", name).RULES}
    assert rules == REPAIRED, "what the passes mend stands in REPAIRED"


def test_a_repair_that_changes_the_network_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import export.passes.scalar_scales as broken_pass
    from export.passes import PassResult

    honest = broken_pass.call

    def careless(model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
        result = honest(model, facts)
        for stored in result.model.graph.initializer:
            if stored.name == "a.relu.scale":
                stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) * 2, stored.name))
        return result

    monkeypatch.setattr(broken_pass, "call", careless)
    file = File()
    vector_scale(file)
    repaired = repair(file.model(), BOARD)
    assert not repaired.modified
    assert "would differ" in repaired.steps[0].outcome


@pytest.fixture
def run(rescompress: Command) -> Command:
    return lambda *args: rescompress("lint", *args, code=None)


def test_command_line(run: Command, tmp_path: Path) -> None:
    file = File()
    vector_scale(file)
    onnx.save(file.model(), tmp_path / "bad.onnx")
    failed = run(str(tmp_path / "bad.onnx"), "--target", "jetson", "--json")
    assert failed.returncode == 3
    findings = json.loads(failed.stdout)
    assert {"rule", "severity", "node", "message", "remedy"} == set(findings[0])
    assert findings[0]["rule"] == "scale-not-scalar"
    mended = run(str(tmp_path / "bad.onnx"), "--target", "jetson", "--json", "--fix", str(tmp_path / "good.onnx"))
    assert mended.returncode == 0, mended.stderr
    assert [f for f in json.loads(mended.stdout) if f["severity"] == "error"] == []
    assert run(str(tmp_path / "good.onnx"), "--target", "jetson").returncode == 0


def test_command_line_refuses_what_is_no_onnx(run: Command, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    for path, code in ((tmp_path / "text.onnx", 5), (tmp_path / "absent.onnx", 5)):
        failed = run(str(path))
        assert failed.returncode == code
        assert str(path) in failed.stderr
        assert "Traceback" not in failed.stderr
    onnx.save(File().model(), tmp_path / "fine.onnx")
    unknown = run(str(tmp_path / "fine.onnx"), "--target", "jetsn")
    assert unknown.returncode == 5


def test_export_of_a_bottleneck_for_a_real_target_has_no_error() -> None:
    from edge_targets.catalog import load_target
    from rescompress.runs.file_check import facts_of

    spec = imagenet_bottleneck()
    model = network(spec)
    for name in ("jetson-orin-nano-8gb", "rtx-sm86", "cpu", "cpu-ort"):
        target = load_target(name)
        exported = to_onnx(spec, arrays(model), quantization_of(model, images(spec, 8)), ExportOptions(1, target.opset))
        assert [f for f in lint(exported, facts_of(target)) if f.severity == "error"] == []
