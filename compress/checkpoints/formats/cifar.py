"""CIFAR networks: a 3x3 stem, pad shortcuts (option A) or projections, ``linear`` or ``fc`` as the head.

The two common layouts: three stages of 16, 32 and 64 channels (akamaster/pytorch_resnet_cifar10,
chenyaofo/pytorch-cifar-models), and four stages of 64 to 512 with ``shortcut.0/1`` (kuangliu/pytorch-cifar).
"""

from __future__ import annotations

from compress.checkpoints import torch_layout
from compress.checkpoints.base import Checkpoint, LoadOptions, RawState, Root
from compress.checkpoints.layout import Facts, assemble

DESCRIPTION = "CIFAR ResNet: 3x3 stem, pad (option A) or projection shortcuts, head called linear or fc"
MARKER = torch_layout.MARKER


def matches(raw: RawState) -> bool:
    """Whether the stem is a single 3x3 convolution."""
    return torch_layout.family(raw) == "cifar"


def load(raw: RawState, root: Root, options: LoadOptions) -> Checkpoint:
    """Return the checkpoint; raises CheckpointError when it is broken or not supported.

    Preprocessing: networks with pad shortcuts follow the code that made them popular, which takes ImageNet's mean and
    standard deviation; the others are taken to use CIFAR-10's own.
    """
    layout, pooled, dropout = torch_layout.read(raw, root, options)
    padded = not any(".downsample." in key for key in layout.tensors)
    facts = Facts("cifar", pooled=pooled, dropout=dropout, preprocessing="imagenet" if padded else "cifar")
    return assemble(raw, layout, facts, options)
