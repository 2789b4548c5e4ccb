"""The kernels a runtime launches for a network: layers after fusion, as the latency model sees them.

TensorRT fuses Conv + BatchNorm + ReLU and, in the main branch of a residual block, the Add and the ReLU behind it, into
one kernel (published TensorRT 8.5 log of a Q/DQ ResNet-18: ``Conv_34 + Add_42 + Relu_43``, 24 kernels in all).

Shape suffixes: none here; sizes are per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, assert_never

from rescompress.core.graph import INPUT, Layer
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
    Operation,
    Pad,
    PRelu,
    Relu,
    Resize,
    Sigmoid,
    Silu,
    Softmax,
    Tanh,
)

LINEAR_PER_CHANNEL = (BatchNorm, Affine)
"""What a kernel takes in beside an activation behind it."""

KernelKind = Literal["conv", "linear", "pool", "move"]
Role = Literal["conv", "linear", "pool", "move", "input", "add", "pointwise", "nothing"]


_roles: dict[type[Operation], Role] = {}
"""By class, as they are asked for: a search over widths asks for the role of the same few classes a million times."""


def role_of(op: Operation) -> Role:
    """Return what an operation is to a runtime: a kernel of some kind, part of the one before, or nothing."""
    role = _roles.get(type(op))
    if role is None:
        role = _roles[type(op)] = _role(op)
    return role


def _role(op: Operation) -> Role:
    match op:
        case Conv() | ChannelConv():
            return "conv"
        case Linear():
            return "linear"
        case MaxPool() | AvgPool() | GlobalPool():
            return "pool"
        case Add():
            return "add"
        case Input():
            return "input"
        case BatchNorm() | Affine() | Clip() | LeakyRelu() | Relu() | PRelu() | Elu() | Silu() | Gelu() | HardSwish():
            return "pointwise"
        case HardSigmoid() | Sigmoid() | Tanh():
            return "pointwise"
        case Flatten() | Dropout():
            return "nothing"
        case Multiply() | Concat() | ChannelSelect() | Pad() | Resize() | Softmax() | GroupNorm():
            return "move"
        case never:
            assert_never(never)


class Kernel(NamedTuple):
    """One kernel, with its sizes for one image.

    A convolution is the matrix product of (pixels, reduce) and (reduce, width), where reduce is taps x (in_width /
    groups).

    Attributes:
        name: Of the layer it starts with.
        kind: ``conv``, ``linear``, ``pool`` (any pooling) or ``move`` (copies, pads, format changes, elementwise).
        pixels: Output pixels.
        in_width: Input channels.
        width: Output channels.
        taps: Kernel height x width.
        groups: Of a convolution.
        in_pixels: Input pixels.
        skip: Whether it also reads a skip connection of the size of its output.
        first: Whether it reads the network's input, whose 3 channels cannot be aligned.
    """

    name: str
    kind: KernelKind
    pixels: int
    in_width: int
    width: int
    taps: int = 1
    groups: int = 1
    in_pixels: int = 0
    skip: bool = False
    first: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        if self.kind not in ("conv", "linear"):
            return 0
        return self.pixels * self.width * self.taps * self.in_width // self.groups


def fuse(layers: Sequence[Layer], *, add_fuses: bool = True) -> list[Kernel]:
    """Return the kernels that run `layers`, in order of computation.

    Args:
        add_fuses: Whether a residual Add runs inside the convolution before it; it does not where both its inputs are
            rounded to INT8.
        layers: A whole walk, or a run of it: inputs made by layers that are not in the list are fine.
    """
    readers: dict[str, list[Layer]] = {layer.name: [] for layer in layers}
    for layer in layers:
        for name in layer.inputs:
            if name in readers:
                readers[name].append(layer)
    absorbed: set[str] = set()
    kernels: list[Kernel] = []
    for layer in layers:
        role = role_of(layer.operation)
        if role == "input":
            c, h, w = layer.out_shape
            kernels.append(Kernel("input reformat", "move", h * w, c, c, in_pixels=h * w, first=True))
        if role in ("input", "nothing") or layer.name in absorbed:
            continue
        skip = False
        if role in ("conv", "linear", "add", "pointwise"):
            skip = _absorb(layer, readers, absorbed, add_fuses=add_fuses)
        kernels.append(_kernel(layer, role, skip=skip, first=layer.inputs[:1] == (INPUT,)))
    return kernels


def _absorb(layer: Layer, readers: dict[str, list[Layer]], absorbed: set[str], *, add_fuses: bool) -> bool:
    """Mark what fuses into the kernel of `layer`; return whether it then reads a skip connection."""
    tail, skip = layer, False
    while len(readers[tail.name]) == 1:
        after = readers[tail.name][0]
        role = role_of(after.operation)
        sums = role == "add" and isinstance(layer.operation, Conv) and after.name not in absorbed
        joins = add_fuses and not skip and sums and _is_summand(after, tail.name, readers)
        if not joins and role not in ("pointwise", "nothing"):
            break
        skip = skip or joins
        absorbed.add(after.name)
        tail = after
        if role == "pointwise" and not isinstance(after.operation, LINEAR_PER_CHANNEL):
            break
    return skip


def _is_summand(add: Layer, tensor: str, readers: dict[str, list[Layer]]) -> bool:
    """Whether an Add runs inside the convolution that ends in `tensor`: its first input, unless that is no such end."""
    return add.inputs[0] == tensor or len(readers.get(add.inputs[0], ())) > 1


def _kernel(layer: Layer, role: Role, *, skip: bool, first: bool) -> Kernel:
    op, into, out = layer.operation, layer.in_shape, layer.out_shape
    if isinstance(op, ChannelConv):  # one channel, as long as the line
        return Kernel(layer.name, "conv", op.length, 1, 1, taps=op.kernel, in_pixels=op.length)
    taps, groups = (op.kernel[0] * op.kernel[1], op.groups) if isinstance(op, Conv) else (1, 1)
    return Kernel(
        layer.name,
        role if role == "conv" or role == "linear" or role == "pool" else "move",
        out[1] * out[2] if len(out) == 3 else 1,
        into[0],
        out[0],
        taps,
        groups,
        into[1] * into[2] if len(into) == 3 else 1,
        skip or role == "add" or isinstance(op, Multiply),
        first,
    )
