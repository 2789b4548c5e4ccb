"""What a checkpoint is, as data: the document behind ``rescompress inspect``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rescompress.core.graph import Layer, Network, ResidualBlock
from rescompress.core.layers import total_macs, total_params
from rescompress.core.operations import (
    ACTIVATIONS,
    AvgPool,
    BatchNorm,
    ChannelSelect,
    Conv,
    Dropout,
    GlobalPool,
    GroupNorm,
    Linear,
    MaxPool,
    Multiply,
    Relu,
    Softmax,
    Weighted,
)
from rescompress.core.spec import Preprocessing

if TYPE_CHECKING:
    from compress.checkpoints.base import Checkpoint


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return everything that is known about a checkpoint, as JSON values.

    Args:
        checkpoint: A loaded checkpoint.
    """
    spec, network = checkpoint.spec, checkpoint.network
    layers = list(network.layers)
    quantization = checkpoint.quantization
    beside = {name for block in network.blocks for name in block.shortcut}
    return {
        "architecture": one_line(network),
        "arch": spec.arch,
        "format": checkpoint.provenance.get("format", "native"),
        "container": checkpoint.provenance.get("container"),
        "origin": checkpoint.provenance.get("origin"),
        "published": checkpoint.provenance.get("published"),
        "input_shape": list(spec.input_shape),
        "preprocessing": {
            "text": preprocessing_line(spec.preprocessing),
            **spec.preprocessing.model_dump(mode="json"),
            "antialias": spec.preprocessing.antialias,
        },
        "num_classes": spec.num_classes,
        "outputs": [
            {"name": o.name, "tensor": o.tensor, "shape": list(network.by_name[o.tensor].out_shape), "classes": o.classes}
            for o in network.outputs
        ],
        "labels": list(spec.labels) if spec.labels else None,
        "notes": checkpoint.provenance.get("notes", []),
        "quantization": None
        if quantization is None
        else {
            "profile": quantization.profile,
            "method": quantization.method,
            "activations": sum(q.kind == "activation" for q in quantization.quantizers),
            "weights": sum(q.kind == "weight" for q in quantization.quantizers),
        },
        "totals": {
            "params": total_params(layers),
            "macs": total_macs(layers),
            "size_bytes": sum(t.numel() * t.element_size() for t in checkpoint.state_dict.values()),
            "conv_layers": sum(layer.op == "conv" for layer in layers),
            "blocks": len(network.blocks),
            "depth": sum(isinstance(layer.operation, Weighted) and layer.name not in beside for layer in layers),
        },
        "blocks": [_block(network, block) for block in network.blocks],
        "layers": [_layer(layer) for layer in layers],
        "groups": groups(network),
        "spec_sha256": spec.digest,
    }


def one_line(network: Network) -> str:
    """Return the architecture in one line, such as ``resnet20: 3-3-3 basic blocks of 16-32-64 channels, ...``."""
    from compress.prune.groups import stages

    convs = [layer for layer in network.layers if isinstance(layer.operation, Conv)]
    found = stages(network)
    parts: list[str] = []
    if not found:
        parts.append(f"a chain of {len(convs)} convolutions without shortcuts")
    else:
        parts += _residual_parts(network, found)
    if not any(isinstance(layer.operation, BatchNorm) for layer in network.layers):
        grouped = any(isinstance(layer.operation, GroupNorm) for layer in network.layers)
        parts.append("GroupNorm" if grouped else "no BatchNorm")
    others = dict.fromkeys(
        layer.op.replace("_", "-")
        for layer in network.layers
        if isinstance(layer.operation, ACTIVATIONS) and not isinstance(layer.operation, Relu | Softmax)
    )
    if others:
        parts.append(" and ".join(others))
    if any(isinstance(layer.operation, Multiply) for layer in network.layers):
        parts.append("channel gates")
    return f"{network.arch}: " + ", ".join([*parts, *_heads(network)])


