"""The networks people know by name, as specs; no tensors, and no torch.

`spec` builds one; `name_of` goes the other way, for a spec that was read off a checkpoint's shapes.

Sources: block counts and widths of ResNet-18..152 and of the CIFAR networks from He et al. 2015 (arXiv:1512.03385,
table 1 and section 4.2), the stride on the 3x3 convolution ("v1.5") from torchvision, deep stems and pooled projections
from He et al. 2018 (arXiv:1812.01187), ResNeXt from Xie et al. 2016 (arXiv:1611.05431), wide networks from Zagoruyko
and Komodakis 2016 (arXiv:1605.07146), ResNet-200 from timm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rescompress.core.errors import BadInput, nearest
from rescompress.core.spec import Block, Head, ModelSpec, Preprocessing, Stem, StemConv

Kind = Literal["basic", "bottleneck"]
Shortcut = Literal["pad", "projection"]

_IMAGENET_DEPTHS: dict[str, tuple[Kind, tuple[int, ...]]] = {
    "10": ("basic", (1, 1, 1, 1)),
    "14": ("bottleneck", (1, 1, 1, 1)),
    "18": ("basic", (2, 2, 2, 2)),
    "26": ("bottleneck", (2, 2, 2, 2)),
    "34": ("basic", (3, 4, 6, 3)),
    "50": ("bottleneck", (3, 4, 6, 3)),
    "101": ("bottleneck", (3, 4, 23, 3)),
    "152": ("bottleneck", (3, 8, 36, 3)),
    "200": ("bottleneck", (3, 24, 36, 3)),
}
_CIFAR_DEPTHS = (20, 32, 44, 56, 110)
_CLASSIC_STEM = Stem(convs=(StemConv(width=64),))
_CIFAR_STEM_64 = Stem(convs=(StemConv(width=64, kernel=3, stride=1),), max_pool=False)
_CIFAR_STEM_16 = Stem(convs=(StemConv(width=16, kernel=3, stride=1),), max_pool=False)


@dataclass(frozen=True)
class _Family:
    """What a name stands for."""

    kind: Kind
    blocks: tuple[int, ...]
    stem: Stem = _CLASSIC_STEM
    base: int = 64
    groups: int = 1
    width_per_group: int = 64
    pool: bool = False
    shortcut: Shortcut = "projection"
    stride_at: int | None = None
    conv_bias: bool = False
    bn_eps: float = 1e-5
    side: int = 224
    preprocessing: str = "imagenet"


def deep_stem(*widths: int) -> Stem:
    """Return a stem of 3x3 convolutions of these widths, the first of which strides, and a max pool (ResNet-C)."""
    return Stem(convs=tuple(StemConv(width=w, kernel=3, stride=2 if i == 0 else 1) for i, w in enumerate(widths)))


def _catalog() -> dict[str, _Family]:
    found: dict[str, _Family] = {}
    for depth, (kind, blocks) in _IMAGENET_DEPTHS.items():
        found[f"resnet{depth}"] = _Family(kind, blocks)
        found[f"resnet{depth}c"] = _Family(kind, blocks, stem=deep_stem(32, 32, 64))
        found[f"resnet{depth}d"] = _Family(kind, blocks, stem=deep_stem(32, 32, 64), pool=True)
        found[f"resnet{depth}t"] = _Family(kind, blocks, stem=deep_stem(24, 32, 64), pool=True)
        found[f"resnet{depth}_cifar"] = _Family(kind, blocks, stem=_CIFAR_STEM_64, side=32, preprocessing="cifar")
        if kind == "bottleneck":
            found[f"resnet{depth}_v1"] = _Family(kind, blocks, stride_at=0)
    for depth in ("50", "101", "152"):
        kind, blocks = _IMAGENET_DEPTHS[depth]
        found[f"keras_resnet{depth}"] = _Family(
            kind,
            blocks,
            stem=Stem(convs=(StemConv(width=64),), conv_bias=True),
            stride_at=0,
            conv_bias=True,
            bn_eps=1.001e-5,
            preprocessing="keras-caffe",
        )
    found["wide_resnet50_2"] = _Family("bottleneck", (3, 4, 6, 3), width_per_group=128)
    found["wide_resnet101_2"] = _Family("bottleneck", (3, 4, 23, 3), width_per_group=128)
    found["resnext50_32x4d"] = _Family("bottleneck", (3, 4, 6, 3), groups=32, width_per_group=4)
    found["resnext50d_32x4d"] = _Family(
        "bottleneck", (3, 4, 6, 3), stem=deep_stem(32, 32, 64), groups=32, width_per_group=4, pool=True
    )
    found["resnext101_32x4d"] = _Family("bottleneck", (3, 4, 23, 3), groups=32, width_per_group=4)
    found["resnext101_32x8d"] = _Family("bottleneck", (3, 4, 23, 3), groups=32, width_per_group=8)
    found["resnext101_64x4d"] = _Family("bottleneck", (3, 4, 23, 3), groups=64, width_per_group=4)
    for n in _CIFAR_DEPTHS:
        per_stage = ((n - 2) // 6,) * 3
        small = _Family("basic", per_stage, stem=_CIFAR_STEM_16, base=16, side=32)
        found[f"resnet{n}"] = _Family(**{**vars(small), "shortcut": "pad"})
        found[f"resnet{n}_b"] = _Family(**{**vars(small), "preprocessing": "pytorch-cifar"})
    return found


def names() -> list[str]:
    """Return every name that `spec` knows, sorted by family and depth.

    ``resnet20`` .. ``resnet110`` are the CIFAR networks with pad shortcuts (option A), ``resnet20_b`` .. those with
    projections; ``resnet18_cifar`` .. have a 3x3 stem without max pool; ``d``, ``c`` and ``t`` are timm's stems.
    """
    return sorted(_catalog())


def spec(
    name: str,
    *,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    hidden: tuple[int, ...] = (),
    dropout: float = 0.0,
) -> ModelSpec:
    """Return the spec of a network that people know by name.

    Args:
        name: Such as ``resnet50``, ``resnet20``, ``resnet50d``, ``resnext50_32x4d`` (see `names`); the option's
            letter after the depth of a CIFAR network may be upper case, and ``-`` stands for ``_``.
        num_classes: Outputs; 10 for CIFAR networks and 1000 for the others unless given. 0 leaves the head out.
        input_shape: Channels, height, width; 3x32x32 or 3x224x224 unless given.
        hidden: Hidden layers of the head.
        dropout: Of the head.

    Raises:
        BadInput: No network of that name is known.
    """
    catalog = _catalog()
    key = name.lower().replace("-", "_")
    if key not in catalog:
        raise BadInput(f"unknown architecture '{name}'", remedy=nearest(key, catalog))
    family = catalog[key]
    shape = input_shape or (3, family.side, family.side)
    if num_classes is None:
        num_classes = 10 if family.side == 32 else 1000
    return ModelSpec(
        arch=key,
        input_shape=shape,
        stem=family.stem,
        stages=_stages(family),
        head=Head(num_classes=num_classes, hidden=hidden, dropout=dropout) if num_classes else None,
        bn_eps=family.bn_eps,
        preprocessing=preprocessing(family.preprocessing, shape, squash=family.preprocessing == "keras-caffe"),
    )


def _stages(family: _Family) -> tuple[tuple[Block, ...], ...]:
    stages = []
    stream = family.stem.convs[-1].width
    for s, count in enumerate(family.blocks):
        planes = family.base * 2**s
        if family.kind == "basic":
            widths: tuple[int, ...] = (planes, planes)
        else:
            inner = planes * family.width_per_group // 64 * family.groups
            widths = (inner, inner, planes * 4)
        blocks = []
        for b in range(count):
            stride = 2 if s > 0 and b == 0 else 1
            shortcut: Literal["identity", "projection", "pad"] = "identity"
            if stride != 1 or stream != widths[-1]:
                shortcut = family.shortcut
            blocks.append(
                Block(
                    name=f"layer{s + 1}.{b}",
                    kind=family.kind,
                    widths=widths,
                    stride=stride,
                    stride_at=stride_at(family.kind) if family.stride_at is None else family.stride_at,
                    groups=family.groups,
                    shortcut=shortcut,
                    shortcut_pool=family.pool and shortcut == "projection",
                    channel_map=pad_map(stream, widths[-1]) if shortcut == "pad" else None,
                    conv_bias=family.conv_bias,
                )
            )
            stream = widths[-1]
        stages.append(tuple(blocks))
    return tuple(stages)


def stride_at(kind: Kind) -> int:
    """Return which convolution strides where nothing else is said: the 3x3 one (torchvision's "v1.5")."""
    return 1 if kind == "bottleneck" else 0


def pad_map(before: int, after: int, *, centred: bool = True) -> tuple[int, ...]:
    """Return the channel map of a pad shortcut (option A).

    Args:
        before: Channels that come in.
        after: Channels that go out; at least as many.
        centred: Half of the zero channels go before and half behind (the common CIFAR code); else all go behind.
    """
    offset = (after - before) // 2 if centred else 0
    return tuple(c - offset if 0 <= c - offset < before else -1 for c in range(after))


PREPROCESSING_NAMES = ("imagenet", "cifar", "pytorch-cifar", "cifar100", "half", "rescale", "raw", "keras-caffe")
"""What `preprocessing` knows.

* ``imagenet``: 1/255, RGB, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225): torchvision, timm, Hugging Face.
* ``cifar``: 1/255, RGB, mean (0.4914, 0.4822, 0.4465), std (0.2470, 0.2435, 0.2616): statistics of CIFAR-10.
* ``pytorch-cifar``: the same with std (0.2023, 0.1994, 0.2010): kuangliu/pytorch-cifar, and for CIFAR-10
  chenyaofo/pytorch-cifar-models.
* ``cifar100``: 1/255, RGB, mean (0.5070, 0.4865, 0.4409), std (0.2673, 0.2564, 0.2761): statistics of CIFAR-100, which
  chenyaofo/pytorch-cifar-models takes for it.
* ``half``: 1/255, RGB, mean and std 0.5, so -1..1 (``keras.applications`` "tf" mode, many tutorials).
* ``rescale``: 1/255, RGB, so 0..1 (``Rescaling(1/255)``).
* ``raw``: 0..255, RGB.
* ``keras-caffe``: 0..255, BGR, mean (103.939, 116.779, 123.68): ``keras.applications.resnet``.
"""


def usual_resize(height: int, width: int) -> int:
    """Return the length of the shorter side before the centre is cut out: 256 for 224, and in that ratio for other inputs."""
    return max(round(min(height, width) * 256 / 224), height, width)


def preprocessing(name: str, input_shape: tuple[int, int, int], *, assumed: bool = True, squash: bool = False) -> Preprocessing:
    """Return the preprocessing of that name for inputs of that shape.

    For inputs of at least 64 pixels images are resized to 256/224 of that and cropped; for smaller ones they are resized to
    the input.

    Args:
        name: One of `PREPROCESSING_NAMES`.
        input_shape: Channels, height, width. With other than three channels, per-channel means are averaged.
        assumed: Whether nobody stated it.
        squash: Whether the whole picture is resized to the input of any size, bilinear without antialiasing, as
            ``keras.utils.image_dataset_from_directory`` does.

    Raises:
        BadInput: The name is unknown.
    """
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale, order = 1.0 / 255.0, "rgb"
    match name:
        case "imagenet":
            mean, std = Preprocessing().mean, Preprocessing().std
        case "cifar":
            mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        case "pytorch-cifar":
            mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
        case "cifar100":
            mean, std = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)
        case "half":
            mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        case "rescale":
            pass
        case "raw":
            scale = 1.0
        case "keras-caffe":
            mean, scale, order = (103.939, 116.779, 123.68), 1.0, "bgr"
        case _:
            raise BadInput(f"unknown preprocessing '{name}'", remedy=nearest(name, PREPROCESSING_NAMES))
    channels, height, width = input_shape
    if channels != 3:
        mean, std, order = (round(sum(mean) / 3, 6),) * channels, (round(sum(std) / 3, 6),) * channels, "rgb"
    small = squash or min(height, width) < 64
    return Preprocessing.model_validate(
        {
            "name": name,
            "mean": mean,
            "std": std,
            "scale": scale,
            "channel_order": order,
            "resize": None if small else usual_resize(height, width),
            "antialias": not squash,
            "assumed": assumed,
        }
    )


def name_of(spec_: ModelSpec) -> str:
    """Return the name people know this network by, or a description such as ``resnet (basic, blocks 1-2-1)``.

    Head, labels, input size, preprocessing and BatchNorm's epsilon do not matter; widths, blocks, stem and strides do.
    """
    for name, family in _catalog().items():
        if family.stem == spec_.stem and tuple(map(len, spec_.stages)) == family.blocks and _stages(family) == spec_.stages:
            return name
    kind = spec_.blocks[0].kind
    return f"resnet ({kind}, blocks {'-'.join(str(len(s)) for s in spec_.stages)})"
