"""Networks for the export tests: small ones of every kind, with BatchNorm statistics that predict several classes.

`fake_quantized` is the oracle of INT8: torch's own fake-quantize kernels on the unfolded network.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from compress.resnet import ResNet, build_model, tensors_of
from rescompress.core.layers import walk
from rescompress.core.quantizers import Profile, Quantization, place
from rescompress.core.spec import Block, Head, ModelSpec, Preprocessing, Stem, StemConv

PIXELS = Preprocessing(name="test", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize=None)


def spec_of(
    arch: str,
    stages: list[list[Block]],
    *,
    side: int = 32,
    stem: Stem | None = None,
    head: Head | None = None,
    bare: bool = False,
) -> ModelSpec:
    return ModelSpec(
        arch=arch,
        input_shape=(3, side, side),
        stem=stem or Stem(convs=(StemConv(width=16, kernel=3, stride=1),), max_pool=False),
        stages=tuple(tuple(blocks) for blocks in stages),
        head=None if bare else head or Head(num_classes=10),
        preprocessing=PIXELS,
    )


def basic(name: str, a: int, b: int, **options: object) -> Block:
    return Block.model_validate({"name": name, "kind": "basic", "widths": (a, b), **options})


def bottleneck(name: str, a: int, b: int, c: int, **options: object) -> Block:
    return Block.model_validate({"name": name, "kind": "bottleneck", "widths": (a, b, c), **options})


def cifar_pad() -> ModelSpec:
    """As ResNet-8 for CIFAR with pad shortcuts."""
    pad = {"shortcut": "pad", "stride": 2}
    return spec_of(
        "cifar-pad",
        [
            [basic("layer1.0", 16, 16)],
            [basic("layer2.0", 32, 32, channel_map=(-1,) * 8 + tuple(range(16)) + (-1,) * 8, **pad)],
            [basic("layer3.0", 64, 64, channel_map=(-1,) * 16 + tuple(range(32)) + (-1,) * 16, **pad)],
        ],
    )


def pruned_pad() -> ModelSpec:
    """Odd widths, and pad shortcuts whose channels are scattered, reordered, partly dropped, or not padded at all."""
    return spec_of(
        "pruned-pad",
        [
            [basic("layer1.0", 5, 16)],
            [basic("layer2.0", 7, 9, shortcut="pad", stride=2, channel_map=(-1, 0, -1, 3, 2, 15, -1, 4, 4))],
            [basic("layer3.0", 3, 6, shortcut="pad", stride=2, channel_map=(8, 1, 0, 5, 6, 7))],
            [basic("layer4.0", 3, 6, shortcut="pad", stride=1, channel_map=tuple(range(6)))],
            [basic("layer5.0", 3, 8, shortcut="pad", stride=2, channel_map=(-1,) * 8)],
        ],
    )


def imagenet_basic() -> ModelSpec:
    """As ResNet-18: a 7x7 stem, max pool, projections; odd image sides."""
    return spec_of(
        "imagenet-basic",
        [
            [basic("layer1.0", 16, 16), basic("layer1.1", 16, 16)],
            [basic("layer2.0", 24, 24, shortcut="projection", stride=2), basic("layer2.1", 24, 24)],
        ],
        side=35,
        stem=Stem(convs=(StemConv(width=16),)),
    )


def imagenet_bottleneck() -> ModelSpec:
    """As ResNet-50 with a custom head of hidden layers and dropout."""
    project = {"shortcut": "projection", "stride_at": 1}
    return spec_of(
        "imagenet-bottleneck",
        [
            [bottleneck("layer1.0", 8, 8, 32, **project), bottleneck("layer1.1", 8, 8, 32)],
            [bottleneck("layer2.0", 16, 16, 64, stride=2, **project), bottleneck("layer2.2", 16, 16, 64)],
        ],
        side=40,
        stem=Stem(convs=(StemConv(width=16),)),
        head=Head(num_classes=12, hidden=(24,), dropout=0.3),
    )


def resnet_d() -> ModelSpec:
    """ResNeXt groups, a deep stem, average-pooled projections on odd sizes, stride in the first convolution."""
    pooled = {"shortcut": "projection", "shortcut_pool": True, "stride": 2, "groups": 4}
    return spec_of(
        "resnet-d",
        [
            [bottleneck("layer1.0", 16, 16, 32, shortcut="projection", groups=4)],
            [bottleneck("layer2.0", 16, 16, 48, stride_at=1, **pooled)],
            [bottleneck("layer3.0", 16, 16, 64, stride_at=0, **pooled)],
        ],
        side=36,
        stem=Stem(
            convs=(StemConv(width=8, kernel=3), StemConv(width=8, kernel=3, stride=1), StemConv(width=16, kernel=3, stride=1)),
        ),
    )


def no_batch_norm() -> ModelSpec:
    """Biased convolutions without BatchNorm."""
    plain = {"batch_norm": False, "conv_bias": True}
    return spec_of(
        "no-batch-norm",
        [[basic("layer1.0", 16, 16, **plain)], [basic("layer2.0", 16, 24, shortcut="projection", stride=2, **plain)]],
        stem=Stem(convs=(StemConv(width=16, kernel=3, stride=1),), max_pool=False, batch_norm=False, conv_bias=True),
    )


def biased() -> ModelSpec:
    """A bias in front of every BatchNorm, as Keras writes them, and a binary head."""
    return spec_of(
        "biased",
        [[bottleneck("layer1.0", 8, 8, 32, shortcut="projection", conv_bias=True)]],
        stem=Stem(convs=(StemConv(width=16, kernel=3, stride=1),), max_pool=False, conv_bias=True),
        head=Head(num_classes=1),
    )


def max_and_average() -> ModelSpec:
    """Maximum and average pooling side by side in front of the head, as fastai's."""
    return spec_of("max-and-average", [[basic("layer1.0", 16, 16)]], head=Head(num_classes=6, hidden=(12,), pool="max_avg"))


