"""`find_groups`: which channels of which tensors must go together, read off the graph.

Tensors that are added, multiplied, normalised, pooled or activated share their channels with their inputs; a convolution or
linear layer makes new ones; a concatenation has those of all its inputs, one after the other; flattening makes each channel
as many columns as it has pixels. So the groups are the connected components of the channels, and they partition the channels
of every tensor:

* an **inner** group lives inside one block, or outside of all of them: removing its channels touches that place only;
* a **stream** group is the residual stream of a stage with everything that writes to it or reads it;
* the **fixed** ones are the network's input and outputs, hidden units of the head, and what a softmax reads.

The *units* that can go one by one are single channels, unless a grouped convolution (its input and output channels are tied,
one convolution group at a time) or a GroupNorm (whose statistics are those of a group of channels) makes them wider. A
channel selection does not tie what it reads to what it makes: a channel that is gone in front of it arrives as zeros, which
it can say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, assert_never

from rescompress.core.graph import INPUT, Layer, Network, ResidualBlock
from rescompress.core.operations import (
    Add,
    Affine,
    AvgPool,
    BatchNorm,
    ChannelConv,
    ChannelSelect,
    Clip,
    Concat,
    Conv,
    Dropout,
    Elu,
    Flatten,
    Gelu,
    GlobalPool,
    GroupNorm,
    HardSigmoid,
    HardSwish,
    Input,
    LeakyRelu,
    Linear,
    MaxPool,
    Multiply,
    Operation,
    Pad,
    PRelu,
    Relu,
    Resize,
    Sigmoid,
    Silu,
    Softmax,
    Tanh,
    Weighted,
)
from rescompress.core.recipe import network_of
from rescompress.core.spec import ModelSpec

Kind = Literal["inner", "stream", "fixed"]
Scope = Literal["inner", "all"]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must go together.

    Attributes:
        name: The first layer that makes them.
        kind: See the module's text.
        size: How many units can go one by one.
        channels: Channels of each unit, per tensor, in order of computation; the tensors of the group are its keys.
        places: Where they are, per tensor: of each run of the group's channels the first one, and how many each unit has.
        producers: Convolutions (and linear layers, for a gate) that make the channels.
        consumers: Convolutions and linear layers that read them; a grouped convolution is both.
    """

    name: str
    kind: Kind
    size: int
    channels: Mapping[str, int]
    places: Mapping[str, tuple[tuple[int, int], ...]]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]

    @property
    def widest(self) -> int:
        """Most channels a unit has in any tensor that a convolution makes."""
        return max((self.channels[name] for name in self.producers), default=1)

    def indices(self, tensor: str, units: Sequence[int] | None = None) -> list[int]:
        """Return the channels of some units (all by default) in a tensor, unit by unit."""
        runs = self.places[tensor]
        return [
            start + unit * width + i
            for unit in (range(self.size) if units is None else units)
            for start, width in runs
            for i in range(width)
        ]


@dataclass
class _Axis:
    """Channels that are tied.

    Attributes:
        units: How many can go one by one.
        root: The axis that stands for this one since they were tied.
        pieces: The axes it was split into, and which parts of its channels they are.
        fixed: Whether none may go.
    """

    units: int
    root: _Axis | None = None
    pieces: tuple[tuple[_Axis, Fraction], ...] = ()
    fixed: bool = False


@dataclass
class _Run:
    """A run of a tensor's channels: those of an axis, as many for each of its units."""

    axis: _Axis
    channels: int


@dataclass
class _Ties:
    """The runs of every tensor, as ties are found."""

    runs: dict[str, list[_Run]] = field(default_factory=dict)

    def new(self, channels: int, *, fixed: bool = False) -> list[_Run]:
        return [_Run(_Axis(channels, fixed=fixed), channels)]

    def of(self, tensor: str) -> list[_Run]:
        """Return the runs of a tensor by axes that stand for themselves."""
        found: list[_Run] = []
        for run in self.runs[tensor]:
            found += _settled(run)
        self.runs[tensor] = found
        return found

    def same(self, tensors: Sequence[str], factor: int = 1) -> list[_Run]:
        """Tie tensors channel by channel; return runs of `factor` channels for each of theirs."""
        first = self.of(tensors[0])
        for name in tensors[1:]:
            _tie(first, self.of(name))
            first = self.of(tensors[0])
        return [_Run(run.axis, run.channels * factor) for run in first]

    def parts(self, tensor: str, count: int) -> list[_Run]:
        """Make a tensor's channels go in `count` equal parts only; return its runs."""
        _tie([_Run(_Axis(count), sum(run.channels for run in self.of(tensor)))], self.of(tensor))
        return self.of(tensor)


