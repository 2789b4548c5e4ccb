"""What the operators of an ONNX file are to the latency model: which compute, which fuse, which only move values.

Integer and fused operators (QLinearConv, ConvInteger, onnxruntime's own domain) are rewritten into the plain operator whose
sizes they share, so that shape inference and the walk over the graph know one form of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from rescompress.core.errors import ModelFileError

if TYPE_CHECKING:
    import onnx

PASS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "Identity",
        "Dropout",
        "Flatten",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Cast",
        "CastLike",
        "Constant",
        "Shape",
        "Size",
        "Gather",
    }
)
"""Nodes without a kernel of their own: shape bookkeeping, and rounding that fuses into its neighbour."""
UNARY = frozenset({"BatchNormalization", "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSwish", "HardSigmoid", "Tanh"})
"""Nodes that fuse into the kernel that feeds them."""
POOLS = frozenset(
    {
        "MaxPool",
        "AveragePool",
        "LpPool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "GlobalLpPool",
        *(f"Reduce{kind}" for kind in ("Mean", "Max", "Min", "Sum", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")),
    }
)
CONVS = frozenset({"Conv", "ConvTranspose"})
GEMMS = frozenset({"Gemm", "MatMul"})
MOVES = frozenset(
    [
        "Abs",
        "Acos",
        "Acosh",
        "Add",
        "And",
        "ArgMax",
        "ArgMin",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "Ceil",
        "Celu",
        "CenterCropPad",
        "Clip",
        "Compress",
        "Concat",
        "ConstantOfShape",
        "Cos",
        "Cosh",
        "CumSum",
        "DepthToSpace",
        "Div",
        "DynamicQuantizeLinear",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "EyeLike",
        "Floor",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Greater",
        "GreaterOrEqual",
        "GroupNormalization",
        "Hardmax",
        "HardSigmoid",
        "HardSwish",
        "InstanceNormalization",
        "IsInf",
        "IsNaN",
        "LRN",
        "LayerNormalization",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "LpNormalization",
        "Max",
        "Mean",
        "MeanVarianceNormalization",
        "Min",
        "Mish",
        "Mod",
        "Mul",
        "Neg",
        "NonZero",
        "Not",
        "OneHot",
        "Or",
        "PRelu",
        "Pad",
        "Pow",
        "Range",
        "Reciprocal",
        "Relu",
        "Resize",
        "RMSNormalization",
        "Round",
        "ScatterElements",
        "ScatterND",
        "Selu",
        "Shrink",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Slice",
        "Softmax",
        "Softplus",
        "Softsign",
        "SpaceToDepth",
        "Split",
        "Sqrt",
        "Sub",
        "Sum",
        "Swish",
        "Tan",
        "Tanh",
        "ThresholdedRelu",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Upsample",
        "Where",
        "Xor",
        "BatchNormalization",
    ]
)
"""Operators that read and write each value about once: memory is what they cost."""
COUNTED = PASS | UNARY | POOLS | CONVS | GEMMS | MOVES
BRANCHES = frozenset({"If", "Loop", "Scan"})


@dataclass(frozen=True)
class _Form:
    """How an operator is written in the plain form.

    Attributes:
        op_type: The operator of the same sizes.
        inputs: Which inputs it keeps, in the plain operator's order.
        integer: Whether it computes in INT8.
        keep: Attributes that it keeps.
    """

    op_type: str
    inputs: tuple[int, ...]
    integer: bool = True
    keep: tuple[str, ...] = ()


_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "dilations", "kernel_shape", "pads", "strides")
_GEMM = ("alpha", "beta", "transA", "transB")

_PLAIN: Mapping[str, _Form] = MappingProxyType(
    {
        "QLinearConv": _Form("Conv", (0, 3), keep=_CONV),
        "ConvInteger": _Form("Conv", (0, 1), keep=_CONV),
        "QLinearMatMul": _Form("MatMul", (0, 3)),
        "MatMulInteger": _Form("MatMul", (0, 1)),
    }
)
_MICROSOFT: Mapping[str, _Form] = MappingProxyType(
    {
        "QLinearConv": _Form("Conv", (0, 3), keep=_CONV),
        "QGemm": _Form("Gemm", (0, 3), keep=_GEMM),
        "QLinearAdd": _Form("Add", (0, 3)),
        "QLinearMul": _Form("Mul", (0, 3)),
        "QLinearGlobalAveragePool": _Form("GlobalAveragePool", (0,)),
        "QLinearAveragePool": _Form("AveragePool", (0,), keep=_POOL),
        "QLinearLeakyRelu": _Form("LeakyRelu", (0,)),
        "QLinearSigmoid": _Form("Sigmoid", (0,)),
        "QLinearSoftmax": _Form("Softmax", (0,), keep=("axis",)),
        "DynamicQuantizeMatMul": _Form("MatMul", (0, 1)),
        "MatMulIntegerToFloat": _Form("MatMul", (0, 1)),
        "FusedConv": _Form("Conv", (0, 1), integer=False, keep=_CONV),
        "FusedGemm": _Form("Gemm", (0, 1), integer=False, keep=_GEMM),
        "QuantizeLinear": _Form("QuantizeLinear", (0, 1, 2), integer=False, keep=("axis",)),
        "DequantizeLinear": _Form("DequantizeLinear", (0, 1, 2), integer=False, keep=("axis",)),
        "Gelu": _Form("Gelu", (0,), integer=False),
        "QuickGelu": _Form("Sigmoid", (0,), integer=False),
    }
)


def plain(model: onnx.ModelProto) -> tuple[onnx.ModelProto, frozenset[str]]:
    """Return the model in plain operators, and the outputs of those that compute in INT8.

    It has the shapes of the model, not its values.

    Args:
        model: As `export.load.load_onnx` reads it: sorted, without local functions; it is changed where it needs to be.
    """
    import onnx

    integer: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        form = _form(node)
        if form is None:
            nodes.append(node)
            continue
        outputs = list(node.output[:1])
        if form.integer:
            integer.update(outputs)
        inputs = [node.input[i] for i in form.inputs if i < len(node.input)]
        added = _added(node)
        if added:
            outputs = [f"{outputs[0]}__before_add"]
        made = onnx.helper.make_node(form.op_type, inputs, outputs, node.name)
        made.attribute.extend(a for a in node.attribute if a.name in form.keep)
        nodes.append(made)
        if added:
            nodes.append(onnx.helper.make_node("Add", [outputs[0], added], list(node.output[:1]), f"{node.name}__add"))
    if len(nodes) != len(model.graph.node) or any(a is not b for a, b in zip(nodes, model.graph.node, strict=True)):
        kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return model, frozenset(integer)


def _form(node: onnx.NodeProto) -> _Form | None:
    """Return the plain form of a node that has another one."""
    if node.domain == "com.microsoft":
        form = _MICROSOFT.get(node.op_type)
        if form is None:
            return None
        # channels last: the axes lie where the plain operator does not expect them
        return None if any(a.name == "channels_last" and a.i for a in node.attribute) else form
    return _PLAIN.get(node.op_type) if node.domain in ("", "ai.onnx") else None


def _added(node: onnx.NodeProto) -> str | None:
    """Return what a fused convolution adds to its sums: its fourth input, a skip connection."""
    return node.input[3] if node.op_type == "FusedConv" and len(node.input) > 3 and node.input[3] else None


def unknown(node: onnx.NodeProto) -> str | None:
    """Return what of a node is not understood, in words; None where its cost is known or small.

    A node with sub-graphs is understood where they hold nothing but operators that cost little.
    """
    called = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    if node.domain not in ("", "ai.onnx"):
        return called
    graphs = list(_subgraphs(node))
    if node.op_type in BRANCHES:
        for graph in graphs:
            for inner in graph.node:
                found = unknown(inner) or (inner.op_type if inner.op_type in CONVS | GEMMS or _form(inner) else None)
                if found is not None:
                    return f"{called}, whose body holds {found}"
        return None
    return None if node.op_type in COUNTED and not graphs else called


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def inputs_of(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the tensors that a node reads, those that its sub-graphs read from outside among them."""
    yield from (name for name in node.input if name)
    for graph in _subgraphs(node):
        own = {i.name for i in graph.input} | {i.name for i in graph.initializer}
        for inner in graph.node:
            yield from (name for name in inputs_of(inner) if name not in own)
            own.update(inner.output)
        yield from (o.name for o in graph.output if o.name not in own)


def activations(nodes: Sequence[onnx.NodeProto], image: str) -> set[str]:
    """Return the tensors that depend on the values of the image, not on its shape alone; `nodes` are in order."""
    data = {image}
    for node in nodes:
        if node.op_type not in ("Shape", "Size") and any(name in data for name in inputs_of(node)):
            data.update(name for name in node.output if name)
    return data


def check_known(graph: onnx.GraphProto, image: str, path: str) -> None:
    """Refuse nodes that work on activations and whose cost is not known.

    Raises:
        ModelFileError: There is one.
    """
    data = activations(graph.node, image)
    for node in graph.node:
        if any(name in data for name in node.output) and (what := unknown(node)) is not None:
            raise ModelFileError(
                f"the cost of the operator {what} is not known (node '{node.name or ', '.join(node.output)}')",
                where=path,
                remedy="predict the checkpoint, or a file of standard operators: export it again, without optimising it",
            )
