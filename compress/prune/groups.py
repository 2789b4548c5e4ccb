"""`find_groups`: which channels of which tensors must go together, read off the layer walk.

Tensors that are added, normalised, pooled or activated share their channels with their inputs; a convolution makes new
ones. So the groups are the connected components of the walk, and they partition the channels of every tensor:

* an **inner** group lives inside one block (or inside a deep stem): removing its channels touches that place only;
* a **stream** group is the residual stream of a stage with everything that writes to it or reads it;
* the **fixed** ones are the network's input, hidden units of the head, and the output.

A grouped convolution ties its input channels to its output channels, one convolution group at a time; the *units* that
can go one by one are then whole convolution groups. A pad shortcut does not tie two streams: a channel that is gone in
front of it arrives as zeros, which its channel map can say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rescompress.core.layers import INPUT, Layer, walk
from rescompress.core.spec import ModelSpec

Kind = Literal["inner", "stream", "fixed"]
Scope = Literal["inner", "all"]

ELEMENTWISE = frozenset({"batch_norm", "relu", "add", "dropout"})


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must go together.

    Attributes:
        name: The first layer that makes them.
        kind: See the module's text.
        size: How many units can go one by one.
        channels: Channels of each unit, per tensor, in order of computation; the tensors of the group are its keys.
        producers: Convolutions that make the channels.
        consumers: Convolutions and linear layers that read them; a grouped convolution is both.
    """

    name: str
    kind: Kind
    size: int
    channels: Mapping[str, int]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]

    @property
    def widest(self) -> int:
        """Most channels a unit has in any tensor that a convolution makes."""
        return max((self.channels[name] for name in self.producers), default=1)


def find_groups(layers: Sequence[Layer]) -> list[ChannelGroup]:
    """Return every group of the network, in order of computation; each tensor is in exactly one.

    Args:
        layers: ``walk(spec)``.
    """
    root: dict[str, str] = {}
    for layer in layers:
        ties = layer.inputs if layer.op not in ("input", "conv", "linear", "pad_shortcut") or layer.groups > 1 else ()
        root[layer.name] = layer.name
        for name in ties:
            old, new = sorted((_find(root, name), _find(root, layer.name)), key=list(root).index)
            root[new] = old
    members: dict[str, list[Layer]] = {}
    for layer in layers:
        members.setdefault(_find(root, layer.name), []).append(layer)
    return [_group(name, tensors, layers) for name, tensors in members.items()]


def _find(root: Mapping[str, str], name: str) -> str:
    while root[name] != name:
        name = root[name]
    return name


def _group(name: str, tensors: list[Layer], layers: Sequence[Layer]) -> ChannelGroup:
    inside = {t.name for t in tensors}
    producers = [t for t in tensors if t.op == "conv"]
    readers = [layer for layer in layers if layer.inputs and layer.inputs[0] in inside and layer.op in ("conv", "linear")]
    conv_groups = max((t.groups for t in tensors), default=1)
    size = conv_groups if conv_groups > 1 else tensors[0].out_shape[0]
    kind: Kind = "stream"
    if not producers or layers[-1].name in inside:
        kind = "fixed"
    elif not any(t.op == "add" for t in tensors) and {r.block for r in readers} == {p.block for p in producers}:
        kind = "inner"
    return ChannelGroup(
        name=name,
        kind=kind,
        size=size,
        channels={t.name: t.out_shape[0] // size for t in tensors},
        producers=tuple(p.name for p in producers),
        consumers=tuple(r.name for r in readers),
    )


def prunable(groups: Sequence[ChannelGroup], scope: Scope) -> list[ChannelGroup]:
    """Return the groups that `scope` lets go: ``inner`` ones, or ``all`` but the fixed."""
    return [g for g in groups if g.kind == "inner" or (scope == "all" and g.kind == "stream")]


def droppable(spec: ModelSpec) -> list[str]:
    """Return the blocks that can go as a whole: identity shortcut, and not the only block of their stage."""
    return [b.name for stage in spec.stages if len(stage) > 1 for b in stage if b.shortcut == "identity"]


class Sizes:
    """The layers of a network whose groups keep other numbers of units, for costs; no tensors are involved."""

    def __init__(self, spec: ModelSpec) -> None:
        """Index the groups of `spec`."""
        self.layers = walk(spec)
        self.groups = {g.name: g for g in find_groups(self.layers)}
        self.group_of = {tensor: g.name for g in self.groups.values() for tensor in g.channels}

    def source(self, layer: Layer) -> str:
        """Return the group that `layer` reads."""
        return self.group_of[layer.inputs[0] if layer.inputs else INPUT]

    def resized(self, layer: Layer, units: Mapping[str, int]) -> Layer:
        """Return `layer` as it is when each named group keeps that many units; groups not named keep all.

        The channel map of a pad shortcut is cut to length only: costs do not read what it says.
        """
        reads, makes = self.groups[self.source(layer)], self.groups[self.group_of[layer.name]]
        read = layer.inputs[0] if layer.inputs else layer.name
        c_in = units.get(reads.name, reads.size) * reads.channels[read]
        c_out = units.get(makes.name, makes.size) * makes.channels[layer.name]
        return replace(
            layer,
            in_shape=(c_in, *layer.in_shape[1:]),
            out_shape=(c_out, *layer.out_shape[1:]),
            groups=units.get(makes.name, makes.size) if layer.groups > 1 else 1,
            channel_map=(-1,) * c_out if layer.channel_map is not None else None,
        )

    def segments(self) -> list[list[Layer]]:
        """Return the layers cut into runs: a convolution, pool or linear layer with the elementwise ones after it."""
        runs: list[list[Layer]] = []
        for layer in self.layers:
            if layer.op in ELEMENTWISE and runs:
                runs[-1].append(layer)
            else:
                runs.append([layer])
        return runs
