"""From tensors with canonical names to a `Checkpoint`: the part of loading that all formats share.

A format only renames. What it hands over is a `Layout`: stem convolutions and blocks whose parts carry the walk's names
(``conv1``, ``bn1``, ``layer1.0.conv2``, ``layer1.0.downsample.0``), the linear layers of the head in order, and the few
facts that no shape tells. From there `assemble` reads widths, kinds, groups and shortcuts off the shapes, checks that
every tensor of the resulting spec is there and fits, and only then reads values.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from compress import zoo
from compress.checkpoints.base import Checkpoint, Derived, LoadOptions, RawState, Shape, Stored
from compress.checkpoints.options import integers, number
from compress.finite import all_finite
from compress.preprocessing import Statement
from rescompress.core.errors import CheckpointError
from rescompress.core.layers import walk
from rescompress.core.spec import Block, Head, ModelSpec, Preprocessing, Stem, StemConv

BN_PARTS = ("weight", "bias", "running_mean", "running_var")
MAX_WEIGHT_BYTES = 16 * 2**30
_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.(conv|bn)(\d+)\.weight")


@dataclass(frozen=True)
class Facts:
    """What a format knows and no shape tells.

    Attributes:
        format: Its name.
        pooled: Blocks whose projection averages 2x2 pixels first (ResNet-D).
        stride_at: Convolution of a bottleneck that strides; None where both readings exist.
        bn_eps: Epsilon of BatchNorm.
        preprocessing: Name, where the format implies one; None leaves it to the network's family.
        preprocessing_stated: Whether the file itself says so.
        own_preprocessing: Returns, for an input shape, what the network does to its images itself.
        input_shape: Where the file states it.
        dropout: Of the head, in training.
        labels: Class names, where the file states them.
    """

    format: str
    pooled: frozenset[str] = frozenset()
    stride_at: int | None = None
    bn_eps: float = 1e-5
    preprocessing: str | None = None
    preprocessing_stated: bool = False
    own_preprocessing: Callable[[tuple[int, int, int]], Preprocessing] | None = None
    input_shape: tuple[int, int, int] | None = None
    dropout: float = 0.0
    labels: tuple[str, ...] | None = None


@dataclass
class Layout:
    """Tensors by their canonical names.

    Attributes:
        tensors: Backbone, by the walk's names.
        head: Weight and bias of each linear layer of the head, in order; empty for a bare backbone.
        foreign: Keys inside the network that belong to nothing known here.
        ignored: Keys outside the network, which are left out.
        notes: Assumptions to tell.
        guesses: Those of them that are as likely wrong: every command tells them.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    head: list[tuple[Stored, Stored]] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    guesses: list[str] = field(default_factory=list)

    def shape(self, name: str) -> Shape | None:
        """Return the shape of a tensor, or None where there is none."""
        stored = self.tensors.get(name)
        return None if stored is None else stored.shape


def zeros(shape: Shape) -> Derived:
    """Return a stored tensor of zeros."""
    return Derived(shape, lambda: torch.zeros(shape))


def assemble(raw: RawState, layout: Layout, facts: Facts, options: LoadOptions) -> Checkpoint:
    """Return the checkpoint of a layout.

    Args:
        raw: The file it comes from.
        layout: The tensors.
        facts: What the format knows beside them.
        options: What the user states; it goes before what is assumed.

    Raises:
        CheckpointError: Something is missing, does not fit, is not finite, or is no ResNet that is known here.
    """
    if layout.foreign:
        raise CheckpointError(
            f"its blocks hold parts that are not known here: {_some(layout.foreign)}",
            remedy="supported blocks: convolutions with BatchNorm and a ReLU, basic or bottleneck (`rescompress formats`)",
        )
    _give_factors(layout)
    spec = _Reader(layout, facts, options).spec()
    tensors = _fit(spec, layout)
    notes = [*raw.notes, *layout.notes]
    warnings = [*layout.guesses]
    if not layout.head:
        warnings.append("no classifier was found: the network ends in its pooled features")
    if layout.ignored:
        warnings.append(f"left out, as no part of the network: {_some(layout.ignored)}")
    state_dict = read_values(tensors, notes)
    provenance: dict[str, object] = {
        "format": facts.format,
        "container": raw.container,
        "path": raw.path.name,
        "notes": [*notes, *warnings],
        "warnings": warnings,
    }
    return Checkpoint(spec, state_dict, None, provenance)


