"""`Network`: the one description of a network, as the graph of its computation.

A network and a dict of tensors are a whole checkpoint. The torch model, the ONNX writer, channel groups, quantizer
placement, budgets, latency and reports all read `Network.layers`, so they cannot disagree about what is computed.

How to build one (what a reader of foreign files does)::

    nodes = [
        Node(name="input", operation=Input()),
        Node(name="stem", operation=Conv(width=16, kernel=(3, 3), pads=(1, 1, 1, 1)), inputs=("input",)),
        Node(name="stem.bn", operation=BatchNorm(eps=1e-3), inputs=("stem",)),
        Node(name="stem.relu", operation=Relu(), inputs=("stem.bn",)),
        ...
        Node(name="pool", operation=GlobalPool(), inputs=("last",)),
        Node(name="fc", operation=Linear(width=10), inputs=("pool",)),
    ]
    network = Network(arch="resnet20", input_shape=(3, 32, 32), nodes=nodes, outputs=(Output(name="logits", tensor="fc",
                      classes=True),), preprocessing=..., labels=None)

* The first node is ``input``; every other node reads tensors of nodes before it. A tensor is called as the node that makes
  it. Names are free but unique, made of ``[A-Za-z0-9_]`` with dots and slashes between; readers keep the file's own, and
  `safe_name` makes a legal one of any text. A dot and a slash are one where names become modules: there cannot be ``a.b`` and
  ``a/b``. An output may be called as the node that makes it, not as another.
* Shapes, parameters and MACs are inferred: a network that does not fit together cannot be built (ValueError, which names the
  node).
* A node's parameters are in the checkpoint's tensors under ``<node>.weight``, ``<node>.bias``, ``<node>.running_mean``,
  ``<node>.running_var``, ``<node>.num_batches_tracked`` (int64, ()): exactly those of `Layer.tensors`, float32, in torch's
  layouts (conv OIHW, linear OI). `Network.tensor_shapes` lists them all.
* ``Output.classes`` marks class scores (logits, no softmax: leave a last softmax or sigmoid out, and say so). With exactly
  one output, and that of classes, the network is a classifier (`Network.num_classes`).
* What a node is for in training only (stochastic depth) is a `Dropout`; what is nothing at all is left out.

Counting: one MAC is one multiply and one add; only convolutions and linear layers have MACs (as in He et al. 2015, table 1,
"FLOPs" there), so that the count is half of what torch's ``FlopCounterMode`` reports.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from rescompress.core.operations import (
    ACTIVATIONS,
    Add,
    BatchNorm,
    ChannelConv,
    Conv,
    Dropout,
    Input,
    Operation,
    Shape,
    Weighted,
    non_negative,
)
from rescompress.core.spec import Frozen, Preprocessing, Width

INPUT = "input"
_NAME = re.compile(r"[A-Za-z0-9_]+(?:[./][A-Za-z0-9_]+)*")


class Node(Frozen):
    """One operation.

    Attributes:
        name: Unique; the name of the tensor it makes, too.
        operation: What it computes.
        inputs: Names of the tensors it reads.
    """

    name: str
    operation: Annotated[Operation, Field(discriminator="op")]
    inputs: tuple[str, ...] = ()


class Output(Frozen):
    """One result of the network.

    Attributes:
        name: What people call it; the name of the output in ONNX files.
        tensor: The node that makes it.
        classes: Whether it holds one score per class: logits, or one logit of a binary classifier.
    """

    name: str
    tensor: str
    classes: bool = False


@dataclass(frozen=True)
class Layer:
    """A node with what is inferred about it.

    Attributes:
        name: Of the node and of its output tensor; its parameters are ``<name>.weight`` and so on.
        operation: What it computes.
        inputs: Names of the tensors it reads.
        in_shapes: Their shapes, without the batch: (C, H, W) or (C,).
        out_shape: Shape of the output, likewise.
        block: Name of the residual block it belongs to, or None.
    """

    name: str
    operation: Operation
    inputs: tuple[str, ...]
    in_shapes: tuple[Shape, ...]
    out_shape: Shape
    block: str | None = None

    @property
    def op(self) -> str:
        """Which operation it is, in a word; code that decides something per operation matches `operation` instead."""
        return self.operation.op

    @property
    def in_shape(self) -> Shape:
        """Shape of the first input."""
        return self.in_shapes[0] if self.in_shapes else self.out_shape

    @property
    def tensors(self) -> dict[str, Shape]:
        """The shape of every tensor it owns, by its name in a checkpoint."""
        return {f"{self.name}.{part}": shape for part, shape in self.operation.parameters(self.in_shapes).items()}

    @property
    def weight_shape(self) -> Shape:
        """Shape of the weight tensor (OIHW, OI or C), () where there is none."""
        return self.operation.parameters(self.in_shapes).get("weight", ())

    @property
    def weights(self) -> int:
        """Elements of the weight tensor."""
        return math.prod(self.weight_shape) if self.weight_shape else 0

    @property
    def params(self) -> int:
        """Learnable parameters, as ``sum(p.numel() for p in module.parameters())`` counts them."""
        constants = self.operation.constants
        parts = self.operation.parameters(self.in_shapes)
        return sum(math.prod(shape) for part, shape in parts.items() if part not in constants)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input."""
        if isinstance(self.operation, ChannelConv):
            return self.weights * self.operation.length
        return self.weights * math.prod(self.out_shape[1:]) if isinstance(self.operation, Weighted) else 0

    @property
    def in_elements(self) -> int:
        """Elements of the first input tensor, for one image."""
        return math.prod(self.in_shape)

    @property
    def out_elements(self) -> int:
        """Elements of the output tensor, for one image."""
        return math.prod(self.out_shape)


