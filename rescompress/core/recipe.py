"""`network_of`: the graph of a `ModelSpec`, the recipe of a ResNet in a few numbers.

Tensor names are those of torchvision (``conv1``, ``layer1.0.conv1``, ``layer1.0.bn1``, ``layer1.0.downsample.0``, ``fc``),
where a layer has one there. A residual block reads: main branch, then shortcut, then ``<block>.add`` (inputs: main branch
first, shortcut second), then ``<block>.relu``.
"""

from __future__ import annotations

from functools import lru_cache

from rescompress.core.graph import INPUT, Network, Node, Output
from rescompress.core.operations import (
    Add,
    AvgPool,
    BatchNorm,
    ChannelSelect,
    Conv,
    Dropout,
    GlobalPool,
    Input,
    Linear,
    MaxPool,
    Operation,
    Relu,
)
from rescompress.core.spec import Block, ModelSpec


class _Walk:
    """Collects nodes; each method appends some and returns the name of the last one."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.nodes: list[Node] = []
        self.add(INPUT, Input())

    def add(self, name: str, operation: Operation, *inputs: str) -> str:
        self.nodes.append(Node(name=name, operation=operation, inputs=inputs))
        return name

    def conv(self, name: str, x: str, width: int, kernel: int, stride: int, *, groups: int = 1, bias: bool) -> str:
        pad = kernel // 2
        return self.add(
            name,
            Conv(
                width=width,
                kernel=(kernel, kernel),
                stride=(stride, stride),
                pads=(pad, pad, pad, pad),
                groups=groups,
                bias=bias,
            ),
            x,
        )

    def norm(self, name: str, x: str) -> str:
        return self.add(name, BatchNorm(eps=self.spec.bn_eps), x)

    def stem(self) -> str:
        stem, x = self.spec.stem, INPUT
        for i, conv in enumerate(stem.convs, 1):
            x = self.conv(f"conv{i}", x, conv.width, conv.kernel, conv.stride, bias=stem.conv_bias)
            if stem.batch_norm:
                x = self.norm(f"bn{i}", x)
            x = self.add(f"relu{i}", Relu(), x)
        return self.add("maxpool", MaxPool(kernel=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1)), x) if stem.max_pool else x

    def main_branch(self, block: Block, x: str) -> str:
        kernels = (3, 3) if block.kind == "basic" else (1, 3, 1)
        for i, (kernel, width) in enumerate(zip(kernels, block.widths, strict=True)):
            stride = block.stride if i == block.stride_at else 1
            groups = block.groups if i == 1 and block.kind == "bottleneck" else 1
            x = self.conv(f"{block.name}.conv{i + 1}", x, width, kernel, stride, groups=groups, bias=block.conv_bias)
            if block.batch_norm:
                x = self.norm(f"{block.name}.bn{i + 1}", x)
            if i + 1 < len(kernels):
                x = self.add(f"{block.name}.relu{i + 1}", Relu(), x)
        return x

    def shortcut(self, block: Block, x: str) -> str:
        n = block.name
        if block.channel_map is not None:
            stride = (block.stride, block.stride)
            return self.add(f"{n}.shortcut", ChannelSelect(channels=block.channel_map, stride=stride), x)
        if block.shortcut == "projection":
            stride_of_conv = block.stride
            if block.shortcut_pool and block.stride == 2:
                x = self.add(f"{n}.downsample.pool", AvgPool(kernel=(2, 2), stride=(2, 2), ceil=True), x)
                stride_of_conv = 1
            x = self.conv(f"{n}.downsample.0", x, block.widths[-1], 1, stride_of_conv, bias=block.conv_bias)
            if block.batch_norm:
                x = self.norm(f"{n}.downsample.1", x)
        return x

    def head(self, x: str) -> Output:
        head = self.spec.head
        x = self.add("avgpool", GlobalPool(kind=head.pool if head else "avg"), x)
        if head is None:
            return Output(name="logits", tensor=x)
        if not head.hidden and head.dropout:
            x = self.add("fc.dropout", Dropout(probability=head.dropout), x)
        widths = (*head.hidden, head.num_classes)
        for i, width in enumerate(widths):
            name = "fc" if len(widths) == 1 else f"fc.{i}"
            x = self.add(name, Linear(width=width), x)
            if i + 1 < len(widths):
                x = self.add(f"{name}.relu", Relu(), x)
                if head.dropout:
                    x = self.add(f"{name}.dropout", Dropout(probability=head.dropout), x)
        return Output(name="logits", tensor=x, classes=True)


@lru_cache(maxsize=32)
def _built(spec: ModelSpec) -> Network:
    w = _Walk(spec)
    x = w.stem()
    for block in spec.blocks:
        main = w.main_branch(block, x)
        skip = w.shortcut(block, x)
        x = w.add(f"{block.name}.add", Add(), main, skip)
        x = w.add(f"{block.name}.relu", Relu(), x)
    output = w.head(x)
    return Network(
        arch=spec.arch,
        input_shape=spec.input_shape,
        nodes=tuple(w.nodes),
        outputs=(output,),
        preprocessing=spec.preprocessing,
        labels=spec.labels if spec.head is not None else None,
    )


def network_of(spec: ModelSpec | Network) -> Network:
    """Return the network that a recipe makes; a network is what it is."""
    return spec if isinstance(spec, Network) else _built(spec)
