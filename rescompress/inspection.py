"""What a checkpoint is, as data: the document behind ``rescompress inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rescompress.core.layers import Layer, total_macs, total_params, walk
from rescompress.core.spec import Block, ModelSpec, Preprocessing

if TYPE_CHECKING:
    from compress.checkpoints.base import Checkpoint


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return everything that is known about a checkpoint, as JSON values.

    Args:
        checkpoint: A loaded checkpoint.
    """
    spec = checkpoint.spec
    layers = walk(spec)
    quantization = checkpoint.quantization
    return {
        "architecture": one_line(spec),
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
        "num_classes": spec.head.num_classes if spec.head else None,
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
            "blocks": len(spec.blocks),
            "depth": sum(layer.op in ("conv", "linear") and ".downsample." not in layer.name for layer in layers),
        },
        "blocks": [_block(spec, block, layers) for block in spec.blocks],
        "layers": [_layer(layer) for layer in layers],
        "groups": groups(layers),
        "spec_sha256": spec.digest,
    }


def one_line(spec: ModelSpec) -> str:
    """Return the architecture in one line, such as ``resnet20: 3-3-3 basic blocks of 16-32-64 channels, ...``."""
    first = spec.blocks[0]
    widths = "-".join(str(stage[-1].widths[-1]) for stage in spec.stages)
    counts = "-".join(str(len(stage)) for stage in spec.stages)
    stem = " + ".join(f"{c.kernel}x{c.kernel}/{c.stride} {c.width}" for c in spec.stem.convs)
    parts = [f"{counts} {first.kind} blocks of {widths} channels", f"stem {stem}{' + max pool' if spec.stem.max_pool else ''}"]
    kinds = {b.shortcut for b in spec.blocks} - {"identity"}
    pooled = any(b.shortcut_pool for b in spec.blocks)
    if kinds:
        parts.append(f"{'average-pool ' if pooled else ''}{' and '.join(sorted(kinds))} shortcuts")
    strided = [b for b in spec.blocks if b.stride > 1 and b.kind == "bottleneck"]
    if strided:
        parts.append(
            f"stride in the {('1x1', '3x3')[strided[0].stride_at]} convolution ({('v1', 'v1.5')[strided[0].stride_at]})"
        )
    if first.groups > 1:
        parts.append(f"{first.groups} groups")
    if not first.batch_norm:
        parts.append("no BatchNorm")
    if spec.head is None:
        parts.append(f"no head ({spec.feature_width} features)")
    else:
        features = spec.feature_width * (2 if spec.head.pool == "max_avg" else 1)
        chain = " -> ".join(str(n) for n in (features, *spec.head.hidden, spec.head.num_classes))
        if spec.head.pool == "max_avg":
            parts.append("maximum and average pooling side by side")
        parts.append(f"head {chain}{' (binary, sigmoid)' if spec.head.num_classes == 1 else ''}")
    return f"{spec.arch}: " + ", ".join(parts)


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
    return {
        "name": layer.name,
        "op": layer.op,
        "inputs": list(layer.inputs),
        "block": layer.block,
        "in_shape": list(layer.in_shape),
        "out_shape": list(layer.out_shape),
        "kernel": layer.kernel,
        "stride": layer.stride,
        "padding": layer.padding,
        "groups": layer.groups,
        "bias": layer.bias,
        "params": layer.params,
        "macs": layer.macs,
    }


def _block(spec: ModelSpec, block: Block, layers: list[Layer]) -> dict[str, Any]:
    mine = [layer for layer in layers if layer.block == block.name]
    return {
        "name": block.name,
        "kind": block.kind,
        "in_channels": spec.in_width(block.name),
        "widths": list(block.widths),
        "out_shape": list(mine[-1].out_shape),
        "stride": block.stride,
        "stride_at": block.stride_at,
        "groups": block.groups,
        "shortcut": block.shortcut,
        "shortcut_text": shortcut_line(spec, block),
        "params": total_params(mine),
        "macs": total_macs(mine),
    }


def shortcut_line(spec: ModelSpec, block: Block) -> str:
    """Return what a block's shortcut does, in words."""
    match block.shortcut:
        case "identity":
            return "identity"
        case "pad":
            assert block.channel_map is not None
            zeros = sum(c < 0 for c in block.channel_map)
            return f"stride {block.stride}, {zeros} zero channels" if block.stride > 1 else f"{zeros} zero channels"
        case _:
            pooled = block.shortcut_pool and block.stride > 1
            start = "2x2 average pool, " if pooled else ""
            stride = 1 if pooled else block.stride
            return f"{start}1x1/{stride} projection {spec.in_width(block.name)} -> {block.widths[-1]}"


def groups(layers: list[Layer]) -> list[dict[str, Any]]:
    """Return the channel groups that pruning may shrink: inner ones (within a block), and the residual streams.

    Args:
        layers: ``walk(spec)``.
    """
    from compress.prune.groups import find_groups, prunable

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
        for group in prunable(find_groups(layers), "all")
    ]