@dataclass(frozen=True)
class ResidualBlock:
    """An Add whose two inputs meet again at one tensor, and what lies between.

    Attributes:
        name: Of the Add's node, without a last ``.add``.
        source: The tensor at which both branches begin.
        main: Layers of the main branch, in order of computation; the branch with more weighted layers.
        shortcut: Layers of the other branch; empty for an identity.
        add: The node that sums them.
        tail: The activation that follows, where nothing else reads the sum; else the Add itself. What the block makes.
        contained: Whether nothing outside reads a tensor between `source` and `tail`, so that the block can go as a whole.
    """

    name: str
    source: str
    main: tuple[str, ...]
    shortcut: tuple[str, ...]
    add: str
    tail: str
    contained: bool

    @property
    def members(self) -> tuple[str, ...]:
        """Every layer of the block."""
        return (*self.main, *self.shortcut, *dict.fromkeys((self.add, self.tail)))


class Network(Frozen):
    """Everything but the tensors of a network.

    Attributes:
        arch: What people call it, such as ``resnet50``; pruning keeps it.
        input_shape: Channels, height and width of one input.
        nodes: In order of computation; the first is the input.
        outputs: What it computes: one, or several with names of their own.
        preprocessing: What the input went through.
        labels: Name of each class, in order of the class scores.
    """

    arch: str = "network"
    input_shape: tuple[Width, Width, Width] = (3, 224, 224)
    nodes: tuple[Node, ...] = Field(min_length=2)
    outputs: tuple[Output, ...] = Field(min_length=1)
    preprocessing: Preprocessing = Preprocessing()
    labels: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        shapes = self._shapes
        for kind, names in (("nodes", [n.name for n in self.nodes]), ("outputs", [o.name for o in self.outputs])):
            if len(set(names)) != len(names):
                raise ValueError(f"two {kind} are called {next(n for n in names if names.count(n) > 1)}")
        plain = [name.replace("/", ".") for name in shapes]  # a dot and a slash are one where names become modules
        if len(set(plain)) != len(plain):
            raise ValueError(f"two nodes are called {next(n for n in plain if plain.count(n) > 1)}, but for dots and slashes")
        if taken := [o.name for o in self.outputs if o.name in shapes and o.name != o.tensor]:
            raise ValueError(f"the output {taken[0]} is called as a node that makes another tensor")
        if missing := [o.tensor for o in self.outputs if o.tensor not in shapes or o.tensor == INPUT]:
            raise ValueError(f"no node makes the output {missing[0]}")
        read = {name for node in self.nodes for name in node.inputs} | {o.tensor for o in self.outputs}
        if unread := [n.name for n in self.nodes if n.name not in read and n.name != INPUT]:
            raise ValueError(f"nothing reads {unread[0]}, and it is no output")
        for output in self.outputs:
            if output.classes and len(shapes[output.tensor]) != 1:
                raise ValueError(f"output {output.name} of shape {shapes[output.tensor]} is no vector of class scores")
        classes = self.num_classes
        if self.labels is not None and classes is not None and len(self.labels) != max(classes, 2 if classes == 1 else 0):
            raise ValueError(f"{len(self.labels)} labels for {classes} outputs")
        channels = self.input_shape[0]
        if not len(self.preprocessing.mean) == len(self.preprocessing.std) == channels:
            raise ValueError(f"preprocessing gives {len(self.preprocessing.mean)} means for {channels} input channels")
        return self

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        """Shape of every tensor by name."""
        shapes: dict[str, Shape] = {}
        for i, node in enumerate(self.nodes):
            if not _NAME.fullmatch(node.name):
                raise ValueError(f"node {node.name!r}: a name is letters, digits and _, with dots and slashes between")
            if (i == 0) != isinstance(node.operation, Input) or (i == 0) != (node.name == INPUT):
                raise ValueError(f"node {node.name!r}: the first node, and no other, is the input and called {INPUT!r}")
            if i == 0:
                shapes[INPUT] = self.input_shape
                continue
            unknown = [name for name in node.inputs if name not in shapes]
            if unknown:
                raise ValueError(
                    f"node {node.name!r} ({node.operation.op}) reads {unknown[0]!r}, which no node before it makes"
                )
            try:
                shapes[node.name] = node.operation.out_shape([shapes[name] for name in node.inputs])
            except ValueError as e:
                raise ValueError(f"node {node.name!r} ({node.operation.op}) {e}") from e
        return shapes

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every node in order of computation, with its shapes and its block."""
        shapes = self._shapes
        block_of = {name: block.name for block in self.blocks for name in block.members}
        return tuple(
            Layer(
                node.name,
                node.operation,
                node.inputs,
                tuple(shapes[name] for name in node.inputs),
                shapes[node.name],
                block_of.get(node.name),
            )
            for node in self.nodes
        )

    @cached_property
    def by_name(self) -> Mapping[str, Layer]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def _reads(self) -> Mapping[str, int]:
        read = [name for node in self.nodes for name in dict.fromkeys(node.inputs)] + [o.tensor for o in self.outputs]
        return Counter(read)

    def reads(self, tensor: str) -> int:
        """Return how many nodes and outputs read a tensor."""
        return self._reads.get(tensor, 0)

    @cached_property
    def _signs(self) -> Mapping[str, bool]:
        known: dict[str, bool] = {}
        for node in self.nodes:
            found = non_negative(node.operation)
            known[node.name] = all(known[name] for name in node.inputs) if found is None else found
        return known

    def non_negative(self, tensor: str) -> bool:
        """Whether no value of a tensor can be below zero: it comes from a ReLU or the like, perhaps through what keeps that."""
        return self._signs[tensor]

    @cached_property
    def folded_norms(self) -> Mapping[str, Layer]:
        """The BatchNorm that alone reads a convolution or linear layer, by that layer's name: the two are one."""
        found = {}
        for layer in self.layers:
            if isinstance(layer.operation, BatchNorm):
                maker = self.by_name[layer.inputs[0]]
                if isinstance(maker.operation, Weighted) and self.reads(maker.name) == 1:
                    found[maker.name] = layer
        return found

    @cached_property
    def blocks(self) -> tuple[ResidualBlock, ...]:
        """The residual blocks, in order of computation (see `find_blocks`)."""
        return find_blocks(self.nodes, [o.tensor for o in self.outputs])

    def block(self, name: str) -> ResidualBlock:
        """Return the block called `name`.

        Raises:
            KeyError: There is none.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(name)

    @property
    def num_classes(self) -> int | None:
        """Outputs of a classifier (1 for a binary one); None for a network of several outputs or of features."""
        if len(self.outputs) != 1 or not self.outputs[0].classes:
            return None
        return self._shapes[self.outputs[0].tensor][0]

    @property
    def tensor_shapes(self) -> dict[str, Shape]:
        """Shape of every tensor of a checkpoint, by name, in order of computation."""
        return {name: shape for layer in self.layers for name, shape in layer.tensors.items()}

    @property
    def is_residual(self) -> bool:
        """Whether it has a residual block; else it is a chain (or something that no block explains)."""
        return bool(self.blocks)

    def replace(self, **changed: object) -> Network:
        """Return a validated copy with the named fields changed."""
        return Network.model_validate({**{name: getattr(self, name) for name in Network.model_fields}, **changed})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a validated copy; what was inferred is inferred again."""
        return type(self).model_validate({**{name: getattr(self, name) for name in Network.model_fields}, **(update or {})})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the network's JSON, in hex: equal for equal networks on every machine."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def summand(add: Layer, network: Network) -> str | None:
    """Return the input of an Add that ends in a convolution which nothing else reads, so that a runtime may add inside it.

    The first input goes first. None where neither is one.
    """
    for name in add.inputs:
        if (maker := weighted_end(name, network)) is not None and isinstance(maker.operation, Conv):
            return name
    return None


