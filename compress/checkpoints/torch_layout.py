"""The key layout that torch ResNets share (``conv1``, ``bn1``, ``layer1.0.conv1`` ...), with its many small variants.

The formats for torchvision, timm, CIFAR networks and others differ in stems, shortcut names and heads only; they share
this reader, and differ in what they claim and what they assume.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Literal

from compress.checkpoints import heads
from compress.checkpoints.base import LoadOptions, RawState, Root, Stored
from compress.checkpoints.layout import Layout
from compress.checkpoints.leftovers import left_out, outside_of
from compress.checkpoints.roots import heads_outside
from rescompress.core.errors import CheckpointError

MARKER = re.compile(r"layer\d+\.\d+\.conv1\.weight$")
_PARTS = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_BLOCK = re.compile(r"(layer\d+\.\d+)\.(.+)")
_MAIN = re.compile(rf"(conv|bn)([123])\.{_PARTS}")
_SHORTCUT = re.compile(rf"(?:downsample|shortcut|skip|projection)\.(?:(\d+)|conv|bn|norm)\.{_PARTS}")
_STEM = re.compile(rf"(conv|bn)1\.{_PARTS}")
_DEEP = re.compile(rf"(?:conv1|stem)\.(\d+)\.{_PARTS}")
_HARMLESS = re.compile(r"(.*\.)?(total_ops|total_params|num_batches_tracked|n_averaged|_extra_state|_metadata)$")
_CALLED = {
    "se": "squeeze-and-excitation (SE)",
    "attn": "attention",
    "ca": "channel attention (CBAM)",
    "sa": "spatial attention (CBAM)",
    "convs": "split convolutions (Res2Net)",
    "aa": "anti-aliased down-sampling",
    "radix": "split attention (ResNeSt)",
}


def read(raw: RawState, root: Root, options: LoadOptions) -> tuple[Layout, frozenset[str], float]:
    """Return the layout of a torch ResNet, the blocks whose projection pools first, and the head's dropout.

    Args:
        raw: Tensors below the network's root.
        root: Where the network stands in its file; a classifier may stand beside it.
        options: What the user states.

    Raises:
        CheckpointError: The head is of no supported kind.
    """
    layout = Layout()
    pooled: set[str] = set()
    rest: dict[str, Stored] = {}
    for key, stored in raw.tensors.items():
        block = _BLOCK.fullmatch(key)
        if block:
            _block_part(layout, pooled, raw, block[1], block[2], stored)
        elif _STEM.fullmatch(key):
            layout.tensors[key] = stored
        else:
            rest[key] = stored
    _deep_stem(layout, rest)
    found, outside = _head(layout, rest, root, options)
    rest = {key: stored for key, stored in rest.items() if not _HARMLESS.fullmatch(key)}
    outside = {key: stored for key, stored in outside.items() if not _HARMLESS.fullmatch(key)}
    if not layout.foreign:  # parts of blocks are named first: they say what kind of network it is
        maybe = () if layout.head else _linear_layers(rest)  # no classifier was found, and that is told
        layout.ignored += left_out(rest, heads=(*found.spare, *maybe))
        # who names the root takes the network alone
        layout.ignored += list(outside) if "root" in options.arch else outside_of(outside, heads=found.spare)
    return layout, frozenset(pooled), found.dropout


def renamed(raw: RawState, name: Callable[[str], str]) -> RawState:
    """Return the tensors under other keys.

    Args:
        raw: The tensors.
        name: Gives the new key for each.

    Raises:
        CheckpointError: Two keys would become one.
    """
    tensors: dict[str, Stored] = {}
    for key, stored in raw.tensors.items():
        new = name(key)
        if new in tensors:
            raise CheckpointError(f"two tensors would be called {new}, one of them {key}", remedy="save the state_dict alone")
        tensors[new] = stored
    return dataclasses.replace(raw, tensors=tensors)


def _block_part(layout: Layout, pooled: set[str], raw: RawState, name: str, rest: str, stored: Stored) -> None:
    if _MAIN.fullmatch(rest):
        layout.tensors[f"{name}.{rest}"] = stored
        return
    shortcut = _SHORTCUT.fullmatch(rest)
    if shortcut:
        # the convolution is the part with a 4-dimensional weight; a pool without parameters may stand before it
        path = f"{name}.{rest.rpartition('.')[0]}"
        weight = raw.tensors.get(f"{path}.weight")
        is_conv = weight is not None and len(weight.shape) == 4
        layout.tensors[f"{name}.downsample.{0 if is_conv else 1}.{shortcut[2]}"] = stored
        if is_conv and shortcut[1] == "1":
            pooled.add(name)
    elif not _HARMLESS.fullmatch(rest):
        called = _CALLED.get(rest.split(".")[0])
        layout.foreign.append(f"{name}.{rest}" + (f" ({called})" if called else ""))


def _deep_stem(layout: Layout, rest: dict[str, Stored]) -> None:
    """Take a stem of several convolutions, a Sequential with or without its last BatchNorm, out of `rest`."""
    modules: dict[int, dict[str, Stored]] = {}
    keys = [key for key in rest if _DEEP.fullmatch(key)]
    for key in keys:
        match = _DEEP.fullmatch(key)
        assert match is not None
        modules.setdefault(int(match[1]), {})[match[2]] = rest[key]
    convs = norms = 0
    for _, parts in sorted(modules.items()):
        if "weight" not in parts:
            return
        if len(parts["weight"].shape) == 4:
            convs += 1
            name = f"conv{convs}"
        else:
            norms += 1
            name = f"bn{norms}"
        for part, stored in parts.items():
            layout.tensors.setdefault(f"_{name}.{part}", stored)
    if not convs:
        return
    # the last BatchNorm of a deep stem is called bn1, outside of the Sequential
    if norms == convs - 1:
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            outer = layout.tensors.pop(f"bn1.{part}", None)
            if outer is not None:
                layout.tensors[f"_bn{convs}.{part}"] = outer
    for key in [k for k in layout.tensors if k.startswith("_")]:
        layout.tensors[key[1:]] = layout.tensors.pop(key)
    for key in keys:
        del rest[key]


def _head(layout: Layout, rest: dict[str, Stored], root: Root, options: LoadOptions) -> tuple[heads.Found, dict[str, Stored]]:
    """Return the head, taken out of `rest`, and what stands outside of the network and is no part of the head."""
    features = _feature_width(layout)
    beside = list(heads_outside(root))
    outside = dict(root.outside)
    spare: list[str] = []
    for any_name in (False, True):
        found = heads.find_head(rest, features, options, any_name=any_name)
        spare += found.spare
        near: dict[str, Stored] = {}
        for prefix, tensors in () if found.layers else beside:
            found = heads.find_head(tensors, features, options, any_name=any_name)
            spare += [prefix + path for path in found.spare]
            if found.layers:
                layout.notes.append(f"the head stands outside of the backbone ({prefix}{sorted(found.used)[0]})")
                near = {k: v for k, v in tensors.items() if k not in found.used}
                outside = {k: v for k, v in outside.items() if not (k.startswith(prefix) and k[len(prefix) :] in found.used)}
                found.used = set()
                break
        if found.layers:
            heads.refuse_norms({k: v for k, v in rest.items() if k not in found.used} | near, found, features)
            break
    found.spare = spare
    layout.head = found.layers
    layout.notes.extend(found.notes)
    for key in found.used:
        rest.pop(key, None)
    return found, outside


def _linear_layers(tensors: dict[str, Stored]) -> list[str]:
    return [
        key.removesuffix(".weight") for key, stored in tensors.items() if key.endswith(".weight") and len(stored.shape) == 2
    ]


def _feature_width(layout: Layout) -> int:
    last, width = (-1, -1, -1), 0
    for key, stored in layout.tensors.items():
        match = re.fullmatch(r"layer(\d+)\.(\d+)\.conv([23])\.weight", key)
        if match and (int(match[1]), int(match[2]), int(match[3])) >= last:
            last, width = (int(match[1]), int(match[2]), int(match[3])), stored.shape[0] if stored.shape else 0
    if not width:
        raise CheckpointError("incomplete: no block has a second convolution", remedy="save the whole network")
    return width


def family(raw: RawState) -> Literal["torchvision", "timm", "cifar"] | None:
    """Return which of the formats that share this layout a network belongs to.

    One without a stem is left to the torchvision format, which says that it is incomplete. None where the keys are others.
    """
    if raw.metadata.get("format") == "rescompress":
        return None
    if not any(MARKER.match(key) for key in raw.tensors):
        return None
    if any(_DEEP.fullmatch(key) for key in raw.tensors):
        return "timm"
    for key, stored in raw.tensors.items():
        if re.fullmatch(r"layer\d+\.\d+\.downsample\.1\.weight", key) and len(stored.shape) == 4:
            return "timm"
    stem = raw.shape("conv1.weight")
    return "cifar" if stem is not None and len(stem) == 4 and stem[2] <= 3 else "torchvision"
