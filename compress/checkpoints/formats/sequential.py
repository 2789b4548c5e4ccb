"""A torch ResNet cut into an ``nn.Sequential`` of its children: bare backbones, and fastai's learners.

``Sequential(*list(resnet.children()))`` numbers its parts: 0 the stem's convolution, 1 its BatchNorm, 4 to 7 the stages.
fastai puts such a body at ``0`` and a head of its own at ``1``.
"""

from __future__ import annotations

import dataclasses
import re

from compress.checkpoints import torch_layout
from compress.checkpoints.base import Checkpoint, LoadOptions, RawState, Root
from compress.checkpoints.layout import Facts, assemble

DESCRIPTION = "a ResNet as nn.Sequential of its children (0, 1, 4.0.conv1 ...), as in fastai and feature extractors"
MARKER = re.compile(r"4\.\d+\.conv1\.weight$")
_PART = re.compile(r"(\d+)\.(.+)")


def matches(raw: RawState) -> bool:
    """Whether part 0 is a convolution, part 1 a BatchNorm and part 4 holds residual blocks."""
    stem, norm = raw.shape("0.weight"), raw.shape("1.running_mean")
    return stem is not None and len(stem) == 4 and norm is not None and any(MARKER.match(key) for key in raw.tensors)


def load(raw: RawState, root: Root, options: LoadOptions) -> Checkpoint:
    """Return the checkpoint; raises CheckpointError when it is broken or not supported."""
    renamed = torch_layout.renamed(raw, _rename)
    outside = root.outside
    if root.prefix.endswith("0."):  # fastai: the head stands beside the body
        sibling = f"{root.prefix[:-2]}1."
        outside = {
            k.replace(sibling, f"{root.prefix[:-2]}fc.", 1) if k.startswith(sibling) else k: v for k, v in outside.items()
        }
    layout, pooled, dropout = torch_layout.read(renamed, dataclasses.replace(root, outside=outside), options)
    return assemble(raw, layout, Facts("sequential", pooled=pooled, dropout=dropout), options)


def _rename(key: str) -> str:
    match = _PART.fullmatch(key)
    if not match:
        return key
    index, rest = int(match[1]), match[2]
    if index in (0, 1):
        return f"{'conv1' if index == 0 else 'bn1'}.{rest}"
    if 4 <= index <= 7:
        return f"layer{index - 3}.{rest}"
    return f"fc.{index}.{rest}" if index >= 8 else key  # the pooling, and a head of any depth
