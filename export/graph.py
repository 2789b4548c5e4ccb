"""`GraphView`: questions about an ONNX graph that lint rules and repair passes ask; made for anyone's file, not only ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from export.recount import shapes_of
from export.structure import STANDARD, check_structure, is_standard, node_label, reads
from rescompress.core.errors import ModelFileError

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})
PASSING = frozenset({"Relu", "MaxPool", "Clip", "Identity", "Slice", "Pad", "Flatten", "Reshape", "Gather", "Transpose"})
"""Operators that hand values on without computing new ones, as far as quantization goes."""

Array = NDArray[Any]


class GraphView:
    """An ONNX model with indices for fast questions; read-only.

    What it holds keeps the promises of `export.structure`: there is no cycle, so walks along the graph end, and nodes of
    ONNX's own operators have their inputs and attributes.

    Attributes:
        model: The model.
        nodes: Its nodes, in order.
        producer: Per tensor, the node that makes it.
        consumers: Per tensor, the nodes that read it, themselves or in a graph inside them.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """Index the main graph.

        Raises:
            ModelFileError: The graph is malformed.
        """
        check_structure(model)
        self.model = model
        self.nodes: Sequence[NodeProto] = list(model.graph.node)
        self.producer = {out: node for node in self.nodes for out in node.output if out}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in (*node.input, *(reads(node) - set(node.input))):
                self.consumers.setdefault(name, []).append(node)
        self._stored = {i.name: i for i in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.domain in STANDARD:
                value = _value(node)
                if value is not None:
                    self._stored[node.output[0]] = value
        self.outputs = {o.name for o in model.graph.output}

    @property
    def opset(self) -> int:
        """Version of the ONNX operator set."""
        return next((int(o.version) for o in self.model.opset_import if o.domain in ("", "ai.onnx")), 1)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that can be inferred, for one image; empty where inference fails."""
        try:
            return shapes_of(self.model)
        except ModelFileError:
            return {}

    def stored(self, name: str) -> TensorProto | None:
        """Return the initializer or constant called `name`, or None."""
        return self._stored.get(name)

    def constant(self, name: str) -> Array | None:
        """Return the value of an initializer or constant, perhaps behind Identity, or None where `name` is computed."""
        while name not in self._stored and (node := self.made_by(name, "Identity")) is not None:
            name = node.input[0]
        tensor = self._stored.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)

    def ops(self, *types: str) -> Iterator[NodeProto]:
        """Yield the nodes of these types, in order."""
        return (node for node in self.nodes if node.op_type in types and is_standard(node))

    def made_by(self, name: str, *types: str) -> NodeProto | None:
        """Return the node that makes the tensor `name` if it is of one of these types of ONNX's own."""
        node = self.producer.get(name)
        return node if node is not None and node.op_type in types and is_standard(node) else None

    def scale(self, node: NodeProto) -> Array | None:
        """Return the scale of a Q or DQ node, or None where it is computed."""
        return self.constant(node.input[1])

    def zero_point(self, node: NodeProto) -> Array:
        """Return the zero point of a Q or DQ node; 0 of its type where none is given, or where it is computed."""
        if len(node.input) > 2 and node.input[2]:
            value = self.constant(node.input[2])
            if value is not None:
                return value
        return np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(self.integer_type(node)))

    def integer_type(self, node: NodeProto) -> int:
        """Return the type that a Q makes, or a DQ reads, as a `TensorProto.DataType`."""
        if len(node.input) > 2 and node.input[2]:
            found = self.element_type(node.input[2])
            if found is not None:
                return found
        if node.op_type == QUANTIZE:
            return int(attribute(node, "output_dtype", 0)) or TensorProto.UINT8
        quantize = self.made_by(node.input[0], QUANTIZE)
        if quantize is not None:
            return self.integer_type(quantize)
        found = self.element_type(node.input[0])
        return TensorProto.UINT8 if found is None else found

    def element_type(self, name: str) -> int | None:
        """Return the type of a stored tensor, perhaps behind Identity, or of an input; None for what is computed."""
        while name not in self._stored and (node := self.made_by(name, "Identity")) is not None:
            name = node.input[0]
        if name in self._stored:
            return int(self._stored[name].data_type)
        return next((i.type.tensor_type.elem_type or None for i in self.model.graph.input if i.name == name), None)

    def is_weight_pair(self, node: NodeProto) -> bool:
        """Whether a Q or DQ node works on a stored tensor rather than an activation."""
        source = node.input[0]
        if node.op_type == DEQUANTIZE:
            quantize = self.made_by(source, QUANTIZE)
            source = quantize.input[0] if quantize is not None else source
        return self.is_stored(source)

    def is_stored(self, name: str) -> bool:
        """Whether `name` is an initializer or constant, perhaps through Identity, Cast or Transpose."""
        while name not in self._stored:
            node = self.made_by(name, "Identity", "Cast", "Transpose", "Reshape")
            if node is None:
                return False
            name = node.input[0]
        return True

    def activation_quantizers(self) -> Iterator[NodeProto]:
        """Yield the QuantizeLinear nodes of activations."""
        return (node for node in self.ops(QUANTIZE) if not self.is_weight_pair(node))

    def weighted(self) -> Iterator[NodeProto]:
        """Yield convolutions and matrix products whose weight is stored."""
        return (node for node in self.ops(*WEIGHTED) if self.weight(node) is not None)

    def weight(self, node: NodeProto) -> str | None:
        """Return the name of the stored weight of a convolution or matrix product, seen through Q and DQ; or None."""
        name = node.input[1]
        for types in ((DEQUANTIZE,), (QUANTIZE,)):
            pair = self.made_by(name, *types)
            name = pair.input[0] if pair is not None else name
        return name if self.is_stored(name) else None

    def weight_dq(self, node: NodeProto) -> NodeProto | None:
        """Return the DequantizeLinear of a layer's weight, or None where the weight is a plain float."""
        return self.made_by(node.input[1], DEQUANTIZE)

    def input_dq(self, node: NodeProto) -> NodeProto | None:
        """Return the DequantizeLinear of a layer's data input, looked for through ReLU, Flatten and the like."""
        name = node.input[0]
        while (between := self.made_by(name, "Flatten", "Reshape", "Identity", "Squeeze", "Relu", "MaxPool")) is not None:
            name = between.input[0]
        return self.made_by(name, DEQUANTIZE)

    def is_int8(self, node: NodeProto) -> bool:
        """Whether a layer reads both its data and its weight through DequantizeLinear."""
        return self.weight_dq(node) is not None and self.input_dq(node) is not None

    @cached_property
    def quantized(self) -> bool:
        """Whether the graph has activations behind QuantizeLinear."""
        return any(True for _ in self.activation_quantizers())

    def residual_adds(self) -> Iterator[tuple[NodeProto, str, str]]:
        """Yield (add, main, skip): Adds of two computed tensors, and which input is the end of the main branch.

        The main branch is the one that ends in a convolution; of two such branches the one with more convolutions since
        they parted. An Add of which neither input comes from a convolution is left out.
        """
        for add in self.ops("Add"):
            if any(self.is_stored(name) for name in add.input):
                continue
            convs = [self._conv_before(name) for name in add.input]
            if all(conv is None for conv in convs):
                continue
            depths = [
                self._convs_since_fork(name) if conv is not None else -1 for name, conv in zip(add.input, convs, strict=True)
            ]
            main = 0 if depths[0] >= depths[1] else 1
            yield add, add.input[main], add.input[1 - main]

    def origin(self, name: str) -> str:
        """Return the tensor whose values `name` hands on unchanged, through Identity and Cast to float32."""
        while (node := self.made_by(name, "Identity", "Cast")) is not None:
            if node.op_type == "Cast" and attribute(node, "to", None) != TensorProto.FLOAT:
                break
            name = node.input[0]
        return name

    def folded_conv(self, name: str) -> NodeProto | None:
        """Return the convolution that makes `name`, perhaps with a BatchNorm behind it, or None."""
        norm = self.made_by(name, "BatchNormalization")
        return self.made_by(name if norm is None else norm.input[0], "Conv")

    def _conv_before(self, name: str) -> NodeProto | None:
        """Return the convolution that makes `name`, looked for through Q/DQ and BatchNorm."""
        while (node := self.made_by(name, QUANTIZE, DEQUANTIZE, "BatchNormalization", "Identity")) is not None:
            name = node.input[0]
        return self.made_by(name, "Conv")

    def _convs_since_fork(self, name: str) -> int:
        """Count the convolutions from `name` up to a tensor with several readers."""
        count = 0
        while (node := self.producer.get(name)) is not None and node.input and count < 8:
            count += node.op_type == "Conv"
            name = node.input[0]
            readers = [n for n in self.consumers.get(name, []) if n.op_type != "Shape"]
            if len(readers) > 1 and all(self.made_by(name, kind) is None for kind in (QUANTIZE,)):
                break
        return count


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return the value of a node's attribute, or `default`."""
    for found in node.attribute:
        if found.name == name:
            return onnx.helper.get_attribute_value(found)
    return default


def label(node: NodeProto) -> str:
    """Return what to call a node in a message: its name, or its type and output."""
    return node_label(node)


def _value(node: NodeProto) -> TensorProto | None:
    """Return what a Constant holds as a tensor, whichever way it is written; None for strings and sparse tensors."""
    for found in node.attribute:
        if found.name == "value":
            tensor: TensorProto = found.t
            return tensor
        kind = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}.get(
            found.name
        )
        if kind is not None:
            return numpy_helper.from_array(np.asarray(onnx.helper.get_attribute_value(found), kind), node.output[0])
    return None
