"""The kernels of any ONNX file, ours or foreign, read off its graph: what `edge_targets.latency` predicts from.

Shapes come from ONNX's own shape inference. Quantize and dequantize nodes vanish into their neighbours; where both inputs
of a residual Add are quantized, the Add is a kernel of its own (see `edge_targets.kernels`). Local functions are inlined, and
an operator that is not known (`edge_targets.onnx_operators`) is refused: its cost would be missing from the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_targets.device import Precision
from edge_targets.kernels import Kernel, KernelKind
from edge_targets.onnx_operators import CONVS, GEMMS, PASS, POOLS, UNARY, activations, check_known, plain
from rescompress.core.errors import ModelFileError

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OnnxInput:
    """The image input of a file.

    Attributes:
        input_name: Its name.
        input_shape: Channels, height and width, in the file's order.
        batch: Fixed batch, or None when it is dynamic.
    """

    input_name: str
    input_shape: tuple[int, int, int]
    batch: int | None


@dataclass(frozen=True)
class OnnxKernels(OnnxInput):
    """What a graph runs.

    Attributes:
        kernels: In order.
        precision: What its convolutions and matrix products compute in, judged by their types and Q/DQ nodes.
    """

    kernels: tuple[Kernel, ...]
    precision: Precision


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
        ModelFileError: It is missing, no ONNX file, has no image input, leaves shapes open, or holds operators whose cost
            is not known.
    """
    image, reader = _read(path, input_shape, strict=True)
    found = tuple(reader.kernels())
    return OnnxKernels(image.input_name, image.input_shape, image.batch, found, reader.precision())


def input_of(path: Path, *, input_shape: tuple[int, int, int] | None = None) -> OnnxInput:
    """Return the image input of an ONNX file, whatever operators it holds.

    Raises:
        ModelFileError: It is missing, no ONNX file, has no image input, or leaves its size open.
    """
    return _image(read_onnx(path), path, input_shape)


def precision_of(path: Path, *, input_shape: tuple[int, int, int] | None = None) -> Precision:
    """Return what the convolutions and matrix products of an ONNX file compute in; operators that are not known are left out.

    Raises:
        ModelFileError: As `kernels_of`, for all but unknown operators.
    """
    return _read(path, input_shape)[1].precision()


@dataclass(frozen=True)
class Asked:
    """What a file asks of its convolutions and matrix products.

    Attributes:
        precisions: By node, in order.
        order: Names of all nodes, in order.
    """

    precisions: dict[str, Precision]
    order: tuple[str, ...]


def asked_of(path: Path, *, input_shape: tuple[int, int, int] | None = None) -> Asked:
    """Return the precision that a file gives to every convolution and matrix product; nodes are named as TensorRT names them.

    Raises:
        ModelFileError: As `precision_of`.
    """
    reader = _read(path, input_shape)[1]
    return Asked(
        {_node_name(n): reader.type_of(n) for n in reader.nodes if reader.multiplies(n)},
        tuple(_node_name(n) for n in reader.nodes if n.output),
    )


def _node_name(node: onnx.NodeProto) -> str:
    return node.name or f"node_of_{node.output[0]}"  # the parser of TensorRT names those without a name so


def _image(model: onnx.ModelProto, path: Path, input_shape: tuple[int, int, int] | None) -> OnnxInput:
    """Return the image input, and fix its shape in `model`."""
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
    c, h, w = shape
    return OnnxInput(images[0].name, (c, h, w), batch)


def _read(path: Path, input_shape: tuple[int, int, int] | None, *, strict: bool = False) -> tuple[OnnxInput, _Reader]:
    """Return the image input and the graph in plain operators with its shapes; `strict` refuses operators of unknown cost."""
    import onnx

    model = read_onnx(path)
    image = _image(model, path, input_shape)
    model, integer = plain(model)
    if strict:
        check_known(model.graph, image.input_name, str(path))
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError) as e:
        raise ModelFileError(f"its shapes contradict each other: {e}", where=str(path), remedy="export it again") from e
    return image, _Reader(inferred, image, str(path), integer)


