"""The one walk over a `ModelSpec`: every layer, in the order of computation, with shapes, parameters and MACs.

The torch model, the ONNX writer, quantizer placement, budgets, latency prediction and reports all read this list, so
they cannot disagree about what the network computes. A tensor is named after the layer that makes it.

Counting: one MAC is one multiply and one add; only convolutions and linear layers have MACs (as in He et al. 2015,
table 1, "FLOPs" there), so that the count is half of what torch's ``FlopCounterMode`` reports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rescompress.core.spec import Block, ModelSpec

Op = Literal[
    "input", "conv", "batch_norm", "relu", "add", "max_pool", "avg_pool", "global_pool", "global_max_avg_pool", "pad_shortcut",
    "linear", "dropout"
]  # fmt: skip
GLOBAL_POOLS: tuple[Op, ...] = ("global_pool", "global_max_avg_pool")
Shape = tuple[int, ...]

INPUT = "input"


@dataclass(frozen=True)
class Layer:
    """One layer of the computation.

    Attributes:
        name: Unique; its parameters are ``<name>.weight`` and so on, and its output tensor is called `name` too.
        op: What it computes.
        inputs: Names of the tensors it reads.
        in_shape: Shape of the first input without the batch: CHW, or (C,) after pooling.
        out_shape: Shape of the output, likewise.
        block: Name of the residual block it belongs to, or None.
        kernel: Side of the square kernel (convolutions and pools).
        stride: Spatial stride (convolutions, pools and pad shortcuts).
        padding: Symmetric zero padding, in pixels.
        groups: Groups of a convolution.
        bias: Whether a convolution or linear layer has a bias.
        eps: Epsilon of a BatchNorm.
        channel_map: For a pad shortcut: the input channel of each output channel, -1 for zeros.
        dropout: Probability, for a dropout.
    """

    name: str
    op: Op
    inputs: tuple[str, ...]
    in_shape: Shape
    out_shape: Shape
    block: str | None = None
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = False
    eps: float = 1e-5
    channel_map: tuple[int, ...] | None = None
    dropout: float = 0.0

    @property
    def weight_shape(self) -> Shape:
        """Shape of the weight tensor (OIKK, OI or C), () where there is none."""
        if self.op == "conv":
            return (self.out_shape[0], self.in_shape[0] // self.groups, self.kernel, self.kernel)
        if self.op == "linear":
            return (self.out_shape[0], self.in_shape[0])
        if self.op == "batch_norm":
            return (self.out_shape[0],)
        return ()

    @property
    def weights(self) -> int:
        """Elements of the weight tensor."""
        return math.prod(self.weight_shape) if self.weight_shape else 0

    @property
    def params(self) -> int:
        """Learnable parameters, as ``sum(p.numel() for p in module.parameters())`` counts them."""
        if self.op == "batch_norm":
            return 2 * self.weights
        return self.weights + (self.out_shape[0] if self.bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input."""
        if self.op == "conv":
            return self.weights * self.out_shape[1] * self.out_shape[2]
        return self.weights if self.op == "linear" else 0

    @property
    def in_elements(self) -> int:
        """Elements of the first input tensor, for one image."""
        return math.prod(self.in_shape)

    @property
    def out_elements(self) -> int:
        """Elements of the output tensor, for one image."""
        return math.prod(self.out_shape)


def conv_out(size: int, kernel: int, stride: int, padding: int) -> int:
    """Return the output side of a convolution or (floor mode) pool over `size` pixels."""
    return (size + 2 * padding - kernel) // stride + 1


