"""Channels go whose loss the remaining ones repair best; then every block is refitted to the dense network.

Needs some hundred images and no labels.

1. One pass over the dense network collects, for every layer that consumes a group, the second moment of its inputs and
   of the loss's gradient at its output; block-wise Optimal Brain Surgeon turns them into an order and an error curve in
   one unit for all groups: the expected rise of the loss (a Kronecker-factored Hessian; Martens & Grosse 2015,
   arXiv:1503.05671).
2. After the widths are chosen, every layer is refitted in the order of computation by least squares on the *pruned*
   network's inputs, against the *dense* network's outputs behind the ReLU; the last convolution of a block against the
   block's output minus the pruned network's own shortcut, so that it also repairs what it inherits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.checkpoints.base import Checkpoint
from compress.prune.apply import channels_kept
from compress.prune.fold import Folded, folded, unfolded
from compress.prune.groups import ChannelGroup, Sizes
from compress.prune.method import Context, Curves, ErrorCurve
from compress.prune.plan import PruningPlan
from compress.prune.solve import damped, obs_curve, refit
from compress.resnet import ResNet, build_model
from rescompress.core.errors import BadInput, DataError
from rescompress.core.layers import Layer, walk

DESCRIPTION = "what the rest repairs best goes first; refits every block to the dense network; needs images, no labels"
NEEDS_DATA = True

_RIDGE = 1e-3
_ROWS = 60_000_000
"""Most numbers in a matrix of patches."""
_STREAM_BYTES = 4 << 30
"""Most memory for the residual streams of the dense and the pruned network together."""
_FISHER_MACS = 1_200_000_000_000
"""Most MACs spent on gradients."""


def curves(context: Context) -> Curves:
    """Return curves in expected rise of the loss per image."""
    dense = build_model(context.checkpoint.spec, context.checkpoint.state_dict).requires_grad_(False)
    sizes = Sizes(context.checkpoint.spec)
    if any(g.kind == "stream" for g in context.groups):
        raise BadInput("reconstruct prunes the channels inside blocks only", remedy="use --scope inner, or --method magnitude")
    layers = {layer.name: layer for layer in sizes.layers}
    x = _images(context, sizes.layers)
    wanted = {g.name: _reader(g, layers) for g in context.groups}
    fisher = _fisher(context, dense, x, [folded(context.checkpoint, layer).output for layer in wanted.values()])
    generator = torch.Generator().manual_seed(context.seed)
    found: dict[str, ErrorCurve] = {}
    for chunk in _chunks(sizes.layers):
        readers = {name: layer for name, layer in wanted.items() if layer in chunk}
        rows: dict[str, list[Tensor]] = {name: [] for name in readers}
        places = {name: _places(layer, len(x), generator) for name, layer in readers.items()}
        outputs = []
        for part in _parts(len(x), chunk):
            inside = _run(dense, chunk, x[part])
            outputs.append(inside[chunk[-1].name])
            for name, layer in readers.items():
                rows[name].append(_patches(inside[layer.inputs[0]], layer, places[name][part]))
        x = torch.cat(outputs)
        for name, layer in readers.items():
            x_ND = torch.cat(rows.pop(name))
            h = torch.cov(x_ND.T, correction=0).double().view(x_ND.shape[1], x_ND.shape[1])
            w = folded(context.checkpoint, layer)
            scaled = fisher[w.output].T @ w.weight_OIKK.flatten(1).double()
            pixels = layer.out_shape[1] * layer.out_shape[2]
            curve = obs_curve(damped(h, _RIDGE), scaled, sizes.groups[name].size)
            found[name] = ErrorCurve(curve.order, tuple(0.5 * pixels * e for e in curve.error))
            context.progress("measuring channels", len(found), len(wanted))
    return Curves(found, unit="expected rise of the loss")


def compensate(context: Context, plan: PruningPlan, pruned: Checkpoint) -> Checkpoint:
    """Return the pruned checkpoint, every layer of it refitted to the dense network on the calibration images."""
    dense_layers = walk(context.checkpoint.spec)
    keep = channels_kept(context.checkpoint.spec, plan)
    left = right = _images(context, dense_layers)
    dense = build_model(context.checkpoint.spec, context.checkpoint.state_dict).requires_grad_(False)
    work = Checkpoint(pruned.spec, dict(pruned.state_dict), None, pruned.provenance)
    generator = torch.Generator().manual_seed(context.seed + 1)
    remaining = {_chunk_name(c): c for c in _chunks(walk(pruned.spec))}
    changed = False
    for done, chunk in enumerate(chunks := _chunks(dense_layers), 1):
        small = remaining.get(_chunk_name(chunk))
        changed = changed or small is None or any(len(keep[a.name]) != a.out_shape[0] for a in chunk)
        if small is not None:
            if changed:
                work = _refit_chunk(work, dense, chunk, small, left, right, keep, generator)
            right = _advance(build_model(work.spec, work.state_dict), small, right)
        left = _advance(dense, chunk, left)
        context.progress("repairing blocks", done, len(chunks))
    return work


def _refit_chunk(
    work: Checkpoint,
    dense: ResNet,
    chunk: Sequence[Layer],
    small: Sequence[Layer],
    left: Tensor,
    right: Tensor,
    keep: dict[str, Tensor],
    generator: torch.Generator,
) -> Checkpoint:
    """Return `work` with every convolution and linear layer of one chunk refitted.

    Args:
        work: The pruned network so far.
        dense: The dense network.
        chunk: The layers in the dense network.
        small: The same layers in the pruned one.
        left: What enters the chunk in the dense network.
        right: What enters it in the pruned one.
        keep: Channels that stay, per dense tensor.
        generator: Chooses pixels.
    """
    jobs = _jobs(work, small)
    places = {job.layer.name: _places(job.layer, len(left), generator) for job in jobs}
    targets: dict[str, list[Tensor]] = {job.layer.name: [] for job in jobs}
    for part in _parts(len(left), chunk):
        inside = _run(dense, chunk, left[part])
        for job in jobs:
            value = inside[job.target].index_select(1, keep[job.target])
            targets[job.layer.name].append(_pixels(value, places[job.layer.name][part]))
    for job in jobs:
        model = build_model(work.spec, work.state_dict)
        behind = {job.layer.name, "add"}
        before = [layer for layer in small if not {layer.name, layer.op} & behind]
        rows, skips = [], []
        for part in _parts(len(right), chunk):
            inside = _run(model, before, right[part], entry=small[0].inputs[0])
            rows.append(_patches(inside[job.layer.inputs[0]], job.layer, places[job.layer.name][part]))
            if job.skip:
                skips.append(_pixels(inside[job.skip], places[job.layer.name][part]))
        work = _solve(work, job, torch.cat(rows), torch.cat(targets.pop(job.layer.name)), torch.cat(skips) if skips else None)
    return work


@dataclass(frozen=True)
class _Job:
    """One layer to refit: against which dense tensor, with what added, and whether a ReLU follows."""

    layer: Layer
    target: str
    skip: str | None
    relu: bool


def _jobs(work: Checkpoint, small: Sequence[Layer]) -> list[_Job]:
    by_input = {name: layer for layer in small for name in layer.inputs}
    jobs = []
    for layer in small:
        if layer.op not in ("conv", "linear"):
            continue
        out = folded(work, layer).output
        after = by_input.get(out)
        if after is not None and after.op == "add" and after.inputs[0] == out:
            jobs.append(_Job(layer, after.name, after.inputs[1], relu=True))
        else:
            jobs.append(_Job(layer, out, None, relu=after is not None and after.op == "relu"))
    last = [j for j in jobs if j.skip]
    return [j for j in jobs if not j.skip] + last


def _solve(work: Checkpoint, job: _Job, x_ND: Tensor, target_NO: Tensor, skip_NO: Tensor | None) -> Checkpoint:
    old = folded(work, job.layer)
    has_bias = f"{job.layer.name}.bias" in work.state_dict or old.output != job.layer.name
    shape = old.weight_OIKK.shape
    groups = job.layer.groups
    weights, biases = [], []
    columns, outputs = x_ND.shape[1] // groups, shape[0] // groups
    for g in range(groups):
        o = slice(g * outputs, (g + 1) * outputs)
        fit = refit(
            x_ND[:, g * columns : (g + 1) * columns],
            target_NO[:, o],
            old.weight_OIKK[o].flatten(1),
            old.bias_O[o],
            skip_NO=None if skip_NO is None else skip_NO[:, o],
            relu=job.relu,
            fit_bias=has_bias,
            ridge=_RIDGE,
        )
        weights.append(fit.w_OD)
        biases.append(fit.b_O)
    new = Folded(torch.cat(weights).reshape(shape), torch.cat(biases), old.output)
    out_NO = torch.cat([x_ND[:, g * columns : (g + 1) * columns] @ weights[g].T + biases[g] for g in range(groups)], dim=1)
    var, mean = torch.var_mean(out_NO, 0, correction=0)
    return Checkpoint(work.spec, {**work.state_dict, **unfolded(work, job.layer, new, mean, var)}, None, work.provenance)


def _reader(group: ChannelGroup, layers: dict[str, Layer]) -> Layer:
    """Return the layer that consumes an inner group."""
    return next(layers[c] for c in reversed(group.consumers) if layers[c].groups == 1)


def _images(context: Context, layers: Sequence[Layer]) -> Tensor:
    """Return as many calibration images as the memory allows."""
    x = context.images()
    widest = max(layer.in_elements for layer in layers if layer.name.endswith(".conv1") or layer.op == "input")
    return x[: max(1, _STREAM_BYTES // (8 * widest))]


def _chunks(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Return the layers by block; each layer outside of blocks with the elementwise layers and pools after it."""
    chunks: list[list[Layer]] = []
    for block, run in itertools.groupby(layers, key=lambda layer: layer.block):
        if block is not None:
            chunks.append(list(run))
            continue
        for layer in run:
            if layer.op == "input":
                continue
            if layer.op in ("conv", "linear", "global_pool"):
                chunks.append([layer])
            else:
                chunks[-1].append(layer)
    return chunks


