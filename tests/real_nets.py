"""The few lines of code that build the networks of ../shared/data/real."""

from __future__ import annotations

CODE = """
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, i, o, stride, residual):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1), nn.BatchNorm2d(o)
        self.more, self.residual = o - i, residual

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if not self.residual:
            return F.relu(y)
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(x + y)


class Atreides(nn.Module):
    def __init__(self, n, residual=True):
        super().__init__()
        self.conv0, self.bn0 = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
        widths = [16] * n + [32] * n + [64] * n
        self.convs = nn.Sequential(*(
            Block(i, o, 1 if i == o else 2, residual) for i, o in zip([16, *widths], widths)
        ))
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = self.convs(F.relu(self.bn0(self.conv0(x))))
        return self.fc(x.mean(3).mean(2))


class Projected(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1), nn.BatchNorm2d(o)
        self.conv3 = nn.Conv2d(i, o, 1, stride)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.conv3(x))


class Planetary(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv2, self.conv3, self.conv4 = (
            nn.Sequential(*(Projected(i if k == 0 else o, o, s if k == 0 else 1) for k in range(3)))
            for i, o, s in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return self.fc(torch.flatten(F.avg_pool2d(x, x.size()[3]), 1))


class Lightning(nn.Module):
    def __init__(self, i, o, stride, pre):
        super().__init__()
        conv = lambda a, b, s: nn.Conv2d(a, b, 3, s, 1, bias=False)
        if pre:
            norm = lambda c: (nn.BatchNorm2d(c), nn.ReLU())
            self.net = nn.Sequential(*norm(i), conv(i, o, stride), *norm(o), conv(o, o, 1))
            self.downsample = nn.Sequential(*norm(i), nn.Conv2d(i, o, 1, stride, bias=False)) if stride > 1 else None
        else:
            self.net = nn.Sequential(conv(i, o, stride), nn.BatchNorm2d(o), nn.ReLU(), conv(o, o, 1), nn.BatchNorm2d(o))
            self.downsample = nn.Conv2d(i, o, 1, stride) if stride > 1 else None
        self.pre = pre

    def forward(self, x):
        z = self.net(x)
        x = x if self.downsample is None else self.downsample(x)
        return z + x if self.pre else F.relu(z + x)


class Tutorial5(nn.Module):
    def __init__(self, pre):
        super().__init__()
        first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.input_net = nn.Sequential(first) if pre else nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU())
        widths = [16] * 3 + [32] * 3 + [64] * 3
        self.blocks = nn.Sequential(*(Lightning(i, o, 1 if i == o else 2, pre) for i, o in zip([16, *widths], widths)))
        self.output_net = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return self.output_net(self.blocks(self.input_net(x)))


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv_block1 = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())
        self.conv_block2 = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        return F.relu(self.conv_block2(self.conv_block1(x)) + x)


class AlphaZero(nn.Module):
    def __init__(self):
        super().__init__()
        c = 40
        self.conv_block = nn.Sequential(nn.Conv2d(17, c, 3, padding=3, bias=False), nn.BatchNorm2d(c), nn.ReLU())
        self.res_blocks = nn.Sequential(*(Residual(c) for _ in range(10)))
        head = lambda k: (nn.Conv2d(c, k, 1, bias=False), nn.BatchNorm2d(k), nn.ReLU(), nn.Flatten())
        self.policy_head = nn.Sequential(*head(2), nn.Linear(578, 169))
        self.value_head = nn.Sequential(*head(1), nn.Linear(289, 80), nn.ReLU(), nn.Linear(80, 1), nn.Tanh())

    def forward(self, x):
        x = self.res_blocks(self.conv_block(x))
        return self.policy_head(x), self.value_head(x)


def resnet20():
    return Atreides(3)

def resnet56():
    return Atreides(9)

def plain20():
    return Atreides(3, residual=False)

def planetary():
    return Planetary()

def tutorial5():
    return Tutorial5(pre=False)

def preact():
    return Tutorial5(pre=True)

def gomoku():
    return AlphaZero()
"""

FILES: dict[str, tuple[str | None, tuple[int, int, int], int]] = {
    "PlanetaryRing__2024-11-20.pt": ("planetary", (3, 32, 32), 9),
    "akamaster__resnet44-014dd654.th": (None, (3, 32, 32), 21),
    "alibaba-tiny__model_ic.onnx": (None, (3, 32, 32), 3),
    "atreides-K__plainnet_neo_v1_5e4_20.pth": ("plain20", (3, 32, 32), 0),
    "atreides-K__resnet20.pth": ("resnet20", (3, 32, 32), 9),
    "atreides-K__resnetv2_5e4_56.pth": ("resnet56", (3, 32, 32), 27),
    "michaelnny__gomoku13_training_steps_219000.ckpt": ("gomoku", (17, 13, 13), 10),
    "mlcommons-tiny__pretrainedResnet.h5": (None, (3, 32, 32), 3),
    "phlippe__tutorial5_ResNet.ckpt": ("tutorial5", (3, 32, 32), 9),
    "phlippe__tutorial5_ResNetPreAct.ckpt": ("preact", (3, 32, 32), 9),
}
"""By file: the function of `CODE` that builds it (None: the file says it all), its input, its residual blocks."""
