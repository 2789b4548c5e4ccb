"""Networks as people write them, in torch: small ones, each with a part that some real training code has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two convolutions and a shortcut, which pads channels with zeros where the width changes."""

    def __init__(
        self, i: int, o: int, stride: int, shortcut: Callable[[Tensor], Tensor] | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.conv_a, self.norm_a = nn.Conv2d(i, o, 3, stride, 1, bias=bias), nn.BatchNorm2d(o)
        self.conv_b, self.norm_b = nn.Conv2d(o, o, 3, 1, 1, bias=bias), nn.BatchNorm2d(o)
        self.skip = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_b(self.conv_b(F.relu(self.norm_a(self.conv_a(x)))))
        return F.relu(y + (x if self.skip is None else self.skip(x)))


class PreActivation(nn.Module):
    """BatchNorm and ReLU before the convolutions."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(i, o, 1, stride) if stride > 1 or i != o else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + skip


class Gated(nn.Module):
    """A block with squeeze and excitation by linear layers."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(c, c, 3, 1, 1), nn.Linear(c, 4), nn.Linear(4, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(y.mean((2, 3))))))
        return F.relu(x + y * gate.view(y.size(0), -1, 1, 1))


class Tutorial(nn.Module):
    """The block of tutorials: convolutions with bias, no BatchNorm, identity shortcut."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(c, c, 3, padding="same"), nn.Conv2d(c, c, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + x)


class Head(nn.Module):
    """Averages the map and classifies."""

    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.fc = nn.Linear(c, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Blur(nn.Module):
    """Anti-aliased down-sampling: a fixed depthwise filter behind mirrored edges."""

    def __init__(self, c: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("filter", (taps[:, None] * taps / 16).expand(c, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.get_buffer("filter"), stride=2, groups=x.shape[1])


class Ecological(nn.Module):
    """Efficient channel attention: a convolution over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3), keepdim=True)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * y.sigmoid().expand_as(x)


class Selective(nn.Module):
    """Two branches that share out their channels by a softmax (SKNet)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=2, dilation=2)
        self.reduce, self.select = nn.Conv2d(c, 4, 1), nn.Conv2d(4, 2 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        paths = torch.stack([F.relu(self.one(x)), F.relu(self.two(x))], 1)
        share = self.select(F.relu(self.reduce(paths.sum(1).mean((2, 3), keepdim=True))))
        share = share.view(x.size(0), 2, -1, 1, 1).softmax(1)
        return (paths * share).sum(1)


class Frozen(nn.Module):
    """A BatchNorm written out with buffers, as torchvision's detectors have it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(c) + 0.5)
        self.register_buffer("mean", torch.randn(c))
        self.register_buffer("var", torch.rand(c) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.get_buffer("scale") * (self.get_buffer("var") + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) - (self.get_buffer("mean") * scale).reshape(1, -1, 1, 1)


class TwoHeads(nn.Module):
    """A trunk with a policy and a value, as AlphaZero has them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(17, 8, 3, padding=1), nn.ReLU(), Tutorial(8))
        self.policy = nn.Sequential(nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 13 * 13, 170))
        self.value = nn.Sequential(
            nn.Conv2d(8, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(169, 8), nn.ReLU(), nn.Linear(8, 1), nn.Tanh()
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {"policy": self.policy(x), "value": self.value(x)}


class Dependent(nn.Module):
    """Decides by what it has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.relu() if y.sum() > 0 else y


def slice_and_pad(x: Tensor) -> Tensor:
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))


def pool_and_cat(x: Tensor) -> Tensor:
    x = F.avg_pool2d(x, 1, 2)
    return torch.cat([x, torch.zeros_like(x)], 1)


def cat_by_mul(x: Tensor) -> Tensor:
    x = F.max_pool2d(x, 1, 2)
    return torch.cat((x, x.mul(0)), 1)


def stem(c: int = 3, **options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, 8, 3, padding=1, **options), nn.BatchNorm2d(8), nn.ReLU())


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "padded by slices": (lambda: nn.Sequential(stem(), Block(8, 16, 2, slice_and_pad), Head(16, 5)), (3, 16, 16)),
    "padded by a pool": (lambda: nn.Sequential(stem(), Block(8, 16, 2, pool_and_cat, bias=True), Head(16, 5)), (3, 17, 17)),
    "chain": (lambda: nn.Sequential(stem(), nn.Conv2d(8, 8, 3, 2), nn.LeakyReLU(0.1), Head(8, 5)), (3, 16, 16)),
    "pre-activation": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            PreActivation(8, 8, 1),
            PreActivation(8, 16, 2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Head(16, 5),
        ),
        (3, 16, 16),
    ),
    "tutorial": (
        lambda: nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), nn.ReLU(), Tutorial(8), Tutorial(8), Head(8, 10)),
        (1, 28, 28),
    ),
    "gates": (lambda: nn.Sequential(stem(), Gated(8), Ecological(), Selective(8), Head(8, 5)), (3, 16, 16)),
    "blur": (lambda: nn.Sequential(stem(), Blur(8), Tutorial(8), Head(8, 5)), (3, 16, 16)),
    "frozen": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), Frozen(8), nn.ReLU(), Tutorial(8), Head(8, 5)),
        (3, 16, 16),
    ),
    "activations": (
        lambda: nn.Sequential(
            *(nn.Conv2d(4, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.GELU()),
            *(nn.Conv2d(8, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3, dilation=2), nn.ELU(), nn.Conv2d(8, 8, 3), nn.PReLU(8)),
            *(nn.GELU("tanh"), nn.Hardsigmoid(), nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        ),
        (4, 24, 20),
    ),
    "flatten": (
        lambda: nn.Sequential(
            stem(),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            nn.Flatten(),
            nn.Linear(8 * 81, 9),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(9, 4),
        ),
        (3, 16, 16),
    ),
    "odd pools": (
        lambda: nn.Sequential(
            stem(),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            nn.ZeroPad2d((1, 0, 2, 1)),
            nn.MaxPool2d(3, 2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 3),
            nn.LogSoftmax(1),
        ),
        (3, 25, 25),
    ),
    "padded maximum": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ZeroPad2d((2, 1, 2, 1)), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(512, 3)
        ),
        (3, 16, 16),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), Tutorial(8), Head(8, 5)),
        (3, 16, 16),
    ),
    "no scale": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), Head(8, 5)),
        (3, 16, 16),
    ),
    "shuffle": (
        lambda: nn.Sequential(stem(), Call(shuffled), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), Head(8, 5)),
        (3, 16, 16),
    ),
    "input normalised": (
        lambda: nn.Sequential(Call(lambda x: (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.25), stem(), Head(8, 5)),
        (3, 16, 16),
    ),
    "features": (lambda: nn.Sequential(stem(), Tutorial(8)), (3, 16, 16)),
    "two heads": (TwoHeads, (17, 13, 13)),
}
"""By name: what makes the network, and its input."""


def made(name: str, seed: int = 0) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return a network in evaluation mode, its statistics and affine parts random, and its input."""
    torch.manual_seed(seed)
    make, shape = NETS[name]
    module = make()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d | nn.GroupNorm):
            for key, value in part.state_dict().items():
                if value.is_floating_point():
                    value.copy_(torch.rand_like(value) + (0.5 if key in ("weight", "running_var") else -0.5))
    return module.eval(), shape