def _chunk_name(chunk: Sequence[Layer]) -> str:
    return chunk[0].block or chunk[0].name


def _parts(n: int, chunk: Sequence[Layer]) -> Iterator[slice]:
    """Yield slices of the batch such that the patches of one slice fit in about 256 MB."""
    largest = max(layer.in_elements * layer.kernel**2 // layer.stride**2 for layer in chunk)
    size = max(1, min(n, 64_000_000 // max(largest, 1)))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


@torch.no_grad()
def _run(model: ResNet, chunk: Sequence[Layer], x_NCHW: Tensor, *, entry: str | None = None) -> dict[str, Tensor]:
    """Return every tensor that can be computed inside a chunk from what enters it.

    Args:
        model: The network.
        chunk: Its layers.
        x_NCHW: What enters.
        entry: The name of that tensor, by default the input of the first layer.
    """
    inside = {entry or chunk[0].inputs[0]: x_NCHW}
    for layer in chunk:
        if all(name in inside for name in layer.inputs):
            inside[layer.name] = model.compute(layer, [inside[name] for name in layer.inputs])
    return inside


def _advance(model: ResNet, chunk: Sequence[Layer], x_NCHW: Tensor) -> Tensor:
    """Return the output of a chunk for all images."""
    return torch.cat([_run(model, chunk, x_NCHW[part])[chunk[-1].name] for part in _parts(len(x_NCHW), chunk)])


def _places(layer: Layer, n: int, generator: torch.Generator) -> Tensor:
    """Return which output pixels of each image to look at (N, P); all where they fit."""
    if layer.op == "linear":
        return torch.zeros(n, 1, dtype=torch.int64)
    pixels = layer.out_shape[1] * layer.out_shape[2]
    columns = layer.in_shape[0] * layer.kernel**2
    count = max(1, min(pixels, _ROWS // (columns * n)))
    if count == pixels:
        return torch.arange(pixels).expand(n, pixels)
    return torch.rand(n, pixels, generator=generator).topk(count, dim=1).indices


def _patches(x_NCHW: Tensor, layer: Layer, places_NP: Tensor) -> Tensor:
    """Return the inputs of a layer's output pixels as rows (N * P, C * k * k)."""
    if layer.op == "linear":
        return x_NCHW
    if layer.kernel == 1:
        return _pixels(x_NCHW[:, :, :: layer.stride, :: layer.stride], places_NP)
    columns = F.unfold(x_NCHW, layer.kernel, padding=layer.padding, stride=layer.stride)
    return _pixels(columns.unsqueeze(3), places_NP)


def _pixels(x_NCHW: Tensor, places_NP: Tensor) -> Tensor:
    """Return the named pixels as rows (N * P, C)."""
    if x_NCHW.dim() == 2:
        return x_NCHW
    flat = x_NCHW.flatten(2)
    if places_NP.shape[1] < flat.shape[2]:
        flat = flat.gather(2, places_NP[:, None, :].expand(-1, flat.shape[1], -1))
    return flat.transpose(1, 2).reshape(-1, flat.shape[1])


def _fisher(context: Context, dense: ResNet, x: Tensor, tensors: Sequence[str]) -> dict[str, Tensor]:
    """Return, per tensor, a root R (C, C) of the loss's curvature there: ``R R^T = E[g g^T]`` over images and pixels.

    g is the gradient of the cross entropy with labels drawn from the network's own predictions, so that E[g g^T] is the
    Fisher matrix and no true label is needed.
    """
    generator = torch.Generator().manual_seed(context.seed)
    macs = sum(layer.macs for layer in dense.layers)
    x = x[: max(16, _FISHER_MACS // (3 * macs))]
    wanted = set(tensors)
    moments: dict[str, Tensor] = {}
    size = max(1, min(64, 64_000_000 // max(sum(layer.out_elements for layer in dense.layers), 1)))
    for start in range(0, len(x), size):
        batch = x[start : start + size].clone().requires_grad_(True)
        seen: dict[str, Tensor] = {}

        def watch(name: str, value: Tensor, seen: dict[str, Tensor] = seen) -> None:
            if name in wanted:
                seen[name] = value

        logits = dense(batch, watch)
        if not bool(torch.isfinite(logits).all()):
            raise DataError("the dense network's outputs hold NaN or infinity", remedy="check the checkpoint and the data")
        loss = _sampled_loss(logits, generator, head=dense.spec.head is not None)
        gradients = torch.autograd.grad(loss, [seen[name] for name in seen])
        for name, g in zip(seen, gradients, strict=True):
            rows = g.flatten(2).transpose(1, 2).reshape(-1, g.shape[1]).double()
            moments[name] = moments.get(name, 0) + rows.T @ rows / g[0, 0].numel()
        context.progress("measuring the loss", min(start + size, len(x)), len(x))
    return {name: _root(m / len(x)) for name, m in moments.items()}


def _sampled_loss(logits_NK: Tensor, generator: torch.Generator, *, head: bool) -> Tensor:
    """Return the summed loss whose gradients have the Fisher matrix as their second moment."""
    if not head:
        return (logits_NK * torch.randn(logits_NK.shape, generator=generator)).sum()
    if logits_NK.shape[1] == 1:
        p = torch.sigmoid(logits_NK.detach())
        y = (torch.rand(p.shape, generator=generator) < p).to(p.dtype)
        return F.binary_cross_entropy_with_logits(logits_NK, y, reduction="sum")
    y = torch.multinomial(logits_NK.detach().softmax(1), 1, generator=generator).flatten()
    return F.cross_entropy(logits_NK, y, reduction="sum")


def _root(m_CC: Tensor) -> Tensor:
    value_C, vector_CC = torch.linalg.eigh(m_CC)
    root: Tensor = vector_CC * value_C.clamp_min(0).sqrt()
    return root