class _Reader:
    """Walks an inferred graph once."""

    def __init__(self, model: onnx.ModelProto, image: OnnxInput, path: str, integer: frozenset[str]) -> None:
        graph = model.graph
        self.nodes = list(graph.node)
        self.image = image.input_name
        self.batch = image.batch or 1
        self.path = path
        self.integer = integer
        self.shapes: dict[str, Shape] = {i.name: tuple(i.dims) for i in graph.initializer}
        self.types: dict[str, int] = {i.name: i.data_type for i in graph.initializer}
        for value in [*graph.input, *graph.value_info, *graph.output]:
            tensor = value.type.tensor_type
            if tensor.HasField("shape"):
                self.shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
            self.types[value.name] = tensor.elem_type
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.done: set[str] = set()
        self.data = activations(self.nodes, self.image)

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor, with the file's batch, or 1 where that is open."""
        found = self.shapes.get(name)
        if found is None or not all(found):
            raise ModelFileError(
                f"the shape of tensor '{name}' cannot be inferred", where=self.path, remedy="export it with fixed shapes"
            )
        return found

    def is_data(self, node: onnx.NodeProto) -> bool:
        """Whether a node works on activations, not on weights or shapes."""
        return any(name in self.data for name in node.output)

    def source(self, name: str) -> tuple[str, bool]:
        """Return the tensor that `name` is a copy of, and whether it was quantized on the way."""
        quantized = False
        while name in self.maker and self.maker[name].op_type in PASS and self.maker[name].input:
            quantized |= self.maker[name].op_type == "QuantizeLinear"
            name = self.maker[name].input[0]
        return name, quantized or name in self.integer

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
            skip = self.absorb(node) if node.op_type in ("Add", "Sum", *CONVS, *GEMMS) else False
            found.append(self.kernel(node, skip=skip))
        return found

    def kernel(self, node: onnx.NodeProto, *, skip: bool) -> Kernel:
        """Return the kernel that a node starts."""
        name = node.name or node.output[0]
        first = any(self.source(i)[0] == self.image for i in node.input[:1])
        out = self.shape(node.output[0])
        if node.op_type in GEMMS:
            left = self.shape(node.input[0])
            attributes = {a.name: a.i for a in node.attribute}
            reduced = left[0] if attributes.get("transA") else left[-1]
            rows = max(1, math.prod(out[:-1]) // self.batch)
            return Kernel(name, "linear", rows, reduced, out[-1], in_pixels=rows, skip=skip, first=first)
        data = next((i for i in node.input if i in self.data), node.input[0] if node.input else node.output[0])
        into = self.shape(data)
        in_pixels, pixels = math.prod(into[2:]), math.prod(out[2:])
        if node.op_type in CONVS:
            taps = math.prod(self.shape(node.input[1])[2:])
            groups = max(1, next((a.i for a in node.attribute if a.name == "group"), 1))
            sizes = (pixels, into[1], out[1], in_pixels)
            if node.op_type == "ConvTranspose":  # costs what the convolution costs whose input is its output
                sizes = (in_pixels, out[1], into[1], pixels)
            pixels, in_width, width, in_pixels = sizes
            return Kernel(name, "conv", pixels, in_width, width, taps, groups, in_pixels=in_pixels, skip=skip, first=first)
        width_in, width_out = (into[1] if len(into) > 1 else 1), (out[1] if len(out) > 1 else 1)
        skip = skip or (node.op_type in ("Add", "Sum", "Mul") and len(node.input) > 1)
        kind: KernelKind = "pool" if node.op_type in POOLS else "move"
        return Kernel(name, kind, pixels, width_in, width_out, in_pixels=in_pixels, skip=skip, first=first)

    def macs(self, node: onnx.NodeProto) -> int:
        """Return the multiply-accumulates of a convolution or matrix product for one image."""
        return self.kernel(node, skip=False).macs

    def multiplies(self, node: onnx.NodeProto) -> bool:
        """Whether a node is a convolution or a matrix product of activations."""
        return node.op_type in CONVS | GEMMS and len(node.input) > 1 and self.is_data(node)

    def precision(self) -> Precision:
        """Return what most of the arithmetic computes in."""
        macs: dict[Precision, int] = {"fp32": 0, "fp16": 0, "int8": 0}
        for node in self.nodes:
            if self.multiplies(node):
                macs[self.type_of(node)] += self.macs(node)
        return max(macs, key=lambda p: macs[p])

    def type_of(self, node: onnx.NodeProto) -> Precision:
        """Return what a convolution or matrix product computes in."""
        import onnx

        if node.output[0] in self.integer or all(self.is_int8(name) for name in node.input[:2]):
            return "int8"
        return "fp16" if self.types.get(node.output[0]) == onnx.TensorProto.FLOAT16 else "fp32"

    def is_int8(self, name: str) -> bool:
        """Whether a tensor comes rounded to 8 bits, through nodes that change none of its values."""
        import onnx

        while (maker := self.maker.get(name)) is not None and maker.op_type in PASS and maker.input:
            if maker.op_type == "DequantizeLinear":
                return self.types.get(maker.input[0]) in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
            name = maker.input[0]
        return False
