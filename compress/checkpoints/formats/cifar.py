"""CIFAR networks: a 3x3 stem, pad shortcuts (option A) or projections, ``linear`` or ``fc`` as the head.

The two common layouts: three stages of 16, 32 and 64 channels (akamaster/pytorch_resnet_cifar10,
chenyaofo/pytorch-cifar-models), and four stages of 64 to 512 with ``shortcut.0/1`` (kuangliu/pytorch-cifar).
"""

from __future__ import annotations

from compress.checkpoints import torch_layout
from compress.checkpoints.base import Checkpoint, LoadOptions, RawState, Root
from compress.checkpoints.layout import Facts, Layout, assemble

DESCRIPTION = "CIFAR ResNet: 3x3 stem, pad (option A) or projection shortcuts, head called linear or fc"
MARKER = torch_layout.MARKER


def matches(raw: RawState) -> bool:
    """Whether the stem is a single 3x3 convolution."""
    return torch_layout.family(raw) == "cifar"


def load(raw: RawState, root: Root, options: LoadOptions) -> Checkpoint:
    """Return the checkpoint; raises CheckpointError when it is broken or not supported.

    Preprocessing is taken to be that of the code that made the layout popular: ImageNet's for pad shortcuts (akamaster),
    `pytorch-cifar` for three stages (chenyaofo; `cifar100` for 100 classes) and for shortcuts that are called so
    (kuangliu), and CIFAR-10's own statistics for torchvision's names behind a 3x3 stem.
    """
    layout, pooled, dropout = torch_layout.read(raw, root, options)
    facts = Facts("cifar", pooled=pooled, dropout=dropout, preprocessing=_preprocessing(raw, layout))
    return assemble(raw, layout, facts, options)


def _preprocessing(raw: RawState, layout: Layout) -> str:
    if not any(".downsample." in key for key in layout.tensors):
        return "imagenet"
    if any(".shortcut." in key for key in raw.tensors):
        return "pytorch-cifar"
    if any(key.startswith("layer4.") for key in layout.tensors):
        return "cifar"
    return "cifar100" if layout.head and layout.head[-1][0].shape[0] == 100 else "pytorch-cifar"
