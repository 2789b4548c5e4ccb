"""The kernels a runtime launches for a network: layers after fusion, as the latency model sees them.

TensorRT fuses Conv + BatchNorm + ReLU and, in the main branch of a residual block, the Add and the ReLU behind it, into
one kernel (published TensorRT 8.5 log of a Q/DQ ResNet-18: ``Conv_34 + Add_42 + Relu_43``, 24 kernels in all).

Shape suffixes: none here; sizes are per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rescompress.core.layers import INPUT, Layer

KernelKind = Literal["conv", "linear", "pool", "move"]


@dataclass(frozen=True, slots=True)
class Kernel:
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
        if layer.op == "input":
            c, h, w = layer.out_shape
            kernels.append(Kernel("input reformat", "move", h * w, c, c, in_pixels=h * w, first=True))
        if layer.op in ("input", "dropout", "batch_norm") or layer.name in absorbed:
            continue
        skip = False
        if layer.op in ("conv", "linear", "add"):
            skip = _absorb(layer, readers, absorbed, add_fuses=add_fuses)
        kernels.append(_kernel(layer, skip=skip, first=layer.inputs[:1] == (INPUT,)))
    return kernels


def _absorb(layer: Layer, readers: dict[str, list[Layer]], absorbed: set[str], *, add_fuses: bool) -> bool:
    """Mark what fuses into the kernel of `layer`; return whether it then reads a skip connection."""
    tail, skip = layer, False
    while len(readers[tail.name]) == 1:
        after = readers[tail.name][0]
        joins = add_fuses and not skip and after.op == "add" and layer.op == "conv" and after.inputs[0] == tail.name
        if not joins and after.op not in ("batch_norm", "relu", "dropout"):
            break
        skip = skip or joins
        absorbed.add(after.name)
        tail = after
        if after.op == "relu":
            break
    return skip


def _kernel(layer: Layer, *, skip: bool, first: bool) -> Kernel:
    out = layer.out_shape
    pixels = out[1] * out[2] if len(out) == 3 else 1
    in_pixels = layer.in_shape[1] * layer.in_shape[2] if len(layer.in_shape) == 3 else 1
    kinds: dict[str, KernelKind] = {
        "conv": "conv",
        "linear": "linear",
        "max_pool": "pool",
        "avg_pool": "pool",
        "global_pool": "pool",
        "global_max_avg_pool": "pool",
    }
    return Kernel(
        layer.name,
        kinds.get(layer.op, "move"),
        pixels,
        layer.in_shape[0],
        out[0],
        taps=layer.kernel**2 if layer.op == "conv" else 1,
        groups=layer.groups,
        in_pixels=in_pixels,
        skip=skip or layer.op == "add",
        first=first,
    )