def _residual_parts(network: Network, found: list[list[ResidualBlock]]) -> list[str]:
    by_name = network.by_name
    facts = {b.name: _block(network, b) for b in network.blocks}
    first = facts[network.blocks[0].name]
    widths = "-".join(str(by_name[stage[-1].tail].out_shape[0]) for stage in found)
    counts = "-".join(str(len(stage)) for stage in found)
    kinds = dict.fromkeys(str(f["kind"]) for f in facts.values())
    parts = [f"{counts} {' and '.join(kinds)} blocks of {widths} channels"]
    before = network.layers[: [layer.name for layer in network.layers].index(network.blocks[0].source) + 1]
    stem = [
        f"{_text(op.kernel, 'x', always=True)}/{_text(op.stride, 'x')} {op.width}"
        for layer in before
        if isinstance(op := layer.operation, Conv)
    ]
    pooled = any(isinstance(layer.operation, MaxPool) for layer in before)
    parts.append(f"stem {' + '.join(stem) or 'of nothing'}{' + max pool' if pooled else ''}")
    shortcuts = {str(f["shortcut"]) for f in facts.values()} - {"identity"}
    if shortcuts:
        averaged = any(isinstance(by_name[n].operation, AvgPool) for b in network.blocks for n in b.shortcut)
        parts.append(f"{'average-pool ' if averaged else ''}{' and '.join(sorted(shortcuts))} shortcuts")
    strided = next((f for f in facts.values() if f["stride"] != 1 and f["kind"] == "bottleneck"), None)
    if strided is not None and strided["stride_at"] in (0, 1):
        place = int(strided["stride_at"])
        parts.append(f"stride in the {('1x1', '3x3')[place]} convolution ({('v1', 'v1.5')[place]})")
    if int(first["groups"]) > 1:
        parts.append(f"{first['groups']} groups")
    return parts


def _heads(network: Network) -> list[str]:
    """Return what each output ends in."""
    texts = []
    for output in network.outputs:
        chain: list[str] = []
        layer = network.by_name[output.tensor]
        while isinstance(layer.operation, (Linear, Dropout, *ACTIVATIONS)) and len(layer.in_shape) == 1:
            if isinstance(layer.operation, Linear):
                chain.insert(0, str(layer.out_shape[0]))
            layer = network.by_name[layer.inputs[0]]
        paired = isinstance(layer.operation, GlobalPool) and layer.operation.kind == "max_avg"
        name = "" if len(network.outputs) == 1 else f" {output.name}"
        if not chain:
            size = _text(network.by_name[output.tensor].out_shape, "x", always=True)
            texts.append(f"no head ({size} features)" if not name else f"output{name} of {size}")
            continue
        if paired:
            texts.append("maximum and average pooling side by side")
        binary = " (binary, sigmoid)" if network.num_classes == 1 else ""
        texts.append(f"head{name} {' -> '.join([str(layer.out_shape[0]), *chain])}{binary}")
    return texts


def _text(sizes: tuple[int, ...], between: str, *, always: bool = False) -> str:
    """Return sizes as text, one number where all are the same and `always` does not want each."""
    return str(sizes[0]) if len(set(sizes)) == 1 and not always else between.join(map(str, sizes))


def preprocessing_line(p: Preprocessing) -> str:
    """Return preprocessing in one line: name, channel order, the arithmetic, and how a picture gets the input's size."""

    def numbers(values: tuple[float, ...]) -> str:
        return ", ".join(f"{v:g}" for v in values)

    scale = "1/255" if abs(p.scale * 255 - 1) < 1e-9 else f"{p.scale:g}"
    stated = "assumed" if p.assumed else "stated"
    match p.resize:
        case None:
            size = "resized to the input as a whole"
        case int(side):
            size = f"shorter side resized to {side}, centre cut out"
        case (height, width):
            size = f"resized to {height}x{width} as a whole, centre cut out"
    smooth = "" if p.antialias else " without antialiasing"
    return (
        f"{p.name} ({stated}): {p.channel_order.upper()}, (pixel * {scale} - [{numbers(p.mean)}]) / [{numbers(p.std)}], "
        f"{size}, {p.interpolation}{smooth}"
    )


