"""`recount`: MACs and parameters counted on an ONNX file alone, to check the counts made from the spec."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from export.shapes import infer, shapes
from export.structure import STANDARD, node_label
from rescompress.core.errors import ModelFileError


@dataclass(frozen=True)
class Recount:
    """What an ONNX file holds and computes.

    Attributes:
        macs: Multiply-accumulates of convolutions and matrix products, for one image.
        params: Elements of the weights and biases of convolutions, matrix products and BatchNorms (gamma and beta).
        macs_by_node: MACs of each convolution and matrix product, by node name.
    """

    macs: int
    params: int
    macs_by_node: Mapping[str, int]


def shapes_of(model: onnx.ModelProto, *, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that can be inferred, a symbolic batch taken as `batch`.

    Args:
        model: Any ONNX model.
        batch: What the first dimension of the inputs is taken as where it is symbolic.

    Raises:
        ModelFileError: The graph is broken.
    """
    return shapes(infer(model, batch=batch))


def recount(model: onnx.ModelProto) -> Recount:
    """Return MACs and parameters of an ONNX model, ours or anyone's, for one image.

    Args:
        model: The model; weights may be initializers or constants, in float or integers behind Q/DQ.

    Raises:
        ModelFileError: A shape or a weight that decides cannot be inferred, or an operator may compute what is not counted.
    """
    graph = model.graph
    for node in graph.node:
        if node.domain not in STANDARD or node.op_type not in _COUNTED | _MOVES | _TRANSPARENT:
            called = f"{node.domain}.{node.op_type}" if node.domain not in STANDARD else node.op_type
            raise ModelFileError(
                f"what the operator {called} computes is not counted (node '{node_label(node)}')",
                remedy="count a file of standard operators",
            )
    producer = {out: node for node in graph.node for out in node.output}
    stored = {i.name: math.prod(i.dims) for i in graph.initializer}
    stored |= {n.output[0]: math.prod(n.attribute[0].t.dims) for n in graph.node if n.op_type == "Constant" and n.attribute}
    shapes = shapes_of(model)
    held = {i.name for i in graph.initializer}
    batch = next((shapes[i.name][0] for i in graph.input if i.name not in held and shapes.get(i.name)), 1)

    def elements(name: str) -> int:
        """Return the size of a constant, seen through Q, DQ and the like."""
        while name not in stored and name in producer and producer[name].op_type in _TRANSPARENT:
            name = producer[name].input[0]
        return int(stored.get(name, 0))

    macs: dict[str, int] = {}
    params = 0
    for i, node in enumerate(graph.node):
        if node.op_type in _WEIGHED:
            weight = node.input[3] if node.op_type.startswith("QLinear") else node.input[1]
            bias = {"QLinearConv": 8, "Conv": 2, "Gemm": 2}.get(node.op_type)
            count = elements(weight)
            if not count:
                raise ModelFileError(
                    f"the weight of {node_label(node)} is not stored in the file", remedy="count a file that holds its weights"
                )
            params += count
            if bias is not None and len(node.input) > bias and node.input[bias]:
                params += elements(node.input[bias])
            out = shapes.get(node.output[0])
            if "Conv" not in node.op_type and (out is None or len(out) != 2 or out[0] != batch):
                raise ModelFileError(
                    f"{node_label(node)} is no product of one row for each image", remedy="count a classifier of images"
                )
            if "Conv" in node.op_type:
                if out is None:
                    raise ModelFileError(
                        f"the output shape of {node.name or node.output[0]} cannot be inferred",
                        remedy="export with fixed image height and width",
                    )
                count *= math.prod(out[2:])
            macs[node.name or f"{node.op_type}_{i}"] = count
        elif node.op_type == "BatchNormalization":
            params += elements(node.input[1]) + elements(node.input[2])
    return Recount(sum(macs.values()), params, macs)


_WEIGHED = frozenset({"Conv", "ConvInteger", "Gemm", "MatMul", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
_COUNTED = _WEIGHED | {"BatchNormalization"}
_MOVES = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Sum", "Max", "Min", "Clip", "Relu", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish"),
        *(
            "Elu",
            "PRelu",
            "Tanh",
            "Erf",
            "InstanceNormalization",
            "Resize",
            "Softmax",
            "LogSoftmax",
            "MaxPool",
            "AveragePool",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "ReduceMean",
        ),
        *("Constant", "ConstantOfShape", "Shape", "Gather", "Slice", "Concat", "Split", "Pad", "Expand", "Where", "Equal"),
        *("Flatten", "Squeeze", "Unsqueeze", "Dropout", "DynamicQuantizeLinear", "Round", "Floor", "Sqrt", "ArgMax", "TopK"),
    }
)
_TRANSPARENT = frozenset({"QuantizeLinear", "DequantizeLinear", "Identity", "Cast", "Transpose", "Reshape", "FakeQuantize"})
