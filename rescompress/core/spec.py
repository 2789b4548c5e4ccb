"""`ModelSpec`: the recipe of a ResNet, in a few numbers.

`rescompress.core.recipe.network_of` makes the graph of it, `rescompress.core.graph.Network`, which everything reads. The
formats that know the usual key layouts, and the zoo, speak in recipes; networks that no recipe can say (pruned ones, those
of other people's codes) are graphs from the start.

Widths are free: each convolution carries its own number of output channels. Tensor names are those of torchvision
(``conv1``, ``layer1.0.conv1``, ``layer1.0.bn1``, ``layer1.0.downsample.0``, ``fc``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

Width = Annotated[int, Field(ge=1, le=1_000_000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
ChannelOrder = Literal["rgb", "bgr"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"]


class Frozen(BaseModel):
    """An immutable pydantic model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Preprocessing(Frozen):
    """How uint8 pixels become the network's input: ``(pixel * scale - mean) / std``, per channel.

    Attributes:
        name: Short name, such as ``imagenet``, ``cifar`` or ``keras-caffe``.
        mean: Per channel, in the unit of ``pixel * scale``, in the order of `channel_order`.
        std: Per channel, likewise.
        scale: What a 0..255 pixel is multiplied by first.
        channel_order: The order in which the network reads the channels.
        resize: What is done before the centre of the input's size is cut out. A number: the shorter side gets that length,
            and the longer one the same ratio. A pair: the whole picture gets that height and width. None: the whole picture
            gets the input's size, and nothing is cut. A size below the input's is taken as the input's.
        interpolation: Filter of the resize.
        antialias: Whether the filter widens where a picture shrinks, as in Pillow and torchvision; without it (``bilinear``
            only) four pixels are read whatever the ratio, as Keras and TensorFlow do.
        assumed: True where no file stated it: reports then say so.
    """

    name: str = "imagenet"
    mean: tuple[Finite, ...] = (0.485, 0.456, 0.406)
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)
    scale: Positive = 1.0 / 255.0
    channel_order: ChannelOrder = "rgb"
    resize: int | tuple[int, int] | None = 256
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    assumed: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.antialias and self.interpolation != "bilinear":
            raise ValueError(f"{self.interpolation} without antialiasing is not known")
        return self

    @model_serializer(mode="wrap")
    def _document(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the usual antialiasing out: files keep the bytes they had before there was another kind."""
        document: dict[str, Any] = handler(self)
        if self.antialias:
            del document["antialias"]
        return document


class StemConv(Frozen):
    """One convolution of the stem."""

    width: Width
    kernel: int = Field(7, ge=1, le=15)
    stride: int = Field(2, ge=1, le=4)


class Stem(Frozen):
    """What stands before the first block.

    Attributes:
        convs: One convolution, or the three of a deep stem.
        max_pool: Whether a 3x3 stride-2 max pool follows.
        batch_norm: Whether each convolution is followed by BatchNorm.
        conv_bias: Whether the convolutions have a bias of their own.
    """

    convs: tuple[StemConv, ...] = Field(min_length=1)
    max_pool: bool = True
    batch_norm: bool = True
    conv_bias: bool = False


class Block(Frozen):
    """One residual block.

    Attributes:
        name: Where its tensors live, such as ``layer1.0``.
        kind: ``basic`` (3x3, 3x3) or ``bottleneck`` (1x1, 3x3, 1x1).
        widths: Output channels of each convolution of the main branch; the last is the width of the stream.
        stride: Spatial stride of the whole block.
        stride_at: Which convolution strides: 0, or 1 in a bottleneck of version 1.5.
        groups: Groups of the (first) 3x3 convolution of a bottleneck; 1 for basic blocks.
        shortcut: ``identity``; ``projection`` (1x1 convolution); ``pad`` (spatial subsampling and zero channels,
            option A of He et al. 2015, arXiv:1512.03385, section 3.3).
        shortcut_pool: Whether the projection averages 2x2 pixels first and then does not stride (ResNet-D, He et al.
            2018, arXiv:1812.01187).
        channel_map: For ``pad``: which input channel each output channel takes, -1 for zeros.
        batch_norm: Whether convolutions are followed by BatchNorm.
        conv_bias: Whether convolutions have a bias of their own.
    """

    name: str
    kind: Literal["basic", "bottleneck"]
    widths: tuple[Width, ...]
    stride: int = Field(1, ge=1, le=4)
    stride_at: int = 0
    groups: int = Field(1, ge=1)
    shortcut: Literal["identity", "projection", "pad"] = "identity"
    shortcut_pool: bool = False
    channel_map: tuple[int, ...] | None = None
    batch_norm: bool = True
    conv_bias: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        convs = 2 if self.kind == "basic" else 3
        if len(self.widths) != convs:
            raise ValueError(f"block {self.name}: a {self.kind} block has {convs} widths, not {len(self.widths)}")
        if self.stride_at not in range(convs - 1):
            raise ValueError(f"block {self.name}: no convolution number {self.stride_at} can stride")
        if self.kind == "basic" and self.groups != 1:
            raise ValueError(f"block {self.name}: basic blocks have no groups")
        if self.groups > 1 and (self.widths[0] % self.groups or self.widths[1] % self.groups):
            raise ValueError(f"block {self.name}: widths {self.widths[:2]} are no multiples of {self.groups} groups")
        if (self.shortcut == "pad") != (self.channel_map is not None):
            raise ValueError(f"block {self.name}: a channel map belongs to a pad shortcut, and only there")
        if self.channel_map is not None and len(self.channel_map) != self.widths[-1]:
            raise ValueError(f"block {self.name}: the channel map names {len(self.channel_map)} channels of {self.widths[-1]}")
        if self.shortcut == "identity" and self.stride != 1:
            raise ValueError(f"block {self.name}: an identity shortcut cannot stride")
        return self


class Head(Frozen):
    """What follows the last block: global pooling, then linear layers with ReLU between them.

    Attributes:
        num_classes: Outputs of the last layer; 1 is a binary classifier whose logit is thresholded at 0.
        hidden: Outputs of each hidden layer, in order.
        dropout: Probability of the dropout after each hidden ReLU (or before the only layer), in training.
        pool: ``avg``: the mean of each channel. ``max_avg``: its maximum and its mean, two features per channel, which stand
            next to each other (fastai's and timm's concatenated pooling, whose columns are put into this order on loading).
    """

    num_classes: Width
    hidden: tuple[Width, ...] = ()
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    pool: Literal["avg", "max_avg"] = "avg"


class ModelSpec(Frozen):
    """Everything but the tensors of a ResNet.

    Attributes:
        arch: What people call it, such as ``resnet50``; pruning keeps it.
        input_shape: Channels, height and width of one input.
        stem: The first convolutions.
        stages: Blocks by stage; each stage has at least one.
        head: The classifier, or None for a bare backbone (its output is then the pooled features).
        bn_eps: Epsilon of every BatchNorm.
        preprocessing: What the input went through.
        labels: Name of each class, in order of the outputs.
    """

    arch: str = "resnet"
    input_shape: tuple[Width, Width, Width] = (3, 224, 224)
    stem: Stem
    stages: tuple[Annotated[tuple[Block, ...], Field(min_length=1)], ...] = Field(min_length=1)
    head: Head | None
    bn_eps: float = Field(1e-5, gt=0.0)
    preprocessing: Preprocessing = Preprocessing()
    labels: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stream = self.stem.convs[-1].width
        seen: set[str] = set()
        for block in self.blocks:
            if block.name in seen:
                raise ValueError(f"two blocks are called {block.name}")
            seen.add(block.name)
            if block.shortcut == "identity" and block.widths[-1] != stream:
                raise ValueError(f"block {block.name}: identity shortcut from {stream} to {block.widths[-1]} channels")
            if block.channel_map is not None and any(not -1 <= c < stream for c in block.channel_map):
                raise ValueError(f"block {block.name}: the channel map reads beyond {stream} channels")
            stream = block.widths[-1]
        outputs = self.head.num_classes if self.head else None
        if self.labels is not None and outputs is not None and len(self.labels) != max(outputs, 2 if outputs == 1 else 0):
            raise ValueError(f"{len(self.labels)} labels for {outputs} outputs")
        channels = self.input_shape[0]
        if not len(self.preprocessing.mean) == len(self.preprocessing.std) == channels:
            raise ValueError(f"preprocessing gives {len(self.preprocessing.mean)} means for {channels} input channels")
        return self

    @property
    def num_classes(self) -> int | None:
        """Outputs of the classifier; None for a bare backbone."""
        return self.head.num_classes if self.head else None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, first to last."""
        return tuple(block for stage in self.stages for block in stage)

    def block(self, name: str) -> Block:
        """Return the block called `name`.

        Raises:
            KeyError: There is none.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(name)

    def in_width(self, name: str) -> int:
        """Return how many channels enter the block called `name`."""
        stream = self.stem.convs[-1].width
        for block in self.blocks:
            if block.name == name:
                return stream
            stream = block.widths[-1]
        raise KeyError(name)

    def replace_blocks(self, changed: Mapping[str, Block | None], **fields: object) -> ModelSpec:
        """Return a spec with some blocks replaced, or removed where the value is None.

        Args:
            changed: Per block name, the block that takes its place.
            fields: Other fields that change with them, such as the stem whose width the first block reads.

        Raises:
            pydantic.ValidationError: The result is no network (widths that do not meet, an empty stage).
        """
        stages = (tuple(changed.get(b.name, b) for b in stage) for stage in self.stages)
        return self.replace(stages=tuple(tuple(b for b in stage if b is not None) for stage in stages), **fields)

    def replace(self, **changed: object) -> ModelSpec:
        """Return a validated copy with the named fields changed."""
        return ModelSpec.model_validate({**dict(self), **changed})

    @property
    def digest(self) -> str:
        """SHA-256 of the spec's JSON, in hex: equal for equal specs on every machine."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
