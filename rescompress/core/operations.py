"""The operations that a network is made of: a closed union of typed, immutable descriptions.

Every operation says in its own class what its attributes are, which tensors it owns (`parameters`), and what shape it
makes of the shapes it reads (`out_shape`). Whoever has to *do* something per operation (the torch model, the ONNX writer,
channel groups, quantizer placement, kernels) holds one exhaustive ``match`` that ends in ``assert_never``: a class added to
`Operation` makes the type checker name each of those places.

Shapes carry no batch: (C, H, W) for a feature map, (C,) for a vector. Pairs are (height, width); paddings are (top, left,
bottom, right), ONNX's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self, assert_never, get_args

from pydantic import Field, model_validator

from rescompress.core.spec import Frozen, Width

Shape = tuple[int, ...]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Size = Annotated[int, Field(ge=0, le=1_000_000)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Epsilon = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Pair = tuple[Count, Count]
Pads = tuple[Size, Size, Size, Size]

ONE: Pair = (1, 1)
NO_PADS: Pads = (0, 0, 0, 0)


class _Operation(Frozen):
    """What every operation answers.

    Attributes:
        op: Which one it is; the key by which JSON tells them apart.
    """

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape it makes of the shapes it reads; by default the first one.

        Raises:
            ValueError: It cannot read these shapes; the message says why.
        """
        return _only(shapes)

    def parameters(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        """Return the shape of every tensor it owns, by the ending of the tensor's name, in torch's order."""
        return {}

    @property
    def constants(self) -> frozenset[str]:
        """Endings of those tensors that no training changes and that count as no parameters."""
        return frozenset()


class Input(_Operation):
    """The network's input; the first node, called ``input``, and no other."""

    op: Literal["input"] = "input"


class Conv(_Operation):
    """A two-dimensional convolution (cross-correlation, as everywhere).

    Attributes:
        width: Output channels.
        kernel: Height and width.
        stride: Per axis.
        pads: Zeros around the input.
        dilation: Per axis.
        groups: Of channels.
        bias: Whether there is a ``.bias``.
        frozen: Whether the weights are constants of the network (a blur in front of down-sampling), not learnt.
    """

    op: Literal["conv"] = "conv"
    width: Width
    kernel: Pair = ONE
    stride: Pair = ONE
    pads: Pads = NO_PADS
    dilation: Pair = ONE
    groups: Count = 1
    bias: bool = False
    frozen: bool = False

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return (width, H', W')."""
        c, h, w = _map(shapes)
        if c % self.groups or self.width % self.groups:
            raise ValueError(f"{c} input and {self.width} output channels are no multiples of its {self.groups} groups")
        return (self.width, *_windows((h, w), self.kernel, self.stride, self.pads, self.dilation, ceil=False))

    def parameters(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        """Return the weight (O, I / groups, KH, KW) and the bias (O)."""
        weight: dict[str, Shape] = {"weight": (self.width, shapes[0][0] // self.groups, *self.kernel)}
        return weight | {"bias": (self.width,)} if self.bias else weight

    @property
    def constants(self) -> frozenset[str]:
        """The weight of a blur."""
        return frozenset({"weight", "bias"}) if self.frozen else frozenset()

    @property
    def square(self) -> bool:
        """Whether kernel, stride and padding are the same on all sides, without dilation."""
        return len({*self.kernel}) == len({*self.stride}) == len({*self.pads}) == 1 and self.dilation == ONE


class BatchNorm(_Operation):
    """BatchNorm with its running statistics: ``(x - running_mean) / sqrt(running_var + eps) * weight + bias``.

    Attributes:
        eps: Epsilon.
        scale: Whether there is a ``.weight``; else it is 1.
        shift: Whether there is a ``.bias``; else it is 0.
        frozen: Whether training leaves statistics, scale and shift alone (torchvision's ``FrozenBatchNorm2d``).
    """

    op: Literal["batch_norm"] = "batch_norm"
    eps: Epsilon = 1e-5
    scale: bool = True
    shift: bool = True
    frozen: bool = False

    def parameters(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        """Return scale, shift, mean and variance, and torch's counter of batches."""
        c = shapes[0][:1]
        learnt = ({"weight": c} if self.scale else {}) | ({"bias": c} if self.shift else {})
        return learnt | {"running_mean": c, "running_var": c, "num_batches_tracked": ()}

    @property
    def constants(self) -> frozenset[str]:
        """The statistics; where it is frozen, all."""
        statistics = {"running_mean", "running_var", "num_batches_tracked"}
        return frozenset(statistics | {"weight", "bias"} if self.frozen else statistics)


class GroupNorm(_Operation):
    """GroupNorm over channel groups and pixels.

    Attributes:
        groups: Of channels.
        eps: Epsilon.
        affine: Whether there are ``.weight`` and ``.bias``.
    """

    op: Literal["group_norm"] = "group_norm"
    groups: Count
    eps: Epsilon = 1e-5
    affine: bool = True

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape it reads."""
        shape = _only(shapes)
        if shape[0] % self.groups:
            raise ValueError(f"{shape[0]} channels are no multiple of its {self.groups} groups")
        return shape

    def parameters(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        """Return scale and shift."""
        return {"weight": shapes[0][:1], "bias": shapes[0][:1]} if self.affine else {}


class Affine(_Operation):
    """One factor and one summand per channel: ``x * weight + bias`` (LayerScale, constants that exporters leave).

    Attributes:
        shift: Whether there is a ``.bias``.
        frozen: Whether both are constants of the network.
    """

    op: Literal["affine"] = "affine"
    shift: bool = True
    frozen: bool = False

    def parameters(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        """Return factor and summand."""
        c = shapes[0][:1]
        return {"weight": c, "bias": c} if self.shift else {"weight": c}

    @property
    def constants(self) -> frozenset[str]:
        """Both, where they are frozen."""
        return frozenset({"weight", "bias"}) if self.frozen else frozenset()


class Relu(_Operation):
    """``max(x, 0)``."""

    op: Literal["relu"] = "relu"


class Clip(_Operation):
    """``min(max(x, low), high)``; ReLU6 is 0 and 6."""

    op: Literal["clip"] = "clip"
    low: Real = 0.0
    high: Real = 6.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"clips to {self.low:g}..{self.high:g}")
        return self


class LeakyRelu(_Operation):
    """``x`` where it is positive, ``slope * x`` elsewhere."""

    op: Literal["leaky_relu"] = "leaky_relu"
    slope: Real = 0.01


class Elu(_Operation):
    """``x`` where it is positive, ``alpha * (exp(x) - 1)`` elsewhere."""

    op: Literal["elu"] = "elu"
    alpha: Real = 1.0


class PRelu(_Operation):
    """Leaky ReLU with learnt slopes in ``.weight``.

    Attributes:
        shared: Whether all channels have one slope; else each its own.
    """

    op: Literal["prelu"] = "prelu"
    shared: bool = False

    def parameters(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        """Return the slopes."""
        return {"weight": (1,) if self.shared else shapes[0][:1]}


class Silu(_Operation):
    """``x * sigmoid(x)``, also called swish."""

    op: Literal["silu"] = "silu"


class Gelu(_Operation):
    """``x * Phi(x)``.

    Attributes:
        tanh: Whether Phi is the approximation by tanh; else the exact one, by erf.
    """

    op: Literal["gelu"] = "gelu"
    tanh: bool = False


class HardSwish(_Operation):
    """``x * clip(x / 6 + 1 / 2, 0, 1)``."""

    op: Literal["hard_swish"] = "hard_swish"


class HardSigmoid(_Operation):
    """``clip(alpha * x + beta, 0, 1)``; torch's alpha is 1/6, ONNX's default and Keras 2's 0.2."""

    op: Literal["hard_sigmoid"] = "hard_sigmoid"
    alpha: Real = 1.0 / 6.0
    beta: Real = 0.5


class Sigmoid(_Operation):
    """``1 / (1 + exp(-x))``."""

    op: Literal["sigmoid"] = "sigmoid"


class Tanh(_Operation):
    """Hyperbolic tangent."""

    op: Literal["tanh"] = "tanh"


class Softmax(_Operation):
    """Softmax over the channels."""

    op: Literal["softmax"] = "softmax"


class Add(_Operation):
    """The sum of two tensors of one shape."""

    op: Literal["add"] = "add"

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape of both."""
        if len(shapes) != 2 or shapes[0] != shapes[1]:
            raise ValueError(f"adds two tensors of one shape, not {_text(shapes)}")
        return shapes[0]


class Multiply(_Operation):
    """The product of two tensors of one shape, or of a map (C, H, W) and a gate.

    A gate has one number per channel, (C, 1, 1) or (C,), or one per pixel, (1, H, W), and is the second input.
    """

    op: Literal["multiply"] = "multiply"

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape of the first."""
        if len(shapes) == 2:
            x, gate = shapes
            if gate in (x, x[:1], (*x[:1], 1, 1), (1, *x[1:])):
                return x
        raise ValueError(f"multiplies a tensor with one of its shape or with a gate for it, not {_text(shapes)}")


class Concat(_Operation):
    """Tensors one after the other, along the channels."""

    op: Literal["concat"] = "concat"

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape with the sum of the channels."""
        if not shapes or len({s[1:] for s in shapes}) != 1:
            raise ValueError(f"joins channels of maps of one size, not {_text(shapes)}")
        return (sum(s[0] for s in shapes), *shapes[0][1:])


class MaxPool(_Operation):
    """The largest value of each window; the padding never wins.

    Attributes:
        kernel: Height and width.
        stride: Per axis.
        pads: Around the input.
        ceil: Whether a last window that is cut off by the border counts (ONNX's ``ceil_mode``).
        dilation: Per axis.
    """

    op: Literal["max_pool"] = "max_pool"
    kernel: Pair
    stride: Pair
    pads: Pads = NO_PADS
    ceil: bool = False
    dilation: Pair = ONE

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return (C, H', W')."""
        c, h, w = _map(shapes)
        return (c, *_windows((h, w), self.kernel, self.stride, self.pads, self.dilation, ceil=self.ceil))


class AvgPool(_Operation):
    """The mean of each window.

    Attributes:
        kernel: Height and width.
        stride: Per axis.
        pads: Zeros around the input.
        ceil: As for `MaxPool`; what a window has beyond the padding is never counted.
        count_pads: Whether the zeros of the padding count (ONNX's ``count_include_pad``).
    """

    op: Literal["avg_pool"] = "avg_pool"
    kernel: Pair
    stride: Pair
    pads: Pads = NO_PADS
    ceil: bool = False
    count_pads: bool = False

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return (C, H', W')."""
        c, h, w = _map(shapes)
        return (c, *_windows((h, w), self.kernel, self.stride, self.pads, ONE, ceil=self.ceil))


class GlobalPool(_Operation):
    """All pixels of a channel as one number.

    Attributes:
        kind: Their mean, their maximum, or both next to each other: maximum and mean of the first channel, then of the
            second, ...
        keep: Whether the result is a map of one pixel, (C, 1, 1), rather than a vector, (C,).
    """

    op: Literal["global_pool"] = "global_pool"
    kind: Literal["avg", "max", "max_avg"] = "avg"
    keep: bool = False

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return (C,) or (C, 1, 1)."""
        c, _, _ = _map(shapes)
        c = 2 * c if self.kind == "max_avg" else c
        return (c, 1, 1) if self.keep else (c,)


class ChannelSelect(_Operation):
    """Some channels in some order, zeros between them, of every n-th pixel: slices, and shortcuts without parameters.

    Attributes:
        channels: Per output channel the input channel it takes, -1 for zeros.
        stride: Of the pixels that stay, from the first one on.
    """

    op: Literal["channel_select"] = "channel_select"
    channels: tuple[Annotated[int, Field(ge=-1)], ...] = Field(min_length=1)
    stride: Pair = ONE

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return (C', H', W')."""
        shape = _only(shapes)
        if max(self.channels) >= shape[0]:
            raise ValueError(f"takes channel {max(self.channels)} of {shape[0]}")
        if len(shape) == 1:
            return (len(self.channels),)
        return (len(self.channels), *(-(-size // s) for size, s in zip(shape[1:], self.stride, strict=True)))


class Pad(_Operation):
    """A border around the map, for what no convolution or pool says itself.

    Attributes:
        pads: Its pixels.
        mode: What they hold: `value`, the map mirrored without its edge, or its edge.
        value: For ``constant``.
    """

    op: Literal["pad"] = "pad"
    pads: Pads
    mode: Literal["constant", "reflect", "edge"] = "constant"
    value: Real = 0.0

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the larger map."""
        c, h, w = _map(shapes)
        top, left, bottom, right = self.pads
        if self.mode == "reflect" and (max(top, bottom) >= h or max(left, right) >= w):
            raise ValueError(f"mirrors {self.pads} pixels of a map of {h}x{w}")
        return (c, h + top + bottom, w + left + right)


class Flatten(_Operation):
    """A map as a vector, channels first: (C, H, W) becomes (C * H * W,)."""

    op: Literal["flatten"] = "flatten"

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the vector."""
        return (math.prod(_only(shapes)),)


class Linear(_Operation):
    """A linear layer on a vector.

    Attributes:
        width: Outputs.
        bias: Whether there is a ``.bias``.
    """

    op: Literal["linear"] = "linear"
    width: Width
    bias: bool = True

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return (width,)."""
        if len(_only(shapes)) != 1:
            raise ValueError(f"reads a vector, not {_text(shapes)}")
        return (self.width,)

    def parameters(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        """Return the weight (O, I) and the bias (O)."""
        weight: dict[str, Shape] = {"weight": (self.width, shapes[0][0])}
        return weight | {"bias": (self.width,)} if self.bias else weight


class ChannelConv(_Operation):
    """A one-dimensional convolution over the channels of a vector (the gate of efficient channel attention).

    Each channel has a place in a line, and the places that no channel has hold zeros. So a channel that pruning takes away
    leaves a zero behind, and its neighbours keep their distance.

    Attributes:
        kernel: Its length, odd; zeros around the line keep the number of channels.
        length: Places in the line.
        places: Of each channel.
        bias: Whether there is a ``.bias``: one number for all.
    """

    op: Literal["channel_conv"] = "channel_conv"
    kernel: Count
    length: Count
    places: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    bias: bool = False

    @model_validator(mode="after")
    def _in_line(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"has a kernel of {self.kernel} places, which has no middle")
        if len(set(self.places)) < len(self.places) or max(self.places) >= self.length:
            raise ValueError(f"puts two channels at one place, or one beyond the {self.length} that there are")
        return self

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the vector's shape."""
        shape = _only(shapes)
        if shape != (len(self.places),):
            raise ValueError(f"reads a vector of {len(self.places)} channels, not {_text(shapes)}")
        return shape

    def parameters(self, shapes: Sequence[Shape]) -> dict[str, Shape]:
        """Return the weight (1, 1, K) and the bias (1)."""
        weight: dict[str, Shape] = {"weight": (1, 1, self.kernel)}
        return weight | {"bias": (1,)} if self.bias else weight


class Dropout(_Operation):
    """Zeros at random, in training only.

    Attributes:
        probability: Of a zero.
        whole: Whether an image's whole tensor goes at once (stochastic depth), rather than each number by itself.
    """

    op: Literal["dropout"] = "dropout"
    probability: float = Field(0.5, ge=0.0, lt=1.0)
    whole: bool = False


class Resize(_Operation):
    """The map at another size.

    Attributes:
        size: Height and width of the result.
        mode: ``nearest`` takes the pixel at ``floor(i * in / out)``; ``bilinear`` the mean of the four around.
        align_corners: For ``bilinear``: whether the corners of both maps lie on each other; else half pixels do.
    """

    op: Literal["resize"] = "resize"
    size: Pair
    mode: Literal["nearest", "bilinear"] = "nearest"
    align_corners: bool = False

    def out_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return (C, *size)."""
        return (_map(shapes)[0], *self.size)


Activation = (
    Relu | Clip | LeakyRelu | Elu | PRelu | Silu | Gelu | HardSwish | HardSigmoid | Sigmoid | Tanh | Softmax
)  # fmt: skip
"""Operations that take every number (for softmax: every pixel) by itself."""

Pool = MaxPool | AvgPool | GlobalPool
Weighted = Conv | Linear

Operation = (
    Input | Conv | Linear | BatchNorm | GroupNorm | Affine | Activation | Add | Multiply | Concat | Pool | ChannelSelect | Pad
    | Flatten | Dropout | Resize | ChannelConv
)  # fmt: skip
"""Every operation there is."""

OPERATIONS: tuple[type[_Operation], ...] = get_args(Operation)
ACTIVATIONS: tuple[type[_Operation], ...] = get_args(Activation)


def non_negative(op: Operation) -> bool | None:
    """Whether no number that `op` makes is below zero; None where that holds exactly if it holds for all that it reads.

    The levels of an unsigned quantizer rest on this, so it is proven, not likely.
    """
    match op:
        case Relu() | Sigmoid() | HardSigmoid() | Softmax():
            return True
        case Clip():
            return op.low >= 0.0
        case Pad():
            return None if op.value >= 0.0 or op.mode != "constant" else False
        case Add() | Multiply() | Concat() | MaxPool() | AvgPool() | GlobalPool() | ChannelSelect() | Flatten() | Dropout():
            return None
        case Resize():
            return None
        case Input() | Conv() | Linear() | BatchNorm() | GroupNorm() | Affine():
            return False
        case LeakyRelu() | Elu() | PRelu() | Silu() | Gelu() | HardSwish() | Tanh() | ChannelConv():
            return False
        case never:
            assert_never(never)


def _text(shapes: Sequence[Shape]) -> str:
    return " and ".join("x".join(map(str, s)) for s in shapes) or "nothing"


def _only(shapes: Sequence[Shape]) -> Shape:
    if len(shapes) != 1:
        raise ValueError(f"reads one tensor, not {len(shapes)}")
    return shapes[0]


def _map(shapes: Sequence[Shape]) -> tuple[int, int, int]:
    shape = _only(shapes)
    if len(shape) != 3:
        raise ValueError(f"reads a map of channels, height and width, not {_text(shapes)}")
    return (shape[0], shape[1], shape[2])


def _windows(size: tuple[int, int], kernel: Pair, stride: Pair, pads: Pads, dilation: Pair, *, ceil: bool) -> tuple[int, int]:
    """Return how many windows fit along each axis.

    Raises:
        ValueError: None fits.
    """
    found = []
    for axis in (0, 1):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        room = size[axis] + pads[axis] + pads[axis + 2] - span
        if room < 0:
            raise ValueError(f"its window of {span} pixels does not fit into {size[axis]} pixels and their padding")
        count = room // stride[axis] + 1
        if ceil and room % stride[axis] and count * stride[axis] < size[axis] + pads[axis]:
            count += 1  # a window that begins beyond the map does not count
        found.append(count)
    return (found[0], found[1])