def _settled(run: _Run) -> list[_Run]:
    """Return a run as runs of axes that stand for themselves and are whole."""
    axis = _root(run.axis)
    if not axis.pieces:
        return [_Run(axis, run.channels)]
    return [r for piece, part in axis.pieces for r in _settled(_Run(piece, int(run.channels * part)))]


def _tie(one: list[_Run], two: list[_Run]) -> None:
    """Tie two lists of runs of as many channels; where their borders differ, axes are split there, or nothing may go."""
    left, right = list(one), list(two)
    while left and right:
        left[:1], right[:1] = _settled(left[0]), _settled(right[0])
        a, b = left.pop(0), right.pop(0)
        if a.channels != b.channels:
            longer, shorter, rest = (a, b, left) if a.channels > b.channels else (b, a, right)
            parts = _split(longer, shorter.channels)
            if parts is None:
                for run in [r for whole in (*one, *two) for r in _settled(whole)]:
                    run.axis.fixed = True
                return
            rest.insert(0, parts[1])
            a, b = (parts[0], b) if longer is a else (a, parts[0])
        _merge(a.axis, b.axis)


def _split(run: _Run, channels: int) -> tuple[_Run, _Run] | None:
    """Split a run (and its axis) behind so many channels; None where that would be inside a unit."""
    axis = run.axis
    width = run.channels // axis.units
    if channels % width:
        return None
    first = _Axis(channels // width, fixed=axis.fixed)
    second = _Axis(axis.units - first.units, fixed=axis.fixed)
    part = Fraction(first.units, axis.units)
    axis.pieces = ((first, part), (second, 1 - part))
    return _Run(first, channels), _Run(second, run.channels - channels)


def _root(axis: _Axis) -> _Axis:
    while axis.root is not None:
        axis = axis.root
    return axis


def _merge(a: _Axis, b: _Axis) -> None:
    """Make one axis of two; its units end where units of both do."""
    a, b = _root(a), _root(b)
    if a is b:
        return
    a.units = math.gcd(a.units, b.units)
    a.fixed = a.fixed or b.fixed
    b.root = a


def find_groups(layers: Sequence[Layer], outputs: Sequence[str] | None = None) -> list[ChannelGroup]:
    """Return every group of the network, in order of computation; each channel of each tensor is in exactly one.

    Args:
        layers: The layers of a network.
        outputs: The tensors that are its outputs; by default the last.
    """
    ties = _Ties()
    for layer in layers:
        ties.runs[layer.name] = _runs_of(layer, ties)
    for name in outputs if outputs is not None else (layers[-1].name,):
        for run in ties.of(name):
            run.axis.fixed = True
    axes: dict[int, _Axis] = {}
    members: dict[int, dict[str, list[tuple[int, int]]]] = {}
    for layer in layers:
        start = 0
        for run in ties.of(layer.name):
            axes[id(run.axis)] = run.axis
            places = members.setdefault(id(run.axis), {}).setdefault(layer.name, [])
            places.append((start, run.channels // run.axis.units))
            start += run.channels
    by_name = {layer.name: layer for layer in layers}
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        if isinstance(layer.operation, Weighted):
            readers.setdefault(layer.inputs[0], []).append(layer)
    order = {layer.name: i for i, layer in enumerate(layers)}
    found: list[ChannelGroup] = []
    names: set[str] = set()
    for key, spots in members.items():
        first = next(iter(spots))
        name = first if first not in names else f"{first}:{sum(n.split(':')[0] == first for n in names)}"
        names.add(name)
        read = sorted((r for tensor in spots for r in readers.get(tensor, ())), key=lambda r: order[r.name])
        found.append(_group(name, axes[key], [by_name[t] for t in spots], spots, read))
    return found


def _runs_of(layer: Layer, ties: _Ties) -> list[_Run]:
    """Return the runs of a layer's output, tied to those of its inputs as the operation does."""
    channels = layer.out_shape[0]
    match layer.operation:
        case Input():
            return ties.new(channels, fixed=True)
        case Conv() as op:
            if op.groups == 1:
                return ties.new(channels)
            read = ties.parts(layer.inputs[0], op.groups)
            if len(read) == 1:
                return [_Run(read[0].axis, channels)]
            for run in read:  # a convolution group may not end where a tensor of several groups has a border
                run.axis.fixed = True
            return ties.new(channels, fixed=True)
        case Linear() | ChannelSelect():
            return ties.new(channels)
        case GroupNorm() as op:
            ties.parts(layer.inputs[0], op.groups)
            return ties.same(layer.inputs)
        case Softmax():
            runs = ties.same(layer.inputs)
            for run in runs:
                run.axis.fixed = True
            return runs
        case Concat():
            return [_Run(run.axis, run.channels) for name in layer.inputs for run in ties.of(name)]
        case GlobalPool() as op:
            return ties.same(layer.inputs, 2 if op.kind == "max_avg" else 1)
        case Flatten():
            return ties.same(layer.inputs, math.prod(layer.in_shape[1:]))
        case Multiply():
            gate = layer.in_shapes[1]
            tied = layer.inputs if gate[0] == channels else layer.inputs[:1]  # a gate per pixel has one channel
            return ties.same(tied)
        case Add() | BatchNorm() | Affine() | MaxPool() | AvgPool() | Pad() | Dropout() | Resize():
            return ties.same(layer.inputs)
        case ChannelConv():  # a channel that goes leaves its place in the line empty, so its neighbours see a zero there
            return ties.same(layer.inputs)
        case Relu() | Clip() | LeakyRelu() | Elu() | PRelu() | Silu() | Gelu() | HardSwish() | HardSigmoid() | Sigmoid():
            return ties.same(layer.inputs)
        case Tanh():
            return ties.same(layer.inputs)
        case never:
            assert_never(never)


def _group(
    name: str, axis: _Axis, tensors: list[Layer], places: Mapping[str, list[tuple[int, int]]], readers: Sequence[Layer]
) -> ChannelGroup:
    producers = [t for t in tensors if isinstance(t.operation, Weighted)]
    convs = [t for t in producers if isinstance(t.operation, Conv)]
    plain = [r for r in readers if is_plain(r)]
    kind: Kind = "stream"
    if not convs or not plain or axis.fixed:
        kind = "fixed"
    elif not any(isinstance(t.operation, Add) for t in tensors) and {r.block for r in readers} == {p.block for p in producers}:
        kind = "inner"
    return ChannelGroup(
        name=name,
        kind=kind,
        size=axis.units,
        channels={tensor: sum(width for _, width in runs) for tensor, runs in places.items()},
        places={tensor: tuple(runs) for tensor, runs in places.items()},
        producers=tuple(p.name for p in producers) if convs else (),
        consumers=tuple(r.name for r in readers),
    )


def is_plain(layer: Layer) -> bool:
    """Whether each output of a convolution or linear layer reads every channel; a grouped convolution's does not."""
    return not (isinstance(layer.operation, Conv) and layer.operation.groups > 1)


def prunable(groups: Sequence[ChannelGroup], scope: Scope) -> list[ChannelGroup]:
    """Return the groups that `scope` lets go: ``inner`` ones, or ``all`` but the fixed."""
    return [g for g in groups if g.kind == "inner" or (scope == "all" and g.kind == "stream")]


def stages(spec: ModelSpec | Network) -> list[list[ResidualBlock]]:
    """Return the blocks by stage: runs of blocks, each beginning where the one before ends, that make maps of one size."""
    network = network_of(spec)
    found: list[list[ResidualBlock]] = []
    for block in network.blocks:
        before = found[-1][-1] if found else None
        shape = network.by_name[block.tail].out_shape
        if before is not None and block.source == before.tail and network.by_name[before.tail].out_shape == shape:
            found[-1].append(block)
        else:
            found.append([block])
    return found


def droppable(spec: ModelSpec | Network) -> list[str]:
    """Return the blocks that can go as a whole: identity shortcut, and not the only block of their stage.

    What a block makes must be what enters where its main branch makes zeros: the activation behind the sum, if there is one,
    changes nothing about what has been through it before.
    """
    network = network_of(spec)
    return [
        b.name
        for stage in stages(network)
        if len(stage) > 1
        for b in stage
        if not b.shortcut and b.contained and _vanishes(network, b)
    ]


def _vanishes(network: Network, block: ResidualBlock) -> bool:
    members = {name for name in block.members}
    at = [i for i, layer in enumerate(network.layers) if layer.name in members]
    if len(at) != len(members) or at[-1] - at[0] + 1 != len(at) or any(network.layers[i].block != block.name for i in at):
        return False
    if block.tail == block.add:
        return True
    tail, source = network.by_name[block.tail], network.by_name[block.source]
    if isinstance(tail.operation, Relu):
        return network.non_negative(source.name)
    return isinstance(tail.operation, Clip) and tail.operation == source.operation


class Sizes:
    """The layers of a network whose groups keep other numbers of units, for costs; no tensors are involved."""

    def __init__(self, spec: ModelSpec | Network) -> None:
        """Index the groups of a network."""
        self.network = network_of(spec)
        self.layers = list(self.network.layers)
        self.groups = {g.name: g for g in find_groups(self.layers, [o.tensor for o in self.network.outputs])}
        self._runs: dict[str, list[tuple[int, str, int]]] = {}
        for g in self.groups.values():
            for tensor, runs in g.places.items():
                self._runs.setdefault(tensor, []).extend((start, g.name, width) for start, width in runs)
        # Of a tensor of several groups the one with the most channels stands for it where one name is asked for.
        self.group_of = {
            tensor: max(runs, key=lambda r: (r[2] * self.groups[r[1]].size, -r[0]))[1] for tensor, runs in self._runs.items()
        }

    def source(self, layer: Layer) -> str:
        """Return the group that `layer` reads."""
        return self.group_of[layer.inputs[0] if layer.inputs else INPUT]

    def width(self, tensor: str, units: Mapping[str, int]) -> int:
        """Return the channels of a tensor when each named group keeps that many units; groups not named keep all."""
        return sum(units.get(name, self.groups[name].size) * width for _, name, width in self._runs[tensor])

    def groups_in(self, layers: Sequence[Layer]) -> tuple[str, ...]:
        """Return the groups whose units change how `layers` are `resized`."""
        tensors = dict.fromkeys(name for layer in layers for name in (*layer.inputs, layer.name))
        return tuple(dict.fromkeys(group for tensor in tensors for _, group, _ in self._runs[tensor]))

    def resized(self, layer: Layer, units: Mapping[str, int]) -> Layer:
        """Return `layer` as it is when each named group keeps that many units; groups not named keep all.

        The channels of a selection are cut to number only: costs do not read what it says.
        """
        reads = tuple((self.width(name, units), *shape[1:]) for name, shape in zip(layer.inputs, layer.in_shapes, strict=True))
        makes = (self.width(layer.name, units), *layer.out_shape[1:])
        operation = narrowed(layer, reads[0][0] if reads else makes[0], makes[0], (-1,) * makes[0])
        return replace(layer, in_shapes=reads, out_shape=makes, operation=operation)

    def segments(self) -> list[list[Layer]]:
        """Return the layers cut into runs: a convolution, pool or linear layer with the elementwise ones after it."""
        runs: list[list[Layer]] = []
        for layer in self.layers:
            if not begins_segment(layer) and runs:
                runs[-1].append(layer)
            else:
                runs.append([layer])
        return runs


def begins_segment(layer: Layer) -> bool:
    """Whether a runtime starts another kernel with this layer, rather than to compute it with the one before."""
    match layer.operation:
        case Conv() | Linear() | MaxPool() | AvgPool() | GlobalPool() | ChannelSelect() | Concat() | Pad() | Resize() | Input():
            return True
        case ChannelConv():
            return True
        case BatchNorm() | GroupNorm() | Affine() | Add() | Multiply() | Dropout() | Flatten() | Softmax() | Tanh():
            return False
        case Relu() | Clip() | LeakyRelu() | Elu() | PRelu() | Silu() | Gelu() | HardSwish() | HardSigmoid() | Sigmoid():
            return False
        case never:
            assert_never(never)


def narrowed(layer: Layer, reads: int, makes: int, selected: tuple[int, ...]) -> Operation:
    """Return the operation of a layer that reads and makes so many channels.

    Args:
        layer: As it is.
        reads: Channels of its first input.
        makes: Channels of its output.
        selected: For a channel selection: the channel that each of its output channels takes; for a convolution over channels:
            the place of each.
    """
    op = layer.operation
    match op:
        case Conv():
            groups = op.groups * reads // layer.in_shape[0] if op.groups > 1 else 1
            return op.model_copy(update={"width": makes, "groups": groups})
        case Linear():
            return op.model_copy(update={"width": makes})
        case GroupNorm():
            return op.model_copy(update={"groups": op.groups * reads // layer.in_shape[0]})
        case ChannelSelect():
            return op.model_copy(update={"channels": selected})
        case ChannelConv():
            return op.model_copy(update={"places": selected})
        case Input() | BatchNorm() | Affine() | Add() | Multiply() | Concat() | MaxPool() | AvgPool() | GlobalPool() | Pad():
            return op
        case Flatten() | Dropout() | Resize() | Softmax() | Tanh() | Relu() | Clip() | LeakyRelu() | Elu() | PRelu() | Silu():
            return op
        case Gelu() | HardSwish() | HardSigmoid() | Sigmoid():
            return op
        case never:
            assert_never(never)