def _layer(layer: Layer) -> dict[str, Any]:
    op = layer.operation
    window = op if isinstance(op, Conv | MaxPool | AvgPool) else None
    stride = op.stride if isinstance(op, ChannelSelect) else window.stride if window else (1, 1)
    return {
        "name": layer.name,
        "op": layer.op,
        "inputs": list(layer.inputs),
        "block": layer.block,
        "in_shape": list(layer.in_shape),
        "out_shape": list(layer.out_shape),
        "kernel": _number(window.kernel if window else (1, 1)),
        "stride": _number(stride),
        "padding": _number(window.pads if window else (0, 0)),
        "dilation": _number(op.dilation if isinstance(op, Conv | MaxPool) else (1, 1)),
        "groups": op.groups if isinstance(op, Conv | GroupNorm) else 1,
        "bias": isinstance(op, Weighted) and op.bias,
        "params": layer.params,
        "macs": layer.macs,
    }


def _number(sizes: tuple[int, ...]) -> int | list[int]:
    """Return one number where all are the same, else all."""
    return sizes[0] if len(set(sizes)) == 1 else list(sizes)


def _block(network: Network, block: ResidualBlock) -> dict[str, Any]:
    mine = [network.by_name[name] for name in block.members]
    convs = [op for name in block.main if isinstance(op := network.by_name[name].operation, Conv)]
    strides = [op.stride for op in convs]
    kernels = [op.kernel for op in convs]
    known = {((3, 3), (3, 3)): "basic", ((1, 1), (3, 3), (1, 1)): "bottleneck"}
    before, after = network.by_name[block.source].out_shape, network.by_name[block.tail].out_shape
    at = next((i for i, stride in enumerate(strides) if max(stride) > 1), 0)
    return {
        "name": block.name,
        "kind": known.get(tuple(kernels), f"{len(convs)}-convolution"),
        "in_channels": before[0],
        "widths": [op.width for op in convs],
        "out_shape": list(after),
        "stride": _number(tuple(math.prod(s[axis] for s in strides) for axis in (0, 1))),
        "stride_at": at,
        "groups": max((op.groups for op in convs), default=1),
        "shortcut": _shortcut(network, block)[0],
        "shortcut_text": _shortcut(network, block)[1],
        "params": total_params(mine),
        "macs": total_macs(mine),
    }


def _shortcut(network: Network, block: ResidualBlock) -> tuple[str, str]:
    """Return what a block's shortcut is, in a word and in words."""
    layers = [network.by_name[name] for name in block.shortcut]
    if not layers:
        return "identity", "identity"
    convs = [op for layer in layers if isinstance(op := layer.operation, Conv)]
    selects = [op for layer in layers if isinstance(op := layer.operation, ChannelSelect)]
    pools = [op for layer in layers if isinstance(op := layer.operation, AvgPool | MaxPool)]
    if len(convs) == 1:
        op = convs[0]
        pool = (
            f"{_text(pools[0].kernel, 'x', always=True)} {'average' if isinstance(pools[0], AvgPool) else 'max'} pool, "
            if pools
            else ""
        )
        kernel = _text(op.kernel, "x", always=True)
        into = network.by_name[block.source].out_shape[0]
        return "projection", f"{pool}{kernel}/{_text(op.stride, 'x')} projection {into} -> {op.width}"
    if len(selects) == 1 and not convs:
        zeros = sum(c < 0 for c in selects[0].channels)
        strided = f"stride {_text(selects[0].stride, 'x')}, " if max(selects[0].stride) > 1 else ""
        return "pad", f"{strided}{zeros} zero channels"
    return "other", ", ".join(layer.op.replace("_", " ") for layer in layers)


def groups(network: Network) -> list[dict[str, Any]]:
    """Return the channel groups that pruning may shrink: inner ones (within a block), and the residual streams.

    Args:
        network: The network.
    """
    from compress.prune.groups import Sizes, prunable

    return [
        {
            "name": group.name,
            "kind": group.kind,
            "channels": group.size * group.channels[group.name],
            "size": group.size,
            "unit": group.channels[group.name],
            "producers": list(group.producers),
            "consumers": list(group.consumers),
        }
        for group in prunable(list(Sizes(network).groups.values()), "all")
    ]
