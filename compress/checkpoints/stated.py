"""What a network that was saved as a whole says of itself, beside its tensors: strides, pooling, epsilon, activations.

A state_dict says none of that, so a reader takes what such networks usually have. Where the modules are there, what they say
counts, and what cannot be had is refused rather than taken to be usual.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from compress.checkpoints.base import LoadOptions
from compress.checkpoints.leftovers import beside
from compress.checkpoints.pickles import Record
from rescompress.core.errors import CheckpointError
from rescompress.core.layers import Layer, walk
from rescompress.core.operations import Conv, GlobalPool
from rescompress.core.spec import ModelSpec

_CONV = "torch.nn.modules.conv.Conv2d"
_LINEAR = "torch.nn.modules.linear.Linear"
_IDENTITY = "torch.nn.modules.linear.Identity"
_SEQUENTIAL = "torch.nn.modules.container.Sequential"
_NORM_OF_VECTORS = "torch.nn.modules.batchnorm.BatchNorm1d"
_ACTIVATIONS = "torch.nn.modules.activation."
_POOLS = "torch.nn.modules.pooling."
_AT_THE_END = ("Softmax", "LogSoftmax", "Sigmoid")
"""They leave the order of the outputs as it is; behind any other layer they are no ReLU."""
_ACTIVATION_NAME = re.compile(r"(?:relu|act|activation)\d*$")
_TIMM_POOLS = {"avg": "avg", "fast": "avg", "fastavg": "avg", "catavgmax": "max_avg", "fastcatavgmax": "max_avg"}

_OF_TORCH = ("conv", "batchnorm", "activation", "pooling", "dropout", "flatten", "container", "loss")
_OF_TIMM = ("drop", "adaptive_avgmax_pool", "norm_act", "linear")
_KNOWN = (
    *(f"torch.nn.modules.{module}." for module in _OF_TORCH),
    *(f"timm.layers.{module}." for module in _OF_TIMM),
    *("torch.nn.modules.linear.Linear", "torch.nn.modules.linear.Identity", "torchvision.ops.misc.FrozenBatchNorm2d"),
    *("torch.nn.modules.linear.NonDynamicallyQuantizableLinear", "torchmetrics."),
    *("torch.nn.quantized.", "torch.ao.nn.quantized.", "torch.ao.quantization.stubs.", "torch.quantization.stubs."),
)
"""Where modules without children come from whose work is known, or checked elsewhere."""
_SHAPES_ALONE = re.compile(
    r"flatten|view|squeeze|reshape|lambda|identity|dropout|drop_?(path|connect)|stochastic_?depth|loss|print", re.IGNORECASE
)
"""Names of classes of people's own that do nothing in evaluation, or only say how values lie."""
_NO_MODULE = Record.__new__(Record)

_Geometry = tuple[int, int, int, int, int, int]
"""Input and output channels, kernel, stride, padding, dilation."""


def options_of(modules: Mapping[str, Record], options: LoadOptions) -> LoadOptions:
    """Return the options with what the modules state; what the user states goes before it.

    Args:
        modules: Of the network, by name, in the order of their registration.
        options: The user's.

    Raises:
        CheckpointError: An activation that is no ReLU, a max pool that is not the usual one, or several epsilons.
    """
    _check_activations(modules)
    stated: dict[str, str] = {}
    norms = [m for m in modules.values() if "eps" in m.state and "running_var" in _tensors(m, "_buffers")]
    for name, found in (
        ("bn_eps", [m for m in norms if m.path != _NORM_OF_VECTORS]),
        ("head_bn_eps", [m for m in norms if m.path == _NORM_OF_VECTORS]),
    ):
        said = [m.state["eps"] for m in found]
        epsilons = sorted({float(eps) for eps in said if isinstance(eps, int | float)})
        if len(epsilons) > 1 and name not in options.arch:
            raise CheckpointError(
                f"its BatchNorms have several epsilons: {epsilons}", remedy=f"--arch-option {name}=X takes one for all"
            )
        if epsilons:
            stated[name] = repr(epsilons[0])
    stem = _geometry(modules.get("conv1"))
    if stem is not None:
        stated["stem_stride"] = str(stem[3])
    pools = _check_max_pools(modules)
    if pools or _is_nothing(modules.get("maxpool")):
        stated["max_pool"] = "yes" if pools else "no"
    return dataclasses.replace(options, arch={**stated, **options.arch})