def backbone() -> ModelSpec:
    """No head: the output is the pooled features."""
    return spec_of("backbone", [[basic("layer1.0", 16, 16)]], bare=True)


ZOO: dict[str, Callable[[], ModelSpec]] = {
    f.__name__: f
    for f in (
        cifar_pad, pruned_pad, imagenet_basic, imagenet_bottleneck, resnet_d, no_batch_norm, biased, max_and_average, backbone,
    )
}  # fmt: skip


def images(spec: ModelSpec, n: int, seed: int = 0) -> Tensor:
    """Return n smooth random pictures, so that neighbouring pixels are alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, spec.input_shape[0], 6, 6, generator=generator)
    fine = torch.randn(n, *spec.input_shape, generator=generator)
    big = nn.functional.interpolate(coarse, spec.input_shape[1:], mode="bilinear")
    return (big + 0.2 * fine).contiguous()


def network(spec: ModelSpec, seed: int = 0) -> ResNet:
    """Return a random network with BatchNorm statistics of real activations, and gammas of both signs, one of them 0."""
    made = copy.deepcopy(_network(spec.model_dump_json(), seed))
    torch.manual_seed(seed)  # the same for who comes next, whether it was made now or before
    return made


@functools.cache
def _network(document: str, seed: int) -> ResNet:
    spec = ModelSpec.model_validate_json(document)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = build_model(spec)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for m in norms:
            size = m.weight.shape
            sign = torch.where(torch.rand(size, generator=generator) < 0.3, -1.0, 1.0)
            m.weight.copy_(sign * (0.5 + torch.rand(size, generator=generator)))
            m.weight[0] = 0.0
            m.bias.copy_(0.3 * torch.randn(size, generator=generator))
            m.momentum = None
        model.train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.eval()
        model(images(spec, 64, seed + 1))
        model.eval()
        for m in model.modules():
            if isinstance(m, nn.Linear):
                m.weight.mul_(6.0)
        if spec.head is not None:  # no class of its own accord wins
            logits_NK = model(images(spec, 64, seed + 1))
            last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
            last.bias.sub_(logits_NK.mean(0))
    return model


def arrays(model: ResNet) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in tensors_of(model).items()}


def quantization_of(
    model: ResNet, x_NCHW: Tensor, profile: Profile = "tensorrt", *, keep_float: frozenset[str] = frozenset()
) -> Quantization:
    """Return every quantizer of `profile` with scales of the largest magnitudes seen on `x_NCHW`."""
    largest: dict[str, float] = {}

    def observe(name: str, value: Tensor) -> None:
        largest[name] = float(value.abs().max())

    with torch.no_grad():
        model(x_NCHW, observe)
    filled = []
    for q in place(model.spec, profile, keep_float=keep_float):
        if q.kind == "weight":
            weight = model.get_submodule(q.tensor).weight.detach()
            scale = tuple((weight.flatten(1).abs().amax(1) / 127.0).clamp_min(1e-8).tolist())
        else:
            scale = (float(np.float32(max(largest[q.shares or q.tensor], 1e-6) / q.high)),)
        filled.append(q.model_copy(update={"scale": scale}))
    return Quantization(profile=profile, quantizers=tuple(filled))


class _Round(nn.Module):
    def __init__(self, scale: float, low: int, high: int) -> None:
        super().__init__()
        self.scale, self.low, self.high = scale, low, high

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, 0, self.low, self.high)


def fake_quantized(model: ResNet, quantization: Quantization) -> ResNet:
    """Return the network that computes with rounded weights and activations: torch's kernels, BatchNorm not folded."""
    copy = build_model(model.spec, tensors_of(model))
    layers = {layer.name for layer in walk(model.spec)}
    for q in quantization.quantizers:
        assert q.tensor in layers
        assert q.scale is not None
        if q.kind == "activation":
            copy.activations[q.tensor.replace(".", "/")] = _Round(q.scale[0], q.low, q.high)
        else:
            weight = copy.get_submodule(q.tensor).weight
            scale, zero = torch.tensor(q.scale), torch.zeros(len(q.scale), dtype=torch.int32)
            rounded = torch.fake_quantize_per_channel_affine(weight.detach(), scale, zero, 0, q.low, q.high)
            weight.data.copy_(rounded)
    return copy.eval()


def logits(model: ResNet, x_NCHW: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(x_NCHW).numpy()
