"""What a network that was saved as a whole says of itself, beside its tensors: strides, padding, epsilon, activations.

A state_dict says none of that, so a reader takes what such networks usually have. Where the modules are there, what they say
counts, and what cannot be had is refused rather than taken to be usual.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from compress.checkpoints.base import LoadOptions
from compress.checkpoints.pickles import Record
from rescompress.core.errors import CheckpointError
from rescompress.core.layers import walk
from rescompress.core.spec import ModelSpec

_CONV = "torch.nn.modules.conv.Conv2d"
_NORM = "torch.nn.modules.batchnorm.BatchNorm2d"
_POOL = "torch.nn.modules.pooling.MaxPool2d"
_IDENTITY = "torch.nn.modules.linear.Identity"
_ACTIVATIONS = "torch.nn.modules.activation."
_ALLOWED = frozenset(_ACTIVATIONS + name for name in ("ReLU", "Softmax", "LogSoftmax", "Sigmoid"))
"""The last three end a head and leave the order of its outputs as it is."""

_Geometry = tuple[int, int, int, int, int, int]
"""Input and output channels, kernel, stride, padding, dilation."""


def options_of(modules: Mapping[str, Record], options: LoadOptions) -> LoadOptions:
    """Return the options with what the modules state; what the user states goes before it.

    Args:
        modules: Of the network, by name.
        options: The user's.

    Raises:
        CheckpointError: An activation that is no ReLU, or several epsilons.
    """
    odd = next((n for n, m in modules.items() if m.path.startswith(_ACTIVATIONS) and m.path not in _ALLOWED), None)
    if odd is not None:
        kind = modules[odd].path.removeprefix(_ACTIVATIONS)
        raise CheckpointError(f"its activation {odd} is {kind}", remedy="supported: networks with ReLU")
    stated: dict[str, str] = {}
    said = [m.state.get("eps") for m in modules.values() if m.path == _NORM]
    epsilons = sorted({float(eps) for eps in said if isinstance(eps, int | float)})
    if len(epsilons) > 1 and "bn_eps" not in options.arch:
        raise CheckpointError(
            f"its BatchNorms have several epsilons: {epsilons}", remedy="--arch-option bn_eps=X takes one for all"
        )
    if epsilons:
        stated["bn_eps"] = repr(epsilons[0])
    stem = _geometry(modules.get("conv1"))
    if stem is not None:
        stated["stem_stride"] = str(stem[3])
    pool = modules.get("maxpool")
    if pool is not None and pool.path in (_POOL, _IDENTITY):
        stated["max_pool"] = "yes" if pool.path == _POOL else "no"
    return dataclasses.replace(options, arch={**stated, **options.arch})


def check(modules: Mapping[str, Record], spec: ModelSpec, options: LoadOptions) -> None:
    """Make sure that the convolutions are those that the modules are.

    Args:
        modules: Of the network, by name.
        spec: What was read from its tensors.
        options: The user's; who states strides knows better.

    Raises:
        CheckpointError: A convolution has another stride, padding or dilation.
    """
    there = {name: found for name, module in modules.items() if (found := _geometry(module)) is not None}
    read = [
        (layer.in_shape[0], layer.out_shape[0], layer.kernel, layer.stride, layer.padding, 1)
        for layer in walk(spec)
        if layer.op == "conv"
    ]
    dilated = next((name for name, geometry in there.items() if geometry[5] != 1), None)
    if dilated is not None:
        raise CheckpointError(f"its convolution {dilated} has dilation {there[dilated][5]}", remedy="supported: no dilation")
    if len(there) != len(read) or {"strides", "stride_at", "stem_stride"} & set(options.arch):
        return
    left = Counter(there.values()) - Counter(read)
    name = next((n for n, geometry in there.items() if geometry in left), None)
    if name is not None:
        _, _, kernel, stride, padding, _ = there[name]
        raise CheckpointError(
            f"its convolution {name} is {kernel}x{kernel} with stride {stride}, padding {padding}, "
            "which is not a usual ResNet's",
            remedy="for other strides: --arch-option strides=1,2,2,2 or stride_at=0; padding is half of the kernel",
        )


def _geometry(module: Record | None) -> _Geometry | None:
    """Return what a convolution's module says, or None where it is none or says nothing."""
    if module is None or module.path != _CONV:
        return None
    facts = [module.state.get(name) for name in ("in_channels", "out_channels")]
    facts += [_side(module.state.get(name)) for name in ("kernel_size", "stride", "padding", "dilation")]
    whole = [f for f in facts if isinstance(f, int)]
    return (whole[0], whole[1], whole[2], whole[3], whole[4], whole[5]) if len(whole) == len(facts) else None


def _side(value: Any) -> Any:
    """Return the one number of a square pair."""
    square = isinstance(value, tuple | list) and len(value) == 2 and value[0] == value[1]
    return value[0] if square else value