def check(modules: Mapping[str, Record], spec: ModelSpec, options: LoadOptions) -> None:
    """Make sure that the convolutions and pools are those that the modules are.

    Args:
        modules: Of the network, by name.
        spec: What was read from its tensors.
        options: The user's; who states strides knows better.

    Raises:
        CheckpointError: A convolution has another stride, padding or dilation, or is of a class of its own; or a pool is not
            what was read.
    """
    layers = walk(spec)
    _check_kinds(modules)
    _check_mean_pools(modules, spec, layers)
    there: dict[str, _Geometry] = {}
    for name, module in modules.items():
        own = _tensors(module, "_parameters")
        if len(getattr(own.get("weight", own.get("weight_orig")), "shape", ())) == 4:
            there[name] = _plain(name, module)
    if not there or {"strides", "stride_at", "stem_stride"} & set(options.arch):
        return
    read = Counter(
        (layer.in_shape[0], layer.out_shape[0], op.kernel[0], op.stride[0], op.pads[0], 1)
        for layer in layers
        if isinstance(op := layer.operation, Conv)
    )
    left, missing = Counter(there.values()) - read, read - Counter(there.values())
    sizes = {geometry[:3] for geometry in missing}
    name_of = (n for n, geometry in there.items() if geometry in left and geometry[:3] in sizes)
    name_found = next(name_of, None)
    if name_found is not None:
        _, _, kernel, stride, padding, _ = there[name_found]
        raise CheckpointError(
            f"its convolution {name_found} is {kernel}x{kernel} with stride {stride}, padding {padding}, "
            "which is not a usual ResNet's",
            remedy="for other strides: --arch-option strides=1,2,2,2 or stride_at=0; padding is half of the kernel",
        )


def check_around(modules: Mapping[str, Record]) -> None:
    """Make sure that what stands beside the network in a larger module is a head, or nothing that computes.

    Args:
        modules: Of the larger module without the network's own, by name.

    Raises:
        CheckpointError: An activation that is no ReLU, or a module of a kind that is not known.
    """
    there = {name: module for name, module in modules.items() if not beside(name)}
    _check_activations(there)
    _check_kinds(there)


def ending(modules: Mapping[str, Record]) -> list[str]:
    """Return what is to be said of an activation behind the last linear layer: the outputs here are what goes into it."""
    order = list(modules)
    last_linear = max((i for i, n in enumerate(order) if modules[n].path == _LINEAR), default=len(order))
    kinds = [modules[n].path.removeprefix(_ACTIVATIONS) for n in order[last_linear + 1 :]]
    return [f"its closing {kind} is left out: the outputs are logits" for kind in kinds if kind in _AT_THE_END][-1:]


def _check_kinds(modules: Mapping[str, Record]) -> None:
    """Make sure that every module without children is of a kind whose work is known; a shortcut's is read off its tensors."""
    for name, module in modules.items():
        if _tensors(module, "_modules") or module.path.startswith(_KNOWN) or beside(name):
            continue
        if _SHAPES_ALONE.search(_kind(module)) or re.search(r"shortcut|downsample|skip", name):
            continue
        raise CheckpointError(
            f"its {name} is of a class of its own, {module.path}, and what that computes cannot be told",
            remedy="if it changes nothing about the outputs, save the state_dict without it",
        )


def _check_activations(modules: Mapping[str, Record]) -> None:
    """Make sure that every activation is a ReLU, but for what ends the head."""
    order = list(modules)
    last_linear = max((i for i, n in enumerate(order) if modules[n].path == _LINEAR), default=len(order))
    for at, name in enumerate(order):
        module = modules[name]
        kind = module.path.removeprefix(_ACTIVATIONS)
        if kind == "ReLU" or (kind in _AT_THE_END and at > last_linear):
            continue
        named = bool(_ACTIVATION_NAME.search(name)) and "eps" not in _parent(modules, name).state
        if kind != module.path or (named and _is_nothing(module)):
            raise CheckpointError(f"its activation {name} is {_kind(module)}", remedy="supported: networks with ReLU")
    linear: dict[str, str] = {}  # the last linear layer of each Sequential
    for name in order:
        parent = name.rpartition(".")[0]
        if modules[name].path == _ACTIVATIONS + "ReLU":
            linear.pop(parent, None)
        elif modules[name].path == _LINEAR and _parent(modules, name).path == _SEQUENTIAL:
            if parent in linear:
                raise CheckpointError(
                    f"its head has no ReLU between {linear[parent]} and {name}",
                    remedy="supported heads: Linear -> ReLU -> Linear",
                )
            linear[parent] = name


def _check_max_pools(modules: Mapping[str, Record]) -> list[str]:
    """Return the max pools; all of them are that of a ResNet's stem."""
    found = [n for n, m in modules.items() if m.path.startswith(_POOLS) and _kind(m).startswith(("Max", "Fractional", "LP"))]
    for name in found:
        module = modules[name]
        facts = tuple(_side(module.state.get(part)) for part in ("kernel_size", "stride", "padding", "dilation"))
        if _kind(module) != "MaxPool2d" or facts != (3, 2, 1, 1) or module.state.get("ceil_mode"):
            raise CheckpointError(
                f"its pooling {name} is another than the 3x3 max pool with stride 2 and padding 1 of a ResNet's stem",
                remedy="supported: that one, or none",
            )
    stem = modules.get("maxpool")
    if stem is not None and not found and not stem.path.startswith(_POOLS) and not _is_nothing(stem):
        raise CheckpointError(
            f"its pooling maxpool is {_kind(stem)}", remedy="supported: the 3x3 max pool of a ResNet, or none"
        )
    return found