def _give_factors(layout: Layout) -> None:
    """Give BatchNorms that store neither weight nor bias (``affine=False``) the ones and zeros that they compute with."""
    bare = [
        name
        for name, norm in ((key.rpartition(".")[0], key) for key in layout.tensors if key.endswith(".running_var"))
        if norm.replace("running_var", "running_mean") in layout.tensors
        and not {f"{name}.weight", f"{name}.bias"} & set(layout.tensors)
    ]
    for name in bare:
        shape = layout.tensors[f"{name}.running_var"].shape
        layout.tensors[f"{name}.weight"] = Derived(shape, lambda shape=shape: torch.ones(shape))  # type: ignore[misc]
        layout.tensors[f"{name}.bias"] = zeros(shape)
    if bare:
        layout.notes.append(f"BatchNorms without weight and bias (affine=False): ones and zeros stand in ({_some(bare)})")


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:4])
    return f"{shown} and {len(keys) - 4} more" if len(keys) > 4 else shown


class _Reader:
    """Reads a spec off shapes."""

    def __init__(self, layout: Layout, facts: Facts, options: LoadOptions) -> None:
        self.layout = layout
        self.facts = facts
        self.options = options
        self.note = layout.notes.append

    def spec(self) -> ModelSpec:
        names = self._block_names()
        stem = self._stem(len(names))
        strides = self._strides(names)
        stages: list[tuple[Block, ...]] = []
        stream = stem.convs[-1].width
        has_projection = any(f"{n}.downsample.0.weight" in self.layout.tensors for stage in names for n in stage)
        try:
            for stage, stride in zip(names, strides, strict=True):
                blocks = []
                for i, name in enumerate(stage):
                    block = self._block(name, stream, stride if i == 0 else 1, stem, may_pad=not has_projection)
                    blocks.append(block)
                    stream = block.widths[-1]
                stages.append(tuple(blocks))
            shape = self._input_shape(stem)
            spec = ModelSpec(
                arch="resnet",
                input_shape=shape,
                stem=stem,
                stages=tuple(stages),
                head=self._head(stream),
                bn_eps=number(self.options, "bn_eps", self.facts.bn_eps),
                preprocessing=self._preprocessing(shape),
                labels=self.facts.labels,
            )
        except ValidationError as e:
            first = e.errors()[0]
            raise CheckpointError(
                f"its shapes make no ResNet: {first['msg'].removeprefix('Value error, ')}",
                remedy="is it complete? `rescompress formats` lists what is supported",
            ) from e
        self._note_strides(spec)
        return spec.replace(arch=self.options.arch.get("arch", zoo.name_of(spec)))

    def _block_names(self) -> list[list[str]]:
        found: dict[int, set[int]] = {}
        for key in self.layout.tensors:
            match = _BLOCK.fullmatch(key)
            if match:
                found.setdefault(int(match[1]), set()).add(int(match[2]))
        if not found:
            raise CheckpointError("holds no residual blocks", remedy="`rescompress formats` lists what is supported")
        for s in range(1, max(found) + 1):
            if s not in found:
                raise CheckpointError(f"incomplete: layer{s} is missing", remedy="save the whole network")
            for b in range(max(found[s]) + 1):
                if b not in found[s]:
                    raise CheckpointError(f"incomplete: layer{s}.{b} is missing", remedy="save the whole network")
        return [[f"layer{s}.{b}" for b in sorted(found[s])] for s in sorted(found)]

    def _conv_shape(self, name: str) -> Shape:
        shape = self.layout.shape(f"{name}.weight")
        if shape is None:
            raise CheckpointError(f"incomplete: {name}.weight is missing", remedy="save the whole network")
        if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
            raise CheckpointError(f"{name}.weight has shape {shape}, not that of a square convolution")
        return shape

    def _stem(self, n_stages: int) -> Stem:
        shapes: list[Shape] = []
        while f"conv{len(shapes) + 1}.weight" in self.layout.tensors:
            shapes.append(self._conv_shape(f"conv{len(shapes) + 1}"))
        if not shapes:
            raise CheckpointError(
                "incomplete: the first convolution (conv1.weight) is missing", remedy="save the whole network"
            )
        small = len(shapes) == 1 and shapes[0][2] <= 3
        stride = int(number(self.options, "stem_stride", 1 if small else 2))
        pool = self.options.arch.get("max_pool", "no" if small else "yes") == "yes"
        if small and n_stages >= 4 and not {"stem_stride", "max_pool"} & set(self.options.arch):
            self.note(
                "the 3x3 stem is taken to have stride 1 and no max pool, as in CIFAR networks "
                "(else: --arch-option stem_stride=2, max_pool=yes)"
            )
        elif len(shapes) == 1 and shapes[0][2] not in (3, 7) and not {"stem_stride", "max_pool"} & set(self.options.arch):
            self.layout.guesses.append(
                f"the {shapes[0][2]}x{shapes[0][2]} stem is taken to have stride {stride} and "
                f"{'a' if pool else 'no'} max pool (else: --arch-option stem_stride=1, max_pool=no)"
            )
        return Stem(
            convs=tuple(StemConv(width=s[0], kernel=s[2], stride=stride if i == 0 else 1) for i, s in enumerate(shapes)),
            max_pool=pool,
            batch_norm="bn1.weight" in self.layout.tensors,
            conv_bias="conv1.bias" in self.layout.tensors,
        )

    def _strides(self, names: list[list[str]]) -> tuple[int, ...]:
        stated = integers(self.options, "strides")
        if stated is not None:
            if len(stated) != len(names):
                raise CheckpointError(f"{len(stated)} strides were given for {len(names)} stages", remedy="give one per stage")
            return stated
        strides = [1]
        for previous, stage in itertools.pairwise(names):
            before = self._conv_shape(self._last_conv(previous[-1]))[0]
            after = self._conv_shape(self._last_conv(stage[0]))[0]
            identity = before == after and f"{stage[0]}.downsample.0.weight" not in self.layout.tensors
            strides.append(1 if identity else 2)
        return tuple(strides)

    def _last_conv(self, name: str) -> str:
        return f"{name}.conv3" if f"{name}.conv3.weight" in self.layout.tensors else f"{name}.conv2"

    def _block(self, name: str, stream: int, stride: int, stem: Stem, *, may_pad: bool) -> Block:
        tensors = self.layout.tensors
        kind: Literal["basic", "bottleneck"] = "bottleneck" if f"{name}.conv3.weight" in tensors else "basic"
        convs = [self._conv_shape(f"{name}.conv{i}") for i in range(1, 4 if kind == "bottleneck" else 3)]
        kernels = (1, 3, 1) if kind == "bottleneck" else (3, 3)
        for i, (shape, kernel) in enumerate(zip(convs, kernels, strict=True), 1):
            if shape[2] != kernel:
                raise CheckpointError(
                    f"{name}.conv{i} has a {shape[2]}x{shape[2]} kernel where a {kind} block has {kernel}x{kernel}",
                    remedy="supported blocks: 3x3, 3x3 (basic) and 1x1, 3x3, 1x1 (bottleneck)",
                )
        groups = 1
        if kind == "bottleneck":
            if convs[0][0] % convs[1][1]:
                raise CheckpointError(f"{name}.conv2 reads {convs[1][1]} channels per group, {name}.conv1 makes {convs[0][0]}")
            groups = convs[0][0] // convs[1][1]
        batch_norm = f"{name}.bn1.weight" in tensors
        if batch_norm and f"{name}.bn1.running_mean" not in tensors:
            raise CheckpointError(
                f"{name}.bn1 has no running statistics: GroupNorm, LayerNorm, or BatchNorm without them",
                remedy="supported normalisation: BatchNorm with running mean and variance, or none",
            )
        if batch_norm and self.layout.shape(f"{name}.bn1.weight") == (convs[0][1],) != (convs[0][0],):
            raise CheckpointError(
                f"is a pre-activation ResNet (V2): {name}.bn1 stands before {name}.conv1",
                remedy="supported: post-activation networks (v1, v1.5, D); retrain, or use another checkpoint",
            )
        shortcut: Literal["identity", "projection", "pad"] = "identity"
        out = convs[-1][0]
        if f"{name}.downsample.0.weight" in tensors:
            shortcut = "projection"
        elif stride != 1 or out != stream:
            if not may_pad or stem.convs[0].kernel > 3 or len(stem.convs) > 1 or out < stream:
                raise CheckpointError(
                    f"incomplete: {name} goes from {stream} to {out} channels and has no projection ({name}.downsample)",
                    remedy="save the whole network",
                )
            shortcut = "pad"
        return Block(
            name=name,
            kind=kind,
            widths=tuple(s[0] for s in convs),
            stride=stride,
            stride_at=self._stride_at(kind),
            groups=groups,
            shortcut=shortcut,
            shortcut_pool=name in self.facts.pooled,
            channel_map=self._pad_map(stream, out) if shortcut == "pad" else None,
            batch_norm=batch_norm,
            conv_bias=any(f"{name}.conv{i}.bias" in tensors for i in range(1, len(convs) + 1)),
        )

    def _stride_at(self, kind: Literal["basic", "bottleneck"]) -> int:
        if kind == "basic":
            return 0
        default = zoo.stride_at(kind) if self.facts.stride_at is None else self.facts.stride_at
        return int(self.options.arch.get("stride_at", default))

    def _pad_map(self, before: int, after: int) -> tuple[int, ...]:
        return zoo.pad_map(before, after, centred=self.options.arch.get("pad", "centre") == "centre")

    def _note_strides(self, spec: ModelSpec) -> None:
        strided = [b for b in spec.blocks if b.stride > 1]
        if (
            any(b.kind == "bottleneck" for b in strided)
            and self.facts.stride_at is None
            and "stride_at" not in self.options.arch
        ):
            self.note("bottlenecks are taken to stride in their 3x3 convolution (v1.5; else: --arch-option stride_at=0)")
        if any(b.shortcut == "pad" for b in strided) and "pad" not in self.options.arch:
            self.note("pad shortcuts are taken to add half of the zero channels on each side (else: --arch-option pad=end)")

    def _input_shape(self, stem: Stem) -> tuple[int, int, int]:
        channels = self._conv_shape("conv1")[1]
        shape = self.options.input_shape or self.facts.input_shape
        if shape is None:
            side = 32 if stem.convs[0].stride == 1 and not stem.max_pool else 224
            self.note(f"the input is taken to be {channels}x{side}x{side} (else: --input)")
            return (channels, side, side)
        if shape[0] != channels:
            raise CheckpointError(f"its first convolution reads {channels} channels, the input shape gives {shape[0]}")
        return shape

    def _preprocessing(self, shape: tuple[int, int, int]) -> Preprocessing:
        name = self.facts.preprocessing or "imagenet"
        keras = self.facts.format == "keras"
        found = zoo.preprocessing(name, shape, assumed=not self.facts.preprocessing_stated, squash=keras)
        if self.facts.own_preprocessing is not None:  # what the network does itself says colours, not how pictures get there
            own = self.facts.own_preprocessing(shape)
            found = own.model_copy(update={key: getattr(found, key) for key in ("resize", "interpolation", "antialias")})
        stated = Statement.parse(self.options.preprocess) if self.options.preprocess is not None else None
        if stated is not None:
            found = stated.over(found, shape)
        if found.assumed:
            self.note(f"preprocessing is taken to be '{name}' (else: --preprocess {'|'.join(zoo.PREPROCESSING_NAMES)})")
        if keras and not (stated and stated.about_shape):
            self.note(
                "images are taken to be resized to the input as a whole, bilinear without antialiasing, as "
                "image_dataset_from_directory does (else: --preprocess geometry=crop, or interpolation=nearest as in load_img)"
            )
        return found

    def _head(self, features: int) -> Head | None:
        if not self.layout.head:
            self.note("there is no classifier: a bare backbone, whose output is the pooled features")
            return None
        pool: Literal["avg", "max_avg"] = "avg"
        if self.layout.head[0][0].shape[1:] == (2 * features,):
            pool = "max_avg"
            self._interleave_features(features)
        width = features if pool == "avg" else 2 * features
        for weight, bias in self.layout.head:
            if len(weight.shape) != 2 or bias.shape != weight.shape[:1]:
                raise CheckpointError(f"its head has a weight of shape {weight.shape} and a bias of shape {bias.shape}")
            if weight.shape[1] != width:
                raise CheckpointError(*_head_mismatch(weight.shape[1], width, first=weight is self.layout.head[0][0]))
            width = weight.shape[0]
        dropout = number(self.options, "dropout", self.facts.dropout)
        hidden = tuple(w.shape[0] for w, _ in self.layout.head[:-1])
        return Head(num_classes=width, hidden=hidden, dropout=dropout, pool=pool)

    def _interleave_features(self, features: int) -> None:
        """Put the columns of a head behind concatenated pooling into the walk's order: channel by channel, maximum first."""
        usual, other = ("max_avg", "avg_max") if self.facts.format == "sequential" else ("avg_max", "max_avg")
        order = self.options.arch.get("pool", usual)
        self.note(
            f"the head reads {2 * features} features of {features} channels: maximum and average pooling, taken to be in the "
            f"order {order} (else: --arch-option pool={other if order == usual else usual})"
        )
        weight, bias = self.layout.head[0]

        def make() -> Tensor:
            first, second = weight.read().view(-1, 2, features).unbind(1)
            return torch.stack([first, second] if order == "max_avg" else [second, first], 2).flatten(1)

        self.layout.head[0] = Derived(weight.shape, make), bias


