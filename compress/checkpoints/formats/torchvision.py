"""torchvision's layout: one stem convolution, four stages, projections as ``downsample.0/1``; timm shares it."""

from __future__ import annotations

from compress.checkpoints import torch_layout
from compress.checkpoints.base import Checkpoint, LoadOptions, RawState, Root
from compress.checkpoints.layout import Facts, assemble

DESCRIPTION = "torchvision and timm ResNet, Wide ResNet, ResNeXt (conv1, layer1.0.conv1, downsample.0, fc)"
MARKER = torch_layout.MARKER


def matches(raw: RawState) -> bool:
    """Whether there is one stem convolution, and no sign of timm's or the CIFAR networks' own variants."""
    return torch_layout.family(raw) == "torchvision"


def load(raw: RawState, root: Root, options: LoadOptions) -> Checkpoint:
    """Return the checkpoint; raises CheckpointError when it is broken or not supported."""
    layout, pooled, dropout = torch_layout.read(raw, root, options)
    return assemble(raw, layout, Facts("torchvision", pooled=pooled, dropout=dropout), options)