def _check_mean_pools(modules: Mapping[str, Record], spec: ModelSpec, layers: Iterable[Layer]) -> None:
    """Make sure that pools in blocks halve, and that those outside are the global one that was read."""
    last = next((layer.in_shape[1:] for layer in layers if isinstance(layer.operation, GlobalPool)), None)
    pool = spec.head.pool if spec.head is not None else None
    for name, module in modules.items():
        kind = _kind(module)
        if kind == "SelectAdaptivePool2d":
            wanted = _TIMM_POOLS.get(str(module.state.get("pool_type")))
            if pool is not None and wanted != pool:
                raise CheckpointError(
                    f"its global pooling {name} is {module.state.get('pool_type')}", remedy="supported: avg, catavgmax"
                )
        elif kind == "AdaptiveMaxPool2d" and pool == "avg":
            raise CheckpointError(f"its global pooling {name} takes maxima", remedy="supported: the mean, or both side by side")
        elif kind == "AdaptiveAvgPool2d" and _side(module.state.get("output_size")) != 1:
            raise CheckpointError(
                f"its pooling {name} leaves {module.state.get('output_size')} pixels", remedy="supported: one"
            )
        elif module.path == _POOLS + "AvgPool2d":
            size, stride = (module.state.get(part) for part in ("kernel_size", "stride"))
            halves = name.count(".") >= 2 and _side(size) == _side(stride) == 2
            whole = last is not None and _pair(size) == tuple(last) and _side(module.state.get("padding")) == 0
            if not halves and not whole:
                raise CheckpointError(
                    f"its pooling {name} averages {size} pixels, where the last feature map has {last}",
                    remedy="if that is the global pooling, state the input: --input 3x224x224",
                )


def _plain(name: str, module: Record) -> _Geometry:
    """Return the geometry of a convolution; raises CheckpointError where it is more than one or not a square one."""
    if module.path != _CONV:
        raise CheckpointError(
            f"its convolution {name} is of a class of its own, {module.path}, and what that computes cannot be told",
            remedy="if it computes what torch.nn.Conv2d does, save the state_dict",
        )
    if module.state.get("padding_mode", "zeros") != "zeros":
        raise CheckpointError(f"its convolution {name} pads by {module.state['padding_mode']}", remedy="supported: zeros")
    found = _geometry(module)
    if found is None:
        raise CheckpointError(
            f"its convolution {name} has another stride, padding or dilation along height than along width",
            remedy="supported: the same along both",
        )
    if found[5] != 1:
        raise CheckpointError(f"its convolution {name} has dilation {found[5]}", remedy="supported: no dilation")
    return found


def _geometry(module: Record | None) -> _Geometry | None:
    """Return what a convolution's module says, or None where it is none or not a square one."""
    if module is None or module.path != _CONV:
        return None
    facts = [module.state.get(name) for name in ("in_channels", "out_channels")]
    facts += [_side(module.state.get(name)) for name in ("kernel_size", "stride", "padding", "dilation")]
    if facts[4] in ("same", "valid") and isinstance(facts[2], int):
        facts[4] = facts[2] // 2 if facts[4] == "same" else 0
    whole = [f for f in facts if isinstance(f, int)]
    return (whole[0], whole[1], whole[2], whole[3], whole[4], whole[5]) if len(whole) == len(facts) else None


def _tensors(module: Record, kind: str) -> Mapping[Any, Any]:
    found = module.state.get(kind)
    return found if isinstance(found, Mapping) else {}


def _parent(modules: Mapping[str, Record], name: str) -> Record:
    return modules.get(name.rpartition(".")[0], _NO_MODULE)


def _kind(module: Record) -> str:
    return module.path.rpartition(".")[2]


def _is_nothing(module: Record | None) -> bool:
    """Whether a module is there and hands its input on."""
    if module is None:
        return False
    return module.path == _IDENTITY or (module.path == _SEQUENTIAL and not _tensors(module, "_modules"))


def _side(value: Any) -> Any:
    """Return the one number of a square pair."""
    square = isinstance(value, tuple | list) and len(value) == 2 and value[0] == value[1]
    return value[0] if square else value


def _pair(value: Any) -> Any:
    """Return the two numbers that one stands for."""
    return (value, value) if isinstance(value, int) else value
