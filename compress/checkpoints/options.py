"""What a user may state about a checkpoint where its file leaves it open (``--input CxHxW``, ``--arch-option NAME=VALUE``)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rescompress.core.errors import BadInput, nearest
from rescompress.core.host import AUTO, wanted_tensors

if TYPE_CHECKING:
    from compress.checkpoints.base import LoadOptions

KNOWN: dict[str, str] = {
    "stride_at": "convolution of a bottleneck that strides: 1 (the 3x3 one, v1.5; torchvision) or 0 (the first, v1)",
    "stem_stride": "stride of the stem's first convolution: 1 or 2",
    "max_pool": "whether a max pool follows the stem: yes or no",
    "strides": "stride of each stage, such as 1,2,2,2",
    "pad": "where the zero channels of pad shortcuts go: centre (half on each side) or end",
    "bn_eps": "epsilon of BatchNorm, such as 1e-3",
    "head_bn_eps": "epsilon of BatchNorm in the head, such as 1e-3",
    "dropout": "dropout of the head in training, such as 0.5",
    "pool": "order of a head's two features per channel: max_avg (fastai) or avg_max (timm)",
    "head_bias": "no where linear layers of the head have no bias (else a missing one is an error)",
    "weights": "which weights where several are stored: raw or ema",
    "root": "prefix of the network's keys, such as teacher.backbone",
    "arch": "name to show for the architecture",
    "code": "FILE:CALLABLE that builds the network of a state_dict (as --code)",
    "trunk": "auto, or the tensors of a larger program in which the part ends that is wanted (as --trunk)",
    "like": "name of the network whose tensors a state_dict holds under other names (as --like)",
}
"""Every architecture option, and what it means."""

_CHOICES = {
    "stride_at": ("0", "1"),
    "stem_stride": ("1", "2", "4"),
    "max_pool": ("yes", "no"),
    "pad": ("centre", "end"),
    "pool": ("max_avg", "avg_max"),
    "head_bias": ("yes", "no"),
    "weights": ("raw", "ema"),
}


def check(options: Mapping[str, str]) -> None:
    """Raise BadInput for an option that is unknown or has an impossible value."""
    for name, value in options.items():
        if name not in KNOWN:
            raise BadInput(f"unknown architecture option '{name}'", where="--arch-option", remedy=nearest(name, KNOWN))
        if name == "code" and not _CODE.fullmatch(value):
            raise BadInput(f"{value!r} is not FILE:CALLABLE", where="--code", remedy="write it like model.py:make_network")
        if name == "trunk" and not wanted_tensors(value) and value.strip() != AUTO:
            raise BadInput("names no tensor", where="--trunk", remedy=f"write {AUTO}, or tensors with commas between")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise BadInput(f"{name} is {value!r}", where="--arch-option", remedy=f"choose one of {', '.join(_CHOICES[name])}")


_MAX_SIDE = 65_536
_CODE = re.compile(r".+:[^\W\d]\w*", re.DOTALL)


def parse_shape(text: str) -> tuple[int, int, int]:
    """Return channels, height and width of a text such as ``3x224x224``.

    Raises:
        BadInput: It is none.
    """
    parts = text.lower().replace("*", "x").split("x")
    sizes = [int(part) if part.isdecimal() else 0 for part in parts]
    if len(sizes) != 3 or not all(0 < size <= _MAX_SIDE for size in sizes):
        raise BadInput(f"{text!r} is no input shape", where="--input", remedy="write channels x height x width: 3x224x224")
    return sizes[0], sizes[1], sizes[2]


def parse(values: Iterable[str]) -> dict[str, str]:
    """Return the options of ``NAME=VALUE`` words; raises BadInput when one is malformed."""
    found: dict[str, str] = {}
    for word in values:
        name, equals, value = word.partition("=")
        if not equals:
            raise BadInput(f"{word!r} is not NAME=VALUE", where="--arch-option", remedy="known: " + ", ".join(KNOWN))
        found[name.strip()] = value.strip()
    check(found)
    return found


def number(options: LoadOptions, name: str, default: float) -> float:
    """Return a numeric option; raises BadInput when it is no number."""
    text = options.arch.get(name)
    if text is None:
        return default
    try:
        return float(text)
    except ValueError:
        raise BadInput(f"{name} is {text!r}, not a number", where="--arch-option", remedy=KNOWN[name]) from None


def integers(options: LoadOptions, name: str) -> tuple[int, ...] | None:
    """Return a list of integers, or None where the option was not given; raises BadInput when it is none."""
    text = options.arch.get(name)
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace("-", ",").split(","))
    except ValueError:
        raise BadInput(f"{name} is {text!r}, no list of numbers", where="--arch-option", remedy=KNOWN[name]) from None
