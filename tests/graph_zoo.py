"""Random small graphs over every operation, with tensors that hide no slip, and hand-made networks of known kinds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from compress.checkpoints.base import Checkpoint
from compress.resnet import AffineLayer, build_model, tensors_of
from rescompress.core.graph import INPUT, Network, Node, Output
from rescompress.core.operations import (
    NO_PADS,
    ONE,
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
from rescompress.core.spec import Preprocessing

SAME = (1, 1, 1, 1)


class Maker:
    """Builds a network node by node."""

    def __init__(self, channels: int = 3, side: tuple[int, int] = (8, 8)) -> None:
        self.input_shape = (channels, *side)
        self.nodes = [Node(name=INPUT, operation=Input())]
        self.shapes: dict[str, tuple[int, ...]] = {INPUT: self.input_shape}

    def add(self, operation: Operation, *inputs: str, name: str | None = None) -> str:
        name = name or f"{operation.op}{len(self.nodes)}"
        self.shapes[name] = operation.out_shape([self.shapes[i] for i in inputs])
        self.nodes.append(Node(name=name, operation=operation, inputs=inputs))
        return name

    def conv(self, x: str, width: int, kernel: int = 3, stride: int = 1, groups: int = 1, *, bias: bool = False) -> str:
        pad = kernel // 2
        op = Conv(width=width, kernel=(kernel,) * 2, stride=(stride,) * 2, pads=(pad,) * 4, groups=groups, bias=bias)
        return self.add(op, x)

    def network(self, *outputs: str, classes: bool = False) -> Network:
        c = self.input_shape[0]
        names = ["logits"] if len(outputs) == 1 else [f"out{i}" for i in range(len(outputs))]
        return Network(
            arch="made",
            input_shape=self.input_shape,
            nodes=tuple(self.nodes),
            outputs=tuple(Output(name=n, tensor=t, classes=classes) for n, t in zip(names, outputs, strict=True)),
            preprocessing=Preprocessing(mean=(0.0,) * c, std=(1.0,) * c),
        )


ACTIVATIONS: tuple[Operation, ...] = (
    *(
        Relu(),
        Relu(),
        Relu(),
        Clip(),
        Clip(low=-0.5, high=1.0),
        LeakyRelu(slope=0.1),
        Elu(alpha=0.7),
        PRelu(),
        PRelu(shared=True),
    ),
    *(Silu(), Gelu(), Gelu(tanh=True), HardSwish(), HardSigmoid(), HardSigmoid(alpha=0.2), Sigmoid(), Tanh()),
)


class _Random(Maker):
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        super().__init__(int(self.rng.integers(1, 5)), (int(self.rng.integers(7, 11)), int(self.rng.integers(7, 11))))

    def choice(self, *options: object) -> object:
        return options[int(self.rng.integers(len(options)))]

    def pair(self, *options: int) -> tuple[int, int]:
        return (int(self.rng.choice(options)), int(self.rng.choice(options)))

    def pads(self, kernel: tuple[int, int]) -> tuple[int, int, int, int]:
        t, left, b, r = (int(self.rng.integers(0, max(1, kernel[i % 2]))) for i in range(4))
        return (t, left, b, r) if self.rng.random() < 0.5 else (t, left, t, left)

    def act(self, x: str) -> str:
        return self.add(ACTIVATIONS[int(self.rng.integers(len(ACTIVATIONS)))], x)

    def norm(self, x: str) -> str:
        c = self.shapes[x][0]
        groups = [g for g in (1, 2, 4) if c % g == 0]
        roll = self.rng.random()
        if roll < 0.6:
            scale, shift = bool(self.rng.random() < 0.8), bool(self.rng.random() < 0.8)
            return self.add(BatchNorm(eps=1e-3, scale=scale, shift=shift, frozen=bool(self.rng.random() < 0.2)), x)
        if roll < 0.8:
            return self.add(GroupNorm(groups=int(self.rng.choice(groups)), affine=bool(self.rng.random() < 0.7)), x)
        return self.add(Affine(shift=bool(self.rng.random() < 0.5), frozen=bool(self.rng.random() < 0.3)), x)

    def any_conv(self, x: str, width: int | None = None) -> str:
        c = self.shapes[x][0]
        kernel, dilation = self.pair(1, 2, 3), self.pair(1, 1, 2)
        width = width or int(self.choice(4, 6, 8))
        groups = int(self.choice(*[g for g in (1, 1, 1, 2, 4, c) if c % g == 0 and width % g == 0]))
        op = Conv(
            width=width,
            kernel=kernel,
            stride=self.pair(1, 1, 2),
            pads=self.pads(kernel),
            dilation=dilation,
            groups=groups,
            bias=bool(self.rng.random() < 0.5),
            frozen=bool(self.rng.random() < 0.1),
        )
        try:
            return self.add(op, x)
        except ValueError:
            return self.add(Conv(width=width, bias=True), x)

    def residual(self, x: str) -> str:
        c = self.shapes[x][0]
        y = x if self.rng.random() < 0.5 else self.act(self.norm(x))  # pre-activation, now and then
        y = self.act(self.norm(self.conv(y, int(self.choice(4, 6, 8)))))
        width = c if self.rng.random() < 0.6 else c + 2
        stride = 1 if width == c else 2
        y = self.conv(y, width, stride=stride, bias=bool(self.rng.random() < 0.3))
        if self.rng.random() < 0.7:
            y = self.norm(y)
        if self.rng.random() < 0.3:
            y = self.gate(y)
        if self.rng.random() < 0.2:
            y = self.add(Dropout(probability=0.2, whole=True), y)
        if width == c:
            skip = x
        elif self.rng.random() < 0.5:
            skip = self.add(ChannelSelect(channels=(-1, *range(c), -1), stride=(2, 2)), x)
        else:
            skip = self.norm(self.conv(x, width, 1, 2))
        pair = (y, skip) if self.rng.random() < 0.7 else (skip, y)
        z = self.add(Add(), *pair)
        return self.act(z) if self.rng.random() < 0.7 else z

    def gate(self, x: str) -> str:
        c = self.shapes[x][0]
        roll = self.rng.random()
        if roll < 0.4:
            y = self.add(GlobalPool(kind=self.choice("avg", "max")), x)
            y = self.act(self.add(Linear(width=3), y))
            y = self.add(Linear(width=c, bias=bool(self.rng.random() < 0.5)), y)
        elif roll < 0.55:
            length = c + int(self.rng.integers(0, 3))
            places = tuple(int(i) for i in self.rng.permutation(length)[:c])
            op = ChannelConv(kernel=int(self.choice(1, 3, 5)), length=length, places=places, bias=bool(self.rng.random() < 0.5))
            y = self.add(op, self.add(GlobalPool(), x))
        elif roll < 0.8:
            y = self.add(GlobalPool(keep=True), x)
            y = self.conv(self.act(self.conv(y, 3, 1, bias=True)), c, 1, bias=True)
        else:
            y = self.conv(x, 1, 3, bias=True)
        y = self.add(self.choice(Sigmoid(), HardSigmoid(), Clip(low=0.0, high=1.0)), y)
        return self.add(Multiply(), x, y)

    def branches(self, x: str) -> str:
        parts = [self.act(self.conv(x, int(self.choice(3, 4)), int(self.choice(1, 3)))) for _ in range(2)]
        return self.add(Concat(), *parts, *([x] if self.rng.random() < 0.4 else []))

    def pool(self, x: str) -> str:
        kernel = self.pair(1, 2, 3)
        pads = tuple(min(p, kernel[i % 2] - 1) for i, p in enumerate(self.pads(kernel)))
        shared = {"kernel": kernel, "stride": self.pair(1, 2, 3), "pads": pads, "ceil": bool(self.rng.random() < 0.5)}
        op: Operation = (
            MaxPool(**shared, dilation=self.pair(1, 1, 2) if pads == NO_PADS else ONE)
            if self.rng.random() < 0.5
            else AvgPool(**shared, count_pads=bool(self.rng.random() < 0.5))
        )
        try:
            return self.add(op, x)
        except ValueError:
            return x

    def step(self, x: str) -> str:
        c, h, w = self.shapes[x]
        match int(self.rng.integers(12)):
            case 0 | 1 | 2:
                return self.residual(x)
            case 3 | 4:
                return self.act(self.norm(self.any_conv(x)))
            case 5:
                return self.pool(x)
            case 6:
                return self.gate(x)
            case 7:
                return self.branches(x)
            case 8:
                channels = tuple(int(i) for i in self.rng.integers(-1, c, size=int(self.rng.integers(1, c + 3))))
                return self.add(ChannelSelect(channels=channels, stride=self.pair(1, 2)), x)
            case 9:
                mode = self.choice("constant", "reflect", "edge")
                value = 0.5 if mode == "constant" and self.rng.random() < 0.5 else 0.0
                pads = (1, 0, 1, 1) if min(h, w) > 1 else NO_PADS
                return self.add(Pad(pads=pads, mode=mode, value=value), x)
            case 10:
                size = (int(self.rng.integers(2, 12)), int(self.rng.integers(2, 12)))
                mode = self.choice("nearest", "bilinear")
                return self.add(Resize(size=size, mode=mode, align_corners=mode == "bilinear" and self.rng.random() < 0.5), x)
            case _:
                return self.act(self.add(Dropout(probability=0.3), self.norm(x)))

    def head(self, x: str) -> str:
        roll = self.rng.random()
        if roll < 0.5:
            kind = self.choice("avg", "avg", "max", "max_avg")
            y = self.add(GlobalPool(kind=kind, keep=bool(self.rng.random() < 0.3)), x)
        elif roll < 0.8:
            y = self.conv(x, 4, 1, bias=True)
        else:
            return x  # a feature map is an output as well
        y = self.add(Flatten(), y) if len(self.shapes[y]) == 3 else y
        if self.rng.random() < 0.4:
            y = self.add(Dropout(probability=0.1), self.act(self.norm(self.add(Linear(width=5), y))))
        y = self.add(Linear(width=int(self.choice(1, 4))), y)
        return self.add(Softmax(), y) if self.rng.random() < 0.2 else y


def random_network(seed: int) -> Network:
    """Return a network that the seed decides."""
    m = _Random(seed)
    x = m.act(m.norm(m.any_conv(INPUT, 8)))
    for _ in range(int(m.rng.integers(1, 5))):
        x = m.step(x)
    outputs = [m.head(x)]
    if m.rng.random() < 0.3:
        outputs.append(m.head(m.step(x)))
    read = {i for node in m.nodes for i in node.inputs}
    outputs += [n.name for n in m.nodes if n.name not in read and n.name not in outputs]
    return m.network(*dict.fromkeys(outputs))


@torch.no_grad()
def random_checkpoint(network: Network, seed: int = 0) -> Checkpoint:
    """Return a checkpoint whose every tensor is random: fresh ones hide slips."""
    torch.manual_seed(seed)
    model = build_model(network)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | AffineLayer):
            if isinstance(module.weight, Tensor):
                module.weight.uniform_(0.5, 1.5)
            if isinstance(module.bias, Tensor):
                module.bias.normal_(0, 0.3)
        if isinstance(module, nn.PReLU):
            module.weight.uniform_(0.0, 0.5)
    return Checkpoint(network, tensors_of(model))


def images(network: Network, count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, *network.input_shape, generator=torch.Generator().manual_seed(seed))
