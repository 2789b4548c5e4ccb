"""`to_onnx`: the ONNX file of a network, written from spec, tensors and quantizers; nothing is traced.

What the file looks like:

* Nodes carry the names of the walk (``layer1.0.conv1``), and so do tensors: the value called ``layer1.0.bn1`` is what
  the torch model computes under that name. A quantized tensor ``t`` is followed by the nodes ``t.q`` and ``t.dq``, once,
  and everything that reads ``t`` reads ``t.dq``.
* BatchNorm is folded. In a float layer into the weights; in an INT8 layer into the per-channel scales, which is exact:
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
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from rescompress.core.errors import BadInput, CheckpointError
from rescompress.core.layers import INPUT, Layer, walk
from rescompress.core.quantizers import PROFILES, Profile, Quantization, Quantizer
from rescompress.core.spec import ModelSpec, Preprocessing

Precision = Literal["auto", "fp32", "fp16", "int8", "int8+fp16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "fp16", "int8", "int8+fp16")
OPSETS = range(13, 21)
"""Opsets that can be written. 13 is the first with per-channel scales; from 21 on onnxruntime 1.31 moves a quantizer over the
Slice of a pad shortcut, gives it the wrong type, and refuses the file."""
FP16_SCALE_OPSET = 19
"""First opset whose QuantizeLinear takes float16 scales."""
OUTPUT = "logits"

_META_SPEC = "rescompress.spec"
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
    spec: ModelSpec, tensors: Mapping[str, Array], quantization: Quantization | None, options: ExportOptions
) -> onnx.ModelProto:
    """Return the network as an ONNX model with input ``input`` and output ``logits``.

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

    spec: ModelSpec
    profile: Profile | None


