"""`apply`: a checkpoint and a plan to the pruned checkpoint; slicing only, no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.prune.groups import Sizes, narrowed
from compress.prune.plan import PruningPlan
from rescompress.core.graph import Layer, Network, Node
from rescompress.core.operations import ChannelConv, ChannelSelect, Operation
from rescompress.core.recipe import network_of
from rescompress.core.spec import ModelSpec


def channels_kept(spec: ModelSpec | Network, plan: PruningPlan) -> dict[str, Tensor]:
    """Return, per tensor of the network, the indices of the channels that stay, ascending (int64).

    Args:
        spec: The dense network.
        plan: A plan for it.

    Raises:
        BadInput: The plan does not fit.
    """
    plan.check(spec)
    return {name: torch.tensor(kept, dtype=torch.int64) for name, kept in _kept(Sizes(spec), plan).items()}


def _kept(sizes: Sizes, plan: PruningPlan) -> dict[str, list[int]]:
    keep: dict[str, list[int]] = {layer.name: [] for layer in sizes.layers}
    for group in sizes.groups.values():
        units = plan.kept(group)
        for name in group.channels:
            keep[name] += group.indices(name, units)
    return {name: sorted(kept) for name, kept in keep.items()}


def pruned_network(spec: ModelSpec | Network, plan: PruningPlan) -> Network:
    """Return the network that the plan leaves.

    Raises:
        BadInput: The plan does not fit.
    """
    plan.check(spec)
    sizes = Sizes(spec)
    network, keep = sizes.network, _kept(sizes, plan)
    blocks = [b for b in network.blocks if b.name in plan.dropped_blocks]
    gone = {name for b in blocks for name in b.members}
    instead = {b.tail: b.source for b in blocks}

    def now(name: str) -> str:
        while name in instead:
            name = instead[name]
        return name

    nodes = [
        Node(
            name=layer.name,
            operation=_narrowed(layer, keep[layer.name], [keep[n] for n in layer.inputs]),
            inputs=tuple(now(n) for n in layer.inputs),
        )
        for layer in network.layers
        if layer.name not in gone
    ]
    outputs = tuple(o.model_copy(update={"tensor": now(o.tensor)}) for o in network.outputs)
    return network.replace(nodes=tuple(nodes), outputs=outputs)


def _narrowed(layer: Layer, makes: Sequence[int], reads: Sequence[Sequence[int]]) -> Operation:
    """Return the operation of a layer that makes and reads these of its channels only."""
    if not reads:
        return layer.operation
    selected: tuple[int, ...] = ()
    if isinstance(layer.operation, ChannelSelect):
        position = {c: i for i, c in enumerate(reads[0])}
        selected = tuple(position.get(layer.operation.channels[c], -1) for c in makes)
    elif isinstance(layer.operation, ChannelConv):
        selected = tuple(layer.operation.places[c] for c in makes)
    return narrowed(layer, len(reads[0]), len(makes), selected)


def apply(checkpoint: Checkpoint, plan: PruningPlan) -> Checkpoint:
    """Return the checkpoint with the channels and blocks of the plan cut out; nothing else changes.

    Args:
        checkpoint: A float network.
        plan: A plan for it.

    Raises:
        BadInput: The plan does not fit.
    """
    network = pruned_network(checkpoint.spec, plan)
    keep = channels_kept(checkpoint.spec, plan)
    dense = network_of(checkpoint.spec).by_name
    tensors: dict[str, Tensor] = {}
    for layer in network.layers:
        for name, shape in layer.tensors.items():
            value = cut(checkpoint.state_dict[name], shape, dense[layer.name], keep)
            tensors[name] = value.detach().clone().contiguous()
    return Checkpoint(network, tensors, None, dict(checkpoint.provenance))


def cut(value: Tensor, shape: Sequence[int], layer: Layer, keep: Mapping[str, Tensor]) -> Tensor:
    """Return what a tensor of a dense layer leaves: outputs first, then the inputs it reads, where its shape has them."""
    if value.dim() and value.shape[0] != shape[0]:
        value = value.index_select(0, keep[layer.name].to(value.device))
    if value.dim() > 1 and value.shape[1] != shape[1]:
        value = value.index_select(1, keep[layer.inputs[0]].to(value.device))
    return value
