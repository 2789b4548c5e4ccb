"""The kernels of any ONNX file, ours or foreign, read off its graph: what `edge_targets.latency` predicts from.

Shapes come from ONNX's own shape inference. Quantize and dequantize nodes vanish into their neighbours; where both inputs
of a residual Add are quantized, the Add is a kernel of its own (see `edge_targets.kernels`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_targets.device import Precision
from edge_targets.kernels import Kernel
from rescompress.core.errors import ModelFileError

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]

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
        "Constant",
        "Shape",
        "Gather",
    }
)
"""Nodes without a kernel of their own: shape bookkeeping, and rounding that fuses into its neighbour."""
UNARY = frozenset({"BatchNormalization", "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSwish", "HardSigmoid", "Tanh"})
"""Nodes that fuse into the kernel that feeds them."""
POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"})
GEMMS = frozenset({"Gemm", "MatMul"})


@dataclass(frozen=True)
class OnnxKernels:
    """What a graph runs.

    Attributes:
        kernels: In order.
        precision: What its convolutions compute in, judged by their types and Q/DQ nodes.
        input_name: Of the image input.
        input_shape: Channels, height and width.
        batch: Fixed batch, or None when it is dynamic.
    """

    kernels: tuple[Kernel, ...]
    precision: Precision
    input_name: str
    input_shape: tuple[int, int, int]
    batch: int | None


def read_onnx(path: Path) -> onnx.ModelProto:
    """Return the ONNX model of a file.

    Raises:
        ModelFileError: It is missing, no ONNX file, or malformed.
    """
    from export.load import load_onnx

    return load_onnx(path, weights=False)


def kernels_of(path: Path, *, input_shape: tuple[int, int, int] | None = None) -> OnnxKernels:
    """Return the kernels of an ONNX file.

    Args:
        path: The file.
        input_shape: Channels, height and width, for a file that leaves them open.

    Raises:
        ModelFileError: It is missing, no ONNX file, has no image input, or leaves shapes open.
    """
    import onnx

    model = read_onnx(path)
    graph = model.graph
    weights = {i.name for i in graph.initializer}
    images = [i for i in graph.input if i.name not in weights and len(i.type.tensor_type.shape.dim) == 4]
    if len(images) != 1:
        raise ModelFileError(
            f"has {len(images)} image inputs (rank 4), one is expected", where=str(path), remedy="name a classifier of images"
        )
    dims = images[0].type.tensor_type.shape.dim
    batch = dims[0].dim_value or None
    shape = tuple(d.dim_value for d in dims[1:])
    if input_shape is not None:
        if any(d and d != want for d, want in zip(shape, input_shape, strict=True)):
            raise ModelFileError(
                f"takes {'x'.join(map(str, shape))}, not {'x'.join(map(str, input_shape))}",
                where=str(path),
                remedy="leave --input out",
            )
        shape = input_shape
    if not all(shape):
        raise ModelFileError("leaves the size of its input open", where=str(path), remedy="give it: --input 3x224x224")
    for d, size in zip(dims, (batch or 1, *shape), strict=True):  # a Reshape may hold the file's own batch
        d.dim_value = size
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    del graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError as e:
        raise ModelFileError(f"its shapes contradict each other: {e}", where=str(path), remedy="export it again") from e
    reader = _Reader(inferred, images[0].name, str(path))
    c, h, w = shape
    return OnnxKernels(tuple(reader.kernels()), reader.precision(), images[0].name, (c, h, w), batch)


class _Reader:
    """Walks an inferred graph once."""

    def __init__(self, model: onnx.ModelProto, image: str, path: str) -> None:
        graph = model.graph
        self.nodes = list(graph.node)
        self.image = image
        self.path = path
        self.shapes: dict[str, Shape] = {i.name: tuple(i.dims) for i in graph.initializer}
        self.types: dict[str, int] = {i.name: i.data_type for i in graph.initializer}
        for value in [*graph.input, *graph.value_info, *graph.output]:
            tensor = value.type.tensor_type
            self.shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
            self.types[value.name] = tensor.elem_type
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.done: set[str] = set()

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor, with the file's batch, or 1 where that is open."""
        found = self.shapes.get(name)
        if not found or not all(found):
            raise ModelFileError(
                f"the shape of tensor '{name}' cannot be inferred", where=self.path, remedy="export it with fixed shapes"
            )
        return found

    def is_data(self, node: onnx.NodeProto) -> bool:
        """Whether a node works on activations, not on weights or shapes."""
        source: str | None = node.input[0] if node.input else None
        while source is not None and source != self.image:
            maker = self.maker.get(source)
            if maker is None:
                return False
            if maker.op_type not in PASS:
                return True
            source = maker.input[0] if maker.input else None
        return source == self.image

    def source(self, name: str) -> tuple[str, bool]:
        """Return the tensor that `name` is a copy of, and whether it was quantized on the way."""
        quantized = False
        while name in self.maker and self.maker[name].op_type in PASS and self.maker[name].input:
            quantized |= self.maker[name].op_type == "QuantizeLinear"
            name = self.maker[name].input[0]
        return name, quantized

    def next_node(self, name: str) -> onnx.NodeProto | None:
        """Return the only node with a kernel that reads a tensor, through nodes without one; None where there are more."""
        while len(readers := self.readers.get(name, [])) == 1:
            if readers[0].op_type not in PASS:
                return readers[0]
            name = readers[0].output[0]
        return None

    def absorb(self, node: onnx.NodeProto) -> bool:
        """Mark what fuses into the kernel of `node`; return whether it then reads a skip connection."""
        tail, skip = node, False
        while (after := self.next_node(tail.output[0])) is not None:
            if after.op_type in ("Add", "Sum") and self.joins(node, tail, after) and not skip:
                skip = True
            elif after.op_type not in UNARY:
                break
            self.done.add(after.output[0])
            tail = after
            if after.op_type != "BatchNormalization" and after.op_type in UNARY:
                break
        return skip

    def joins(self, node: onnx.NodeProto, tail: onnx.NodeProto, add: onnx.NodeProto) -> bool:
        """Whether an Add runs inside the convolution `node`, whose last fused node is `tail`."""
        if node.op_type != "Conv" or add.output[0] in self.done:
            return False
        mine = other = False
        for name in add.input:
            origin, quantized = self.source(name)
            if origin == tail.output[0]:
                mine = quantized
            elif origin in self.shapes and origin not in self.maker and origin != self.image:
                return True  # adds a constant: a bias
            else:
                other = quantized
        if mine:
            return False
        return other or self.source(add.input[0])[0] == tail.output[0] or not self.other_is_conv(tail, add)

    def other_is_conv(self, tail: onnx.NodeProto, add: onnx.NodeProto) -> bool:
        """Whether the other input of `add` comes straight from a convolution, which could run the Add as well."""
        for name in add.input:
            origin, _ = self.source(name)
            if origin == tail.output[0] or origin not in self.maker:
                continue
            while self.maker[origin].op_type == "BatchNormalization":
                origin, _ = self.source(self.maker[origin].input[0])
            return bool(self.maker[origin].op_type == "Conv")
        return False

    def kernels(self) -> list[Kernel]:
        """Return the kernels in order."""
        c, h, w = self.shape(self.image)[1:]
        found = [Kernel("input reformat", "move", h * w, c, c, in_pixels=h * w, first=True)]
        for node in self.nodes:
            if node.op_type in PASS or not node.output or node.output[0] in self.done or not self.is_data(node):
                continue
            skip = self.absorb(node) if node.op_type in ("Conv", "Add", "Sum", *GEMMS) else False
            found.append(self.kernel(node, skip=skip))
        return found

    def kernel(self, node: onnx.NodeProto, *, skip: bool) -> Kernel:
        origin, _ = self.source(node.input[0])
        into, out = self.shape(node.input[0]), self.shape(node.output[0])
        in_pixels, pixels = math.prod(into[2:]), math.prod(out[2:])
        name = node.name or node.output[0]
        first = origin == self.image
        if node.op_type == "Conv":
            weight = self.shape(node.input[1])
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            return Kernel(
                name,
                "conv",
                pixels,
                into[1],
                out[1],
                math.prod(weight[2:]),
                groups,
                in_pixels=in_pixels,
                skip=skip,
                first=first,
            )
        if node.op_type in GEMMS:
            rows = math.prod(out[1:-1])
            return Kernel(name, "linear", rows, into[-1], out[-1], in_pixels=rows, skip=skip, first=first)
        width_in, width_out = (into[1] if len(into) > 1 else 1), (out[1] if len(out) > 1 else 1)
        kind = "pool" if node.op_type in POOLS else "move"
        skip = skip or (node.op_type in ("Add", "Sum", "Mul") and len(node.input) > 1)
        return Kernel(
            name, "pool" if kind == "pool" else "move", pixels, width_in, width_out, in_pixels=in_pixels, skip=skip, first=first
        )

    def precision(self) -> Precision:
        """Return what most of the arithmetic computes in."""
        import onnx

        macs: dict[Precision, int] = {"fp32": 0, "fp16": 0, "int8": 0}
        for node in self.nodes:
            if node.op_type != "Conv":
                continue
            pixels = math.prod(self.shape(node.output[0])[2:])
            cost = math.prod(self.shape(node.input[1])) * pixels
            maker = self.maker.get(node.input[0])
            if maker is not None and maker.op_type == "DequantizeLinear":
                macs["int8"] += cost
            elif self.types.get(node.input[0]) == onnx.TensorProto.FLOAT16:
                macs["fp16"] += cost
            else:
                macs["fp32"] += cost
        return max(macs, key=lambda p: macs[p])
