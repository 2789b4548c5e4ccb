"""Where a network is quantized: placement as data, one list per profile, read off the layer walk.

A quantizer is keyed by the tensor it rounds (activations) or by the layer whose weight it rounds. Placement is a pure
function of spec and profile; calibration and training fill in the scales; the ONNX writer emits exactly this list.

Conventions of every profile: weights symmetric, per output channel, int8 in [-127, 127], zero point 0; activations per
tensor, zero point 0, so that ``real = integer * scale``. Every scale is a float32 number. The integer of a weight is, in
float32 arithmetic with halves to even, ``clamp(rint(weight * (1 / scale)), low, high)``: a multiplication by the
reciprocal, as torch's fused fake-quantize kernels do it, because a division rounds differently for one weight in some
100,000. Whoever writes integers must compute them so.

What the places are: the input of every convolution and linear layer, the input of global pooling behind an INT8 layer, and
of every Add that a convolution's end goes into, the other input. All consumers of a tensor share its quantizer. A channel
selection's or flattening's output is rounded with the scale of the tensor it copies from (`Quantizer.shares`), so that this
second rounding changes nothing. Everything else (GroupNorm, SiLU, softmax, gates, sums of no convolution) stays in floating
point, and `float_operations` says so.

Profiles, one per runtime (decision 0035):

* ``tensorrt``: activations signed, [-128, 127]; of the two inputs of a residual Add only the skip is rounded, so that
  Conv+Add+ReLU fuses into one INT8 kernel (NVIDIA TensorRT, tools/tensorflow-quantization/docs/add_custom_qdq_cases.md).
* ``openvino``: activations after ReLU unsigned, [0, 255]; of an Add only the skip is rounded. OpenVINO's CPU plugin fuses
  convolution, Add and ReLU, and computes the file's integers exactly; a rounding between the two it would leave out.
* ``onnxruntime``: activations after ReLU unsigned, and both inputs of an Add rounded: onnxruntime computes a convolution
  in integers only where its output is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, Self, assert_never

from pydantic import Field, model_validator

from rescompress.core.choices import Mode
from rescompress.core.choices import Profile as Profile
from rescompress.core.graph import Layer, Network, summand, weighted_end
from rescompress.core.operations import (
    ACTIVATIONS,
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
    Operation,
    Pad,
    PRelu,
    Relu,
    Resize,
    Sigmoid,
    Silu,
    Softmax,
    Tanh,
    Weighted,
)
from rescompress.core.recipe import network_of
from rescompress.core.spec import Frozen, ModelSpec


class _Rules(NamedTuple):
    """What one profile wants.

    Attributes:
        unsigned: Activations that cannot be negative have the levels 0..255.
        main_branch: The end of the main branch is rounded in front of a residual Add, not only the skip.
    """

    unsigned: bool
    main_branch: bool


_RULES: Mapping[Profile, _Rules] = MappingProxyType(
    {
        "tensorrt": _Rules(unsigned=False, main_branch=False),
        "openvino": _Rules(unsigned=True, main_branch=False),
        "onnxruntime": _Rules(unsigned=True, main_branch=True),
    }
)
PROFILES: tuple[Profile, ...] = tuple(_RULES)

WEIGHT_LEVELS = (-127, 127)


class Quantizer(Frozen):
    """One place where values are rounded to 8 bits.

    Attributes:
        tensor: Name of the activation tensor, or of the layer whose weight is meant.
        kind: What is rounded.
        low: Smallest integer.
        high: Largest integer.
        scale: Real value of one integer step: one number for an activation, one per output channel for a weight; None
            before calibration.
        shares: For an activation whose values are copies of another quantized tensor's: the name of that tensor. Both
            always have one scale, and this quantizer's rounding is the identity.
    """

    tensor: str
    kind: Literal["activation", "weight"]
    low: int
    high: int
    scale: tuple[float, ...] | None = None
    shares: str | None = None

    @property
    def signed(self) -> bool:
        """Whether the integers are int8 rather than uint8."""
        return self.low < 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.scale is not None:
            if self.kind == "activation" and len(self.scale) != 1:
                raise ValueError(f"activation {self.tensor} has {len(self.scale)} scales instead of one")
            if not all(0.0 < s < float("inf") for s in self.scale):
                raise ValueError(f"{self.kind} {self.tensor} has a scale that is not a positive finite number")
        return self


class Quantization(Frozen):
    """Every quantizer of a network, with its scales.

    Attributes:
        profile: The runtime the placement is for.
        quantizers: In order of computation; a layer's weight follows the activations it reads and precedes its output.
        method: How the scales came about: ``ptq`` or ``qat``.
    """

    profile: Profile
    quantizers: tuple[Quantizer, ...] = Field(min_length=1)
    method: Mode = "ptq"

    def activation(self, tensor: str) -> Quantizer | None:
        """Return the quantizer of the activation `tensor`, or None."""
        return next((q for q in self.quantizers if q.kind == "activation" and q.tensor == tensor), None)

    def weight(self, layer: str) -> Quantizer | None:
        """Return the quantizer of the weight of `layer`, or None."""
        return next((q for q in self.quantizers if q.kind == "weight" and q.tensor == layer), None)

    @property
    def scaled(self) -> bool:
        """Whether every quantizer has its scale."""
        return all(q.scale is not None for q in self.quantizers)

    def keep_float(self, spec: ModelSpec | Network) -> frozenset[str]:
        """Return the convolution and linear layers of `spec` that stay in floating point."""
        weights = {q.tensor for q in self.quantizers if q.kind == "weight"}
        return frozenset(layer.name for layer in network_of(spec).layers if isinstance(layer.operation, Weighted)) - weights

    def check(self, spec: ModelSpec | Network) -> None:
        """Raise ValueError unless the quantizers are those of the profile for `spec`, all with scales that fit."""
        layers = network_of(spec).by_name
        by_key = {(q.kind, q.tensor): q for q in self.quantizers}
        if len(by_key) != len(self.quantizers):
            raise ValueError("a tensor has two quantizers")
        for q in self.quantizers:
            if q.tensor not in layers:
                raise ValueError(f"quantizer for {q.tensor}, which this network does not have")
            if q.scale is None:
                raise ValueError(f"the {q.kind} quantizer of {q.tensor} has no scale")
            if q.kind == "weight" and len(q.scale) != layers[q.tensor].out_shape[0]:
                raise ValueError(f"{len(q.scale)} scales for the {layers[q.tensor].out_shape[0]} channels of {q.tensor}")
            if q.shares is not None and (source := by_key.get(("activation", q.shares))) and source.scale != q.scale:
                raise ValueError(f"the scale of {q.tensor} is not that of {q.shares}, which it copies")
        wanted = {q.model_copy(update={"scale": None}) for q in place(spec, self.profile, keep_float=self.keep_float(spec))}
        found = {q.model_copy(update={"scale": None}) for q in self.quantizers}
        if wanted != found:
            names = sorted({q.tensor for q in wanted ^ found})
            raise ValueError(f"not the placement of profile {self.profile} for this network: {', '.join(names)}")


def place(spec: ModelSpec | Network, profile: Profile, *, keep_float: frozenset[str] = frozenset()) -> tuple[Quantizer, ...]:
    """Return every quantizer that `profile` wants for a network, without scales, in the order of computation.

    Args:
        spec: The network.
        profile: The runtime.
        keep_float: Convolution and linear layers to leave in floating point. An Add whose main branch ends in such a
            layer runs in floating point too, so its skip is rounded only where another layer wants it.

    Raises:
        ValueError: `keep_float` names no convolution or linear layer of the network, or all of them.
    """
    rules = _RULES[profile]
    network = network_of(spec)
    by_name = network.by_name
    weighted = {layer.name for layer in network.layers if isinstance(layer.operation, Weighted)}
    if unknown := keep_float - weighted:
        raise ValueError(f"no convolution or linear layer: {', '.join(sorted(unknown))}")
    if keep_float == weighted:
        raise ValueError("every layer stays in floating point: nothing is left to quantize")
    weights: set[str] = set()
    placed: dict[str, Quantizer] = {}

    def activation(tensor: str) -> None:
        tensor = rounded_at(tensor, network)
        low, high = (0, 255) if rules.unsigned and network.non_negative(tensor) else (-128, 127)
        copies = isinstance(by_name[tensor].operation, ChannelSelect | Flatten)
        source = rounded_at(by_name[tensor].inputs[0], network) if copies else None
        shares = placed[source].shares or source if source in placed else None
        placed.setdefault(tensor, Quantizer(tensor=tensor, kind="activation", low=low, high=high, shares=shares))

    def int8_sum(add: Layer) -> str | None:
        """Return the end of the main branch of an Add that is computed in INT8."""
        main = summand(add, network)
        maker = weighted_end(main, network) if main is not None else None
        return main if maker is not None and maker.name not in keep_float else None

    def int8_end(tensor: str) -> bool:
        """Whether an INT8 layer makes a tensor, perhaps through an Add and activations."""
        layer = by_name[tensor]
        while isinstance(layer.operation, (*ACTIVATIONS, BatchNorm, Dropout)):
            layer = by_name[layer.inputs[0]]
        if isinstance(layer.operation, Add):
            return int8_sum(layer) is not None
        return isinstance(layer.operation, Weighted) and layer.name not in keep_float

    for layer in network.layers:
        if isinstance(layer.operation, Weighted) and layer.name not in keep_float:
            activation(layer.inputs[0])
            weights.add(layer.name)
        elif isinstance(layer.operation, Add) and (main := int8_sum(layer)) is not None:
            activation(layer.inputs[1] if main == layer.inputs[0] else layer.inputs[0])
            if rules.main_branch:
                activation(main)
        elif isinstance(layer.operation, GlobalPool) and int8_end(layer.inputs[0]):
            activation(layer.inputs[0])

    low, high = WEIGHT_LEVELS
    ordered: list[Quantizer] = []
    for layer in network.layers:
        if layer.name in weights:
            ordered.append(Quantizer(tensor=layer.name, kind="weight", low=low, high=high))
        if layer.name in placed:
            ordered.append(placed[layer.name])
    return tuple(ordered)


def rounded_at(tensor: str, network: Network) -> str:
    """Return the tensor that a quantizer of `tensor` rounds: through dropouts, which are nothing, the one they read."""
    layer = network.by_name[tensor]
    while isinstance(layer.operation, Dropout):
        layer = network.by_name[layer.inputs[0]]
    return layer.name


def float_operations(spec: ModelSpec | Network) -> dict[str, int]:
    """Return how many operations of a network stay in floating point in every INT8 file, by what people call them."""
    names = [name for layer in network_of(spec).layers if (name := _float_name(layer.operation)) is not None]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _float_name(op: Operation) -> str | None:
    """Return what an operation that no INT8 file computes in integers is called; None for the others."""
    match op:
        case Conv() | Linear() | BatchNorm() | Relu() | Clip() | Add() | MaxPool() | AvgPool() | GlobalPool() | Input():
            return None
        case ChannelSelect() | Concat() | Flatten() | Dropout() | Pad() | LeakyRelu() | Affine():
            return None
        case GroupNorm():
            return "GroupNorm"
        case ChannelConv():
            return "convolutions over channels"
        case Silu():
            return "SiLU"
        case Gelu():
            return "GELU"
        case HardSwish():
            return "hard-swish"
        case HardSigmoid():
            return "hard-sigmoid"
        case Sigmoid():
            return "sigmoid"
        case Tanh():
            return "tanh"
        case Elu():
            return "ELU"
        case PRelu():
            return "PReLU"
        case Softmax():
            return "softmax"
        case Multiply():
            return "products of two tensors"
        case Resize():
            return "resizing"
        case never:
            assert_never(never)