def read_metadata(model: onnx.ModelProto) -> ExportedModel | None:
    """Return what `to_onnx` stored in the model, or None where somebody else wrote it.

    Raises:
        BadInput: The metadata is ours but cannot be read.
    """
    props = {p.key: p.value for p in model.metadata_props}
    if _META_SPEC not in props:
        return None
    try:
        stored = json.loads(props[_META_SPEC])
        if not isinstance(stored, dict):
            raise ValueError(f"{_META_SPEC} is no mapping")
        spec = ModelSpec.model_validate(
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
        spec: ModelSpec,
        tensors: Mapping[str, Array],
        quantization: Quantization | None,
        options: ExportOptions,
        *,
        half: bool,
    ) -> None:
        self.spec = spec
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
        layers = walk(self.spec)
        batch_norm_of = {layer.inputs[0]: layer for layer in layers if layer.op == "batch_norm"}
        batch = "N" if self.options.batch == "dynamic" else self.options.batch
        source = ir.Value(name=INPUT, shape=ir.Shape([batch, *self.spec.input_shape]), type=ir.TensorType(ir.DataType.FLOAT))
        # A tensor gets the name of the layer that makes it; the last one is the output, whatever layer makes it.
        last = layers[-1].name
        for layer in layers:
            match layer.op:
                case "input":
                    x = self.node("Cast", f"{INPUT}.half", [source], to=ir.DataType.FLOAT16) if self.half else source
                case "conv" | "linear":
                    x = self.weighted(layer, batch_norm_of.get(layer.name))
                case "batch_norm" | "dropout":
                    self.values[layer.name] = self.values[layer.inputs[0]]
                    continue
                case _:
                    x = self.plain(layer)
            name = batch_norm_of[layer.name].name if layer.name in batch_norm_of else layer.name
            unchanged = bool(layer.inputs) and x is self.values[layer.inputs[0]]  # a pad shortcut that pads nothing
            if name in self.activations and not unchanged:
                x = self.quantized(x, self.activations[name])
            self.values[layer.name] = x
        logits = self.values[last]
        if self.half:
            logits = self.node("Cast", OUTPUT, [logits], to=ir.DataType.FLOAT)
        logits.name = OUTPUT
        out = layers[-1].out_shape
        logits.shape, logits.type = ir.Shape([batch, *out]), ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            [source],
            [logits],
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

    def metadata(self) -> dict[str, str]:
        spec = self.spec.model_dump(mode="json", exclude={"labels", "preprocessing"})
        props = {
            _META_SPEC: json.dumps(spec, separators=(",", ":")),
            _META_PREPROCESSING: self.spec.preprocessing.model_dump_json(),
        }
        if self.spec.labels is not None:
            props[_META_LABELS] = json.dumps(self.spec.labels, separators=(",", ":"), ensure_ascii=False)
        if self.quantization is not None:
            props[_META_PROFILE] = self.quantization.profile
        return props

    # ---- pieces of the graph

    def node(
        self, op_type: str, name: str, inputs: Sequence[ir.Value], *, out: str | None = None, **attributes: Any
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
        if layer.op == "linear":
            return self.node("Gemm", name, inputs, transB=1)
        attributes: dict[str, Any] = {"kernel_shape": [layer.kernel] * 2}
        if layer.padding:
            attributes["pads"] = [layer.padding] * 4
        if layer.stride > 1:
            attributes["strides"] = [layer.stride] * 2
        if layer.groups > 1:
            attributes["group"] = layer.groups
        return self.node("Conv", name, inputs, out=out, **attributes)

    def fold(self, layer: Layer, batch_norm: Layer | None) -> _Folded:
        """Return weights and bias of a layer with its BatchNorm folded in; float64 inside."""
        outputs = layer.out_shape[0]
        weight = self.tensor(f"{layer.name}.weight", layer.weight_shape)
        bias_O = self.tensor(f"{layer.name}.bias", (outputs,)).astype(np.float64) if layer.bias else None
        gain_O = np.ones(outputs)
        if batch_norm is not None:
            n = batch_norm.name
            gamma_O, beta_O, mean_O, var_O = (
                self.tensor(f"{n}.{part}", (outputs,)).astype(np.float64)
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            if (var_O < 0).any():
                raise CheckpointError("a variance is negative", where=f"{n}.running_var", remedy="the file is damaged")
            gain_O = gamma_O / np.sqrt(var_O + batch_norm.eps)
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

    def plain(self, layer: Layer) -> ir.Value:
        """Append a layer without weights."""
        name = layer.name
        inputs = [self.values[i] for i in layer.inputs]
        match layer.op:
            case "relu":
                return self.node("Relu", name, inputs)
            case "add":
                return self.node("Add", name, inputs)
            case "max_pool":
                kernel, stride, pad = [layer.kernel] * 2, [layer.stride] * 2, [layer.padding] * 4
                return self.node("MaxPool", name, inputs, kernel_shape=kernel, strides=stride, pads=pad)
            case "avg_pool":
                # Ceil mode as one uncounted row and column at the end: equal in every opset and runtime, which ceil_mode
                # is not (its divisor at the border changed in opset 19).
                _, h, w = layer.in_shape
                odd: dict[str, Any] = {"pads": [0, 0, h % 2, w % 2], "count_include_pad": 0} if h % 2 or w % 2 else {}
                kernel, stride = [layer.kernel] * 2, [layer.stride] * 2
                return self.node("AveragePool", name, inputs, kernel_shape=kernel, strides=stride, **odd)
            case "global_pool":
                pooled = self.node("GlobalAveragePool", name, inputs, out=f"{name}.pooled")
                return self.node("Flatten", f"{name}.flatten", [pooled], out=name, axis=1)
            case "global_max_avg_pool":  # joined along the height, so that a channel's two features end up side by side
                parts = [
                    self.node("GlobalMaxPool", f"{name}.max", inputs, out=f"{name}.maximum"),
                    self.node("GlobalAveragePool", f"{name}.avg", inputs, out=f"{name}.mean"),
                ]
                pooled = self.node("Concat", f"{name}.concat", parts, out=f"{name}.pooled", axis=2)
                return self.node("Flatten", f"{name}.flatten", [pooled], out=name, axis=1)
            case "pad_shortcut":
                return self.pad_shortcut(layer, inputs[0])
            case _:
                raise AssertionError(layer.op)

    def pad_shortcut(self, layer: Layer, x: ir.Value) -> ir.Value:
        """Append subsampling (Slice), the choice of channels (Gather) and zero channels (Pad), each only where needed."""
        assert layer.channel_map is not None
        name, wanted = layer.name, list(layer.channel_map)
        if layer.stride > 1:
            ends = np.asarray(layer.in_shape[1:], np.int64)
            x = self.node(
                "Slice",
                f"{name}.slice",
                [
                    x,
                    self.constant("zeros", np.zeros(2, np.int64)),
                    self.constant(f"{name}.ends", ends),
                    self.constant("axes", np.asarray([2, 3], np.int64)),
                    self.constant(f"{name}.steps", np.asarray([layer.stride] * 2, np.int64)),
                ],
            )
        kept = [c for c in wanted if c >= 0]
        front = next((i for i, c in enumerate(wanted) if c >= 0), len(wanted))
        back = len(wanted) - front - len(kept)
        scattered = -1 in wanted[front : len(wanted) - back] or not kept
        if scattered:  # zeros between channels: add one zero channel, then gather it wherever a zero is wanted
            x = self.pad_channels(f"{name}.pad", x, 0, 1)
            kept = [c if c >= 0 else layer.in_shape[0] for c in wanted]
        if scattered or kept != list(range(layer.in_shape[0])):
            x = self.node("Gather", f"{name}.gather", [x, self.constant(f"{name}.map", np.asarray(kept, np.int64))], axis=1)
        if not scattered and (front or back):
            x = self.pad_channels(f"{name}.pad", x, front, back)
        if x is self.values[layer.inputs[0]]:
            return x
        x.name = name
        return x

    def pad_channels(self, name: str, x: ir.Value, front: int, back: int) -> ir.Value:
        """Append zero channels before and after."""
        pads = self.constant(f"{name}.pads", np.asarray([0, front, 0, 0, 0, back, 0, 0], np.int64))
        return self.node("Pad", name, [x, pads])