class _Walk:
    """Collects layers; each method appends one and returns the name of its output tensor."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.layers: list[Layer] = [Layer(INPUT, "input", (), spec.input_shape, spec.input_shape)]
        self.shapes: dict[str, Shape] = {INPUT: spec.input_shape}

    def add(self, layer: Layer) -> str:
        self.layers.append(layer)
        self.shapes[layer.name] = layer.out_shape
        return layer.name

    def conv(
        self, name: str, x: str, width: int, kernel: int, stride: int, *, groups: int, bias: bool, block: str | None
    ) -> str:
        c, h, w = self.shapes[x]
        pad = kernel // 2
        out = (width, conv_out(h, kernel, stride, pad), conv_out(w, kernel, stride, pad))
        return self.add(
            Layer(
                name, "conv", (x,), (c, h, w), out, block, kernel=kernel, stride=stride, padding=pad, groups=groups, bias=bias
            )
        )

    def same(self, name: str, op: Op, inputs: tuple[str, ...], block: str | None, dropout: float = 0.0) -> str:
        shape = self.shapes[inputs[0]]
        return self.add(Layer(name, op, inputs, shape, shape, block, eps=self.spec.bn_eps, dropout=dropout))

    def pool(self, name: str, op: Op, x: str, kernel: int, padding: int, block: str | None, *, ceil: bool = False) -> str:
        c, h, w = self.shapes[x]
        out = (c, -(-h // 2), -(-w // 2)) if ceil else (c, conv_out(h, kernel, 2, padding), conv_out(w, kernel, 2, padding))
        return self.add(Layer(name, op, (x,), (c, h, w), out, block, kernel=kernel, stride=2, padding=padding))

    def stem(self) -> str:
        stem, x = self.spec.stem, INPUT
        for i, conv in enumerate(stem.convs, 1):
            x = self.conv(f"conv{i}", x, conv.width, conv.kernel, conv.stride, groups=1, bias=stem.conv_bias, block=None)
            if stem.batch_norm:
                x = self.same(f"bn{i}", "batch_norm", (x,), None)
            x = self.same(f"relu{i}", "relu", (x,), None)
        return self.pool("maxpool", "max_pool", x, 3, 1, None) if stem.max_pool else x

    def main_branch(self, block: Block, x: str) -> str:
        kernels = (3, 3) if block.kind == "basic" else (1, 3, 1)
        for i, (kernel, width) in enumerate(zip(kernels, block.widths, strict=True)):
            stride = block.stride if i == block.stride_at else 1
            groups = block.groups if i == 1 and block.kind == "bottleneck" else 1
            n = block.name
            x = self.conv(f"{n}.conv{i + 1}", x, width, kernel, stride, groups=groups, bias=block.conv_bias, block=n)
            if block.batch_norm:
                x = self.same(f"{n}.bn{i + 1}", "batch_norm", (x,), n)
            if i + 1 < len(kernels):
                x = self.same(f"{n}.relu{i + 1}", "relu", (x,), n)
        return x

    def shortcut(self, block: Block, x: str) -> str:
        n = block.name
        if block.shortcut == "pad":
            c, h, w = self.shapes[x]
            out = (block.widths[-1], conv_out(h, 1, block.stride, 0), conv_out(w, 1, block.stride, 0))
            return self.add(
                Layer(
                    f"{n}.shortcut", "pad_shortcut", (x,), (c, h, w), out, n, stride=block.stride, channel_map=block.channel_map
                )
            )
        if block.shortcut == "projection":
            stride = block.stride
            if block.shortcut_pool and stride == 2:
                x, stride = self.pool(f"{n}.downsample.pool", "avg_pool", x, 2, 0, n, ceil=True), 1
            x = self.conv(f"{n}.downsample.0", x, block.widths[-1], 1, stride, groups=1, bias=block.conv_bias, block=n)
            if block.batch_norm:
                x = self.same(f"{n}.downsample.1", "batch_norm", (x,), n)
        return x

    def head(self, x: str) -> str:
        c = self.shapes[x][0]
        head = self.spec.head
        if head is not None and head.pool == "max_avg":
            x = self.add(Layer("avgpool", "global_max_avg_pool", (x,), self.shapes[x], (2 * c,)))
        else:
            x = self.add(Layer("avgpool", "global_pool", (x,), self.shapes[x], (c,)))
        if head is None:
            return x
        if not head.hidden and head.dropout:
            x = self.same("fc.dropout", "dropout", (x,), None, head.dropout)
        widths = (*head.hidden, head.num_classes)
        for i, width in enumerate(widths):
            name = "fc" if len(widths) == 1 else f"fc.{i}"
            x = self.add(Layer(name, "linear", (x,), self.shapes[x], (width,), bias=True))
            if i + 1 < len(widths):
                x = self.same(f"{name}.relu", "relu", (x,), None)
                if head.dropout:
                    x = self.same(f"{name}.dropout", "dropout", (x,), None, head.dropout)
        return x


def walk(spec: ModelSpec) -> list[Layer]:
    """Return every layer of the network in the order of computation; the last one makes the output.

    The first layer is ``input``. A residual block reads: main branch, then shortcut, then ``<block>.add`` (inputs: main
    branch first, shortcut second), then ``<block>.relu``.
    """
    w = _Walk(spec)
    x = w.stem()
    for block in spec.blocks:
        main = w.main_branch(block, x)
        skip = w.shortcut(block, x)
        x = w.same(f"{block.name}.add", "add", (main, skip), block.name)
        x = w.same(f"{block.name}.relu", "relu", (x,), block.name)
    w.head(x)
    return w.layers


def total_macs(layers: Iterable[Layer]) -> int:
    """Return the multiply-accumulates of one forward pass over one input."""
    return sum(layer.macs for layer in layers)


def total_params(layers: Iterable[Layer]) -> int:
    """Return the learnable parameters, as torch counts them."""
    return sum(layer.params for layer in layers)


def consumers(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Return, per tensor name, the layers that read it, in order of computation."""
    readers: dict[str, list[Layer]] = {layer.name: [] for layer in layers}
    for layer in layers:
        for name in layer.inputs:
            readers[name].append(layer)
    return readers
