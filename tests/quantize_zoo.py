"""Small networks of every architecture, and images for them."""

from __future__ import annotations

import torch

from compress.checkpoints.base import Checkpoint
from compress.resnet import build_model, tensors_of
from rescompress.core.spec import Block, Head, ModelSpec, Stem, StemConv


def basic(name: str, inner: int, out: int, **more: object) -> Block:
    return Block(name=name, kind="basic", widths=(inner, out), **more)


def bottleneck(name: str, a: int, b: int, out: int, **more: object) -> Block:
    return Block(name=name, kind="bottleneck", widths=(a, b, out), **more)


CIFAR = Stem(convs=(StemConv(width=8, kernel=3, stride=1),), max_pool=False)
IMAGENET = Stem(convs=(StemConv(width=8),))
PROJECT = {"shortcut": "projection", "stride": 2}


def pad(inner: int, into: int, out: int, name: str) -> Block:
    front = (out - into) // 2
    channel_map = (-1,) * front + tuple(range(into)) + (-1,) * (out - into - front)
    return basic(name, inner, out, stride=2, shortcut="pad", channel_map=channel_map)


SPECS: dict[str, ModelSpec] = {
    "basic": ModelSpec(
        input_shape=(3, 32, 32),
        stem=IMAGENET,
        stages=((basic("layer1.0", 5, 8),), (basic("layer2.0", 8, 12, **PROJECT), basic("layer2.1", 7, 12))),
        head=Head(num_classes=6),
    ),
    "pad": ModelSpec(
        input_shape=(3, 16, 16),
        stem=CIFAR,
        stages=(
            (basic("layer1.0", 8, 8),),
            (pad(6, 8, 16, "layer2.0"), basic("layer2.1", 9, 16)),
            (pad(8, 16, 32, "layer3.0"),),
        ),
        head=Head(num_classes=10),
    ),
    "bottleneck": ModelSpec(
        input_shape=(3, 32, 32),
        stem=IMAGENET,
        stages=(
            (bottleneck("layer1.0", 4, 5, 16, shortcut="projection"), bottleneck("layer1.2", 4, 4, 16)),
            (bottleneck("layer2.0", 8, 8, 24, stride_at=1, **PROJECT),),
        ),
        head=Head(num_classes=5),
    ),
    "deep-stem-average-pool": ModelSpec(
        input_shape=(3, 33, 33),
        stem=Stem(
            convs=(StemConv(width=4, kernel=3), StemConv(width=4, kernel=3, stride=1), StemConv(width=8, kernel=3, stride=1))
        ),
        stages=(
            (bottleneck("layer1.0", 4, 4, 16, shortcut="projection"),),
            (bottleneck("layer2.0", 4, 4, 24, stride_at=1, shortcut_pool=True, **PROJECT),),
        ),
        head=Head(num_classes=5),
    ),
    "groups": ModelSpec(
        input_shape=(3, 32, 32),
        stem=IMAGENET,
        stages=(
            (bottleneck("layer1.0", 8, 8, 16, groups=4, shortcut="projection"), bottleneck("layer1.1", 8, 8, 16, groups=2)),
        ),
        head=Head(num_classes=5),
    ),
    "no-batch-norm": ModelSpec(
        input_shape=(1, 16, 16),
        stem=Stem(convs=(StemConv(width=8, kernel=3, stride=1),), max_pool=False, batch_norm=False, conv_bias=True),
        stages=(
            (basic("layer1.0", 8, 8, batch_norm=False, conv_bias=True),),
            (basic("layer2.0", 8, 12, batch_norm=False, conv_bias=True, **PROJECT),),
        ),
        head=Head(num_classes=4),
        preprocessing={"mean": (0.5,), "std": (0.5,)},
    ),
    "hidden-head": ModelSpec(
        input_shape=(3, 16, 16),
        stem=CIFAR,
        stages=((basic("layer1.0", 8, 8),),),
        head=Head(num_classes=4, hidden=(12, 7), dropout=0.2),
    ),
    "max-and-average": ModelSpec(
        input_shape=(3, 16, 16), stem=CIFAR, stages=((basic("layer1.0", 8, 8),),), head=Head(num_classes=4, pool="max_avg")
    ),
    "dropout-head": ModelSpec(
        input_shape=(3, 16, 16), stem=CIFAR, stages=((basic("layer1.0", 8, 8),),), head=Head(num_classes=4, dropout=0.2)
    ),
    "backbone": ModelSpec(input_shape=(3, 16, 16), stem=CIFAR, stages=((basic("layer1.0", 8, 8),),), head=None),
}


def images_for(spec: ModelSpec, batches: int = 3, size: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, *spec.input_shape, generator=generator) for _ in range(batches)]


def checkpoint_of(arch: str) -> Checkpoint:
    """A network with random weights, BatchNorm gammas of both signs, and statistics from images."""
    spec = SPECS[arch]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = build_model(spec)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "bn" in name or "downsample.1" in name:
                    parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.5)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        for x in images_for(spec):
            model(x)
    return Checkpoint(spec, tensors_of(model.eval()))
