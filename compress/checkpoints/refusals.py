"""Names the network that a checkpoint holds when it is none of those that are supported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rescompress.core.errors import CheckpointError

if TYPE_CHECKING:  # a file that is not there is missed without torch
    from compress.checkpoints.base import Stored

SUPPORTED = (
    "keys that are known: `rescompress formats`; a network of other names: state its code too (--code model.py:make_net), or "
    "give its ONNX file, its torch.export archive or the whole Keras model"
)
"""What to do about keys of no layout: the computation of the network says what they do not."""
OF_A_TEACHER = (
    "--code is of the network that is taught: give the teacher as safetensors, as `prune` leaves it beside its result "
    "(--teacher dense), or its ONNX file"
)
"""What to do about such a teacher."""
_SIGNS: tuple[tuple[str, str], ...] = (
    (r"(^|\.)denseblock\d|denselayer\d", "a DenseNet"),
    (r"(^|\.)(relative_position_bias_table)", "a Swin Transformer"),
    (
        r"(^|\.)(cls_token|class_token|pos_embed|position_embeddings)|attn\.qkv|self_attention|patch_embed",
        "a Vision Transformer",
    ),
    (r"(^|\.)(dwconv|conv_dw)\.|(^|\.)conv_stem\.", "a network of depthwise convolutions (ConvNeXt, MobileNet, EfficientNet)"),
    (r"features\.\d+\.\d+\.layer_scale", "a ConvNeXt"),
    (r"features\.\d+\.(conv|block)\.", "a MobileNet or EfficientNet"),
    (r"_blocks\.\d+\._depthwise", "an EfficientNet"),
    (r"layer\d+\.\d+\.conv\d\.(paths|attn|conv)\.", "a ResNet with selective or split attention (SKNet, ResNeSt)"),
    (r"\.gain$", "a normaliser-free ResNet"),
    (r"branch[12]\.\d|branch_main", "a ShuffleNet"),
    (r"Mixed_\d|inception\d", "an Inception network"),
    (r"features\.\d+\.(squeeze|expand)", "a SqueezeNet"),
    (r"stages\.\d+\.blocks\.\d+\.norm1|(^|\.)block_group\d|(^|\.)body\.block\d", "a pre-activation ResNet (V2)"),
    (r"trunk_output|(^|\.)s\d\.b\d+\.conv", "a RegNet"),
    (r"(^|\.)features\.0\.weight", "a VGG or AlexNet"),
    (r"bottom_up\.|(^|\.)(rpn|roi_heads|fpn)\b", "an object detector"),
    (r"lstm|(^|\.)rnn|gru\.", "a recurrent network"),
    (r"lm_head|self_attn|embed_tokens|attention\.", "a transformer"),
)


def refusal(tensors: Mapping[str, Stored]) -> CheckpointError:
    """Return the error that says what a file holds and what is supported."""
    for pattern, what in _SIGNS:
        compiled = re.compile(pattern)
        sign = next((key for key in tensors if compiled.search(key)), None)
        if sign is not None:
            return CheckpointError(f"looks like {what} (it holds {sign[:100]!r})", remedy=SUPPORTED)
    keys = list(tensors)
    shown = ", ".join(f"{k[:60]} {tensors[k].shape}" for k in keys[:3])
    return CheckpointError(f"is no ResNet that is known here: it holds {len(keys)} tensors, such as {shown}", remedy=SUPPORTED)
