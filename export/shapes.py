"""`infer`: the type and shape of every tensor of an ONNX model, and whether they fit together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper

from export.structure import STANDARD, by, node_label, one_line, opsets, order, refuse
from rescompress.core.errors import ModelFileError

LARGEST_TENSOR = 2**31 - 1
"""Elements of a tensor that TensorRT and 32-bit indices reach."""
HALF_SCALES = 19
"""First opset whose quantizers take float16 scales."""

_SMALL = 4096
"""Elements of a stored tensor whose values shapes may depend on."""

Sizes = Sequence["tuple[int, ...] | None"]


def infer(model: onnx.ModelProto, *, strict: bool = False, batch: int | None = None) -> onnx.ModelProto:
    """Return a copy of a model without its large weights, with the type and shape of every tensor that can be inferred.

    Args:
        model: Any model.
        strict: Whether types and shapes that contradict each other are an error; else they are left out.
        batch: What the first dimension of the inputs is taken as where it is open.

    Raises:
        ModelFileError: Types or shapes do not fit together.
    """
    copy = _without_weights(model)
    stored = {i.name for i in copy.graph.initializer}
    for value in copy.graph.input:
        dims = value.type.tensor_type.shape.dim
        if batch is not None and value.name not in stored and dims and not dims[0].dim_value:
            dims[0].dim_value = batch
    for value in copy.graph.output:  # exporters leave shapes there that no longer hold; runtimes only warn
        value.type.tensor_type.ClearField("shape")
    copy.graph.node.extend(model.graph.node[i] for i in order(model.graph.node))
    try:
        return onnx.shape_inference.infer_shapes(copy, check_type=strict, strict_mode=strict, data_prop=True)
    except Exception as e:  # InferenceError, RuntimeError, and UnicodeDecodeError from their texts
        raise ModelFileError(f"types or shapes do not fit together: {one_line(e)}", remedy="check how it was made") from e


def shapes(inferred: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model that `infer` returned whose shape is known in full."""
    graph = inferred.graph
    found = {i.name: tuple(i.dims) for i in graph.initializer}
    found |= {i.values.name: tuple(i.dims) for i in graph.sparse_initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            found.setdefault(value.name, tuple(d.dim_value for d in tensor.shape.dim))
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            found[node.output[0]] = tuple(node.attribute[0].t.dims)
    return found


def check_shapes(model: onnx.ModelProto) -> None:
    """Check that types and shapes fit together, and that no tensor is beyond what any runtime takes."""
    try:
        inferred = infer(model, strict=True, batch=1)
    except ModelFileError:
        if not half_quantizers(model):
            raise
        inferred = infer(_newer(model), strict=True, batch=1)
    sizes = shapes(inferred)
    stored = {i.name for i in model.graph.initializer}
    for value in model.graph.input:  # of the batch that the file states
        dims = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
        if value.name not in stored:
            sizes.pop(value.name, None)
            sizes = {value.name: tuple(dims)} | sizes  # an error names the input first
    for name, size in sizes.items():
        if any(d < 0 for d in size):
            refuse(f"tensor '{name}' has a negative size: {by(size)}")
        if math.prod(size) > LARGEST_TENSOR:
            refuse(
                f"tensor '{name}' is {by(size)}: {math.prod(size):.2g} values, more than any runtime takes",
                "use a smaller input",
            )
    for node in model.graph.node:
        if node.domain in STANDARD and node.op_type in _FIT:
            wrong = _FIT[node.op_type](node, [sizes.get(name) if name else None for name in node.input])
            if wrong:
                refuse(f"{node.op_type} {node_label(node)}: {wrong}")


def half_quantizers(model: onnx.ModelProto) -> bool:
    """Whether a file has float16 scales although its opset has none: TensorRT reads it, ONNX does not allow it."""
    half = {i.name for i in model.graph.initializer if i.data_type == TensorProto.FLOAT16}
    pairs = (n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear") and n.domain in STANDARD)
    return opsets(model.opset_import).get("", HALF_SCALES) < HALF_SCALES and any(set(n.input[1:2]) & half for n in pairs)


def _newer(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model in the first opset that has float16 scales, to check everything else of it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for entry in copy.opset_import:
        if entry.domain in STANDARD:
            entry.version = HALF_SCALES
    return copy


def _conv(node: NodeProto, sizes: Sizes) -> str | None:
    data, weight = sizes[0], sizes[1]
    groups = _attribute(node, "group", 1)
    if groups < 1:
        return f"group is {groups}"
    if weight is None:
        return None
    if len(weight) < 3 or not all(weight):
        return f"the weight is {by(weight)}"
    if weight[0] % groups:
        return f"{weight[0]} output channels cannot be cut into {groups} groups"
    kernel = _attribute(node, "kernel_shape", None)
    if kernel is not None and tuple(kernel) != weight[2:]:
        return f"the kernel is {by(kernel)}, the weight {by(weight)}"
    if data is not None and (len(data) != len(weight) or data[1] != weight[1] * groups):
        return f"the weight {by(weight)} does not fit the data {by(data)}{f' in {groups} groups' if groups > 1 else ''}"
    bias = sizes[2] if len(sizes) > 2 else None
    return f"the bias is {by(bias)} for {weight[0]} channels" if bias is not None and bias != weight[:1] else None


def _gemm(node: NodeProto, sizes: Sizes) -> str | None:
    data, weight = sizes[0], sizes[1]
    if any(s is not None and (len(s) != 2 or not all(s)) for s in (data, weight)):
        return f"its inputs are {' and '.join(by(s) for s in (data, weight) if s is not None)}, not matrices"
    if data is None or weight is None:
        return None
    inner = data[0 if _attribute(node, "transA", 0) else 1], weight[1 if _attribute(node, "transB", 0) else 0]
    return f"the weight {by(weight)} does not fit the data {by(data)}" if inner[0] != inner[1] else None


def _batch_norm(node: NodeProto, sizes: Sizes) -> str | None:
    data, parts = sizes[0], [s for s in sizes[1:5] if s is not None]
    channels = data[1] if data is not None and len(data) > 1 else None
    if len(set(parts)) > 1 or any(len(s) != 1 or not all(s) or channels not in (None, s[0]) for s in parts):
        return f"its parameters are {', '.join(map(by, parts))}{f' for {channels} channels' if channels else ''}"
    return None


def _quantizer(node: NodeProto, sizes: Sizes) -> str | None:
    data, scale = sizes[0], sizes[1]
    zero = sizes[2] if len(sizes) > 2 else None
    if scale is None:
        return None
    if not all(scale):
        return "its scale holds no value"
    if zero is not None and zero != scale and not (math.prod(zero) == math.prod(scale) == 1):
        return f"the zero point is {by(zero)}, the scale {by(scale)}"
    if data is None or math.prod(scale) == 1:
        return None
    axis = _attribute(node, "axis", 1)
    if not -len(data) <= axis < len(data) or (len(scale) != 1 and len(scale) != len(data)):
        return f"the scale {by(scale)} along axis {axis} does not fit the data {by(data)}"
    if len(scale) == 1 and scale[0] != data[axis]:
        return f"{scale[0]} scales along axis {axis} of the data {by(data)}"
    return None


_FIT = {
    "Conv": _conv,
    "Gemm": _gemm,
    "BatchNormalization": _batch_norm,
    "QuantizeLinear": _quantizer,
    "DequantizeLinear": _quantizer,
}


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model without nodes, in which large tensors have a shape and no values."""
    graph = model.graph
    copy = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    copy.graph.name = "graph"
    for field in ("input", "output", "sparse_initializer"):
        getattr(copy.graph, field).extend(getattr(graph, field))
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _SMALL and tensor.data_location != TensorProto.EXTERNAL:
            copy.graph.initializer.append(tensor)
        else:
            copy.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return copy


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