def _head_mismatch(found: int, width: int, *, first: bool) -> tuple[str]:
    if first and found > width and found % width == 0:
        return (
            f"its head reads {found} features of a backbone with {width} channels: it flattens the feature map instead of "
            "pooling it, which is not supported",
        )
    return (f"its head reads {found} features where {width} come in",)


def _fit(spec: ModelSpec, layout: Layout) -> dict[str, Stored]:
    """Return every tensor that `spec` wants, checked by name and shape."""
    available = dict(layout.tensors)
    linear = [layer.name for layer in walk(spec) if layer.op == "linear"]
    for name, (weight, bias) in zip(linear, layout.head, strict=True):
        available[f"{name}.weight"], available[f"{name}.bias"] = weight, bias
    found: dict[str, Stored] = {}
    filled = []
    total = 0
    for layer in walk(spec):
        for name, shape in layer.tensors.items():
            stored = available.pop(name, None)
            if stored is None:
                if name.endswith(".num_batches_tracked"):
                    stored = Derived((), lambda: torch.zeros((), dtype=torch.int64))
                elif layer.op == "conv" and name.endswith(".bias"):
                    stored = zeros(shape)
                    filled.append(name)
                else:
                    raise CheckpointError(f"incomplete: {name} of shape {shape} is missing", remedy="save the whole network")
            if stored.shape != shape and not (name.endswith(".num_batches_tracked") and stored.shape == (1,)):
                raise CheckpointError(f"{name} has shape {stored.shape} where {shape} fits the rest of the network")
            total += 4 * layer.weights
            found[name] = stored
    if total > MAX_WEIGHT_BYTES:
        raise CheckpointError(f"claims weights of {total / 2**30:.0f} GiB, which is absurd for a ResNet")
    if available:
        raise CheckpointError(
            f"holds parts that do not fit the network read off the rest: {_some(sorted(available))}",
            remedy="`rescompress formats` lists what is supported",
        )
    roles = {key: re.sub(r"^layer\d+\.\d+\.", "", key) for key in layout.tensors if key.endswith(".bias")}
    for name in filled:
        if re.sub(r"^layer\d+\.\d+\.", "", name) in roles.values():
            raise CheckpointError(f"incomplete: {name} is missing", remedy="save the whole network")
    if filled:
        layout.notes.append(f"some convolutions of a block have a bias and others none: zeros stand in ({_some(filled)})")
    return found


