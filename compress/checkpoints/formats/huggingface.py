"""Hugging Face transformers' ResNet (``ResNetModel``, ``ResNetForImageClassification``)."""

from __future__ import annotations

import re

from compress.checkpoints import torch_layout
from compress.checkpoints.base import Checkpoint, LoadOptions, RawState, Root
from compress.checkpoints.layout import Facts, assemble
from compress.checkpoints.refusals import SUPPORTED
from rescompress.core.errors import CheckpointError

DESCRIPTION = "Hugging Face ResNet (resnet.embedder..., resnet.encoder.stages.0.layers.0..., classifier.1)"
MARKER = re.compile(r"encoder\.stages\.\d+\.layers\.\d+\.layer\.0\.convolution\.weight$")

_BLOCK = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(layer\.(\d)|shortcut)\.(convolution|normalization)\.(\w+)")
_STEM = re.compile(r"embedder\.embedder\.(convolution|normalization)\.(\w+)")


def matches(raw: RawState) -> bool:
    """Whether the keys are those of transformers' ResNet."""
    return any(MARKER.match(key) for key in raw.tensors)


def load(raw: RawState, root: Root, options: LoadOptions) -> Checkpoint:
    """Return the checkpoint; raises CheckpointError when it is broken or not supported."""
    stem = raw.shape("embedder.embedder.convolution.weight")
    if stem is not None and len(stem) == 4 and stem[2] == 3:  # a ResNet's is 7x7
        raise CheckpointError("looks like a RegNet (its keys are those of a ResNet, its stem is 3x3)", remedy=SUPPORTED)
    renamed = torch_layout.renamed(raw, _rename)
    layout, _, dropout = torch_layout.read(renamed, root, options)
    return assemble(raw, layout, Facts("huggingface", dropout=dropout), options)


def _rename(key: str) -> str:
    block, stem = _BLOCK.fullmatch(key), _STEM.fullmatch(key)
    if stem:
        return f"{'conv1' if stem[1] == 'convolution' else 'bn1'}.{stem[2]}"
    if not block:
        return key
    name = f"layer{int(block[1]) + 1}.{block[2]}"
    conv = block[5] == "convolution"
    if block[3] == "shortcut":
        return f"{name}.downsample.{0 if conv else 1}.{block[6]}"
    return f"{name}.{'conv' if conv else 'bn'}{int(block[4]) + 1}.{block[6]}"