def weighted_end(tensor: str, network: Network) -> Layer | None:
    """Return the convolution or linear layer that makes a tensor, with BatchNorm and dropout behind it at most."""
    layer = network.by_name[tensor]
    while isinstance(layer.operation, BatchNorm | Dropout) and network.reads(layer.name) == 1:
        layer = network.by_name[layer.inputs[0]]
    return layer if isinstance(layer.operation, Weighted) and network.reads(layer.name) == 1 else None


def safe_name(text: str, taken: Iterable[str] = ()) -> str:
    """Return a legal name of a node made of any text, different from all that are taken."""
    name = re.sub(r"[^A-Za-z0-9_./]+", "_", text)
    name = re.sub(r"[./]{2,}", ".", name).strip("./") or "node"
    taken = set(taken)
    if name not in taken:
        return name
    return next(f"{name}_{i}" for i in range(1, len(taken) + 2) if f"{name}_{i}" not in taken)


def consumers(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Return, per tensor name, the layers that read it, in order of computation."""
    readers: dict[str, list[Layer]] = {layer.name: [] for layer in layers}
    for layer in layers:
        for name in dict.fromkeys(layer.inputs):
            readers[name].append(layer)
    return readers


def find_blocks(nodes: Sequence[Node], outputs: Sequence[str]) -> tuple[ResidualBlock, ...]:
    """Return the residual blocks of a graph, in order of computation.

    Both inputs of a residual Add come from one tensor: the last one that every path from the network's input to the Add
    goes through (its immediate dominator). A block inside another's branch is a block of its own, and the layers belong to
    the inner one; an Add of which both branches hold weighted layers of the same number is a block whose main branch is
    its first input.
    """
    index = {node.name: i for i, node in enumerate(nodes)}
    readers: dict[str, set[str]] = {node.name: set() for node in nodes}
    for node in nodes:
        for name in node.inputs:
            readers[name].add(node.name)
    for name in outputs:
        readers[name].add("")  # the world
    parent = list(range(len(nodes)))  # immediate dominator
    for i, node in enumerate(nodes):
        if node.inputs:
            found = index[node.inputs[0]]
            for name in node.inputs[1:]:
                found = _meet(parent, found, index[name])
            parent[i] = found
    blocks: list[ResidualBlock] = []
    claimed: set[int] = set()
    for i, node in enumerate(nodes):
        if not isinstance(node.operation, Add):
            continue
        first, second = (index[name] for name in node.inputs)
        source = parent[i]
        one, two = _between(nodes, index, first, source), _between(nodes, index, second, source)
        shared = one & two
        one, two = one - shared, two - shared
        if first == second or shared or not (one or two):
            continue  # the branches share more than their beginning, or there are none
        weighted = [sum(isinstance(nodes[j].operation, Weighted) for j in branch) for branch in (one, two)]
        main, shortcut = (one, two) if weighted[0] >= weighted[1] and one else (two, one)
        tail = node.name
        if len(readers[tail]) == 1:
            (after,) = readers[tail]
            if after and isinstance(nodes[index[after]].operation, ACTIVATIONS):
                tail = after
        inside = {nodes[j].name for j in main | shortcut} | {node.name} | {tail}
        contained = all(readers[name] <= inside for name in inside - {tail})
        name = node.name.removesuffix(".add") or node.name
        own = [tuple(nodes[j].name for j in sorted(branch - claimed)) for branch in (main, shortcut)]
        blocks.append(ResidualBlock(name, nodes[source].name, own[0], own[1], node.name, tail, contained))
        claimed |= main | shortcut | {i, index[tail]}
    return tuple(blocks)


def _meet(parent: Sequence[int], a: int, b: int) -> int:
    """Return the nearest node that dominates both; nodes are numbered in order of computation."""
    while a != b:
        if a > b:
            a = parent[a]
        else:
            b = parent[b]
    return a


def _between(nodes: Sequence[Node], index: Mapping[str, int], last: int, source: int) -> set[int]:
    """Return the nodes on all paths from `source` (without it) to `last` (with it)."""
    found: set[int] = set()
    todo = [last]
    while todo:
        i = todo.pop()
        if i != source and i not in found:
            found.add(i)
            todo += [index[name] for name in nodes[i].inputs]
    return found
