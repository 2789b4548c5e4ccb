"""``--like NAME``: a state_dict whose names say nothing, laid over a network that people know by name.

Modules of the file, in its order, are those of the network where every shape fits, in one of the orders in which people
define the parts of a block. Only if exactly one assignment exists is it taken: what it rests on is told with the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from compress import zoo
from compress.checkpoints.base import Checkpoint, LoadOptions, Stored
from compress.checkpoints.files import Opened
from compress.checkpoints.layout import read_values, zeros
from compress.checkpoints.roots import AVERAGED, flatten, without_masks
from compress.importers.finish import Source, checkpoint_of
from compress.importers.network import Read
from rescompress.core.errors import CheckpointError
from rescompress.core.graph import Layer
from rescompress.core.operations import BatchNorm, Conv, Linear
from rescompress.core.recipe import network_of
from rescompress.core.spec import ModelSpec

_PARTS = {
    **{"weight": "weight", "kernel": "weight", "gamma": "weight", "W": "weight", "scale": "weight"},
    **{"bias": "bias", "beta": "bias", "b": "bias", "shift": "bias"},
    **{"running_mean": "running_mean", "moving_mean": "running_mean", "mean": "running_mean"},
    **{"running_var": "running_var", "moving_variance": "running_var", "moving_var": "running_var", "var": "running_var"},
}
_SKIPPED = ("num_batches_tracked",)
_OPTIMIZER = ("optimizer", "optim", "opt", "scheduler", "lr_scheduler", "optimizer_states", "momentum", "momentum_buffer")
Module = tuple[str, Mapping[str, Stored]]


def load_like(path: Path, opened: Opened, name: str, options: LoadOptions) -> Checkpoint:
    """Return a checkpoint of a known network with the tensors of a file.

    Args:
        path: Of the file.
        opened: The file.
        name: Of the network (`compress.zoo.names`).
        options: What the user states.

    Raises:
        CheckpointError: No assignment of the file's tensors exists, or more than one.
        BadInput: No network of that name is known.
    """
    tensors, notes = without_masks(flatten(opened))
    modules = list(_modules(tensors, options.arch.get("root")))
    spec = _spec(name, modules, options)
    found: list[dict[str, Stored]] = []
    trouble = ""
    for order in _orders(network_of(spec).layers):
        assigned, why = _assigned(order, modules)
        trouble = trouble or why
        if assigned is not None and all(_differ(assigned, other) for other in found):
            found.append(assigned)
    if len(found) != 1:
        what = f"its tensors make no {name}: {trouble}" if not found else f"its tensors make {name} in {len(found)} ways"
        raise CheckpointError(what, remedy="give the code that it was trained with: --code FILE:CALLABLE")
    network = network_of(spec)
    stored = {k: found[0].get(k) or zeros(shape) for k, shape in network.tensor_shapes.items()}
    state = read_values(stored, notes)
    told = (
        f"names in the file say nothing: its {len(found[0])} tensors are those of {name} in the only order in which all shapes "
        "fit; nothing else proves it (compare the accuracy: rescompress evaluate --data)"
    )
    source = Source(
        "like", path.name, name, opened.container, tuple(notes), (told,), options.input_shape is not None,
        zoo.preprocessing(spec.preprocessing.name, spec.input_shape),
    )  # fmt: skip
    checkpoint = checkpoint_of(Read(network, state, {}, ("",)), None, options, source)
    return dataclasses.replace(checkpoint, spec=spec.replace(preprocessing=checkpoint.spec.preprocessing))


def _modules(tensors: Mapping[str, Stored], root: str | None) -> Iterator[Module]:
    """Yield the modules of a file in its order: what stands before a tensor's last name, and its tensors."""
    found: dict[str, dict[str, Stored]] = {}
    for key, stored in tensors.items():
        owner, _, part = key.rpartition(".")
        parts = owner.split(".")
        if part in _SKIPPED or any(p in _OPTIMIZER for p in parts) or AVERAGED.search(owner):
            continue
        if root is not None and not f"{owner}.".startswith(f"{root.rstrip('.')}."):
            continue
        if part not in _PARTS:
            raise CheckpointError(
                f"holds {key!r}, whose role its name does not tell",
                remedy="give the code that it was trained with: --code FILE:CALLABLE",
            )
        found.setdefault(owner, {})[_PARTS[part]] = stored
    yield from found.items()


def _spec(name: str, modules: Sequence[Module], options: LoadOptions) -> ModelSpec:
    """Return the recipe with the input channels, the classes and the biases that the file shows."""
    weights = [(parts, parts["weight"].shape) for _, parts in modules if "weight" in parts]
    convs = [(parts, shape) for parts, shape in weights if len(shape) == 4]
    if not convs:
        raise CheckpointError("holds no convolution", remedy="give the state_dict of the network")
    dense = [shape for _, shape in weights if len(shape) == 2]
    base = zoo.spec(name)
    channels = convs[0][1][1]
    shape = options.input_shape or (channels, *base.input_shape[1:])
    spec = zoo.spec(name, num_classes=dense[-1][0] if dense else 0, input_shape=shape)
    if any("bias" in parts for parts, _ in convs) and not base.stem.conv_bias:
        changed = {b.name: b.model_copy(update={"conv_bias": True}) for b in spec.blocks}
        spec = spec.replace_blocks(changed, stem=spec.stem.model_copy(update={"conv_bias": True}))
    return spec


def _orders(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Yield the orders in which people define what a network is made of.

    Within a block that is the shortcut last or first, and each BatchNorm behind its convolution or behind all of the block's.
    """
    owners = [layer for layer in layers if layer.tensors]
    runs: list[list[Layer]] = []
    for layer in owners:
        if runs and layer.block is not None and runs[-1][0].block == layer.block:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    for first in (False, True):
        for behind in (False, True):
            order: list[Layer] = []
            for run in runs:
                main = [x for x in run if ".downsample." not in x.name]
                short = [x for x in run if ".downsample." in x.name]
                parts = short + main if first else main + short
                if behind:
                    parts.sort(key=lambda x: isinstance(x.operation, BatchNorm))
                order += parts
            yield order


def _assigned(order: Sequence[Layer], modules: Sequence[Module]) -> tuple[dict[str, Stored] | None, str]:
    """Return the tensors of a network by name if the file's modules are its layers in that order; else why not."""
    if len(order) != len(modules):
        return None, f"it holds {len(modules)} modules where {len(order)} belong"
    found: dict[str, Stored] = {}
    for layer, (owner, parts) in zip(order, modules, strict=True):
        for key, shape in layer.tensors.items():
            part = key.removeprefix(f"{layer.name}.")
            if part in _SKIPPED:
                continue
            stored = parts.get(part)
            if stored is None and part == "bias" and isinstance(layer.operation, Conv):
                continue  # zeros
            if stored is None or tuple(stored.shape) != tuple(shape):
                has = "nothing" if stored is None else "x".join(map(str, stored.shape))
                return None, f"{owner}.{part} is {has} where {'x'.join(map(str, shape))} belongs ({layer.name})"
            found[key] = stored
        extra = [p for p in parts if f"{layer.name}.{p}" not in layer.tensors]
        if extra and not isinstance(layer.operation, Linear):
            return None, f"{owner} has a {extra[0]}, {layer.name} has none"
    return found, ""


def _differ(a: Mapping[str, Stored], b: Mapping[str, Stored]) -> bool:
    return any(a[k] is not b[k] for k in a if k in b) or a.keys() != b.keys()
