"""Where a network is quantized: placement as data, one list per profile, read off the layer walk.

A quantizer is keyed by the tensor it rounds (activations) or by the layer whose weight it rounds. Placement is a pure
function of spec and profile; calibration and training fill in the scales; the ONNX writer emits exactly this list.

Conventions of every profile: weights symmetric, per output channel, int8 in [-127, 127], zero point 0; activations per
tensor, zero point 0, so that ``real = integer * scale``.

Profiles:

* ``tensorrt``: activations signed, [-128, 127]; of the two inputs of a residual Add only the skip is rounded, so that
  Conv+Add+ReLU fuses into one INT8 kernel (NVIDIA TensorRT, tools/tensorflow-quantization/docs/add_custom_qdq_cases.md).
* ``openvino``: activations after ReLU unsigned, [0, 255], and both inputs of an Add are rounded: what OpenVINO's CPU
  plugin fuses best.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rescompress.core.layers import Layer, walk
from rescompress.core.spec import Frozen, ModelSpec

Profile = Literal["tensorrt", "openvino"]
PROFILES: tuple[Profile, ...] = ("tensorrt", "openvino")

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
    """

    tensor: str
    kind: Literal["activation", "weight"]
    low: int
    high: int
    scale: tuple[float, ...] | None = None

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
        profile: The runtime family the placement is for.
        quantizers: In order of computation; a layer's weight follows the activations it reads.
        method: How the scales came about: ``ptq`` or ``qat``.
    """

    profile: Profile
    quantizers: tuple[Quantizer, ...] = Field(min_length=1)
    method: Literal["ptq", "qat"] = "ptq"

    def activation(self, tensor: str) -> Quantizer | None:
        """Return the quantizer of the activation `tensor`, or None."""
        return next((q for q in self.quantizers if q.kind == "activation" and q.tensor == tensor), None)

    def weight(self, layer: str) -> Quantizer | None:
        """Return the quantizer of the weight of `layer`, or None."""
        return next((q for q in self.quantizers if q.kind == "weight" and q.tensor == layer), None)

    def check(self, spec: ModelSpec) -> None:
        """Raise ValueError unless every quantizer has scales of the right number and belongs to a layer of `spec`."""
        layers = {layer.name: layer for layer in walk(spec)}
        for q in self.quantizers:
            if q.tensor not in layers:
                raise ValueError(f"quantizer for {q.tensor}, which this network does not have")
            if q.scale is None:
                raise ValueError(f"the {q.kind} quantizer of {q.tensor} has no scale")
            if q.kind == "weight" and len(q.scale) != layers[q.tensor].out_shape[0]:
                raise ValueError(f"{len(q.scale)} scales for the {layers[q.tensor].out_shape[0]} channels of {q.tensor}")


def _unsigned(tensor: str, by_name: dict[str, Layer]) -> bool:
    """Whether `tensor` cannot be negative: it comes from a ReLU, perhaps through pooling or a pad shortcut."""
    layer = by_name[tensor]
    while layer.op in ("max_pool", "avg_pool", "global_pool", "pad_shortcut", "dropout"):
        layer = by_name[layer.inputs[0]]
    return layer.op == "relu"


def place(spec: ModelSpec, profile: Profile, *, keep_float: frozenset[str] = frozenset()) -> tuple[Quantizer, ...]:
    """Return every quantizer that `profile` wants for `spec`, without scales.

    Args:
        spec: The network.
        profile: The runtime family.
        keep_float: Convolution and linear layers to leave in floating point.
    """
    layers = walk(spec)
    by_name = {layer.name: layer for layer in layers}
    placed: dict[tuple[str, str], Quantizer] = {}

    def activation(tensor: str) -> None:
        while by_name[tensor].op == "dropout":
            tensor = by_name[tensor].inputs[0]
        unsigned = profile == "openvino" and _unsigned(tensor, by_name)
        low, high = (0, 255) if unsigned else (-128, 127)
        placed.setdefault(("activation", tensor), Quantizer(tensor=tensor, kind="activation", low=low, high=high))

    for layer in layers:
        if layer.op in ("conv", "linear") and layer.name not in keep_float:
            activation(layer.inputs[0])
            low, high = WEIGHT_LEVELS
            placed["weight", layer.name] = Quantizer(tensor=layer.name, kind="weight", low=low, high=high)
        elif layer.op == "add":
            main, skip = layer.inputs
            activation(skip)
            if profile == "openvino":
                activation(main)
    return tuple(placed.values())
