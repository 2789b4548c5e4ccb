"""`apply`: a checkpoint and a plan to the pruned checkpoint; slicing only, no data."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.prune.groups import Sizes
from compress.prune.plan import PruningPlan
from rescompress.core.layers import INPUT, walk
from rescompress.core.spec import Block, ModelSpec


def channels_kept(spec: ModelSpec, plan: PruningPlan) -> dict[str, Tensor]:
    """Return, per tensor of ``walk(spec)``, the indices of the channels that stay, ascending (int64).

    Args:
        spec: The dense network.
        plan: A plan for it.

    Raises:
        BadInput: The plan does not fit.
    """
    plan.check(spec)
    keep: dict[str, Tensor] = {}
    for group in Sizes(spec).groups.values():
        units = torch.tensor(plan.kept(group), dtype=torch.int64)
        for name, width in group.channels.items():
            keep[name] = (units[:, None] * width + torch.arange(width)).flatten()
    return keep


def pruned_spec(spec: ModelSpec, plan: PruningPlan) -> ModelSpec:
    """Return the network that the plan leaves.

    Raises:
        BadInput: The plan does not fit.
    """
    keep = channels_kept(spec, plan)
    sizes = Sizes(spec)
    entry = {layer.block: layer.inputs[0] for layer in reversed(sizes.layers) if layer.block and layer.name.endswith(".conv1")}
    changed: dict[str, Block | None] = {}
    for block in spec.blocks:
        if block.name in plan.dropped_blocks:
            changed[block.name] = None
            continue
        convs = [f"{block.name}.conv{i + 1}" for i in range(len(block.widths))]
        update: dict[str, object] = {"widths": tuple(len(keep[name]) for name in convs)}
        if block.groups > 1:
            update["groups"] = len(plan.kept(sizes.groups[sizes.group_of[convs[1]]]))
        if block.channel_map is not None:
            position = {int(c): i for i, c in enumerate(keep[entry[block.name]])}
            update["channel_map"] = tuple(position.get(block.channel_map[int(c)], -1) for c in keep[convs[-1]])
        changed[block.name] = Block.model_validate({**dict(block), **update})
    stem = spec.stem.model_copy(
        update={
            "convs": tuple(
                conv.model_copy(update={"width": len(keep[f"conv{i}"])}) for i, conv in enumerate(spec.stem.convs, 1)
            )
        }
    )
    return spec.replace_blocks(changed, stem=stem)


def apply(checkpoint: Checkpoint, plan: PruningPlan) -> Checkpoint:
    """Return the checkpoint with the channels and blocks of the plan cut out; nothing else changes.

    Args:
        checkpoint: A float network.
        plan: A plan for it.

    Raises:
        BadInput: The plan does not fit.
    """
    spec = pruned_spec(checkpoint.spec, plan)
    keep = channels_kept(checkpoint.spec, plan)
    dense = {layer.name: layer for layer in walk(checkpoint.spec)}
    tensors: dict[str, Tensor] = {}
    for layer in walk(spec):
        old = dense[layer.name]
        reads = keep[old.inputs[0]] if old.inputs else keep[INPUT]
        for suffix in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            key = f"{layer.name}.{suffix}"
            if key not in checkpoint.state_dict:
                continue
            value = checkpoint.state_dict[key]
            if value.dim():
                value = value.index_select(0, keep[layer.name].to(value.device))
            if value.dim() > 1 and old.groups == 1:
                value = value.index_select(1, reads.to(value.device))
            tensors[key] = value.detach().clone().contiguous()
    return Checkpoint(spec, tensors, None, dict(checkpoint.provenance))
