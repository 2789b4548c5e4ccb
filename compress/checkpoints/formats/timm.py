"""timm's own variants: deep stems (``conv1.0`` ...) and projections behind an average pool (``downsample.1/2``)."""

from __future__ import annotations

from compress.checkpoints import torch_layout
from compress.checkpoints.base import Checkpoint, LoadOptions, RawState, Root
from compress.checkpoints.layout import Facts, assemble

DESCRIPTION = "timm ResNet-C, -D, -T: deep stem (conv1.0), average-pool projection (downsample.1)"
MARKER = torch_layout.MARKER


def matches(raw: RawState) -> bool:
    """Whether the stem is deep or a projection stands behind a pool."""
    return torch_layout.family(raw) == "timm"


def load(raw: RawState, root: Root, options: LoadOptions) -> Checkpoint:
    """Return the checkpoint; raises CheckpointError when it is broken or not supported."""
    layout, pooled, dropout = torch_layout.read(raw, root, options)
    return assemble(raw, layout, Facts("timm", pooled=pooled, dropout=dropout), options)
