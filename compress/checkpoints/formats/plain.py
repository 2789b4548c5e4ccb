"""Plain residual networks: a list of two-convolution blocks with identity shortcuts, with or without BatchNorm.

What many small projects write: ``stem``/``conv_in``, then ``blocks.0.conv1`` ... of one width, then a linear layer.
"""

from __future__ import annotations

import re

from compress.checkpoints import torch_layout
from compress.checkpoints.base import Checkpoint, LoadOptions, RawState, Root
from compress.checkpoints.layout import Facts, assemble

DESCRIPTION = "plain residual blocks in one list (blocks.0.conv1, blocks.0.conv2 ...), with or without BatchNorm"
_LIST = r"(?:blocks?|res_?blocks?|residual_?blocks?|res_?layers?|body|trunk|layers|res)"
MARKER = re.compile(rf"{_LIST}\.?\d+\.conv1\.weight$")

_BLOCK = re.compile(rf"{_LIST}\.?(\d+)\.(.+)")
_STEM = re.compile(
    r"(?:stem|conv_in|conv_first|first_conv|input_conv|conv_input|conv0|conv|initial|entry|conv1|stem\.conv|stem\.0|stem_conv)"
    r"\.(weight|bias)"
)
_STEM_NORM = re.compile(
    r"(?:stem_bn|bn_in|bn0|bn|norm|stem\.bn|stem\.1|bn1)\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)


def matches(raw: RawState) -> bool:
    """Whether there is one list of blocks of two 3x3 convolutions, and none of torchvision's stages."""
    if any(torch_layout.MARKER.match(key) for key in raw.tensors):
        return False
    firsts = [raw.tensors[key].shape for key in raw.tensors if MARKER.match(key)]
    return bool(firsts) and all(len(s) == 4 and s[0] == s[1] and s[2] == 3 for s in firsts)


def load(raw: RawState, root: Root, options: LoadOptions) -> Checkpoint:
    """Return the checkpoint; raises CheckpointError when it is broken or not supported."""
    numbers = sorted({int(m[1]) for m in map(_BLOCK.fullmatch, raw.tensors) if m})
    position = {number: i for i, number in enumerate(numbers)}

    def rename(key: str) -> str:
        block, stem, norm = _BLOCK.fullmatch(key), _STEM.fullmatch(key), _STEM_NORM.fullmatch(key)
        if block:
            return f"layer1.{position[int(block[1])]}.{block[2]}"
        if stem and (len(raw.tensors[key].shape) == 4 or stem[1] == "bias"):
            return f"conv1.{stem[1]}"
        return f"bn1.{norm[1]}" if norm else key

    layout, pooled, dropout = torch_layout.read(torch_layout.renamed(raw, rename), root, options)
    layout.notes.append("every block is taken to end in a ReLU behind the addition")
    return assemble(raw, layout, Facts("plain", pooled=pooled, dropout=dropout), options)
