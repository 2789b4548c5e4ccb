"""`to_onnx`: the ONNX file of a network, written from its graph, tensors and quantizers; nothing is traced.

What the file looks like:

* Nodes carry the names of the layers (``layer1.0.conv1``), and so do tensors: the value called ``layer1.0.bn1`` is what
  the torch model computes under that name. A quantized tensor ``t`` is followed by the nodes ``t.q`` and ``t.dq``, once,
  and everything that reads ``t`` reads ``t.dq``.
* BatchNorm behind a convolution is folded. In a float layer into the weights; in an INT8 layer into the per-channel scales,
  which is exact:
  ``BN(conv(x, s_c W_c)) = conv(x, (s_c g_c) W_c) + b_c`` with ``g_c = gamma_c / sqrt(var_c + eps)``. The integers stay
  those of the training; where ``g_c`` is negative they change sign ([-127, 127] allows it), where it is 0 they are 0.
* Weights are int8 initializers behind a DequantizeLinear; biases are floats; activation scales and zero points are
  scalars (0-D), because TensorRT for RTX silently runs convolutions in float when they have shape [1].

Shape suffixes: N batch, C channels, O output channels, I input channels, K kernel side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, assert_never

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from rescompress.core.errors import BadInput, CheckpointError
from rescompress.core.graph import INPUT, Layer, Network
from rescompress.core.operations import (
    Add,
    Affine,
    AvgPool,
    BatchNorm,
    ChannelConv,
    ChannelSelect,
    Clip,
    Concat,
    Conv,
    Dropout,
    Elu,
    Flatten,
    Gelu,
    GlobalPool,
    GroupNorm,
    HardSigmoid,
    HardSwish,
    Input,
    LeakyRelu,
    Linear,
    MaxPool,
    Multiply,
    Pad,
    PRelu,
    Relu,
    Resize,
    Sigmoid,
    Silu,
    Softmax,
    Tanh,
)
from rescompress.core.quantizers import PROFILES, Profile, Quantization, Quantizer
from rescompress.core.recipe import network_of
from rescompress.core.spec import ModelSpec, Preprocessing

Precision = Literal["auto", "fp32", "fp16", "int8", "int8+fp16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "fp16", "int8", "int8+fp16")
OPSETS = range(13, 21)
"""Opsets that can be written. 13 is the first with per-channel scales; from 21 on onnxruntime 1.31 moves a quantizer over the
Slice of a pad shortcut, gives it the wrong type, and refuses the file."""
FP16_SCALE_OPSET = 19
"""First opset whose QuantizeLinear takes float16 scales."""

_META_SPEC = "rescompress.spec"
_META_NETWORK = "rescompress.network"
_META_LABELS = "rescompress.labels"
_META_PREPROCESSING = "rescompress.preprocessing"
_META_PROFILE = "rescompress.profile"

Array = NDArray[Any]


@dataclass(frozen=True)
class ExportOptions:
    """What kind of file to write.

    Attributes:
        batch: Images per call, or ``dynamic``.
        opset: ONNX operator set; a target says which one its runtime reads.
        precision: ``fp32``; ``fp16`` (weights and arithmetic, input and output stay float32); ``int8``; ``int8+fp16``
            (whatever is not INT8 is float16, for strongly typed TensorRT); ``auto`` is ``int8`` for a quantized network and
            ``fp32`` otherwise.
    """

    batch: int | Literal["dynamic"] = 1
    opset: int = 17
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        """Refuse what no file can be.

        Raises:
            BadInput: An opset, batch or precision that cannot be written.
        """
        if self.opset not in OPSETS:
            raise BadInput(f"opset {self.opset} cannot be written", remedy=f"choose {OPSETS[0]} to {OPSETS[-1]}")
        if self.batch != "dynamic" and (not isinstance(self.batch, int) or self.batch < 1):
            raise BadInput(f"a batch of {self.batch} is none", remedy="give a number from 1, or 'dynamic'")
        if self.precision not in PRECISIONS:
            raise BadInput(f"unknown precision '{self.precision}'", remedy="known: " + ", ".join(PRECISIONS))
        if self.precision == "int8+fp16" and self.opset < FP16_SCALE_OPSET:
            raise BadInput(
                f"opset {self.opset} has no float16 scales", remedy=f"use opset {FP16_SCALE_OPSET} or later for int8+fp16"
            )


def to_onnx(
    spec: ModelSpec | Network, tensors: Mapping[str, Array], quantization: Quantization | None, options: ExportOptions
) -> onnx.ModelProto:
    """Return the network as an ONNX model with input ``input`` and the network's outputs, of a classifier ``logits``.

    Args:
        spec: The network.
        tensors: Every tensor of the network by name (``layer1.0.conv1.weight``, ``layer1.0.bn1.running_var``); float.
        quantization: Every quantizer with its scales. Read only when the precision is an INT8 one.
        options: What kind of file.

    Raises:
        BadInput: INT8 without quantizers, or quantizers that do not fit the network.
        CheckpointError: A tensor is missing, of another shape, not finite, or beyond float16.
    """
    precision = options.precision
    if precision == "auto":
        precision = "int8" if quantization is not None else "fp32"
    if precision.startswith("int8"):
        if quantization is None:
            raise BadInput("an INT8 file needs a quantized network", remedy="run `rescompress quantize` first")
        if precision == "int8+fp16" and quantization.profile != "tensorrt":
            raise BadInput(
                f"int8+fp16 is written for the tensorrt profile only, this network has the {quantization.profile} profile",
                remedy="quantize with --profile tensorrt, or export int8",
            )
        try:
            quantization.check(spec)
        except ValueError as e:
            raise BadInput(f"the quantizers do not fit the network: {e}", remedy="quantize this very network again") from e
    else:
        quantization = None
    writer = _Writer(spec, tensors, quantization, options, half=precision.endswith("fp16"))
    return writer.write()


def weight_integers(weight: Array, quantizer: Quantizer) -> NDArray[np.int8]:
    """Return the int8 weights that fake quantization computes with: ``clip(round(w * (1 / s)), low, high)``.

    Rounding is to even and the arithmetic float32 with a reciprocal, as in torch's ``fake_quantize_per_channel_affine``,
    so that the integers are those of the training to the last one.

    Args:
        weight: (O, ...) float weights.
        quantizer: Its quantizer, one scale per output channel.
    """
    assert quantizer.scale is not None
    inverse_O = np.float32(1.0) / np.asarray(quantizer.scale, np.float32)
    scaled = weight.astype(np.float32) * inverse_O.reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(np.rint(scaled), quantizer.low, quantizer.high).astype(np.int8)


@dataclass(frozen=True)
class ExportedModel:
    """What a file of ours says about itself.

    Attributes:
        spec: The network, with labels and preprocessing.
        profile: Placement profile of its quantizers, or None for a float file.
    """

    spec: ModelSpec | Network
    profile: Profile | None


def read_metadata(model: onnx.ModelProto) -> ExportedModel | None:
    """Return what `to_onnx` stored in the model, or None where somebody else wrote it.

    Raises:
        BadInput: The metadata is ours but cannot be read.
    """
    props = {p.key: p.value for p in model.metadata_props}
    key = next((key for key in (_META_SPEC, _META_NETWORK) if key in props), None)
    if key is None:
        return None
    try:
        stored = json.loads(props[key])
        if not isinstance(stored, dict):
            raise ValueError(f"{key} is no mapping")
        kind: type[ModelSpec | Network] = ModelSpec if key == _META_SPEC else Network
        spec = kind.model_validate(
            {
                **stored,
                "labels": json.loads(props[_META_LABELS]) if _META_LABELS in props else None,
                "preprocessing": Preprocessing.model_validate_json(props[_META_PREPROCESSING]),
            }
        )
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        lacks = f"it lacks {e}" if isinstance(e, KeyError) else e
        raise BadInput(f"the metadata of the ONNX file cannot be read: {lacks}", remedy="export the checkpoint again") from e
    named = props.get(_META_PROFILE)
    profile = next((known for known in PROFILES if known == named), None)
    if named is not None and profile is None:
        raise BadInput(f"the ONNX file names a profile that is not known here: {named}", remedy="export the checkpoint again")
    return ExportedModel(spec, profile)


@dataclass(frozen=True)
class _Folded:
    """A convolution or linear layer with its BatchNorm inside.

    Attributes:
        weight: (O, ...) float32 weights, or the int8 ones.
        scale_O: Scale of each output channel of an INT8 layer, float32.
        bias_O: float32, or None.
    """

    weight: Array
    scale_O: Array | None
    bias_O: Array | None


class _Writer:
    """Builds one model, layer by layer; `values` holds what readers of each tensor read."""

    def __init__(
        self,
        spec: ModelSpec | Network,
        tensors: Mapping[str, Array],
        quantization: Quantization | None,
        options: ExportOptions,
        *,
        half: bool,
    ) -> None:
        self.spec = spec
        self.network = network_of(spec)
        self.tensors = tensors
        self.quantization = quantization
        self.options = options
        self.half = half
        self.float_dtype = np.float16 if half else np.float32
        self.activations = {q.tensor: q for q in quantization.quantizers if q.kind == "activation"} if quantization else {}
        self.weights = {q.tensor: q for q in quantization.quantizers if q.kind == "weight"} if quantization else {}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.values: dict[str, ir.Value] = {}

    def write(self) -> onnx.ModelProto:
        batch_norm_of = self.network.folded_norms
        folded = {norm.name for norm in batch_norm_of.values()}
        batch = "N" if self.options.batch == "dynamic" else self.options.batch
        source = ir.Value(name=INPUT, shape=ir.Shape([batch, *self.spec.input_shape]), type=ir.TensorType(ir.DataType.FLOAT))
        # A tensor gets the name of the layer that makes it; an output its own, whatever layer makes it.
        for layer in self.network.layers:
            if layer.name in folded:
                self.values[layer.name] = self.values[layer.inputs[0]]
                continue
            norm = batch_norm_of.get(layer.name)
            x = self.made(layer, norm, source)
            name = norm.name if norm is not None else layer.name
            unchanged = bool(layer.inputs) and x is self.values[layer.inputs[0]]  # a dropout, a selection of all channels
            if name in self.activations and not unchanged:
                x = self.quantized(x, self.activations[name])
            self.values[layer.name] = x
        outputs = [self.output(output.name, output.tensor, batch) for output in self.network.outputs]
        graph = ir.Graph(
            [source],
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": self.options.opset},
            name=self.spec.arch,
        )
        model = ir.Model(
            graph,
            ir_version=onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", self.options.opset)]),
            producer_name="rescompress",
            producer_version=version("rescompress"),
            metadata_props=self.metadata(),
        )
        return ir.to_proto(model)

    def output(self, name: str, tensor: str, batch: int | str) -> ir.Value:
        """Return the value of an output, called as it is called."""
        value = self.values[tensor]
        if self.half:
            value = self.node("Cast", name, [value], to=ir.DataType.FLOAT)
        elif value.producer() is None or value.type is not None:
            value = self.node("Identity", name, [value])  # the input itself, or an output already
        value.name = name
        value.shape = ir.Shape([batch, *self.network.by_name[tensor].out_shape])
        value.type = ir.TensorType(ir.DataType.FLOAT)
        return value

    def metadata(self) -> dict[str, str]:
        spec = self.spec.model_dump(mode="json", exclude={"labels", "preprocessing"})
        key = _META_SPEC if isinstance(self.spec, ModelSpec) else _META_NETWORK
        props = {
            key: json.dumps(spec, separators=(",", ":")),
            _META_PREPROCESSING: self.spec.preprocessing.model_dump_json(),
        }
        if self.spec.labels is not None:
            props[_META_LABELS] = json.dumps(self.spec.labels, separators=(",", ":"), ensure_ascii=False)
        if self.quantization is not None:
            props[_META_PROFILE] = self.quantization.profile
        return props

    # ---- pieces of the graph

    def node(
        self, op_type: str, name: str, inputs: Sequence[ir.Value | None], *, out: str | None = None, **attributes: Any
    ) -> ir.Value:
        """Append a node; return its output, called `out` or like the node."""
        value = ir.Value(name=out or name)
        self.nodes.append(ir.node(op_type, inputs, attributes, outputs=[value], name=name))
        return value

    def constant(self, name: str, array: Array) -> ir.Value:
        """Return the initializer called `name`, made at the first call."""
        if name not in self.initializers:
            tensor = ir.Tensor(np.ascontiguousarray(array) if array.ndim else array, name=name)
            self.initializers[name] = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.initializers[name]

    def floats(self, name: str, array: Array, *, positive: bool = False) -> ir.Value:
        """Return a float initializer in the file's float type.

        Args:
            name: Of the initializer.
            array: The values.
            positive: Whether they are scales, by which is divided: none may become 0.
        """
        if self.half:
            with np.errstate(over="ignore"):
                halves = array.astype(np.float16)
            if not np.isfinite(halves).all() or (positive and not halves.all()):
                worst = float(np.abs(array).max() if not np.isfinite(halves).all() else array.min())
                raise CheckpointError(
                    f"a value of {worst:.3g} does not fit float16", where=name, remedy="export with --precision fp32 or int8"
                )
            return self.constant(name, halves)
        return self.constant(name, array.astype(np.float32))

    def quantized(self, x: ir.Value, quantizer: Quantizer) -> ir.Value:
        """Append the one Q/DQ pair of an activation; return what its readers read."""
        assert quantizer.scale is not None
        name = quantizer.tensor
        scale = self.floats(f"{name}.scale", np.asarray(quantizer.scale[0], np.float32), positive=True)
        zero_type = np.int8 if quantizer.signed else np.uint8
        zero = self.constant(f"zero_point.{zero_type.__name__}", np.asarray(0, zero_type))
        q = self.node("QuantizeLinear", f"{name}.q", [x, scale, zero])
        return self.node("DequantizeLinear", f"{name}.dq", [q, scale, zero])

    def weighted(self, layer: Layer, batch_norm: Layer | None) -> ir.Value:
        """Append a convolution or linear layer with its BatchNorm folded in."""
        folded = self.fold(layer, batch_norm)
        name = layer.name
        if folded.scale_O is None:
            weight = self.floats(f"{name}.weight", folded.weight)
        else:
            integers = self.constant(f"{name}.weight", folded.weight)
            scale = self.floats(f"{name}.weight.scale", folded.scale_O)
            weight = self.node("DequantizeLinear", f"{name}.weight.dq", [integers, scale], axis=0)
        inputs = [self.values[layer.inputs[0]], weight]
        if folded.bias_O is not None:
            inputs.append(self.floats(f"{name}.bias", folded.bias_O))
        out = batch_norm.name if batch_norm is not None else name
        if not isinstance(layer.operation, Conv):
            return self.node("Gemm", name, inputs, out=out, transB=1)
        return self.node("Conv", name, inputs, out=out, **_window(layer.operation))

    def fold(self, layer: Layer, batch_norm: Layer | None) -> _Folded:
        """Return weights and bias of a layer with its BatchNorm folded in; float64 inside."""
        outputs = layer.out_shape[0]
        weight = self.tensor(f"{layer.name}.weight", layer.weight_shape)
        has_bias = f"{layer.name}.bias" in layer.tensors
        bias_O = self.tensor(f"{layer.name}.bias", (outputs,)).astype(np.float64) if has_bias else None
        gain_O = np.ones(outputs)
        if batch_norm is not None:
            gamma_O, beta_O, mean_O, var_O = (value.astype(np.float64) for value in self.norm_parts(batch_norm))
            assert isinstance(batch_norm.operation, BatchNorm)
            gain_O = gamma_O / np.sqrt(var_O + batch_norm.operation.eps)
            bias_O = beta_O + ((bias_O if bias_O is not None else 0.0) - mean_O) * gain_O
        per_channel = (-1, *[1] * (weight.ndim - 1))
        quantizer = self.weights.get(layer.name)
        if quantizer is None:
            return _Folded(weight.astype(np.float64) * gain_O.reshape(per_channel), None, bias_O)
        assert quantizer.scale is not None
        integers = weight_integers(weight, quantizer)
        scale_O = (np.asarray(quantizer.scale, np.float64) * np.abs(gain_O)).astype(self.float_dtype)
        dead_O = scale_O == 0  # gamma is 0, or so small that the file's float type has no number for the scale
        sign_O = np.where(dead_O, 0, np.sign(gain_O)).astype(np.int8)
        # A scale must be positive even where the integers are 0, and no coarser than its neighbours': a runtime that
        # stores the bias as an integer rounds it to this step.
        live_O = scale_O[~dead_O]
        of_dead = live_O.min() if live_O.size else max(np.asarray(quantizer.scale).min(), np.finfo(self.float_dtype).tiny)
        scale_O = np.where(dead_O, of_dead, scale_O)
        return _Folded(integers * sign_O.reshape(per_channel), scale_O, bias_O)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Array:
        """Return a tensor of the checkpoint, checked."""
        if name not in self.tensors:
            raise CheckpointError(f"the tensor {name} is missing", where=name, remedy="load the checkpoint it belongs to")
        array = np.asarray(self.tensors[name])
        if array.shape != shape:
            raise CheckpointError(
                f"{name} has shape {array.shape}, the network needs {shape}", where=name, remedy="spec and tensors do not match"
            )
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{name} holds NaN or infinity", where=name, remedy="the training diverged: train with a lower rate"
            )
        return array

    def norm_parts(self, layer: Layer) -> list[Array]:
        """Return scale, shift, mean and variance of a BatchNorm; 1 and 0 where it has no scale or shift."""
        shape = (layer.out_shape[0],)
        absent = {"weight": np.ones(shape, np.float32), "bias": np.zeros(shape, np.float32)}
        parts = [
            self.tensor(f"{layer.name}.{part}", shape) if f"{layer.name}.{part}" in layer.tensors else absent[part]
            for part in ("weight", "bias", "running_mean", "running_var")
        ]
        if (parts[3] < 0).any():
            raise CheckpointError("a variance is negative", where=f"{layer.name}.running_var", remedy="the file is damaged")
        return parts

    def made(self, layer: Layer, norm: Layer | None, source: ir.Value) -> ir.Value:
        """Append a layer (and the BatchNorm folded into it); return its output."""
        name = layer.name
        inputs = [self.values[i] for i in layer.inputs]
        match layer.operation:
            case Input():
                return self.node("Cast", f"{INPUT}.half", [source], to=ir.DataType.FLOAT16) if self.half else source
            case Conv() | Linear():
                return self.weighted(layer, norm)
            case BatchNorm() if self.quantization is not None:
                return self.normalised(layer, inputs[0])
            case BatchNorm() as op:
                parts = ("weight", "bias", "running_mean", "running_var")
                held = [self.floats(f"{name}.{p}", v) for p, v in zip(parts, self.norm_parts(layer), strict=True)]
                return self.node("BatchNormalization", name, [*inputs, *held], epsilon=op.eps)
            case GroupNorm() as op:
                return self.group_norm(layer, op, inputs[0])
            case Affine():
                return self.affine(layer, inputs[0], name)
            case Relu():
                return self.node("Relu", name, inputs)
            case Clip() as op:
                bounds = [self.floats(f"{name}.{end}", np.asarray(v)) for end, v in (("low", op.low), ("high", op.high))]
                return self.node("Clip", name, [*inputs, *bounds])
            case LeakyRelu() as op:
                return self.node("LeakyRelu", name, inputs, alpha=op.slope)
            case Elu() as op:
                return self.node("Elu", name, inputs, alpha=op.alpha)
            case PRelu():
                slopes = self.tensor(f"{name}.weight", layer.weight_shape)
                slope = self.floats(f"{name}.weight", slopes.reshape(-1, *[1] * (len(layer.out_shape) - 1)))
                return self.node("PRelu", name, [*inputs, slope])
            case Silu():
                gate = self.node("Sigmoid", f"{name}.gate", inputs)
                return self.node("Mul", name, [inputs[0], gate])
            case HardSwish():
                gate = self.node("HardSigmoid", f"{name}.gate", inputs, alpha=1.0 / 6.0, beta=0.5)
                return self.node("Mul", name, [inputs[0], gate])
            case Gelu() as op:
                return self.gelu(name, inputs[0], tanh=op.tanh)
            case HardSigmoid() as op:
                return self.node("HardSigmoid", name, inputs, alpha=op.alpha, beta=op.beta)
            case Sigmoid():
                return self.node("Sigmoid", name, inputs)
            case Tanh():
                return self.node("Tanh", name, inputs)
            case Softmax():
                return self.node("Softmax", name, inputs, axis=1)
            case Add():
                return self.node("Add", name, inputs)
            case Multiply():
                if len(layer.in_shapes[1]) < len(layer.in_shapes[0]):
                    axes = self.constant("axes", np.asarray([2, 3], np.int64))
                    inputs[1] = self.node("Unsqueeze", f"{name}.gate", [inputs[1], axes])
                return self.node("Mul", name, inputs)
            case Concat():
                return self.node("Concat", name, inputs, axis=1)
            case MaxPool() as op:
                dilated: dict[str, Any] = {"dilations": list(op.dilation)} if op.dilation != (1, 1) else {}
                pads = _covering(op, layer, op.dilation)
                return self.node(
                    "MaxPool", name, inputs, kernel_shape=list(op.kernel), strides=list(op.stride), pads=pads, **dilated
                )
            case AvgPool() as op:
                return self.avg_pool(layer, op, inputs[0])
            case GlobalPool() as op:
                return self.global_pool(layer, op, inputs[0])
            case ChannelSelect() as op:
                return self.channel_select(layer, op, inputs[0])
            case ChannelConv() as op:
                return self.channel_conv(layer, op, inputs[0])
            case Pad() as op:
                top, left, bottom, right = op.pads
                pads_of = self.constant(f"{name}.pads", np.asarray([0, 0, top, left, 0, 0, bottom, right], np.int64))
                filled = [self.floats(f"{name}.value", np.asarray(op.value))] if op.mode == "constant" and op.value else []
                return self.node("Pad", name, [*inputs, pads_of, *filled], mode=op.mode)
            case Flatten():
                return self.node("Flatten", name, inputs, axis=1)
            case Dropout():
                return inputs[0]
            case Resize() as op:
                return self.resize(layer, op, inputs[0])
            case never:
                assert_never(never)

    def affine(self, layer: Layer, x: ir.Value, name: str) -> ir.Value:
        """Append a factor and, where there is one, a summand per channel."""
        shape = (-1, *[1] * (len(layer.out_shape) - 1))
        parts = [part for part in ("weight", "bias") if f"{layer.name}.{part}" in layer.tensors]
        for part, op_type in zip(parts, ("Mul", "Add"), strict=False):
            value = self.tensor(f"{layer.name}.{part}", layer.out_shape[:1]).reshape(shape)
            called = name if part == parts[-1] else f"{name}.scaled"
            x = self.node(op_type, called, [x, self.floats(f"{layer.name}.{part}", value)])
        return x

    def normalised(self, layer: Layer, x: ir.Value) -> ir.Value:
        """Append a BatchNorm of its own as one factor and one summand: every runtime rounds these two alike."""
        assert isinstance(layer.operation, BatchNorm)
        gamma_O, beta_O, mean_O, var_O = (value.astype(np.float64) for value in self.norm_parts(layer))
        gain_O = gamma_O / np.sqrt(var_O + layer.operation.eps)
        shape = (-1, *[1] * (len(layer.out_shape) - 1))
        factor, summand = gain_O.reshape(shape), (beta_O - mean_O * gain_O).reshape(shape)
        scaled = self.node("Mul", f"{layer.name}.scaled", [x, self.floats(f"{layer.name}.factor", factor)])
        return self.node("Add", layer.name, [scaled, self.floats(f"{layer.name}.summand", summand)])

    def group_norm(self, layer: Layer, op: GroupNorm, x: ir.Value) -> ir.Value:
        """Append a GroupNorm as an InstanceNormalization of groups, which every opset and runtime has."""
        name = layer.name
        apart = self.constant(f"{name}.apart", np.asarray([0, op.groups, -1], np.int64))
        whole = self.constant(f"{name}.whole", np.asarray([0, *layer.out_shape], np.int64))
        rows = self.node("Reshape", f"{name}.rows", [x, apart])
        ones, zeros = (self.floats(f"{name}.{k}", np.full(op.groups, v)) for k, v in (("ones", 1.0), ("zeros", 0.0)))
        normed = self.node("InstanceNormalization", f"{name}.normed", [rows, ones, zeros], epsilon=op.eps)
        back = self.node("Reshape", f"{name}.back" if op.affine else name, [normed, whole])
        return self.affine(layer, back, name)

    def gelu(self, name: str, x: ir.Value, *, tanh: bool) -> ir.Value:
        """Append a GELU in operators that every opset has: ``x * (0.5 + 0.5 * f(...))``."""

        def number(key: str, value: float) -> ir.Value:
            return self.floats(f"gelu.{key}", np.asarray(value))

        half = number("half", 0.5)
        if tanh:
            square = self.node("Mul", f"{name}.square", [x, x])
            small = self.node("Mul", f"{name}.small", [square, number("cubic", 0.044715 * (2 / np.pi) ** 0.5)])
            factor = self.node("Add", f"{name}.factor", [small, number("linear", (2 / np.pi) ** 0.5)])
            inner = self.node("Tanh", f"{name}.tanh", [self.node("Mul", f"{name}.inner", [x, factor])])
        else:
            inner = self.node("Erf", f"{name}.erf", [self.node("Mul", f"{name}.inner", [x, number("root", 0.5**0.5)])])
        gate = self.node("Add", f"{name}.gate", [self.node("Mul", f"{name}.halved", [inner, half]), half])
        return self.node("Mul", name, [x, gate])

    def avg_pool(self, layer: Layer, op: AvgPool, x: ir.Value) -> ir.Value:
        """Append an average pool.

        Ceil mode is written as uncounted rows and columns at the end: equal in every opset and runtime, which ceil_mode is
        not (its divisor at the border changed in opset 19).
        """
        name = layer.name
        pads = _covering(op, layer, (1, 1))
        if op.count_pads and any(op.pads) and pads != list(op.pads):  # zeros that count, and a border that does not
            top, left, bottom, right = op.pads
            zeros = self.constant(f"{name}.pads", np.asarray([0, 0, top, left, 0, 0, bottom, right], np.int64))
            x = self.node("Pad", f"{name}.pad", [x, zeros])
            pads = [0, 0, pads[2] - bottom, pads[3] - right]
            counted = 0
        else:
            counted = int(op.count_pads and any(op.pads))
        odd: dict[str, Any] = {"pads": pads, "count_include_pad": counted} if any(pads) else {}
        return self.node("AveragePool", name, [x], kernel_shape=list(op.kernel), strides=list(op.stride), **odd)

    def global_pool(self, layer: Layer, op: GlobalPool, x: ir.Value) -> ir.Value:
        """Append a global pool."""
        name = layer.name
        out = name if op.keep else f"{name}.pooled"
        match op.kind:
            case "avg" | "max":
                pooled = self.node({"avg": "GlobalAveragePool", "max": "GlobalMaxPool"}[op.kind], name, [x], out=out)
            case "max_avg":  # joined along the height, so that a channel's two features end up side by side
                parts = [
                    self.node("GlobalMaxPool", f"{name}.max", [x], out=f"{name}.maximum"),
                    self.node("GlobalAveragePool", f"{name}.avg", [x], out=f"{name}.mean"),
                ]
                pooled = self.node("Concat", f"{name}.concat", parts, out=f"{name}.pooled", axis=2)
                if op.keep:
                    shape = self.constant(f"{name}.shape", np.asarray([0, -1, 1, 1], np.int64))
                    return self.node("Reshape", f"{name}.reshape", [pooled, shape], out=name)
        return pooled if op.keep else self.node("Flatten", f"{name}.flatten", [pooled], out=name, axis=1)

    def resize(self, layer: Layer, op: Resize, x: ir.Value) -> ir.Value:
        """Append a resize to a fixed height and width."""
        name = layer.name
        channels_up = np.asarray([layer.out_shape[0], *op.size], np.int64)
        if self.options.batch == "dynamic":
            zero, one = (self.constant(f"resize.{n}", np.asarray([n], np.int64)) for n in (0, 1))
            count = self.node("Slice", f"{name}.count", [self.node("Shape", f"{name}.shape", [x]), zero, one])
            sizes = self.node("Concat", f"{name}.sizes", [count, self.constant(f"{name}.size", channels_up)], axis=0)
        else:
            sizes = self.constant(f"{name}.size", np.asarray([self.options.batch, *channels_up], np.int64))
        where = "asymmetric" if op.mode == "nearest" else "align_corners" if op.align_corners else "half_pixel"
        attributes = {"nearest_mode": "floor"} if op.mode == "nearest" else {}
        mode = "nearest" if op.mode == "nearest" else "linear"
        inputs = [x, None, None, sizes]
        return self.node("Resize", name, inputs, mode=mode, coordinate_transformation_mode=where, **attributes)

    def channel_select(self, layer: Layer, op: ChannelSelect, x: ir.Value) -> ir.Value:
        """Append subsampling (Slice), the choice of channels (Gather) and zero channels (Pad), each only where needed."""
        name, wanted = layer.name, list(op.channels)
        if max(op.stride) > 1 and len(layer.in_shape) == 3:
            ends = np.asarray(layer.in_shape[1:], np.int64)
            x = self.node(
                "Slice",
                f"{name}.slice",
                [
                    x,
                    self.constant("zeros", np.zeros(2, np.int64)),
                    self.constant(f"{name}.ends", ends),
                    self.constant("axes", np.asarray([2, 3], np.int64)),
                    self.constant(f"{name}.steps", np.asarray(op.stride, np.int64)),
                ],
            )
        kept = [c for c in wanted if c >= 0]
        front = next((i for i, c in enumerate(wanted) if c >= 0), len(wanted))
        back = len(wanted) - front - len(kept)
        scattered = -1 in wanted[front : len(wanted) - back] or not kept
        if scattered:  # zeros between channels: add one zero channel, then gather it wherever a zero is wanted
            x = self.pad_channels(f"{name}.pad", x, 0, 1, len(layer.in_shape))
            kept = [c if c >= 0 else layer.in_shape[0] for c in wanted]
        if scattered or kept != list(range(layer.in_shape[0])):
            x = self.node("Gather", f"{name}.gather", [x, self.constant(f"{name}.map", np.asarray(kept, np.int64))], axis=1)
        if not scattered and (front or back):
            x = self.pad_channels(f"{name}.pad", x, front, back, len(layer.in_shape))
        if x is self.values[layer.inputs[0]]:
            return x
        x.name = name
        return x

    def channel_conv(self, layer: Layer, op: ChannelConv, x: ir.Value) -> ir.Value:
        """Append a one-dimensional convolution over the channels of a vector, each at its place in a line of zeros."""
        name, whole = layer.name, op.places == tuple(range(op.length))
        if not whole:
            index = np.full(op.length, len(op.places), np.int64)
            index[list(op.places)] = np.arange(len(op.places))
            padded = self.pad_channels(f"{name}.pad", x, 0, 1, 1)
            x = self.node("Gather", f"{name}.line", [padded, self.constant(f"{name}.map", index)], axis=1)
        axis = self.constant("axis", np.asarray([1], np.int64))
        parts = [
            self.floats(f"{name}.{part}", self.tensor(f"{name}.{part}", shape))
            for part, shape in op.parameters(layer.in_shapes).items()
        ]
        row = self.node("Unsqueeze", f"{name}.row", [x, axis])
        made = self.node("Conv", name, [row, *parts], out=f"{name}.made", kernel_shape=[op.kernel], pads=[op.kernel // 2] * 2)
        flat = self.node("Squeeze", f"{name}.flat", [made, axis], out=name if whole else f"{name}.flat")
        if whole:
            return flat
        places = self.constant(f"{name}.places", np.asarray(op.places, np.int64))
        return self.node("Gather", f"{name}.chosen", [flat, places], out=name, axis=1)

    def pad_channels(self, name: str, x: ir.Value, front: int, back: int, axes: int) -> ir.Value:
        """Append zero channels before and after, to a map (3 axes) or a vector (1)."""
        rest = [0] * (axes - 1)
        pads = self.constant(f"{name}.pads", np.asarray([0, front, *rest, 0, back, *rest], np.int64))
        return self.node("Pad", name, [x, pads])


def _window(op: Conv) -> dict[str, Any]:
    """Return the attributes of a convolution, those that are not the default."""
    attributes: dict[str, Any] = {"kernel_shape": list(op.kernel)}
    if any(op.pads):
        attributes["pads"] = list(op.pads)
    if max(op.stride) > 1:
        attributes["strides"] = list(op.stride)
    if op.groups > 1:
        attributes["group"] = op.groups
    if max(op.dilation) > 1:
        attributes["dilations"] = list(op.dilation)
    return attributes


def _covering(op: MaxPool | AvgPool, layer: Layer, dilation: tuple[int, int]) -> list[int]:
    """Return the padding with which the windows in floor mode are those of the pool."""
    pads = list(op.pads)
    for axis in (0, 1):
        span = (layer.out_shape[1 + axis] - 1) * op.stride[axis] + dilation[axis] * (op.kernel[axis] - 1) + 1
        pads[axis + 2] = max(pads[axis + 2], span - layer.in_shape[1 + axis] - pads[axis])
    return pads
