"""Where a network is quantized: placement as data, one list per profile, read off the layer walk.

A quantizer is keyed by the tensor it rounds (activations) or by the layer whose weight it rounds. Placement is a pure
function of spec and profile; calibration and training fill in the scales; the ONNX writer emits exactly this list.

Conventions of every profile: weights symmetric, per output channel, int8 in [-127, 127], zero point 0; activations per
tensor, zero point 0, so that ``real = integer * scale``. Every scale is a float32 number. The integer of a weight is, in
float32 arithmetic with halves to even, ``clamp(rint(weight * (1 / scale)), low, high)``: a multiplication by the
reciprocal, as torch's fused fake-quantize kernels do it, because a division rounds differently for one weight in some
100,000. Whoever writes integers must compute them so.

What the places are: the input of every convolution and linear layer, the input of global average pooling, and the skip
input of every residual Add. All consumers of a tensor share its quantizer. A pad shortcut's output is rounded with the
scale of the tensor it copies from (`Quantizer.shares`), so that this second rounding changes nothing.

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
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from rescompress.core.choices import Mode
from rescompress.core.choices import Profile as Profile
from rescompress.core.layers import GLOBAL_POOLS, Layer, walk
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

    def keep_float(self, spec: ModelSpec) -> frozenset[str]:
        """Return the convolution and linear layers of `spec` that stay in floating point."""
        weights = {q.tensor for q in self.quantizers if q.kind == "weight"}
        return frozenset(layer.name for layer in walk(spec) if layer.op in ("conv", "linear")) - weights

    def check(self, spec: ModelSpec) -> None:
        """Raise ValueError unless the quantizers are those of the profile for `spec`, all with scales that fit."""
        layers = {layer.name: layer for layer in walk(spec)}
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


def _unsigned(tensor: str, by_name: dict[str, Layer]) -> bool:
    """Whether `tensor` cannot be negative: it comes from a ReLU, perhaps through pooling or a pad shortcut."""
    layer = by_name[tensor]
    while layer.op in ("max_pool", "avg_pool", *GLOBAL_POOLS, "pad_shortcut", "dropout"):
        layer = by_name[layer.inputs[0]]
    return layer.op == "relu"


def place(spec: ModelSpec, profile: Profile, *, keep_float: frozenset[str] = frozenset()) -> tuple[Quantizer, ...]:
    """Return every quantizer that `profile` wants for `spec`, without scales, in the order of computation.

    Args:
        spec: The network.
        profile: The runtime.
        keep_float: Convolution and linear layers to leave in floating point. An Add whose main branch ends in such a
            layer runs in floating point too, so its skip is rounded only where another layer wants it.

    Raises:
        ValueError: `keep_float` names no convolution or linear layer of the network, or all of them.
    """
    rules = _RULES[profile]
    layers = walk(spec)
    by_name = {layer.name: layer for layer in layers}
    weighted = {layer.name for layer in layers if layer.op in ("conv", "linear")}
    if unknown := keep_float - weighted:
        raise ValueError(f"no convolution or linear layer: {', '.join(sorted(unknown))}")
    if keep_float == weighted:
        raise ValueError("every layer stays in floating point: nothing is left to quantize")
    weights: set[str] = set()
    placed: dict[str, Quantizer] = {}

    def activation(tensor: str) -> None:
        while by_name[tensor].op == "dropout":
            tensor = by_name[tensor].inputs[0]
        low, high = (0, 255) if rules.unsigned and _unsigned(tensor, by_name) else (-128, 127)
        source = by_name[tensor].inputs[0] if by_name[tensor].op == "pad_shortcut" else None
        shares = source if source in placed else None
        placed.setdefault(tensor, Quantizer(tensor=tensor, kind="activation", low=low, high=high, shares=shares))

    def int8_sum(add: Layer) -> bool:
        conv = add.inputs[0]
        return (by_name[conv].inputs[0] if by_name[conv].op == "batch_norm" else conv) not in keep_float

    for layer in layers:
        if layer.op in ("conv", "linear") and layer.name not in keep_float:
            activation(layer.inputs[0])
            weights.add(layer.name)
        elif layer.op == "add" and int8_sum(layer):
            main, skip = layer.inputs
            activation(skip)
            if rules.main_branch:
                activation(main)
        elif layer.op in GLOBAL_POOLS and int8_sum(by_name[by_name[layer.inputs[0]].inputs[0]]):
            activation(layer.inputs[0])

    low, high = WEIGHT_LEVELS
    ordered: list[Quantizer] = []
    for layer in layers:
        if layer.name in weights:
            ordered.append(Quantizer(tensor=layer.name, kind="weight", low=low, high=high))
        if layer.name in placed:
            ordered.append(placed[layer.name])
    return tuple(ordered)