def read_values(tensors: Mapping[str, Stored], notes: list[str]) -> dict[str, Tensor]:
    """Return the values in float32 (counters in int64), by name.

    Args:
        tensors: Where the values lie.
        notes: Gets a line for each other dtype met.

    Raises:
        CheckpointError: Some value is not finite, a variance is negative, or weights are integers.
    """
    state_dict: dict[str, Tensor] = {}
    dtypes: set[torch.dtype] = set()
    for name, stored in tensors.items():
        value = stored.read()
        if name.endswith(".num_batches_tracked"):
            state_dict[name] = value.reshape(()).to(torch.int64)
            continue
        if not value.is_floating_point() or value.dtype.itemsize == 1:
            raise CheckpointError(f"{name} holds {value.dtype} values instead of floating-point ones")
        dtypes.add(value.dtype)
        value = value.to(torch.float32)
        if not all_finite(value):
            bad = int((~torch.isfinite(value)).sum())
            raise CheckpointError(f"{name} holds {bad} values that are NaN or infinite", remedy="use an earlier checkpoint")
        if name.endswith(".running_var") and bool((value < 0).any()):
            raise CheckpointError(f"{name} holds negative variances", remedy="use an earlier checkpoint")
        state_dict[name] = value
    for dtype in sorted(dtypes - {torch.float32}, key=str):
        notes.append(f"stored as {str(dtype).removeprefix('torch.')}, computed with in float32")
    return state_dict
