"""Channels go whose loss the remaining ones repair best; then every block is refitted to the dense network.

Needs some hundred images and no labels.

1. One pass over the dense network collects, for every layer that reads a group, the second moment of its inputs.
   Block-wise Optimal Brain Surgeon turns it into an order and an error curve: the share of the reader's output energy
   (behind the block's addition and ReLU) that is lost when the remaining channels are adjusted. Where several layers
   read a group, as on the residual stream, their shares add up.
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
from compress.prune.groups import Sizes
from compress.prune.method import Context, Curves, ErrorCurve
from compress.prune.plan import PruningPlan
from compress.prune.solve import damped, obs_curve, refit
from compress.resnet import ResNet, build_model
from rescompress.core.errors import DataError
from rescompress.core.layers import Layer, walk

DESCRIPTION = "what the rest repairs best goes first; refits every block to the dense network; needs images, no labels"
NEEDS_DATA = True

_RIDGE = 1e-3
_ROWS = 32_768
"""Pixels that a layer is fitted to, if there are so many."""
_ROWS_PER_COLUMN = 12
"""Pixels per input column, where that is more."""
_STREAM_BYTES = 4 << 30
"""Most memory for the residual streams of the dense and the pruned network together."""


def curves(context: Context) -> Curves:
    """Return curves in summed relative error of the layers that read a group, behind their ReLU."""
    dense = build_model(context.checkpoint.spec, context.checkpoint.state_dict).requires_grad_(False)
    sizes = Sizes(context.checkpoint.spec)
    layers = {layer.name: layer for layer in sizes.layers}
    x = _images(context, sizes.layers)
    readers = {
        g.name: [_Reader(layers[c], context.checkpoint) for c in g.consumers if layers[c].groups == 1] for g in context.groups
    }
    generator = torch.Generator().manual_seed(context.seed)
    found: dict[str, ErrorCurve] = {}
    blocks: dict[str, float] = {}
    for chunk in _chunks(sizes.layers):
        inside = {layer.name for layer in chunk}
        before = x
        x = _collect(dense, chunk, x, [r for rs in readers.values() for r in rs if r.layer.name in inside], generator)
        if not bool(torch.isfinite(x).all()):
            raise DataError(
                f"the dense network's tensors behind {chunk[0].name} hold NaN or infinity",
                remedy="check the checkpoint and the data",
            )
        if _chunk_name(chunk) in context.blocks:
            blocks[_chunk_name(chunk)] = float((x - before).square().sum() / x.square().sum().clamp_min(1e-30))
        for group, rs in readers.items():
            if group not in found and all(r.ready for r in rs):
                found[group] = obs_curve([r.relative() for r in rs], sizes.groups[group].size)
                for r in rs:
                    r.forget()
                context.progress("measuring channels", len(found), len(readers))
    return Curves({g.name: found[g.name] for g in context.groups}, blocks, unit="summed relative error of layers")


class _Reader:
    """A layer that reads a group, with the second moment of its inputs once they have been seen."""

    def __init__(self, layer: Layer, checkpoint: Checkpoint) -> None:
        self.layer = layer
        self.old = folded(checkpoint, layer)
        self._h_DD: Tensor | None = None
        self._energy = 1.0

    @property
    def ready(self) -> bool:
        """Whether the inputs have been seen."""
        return self._h_DD is not None

    def see(self, x_ND: Tensor, output_NO: Tensor) -> None:
        """Take in inputs, and what the layer (with the shortcut, if one is added) makes of them."""
        x_ND = x_ND - x_ND.mean(0)
        self._h_DD = damped((x_ND.T @ x_ND).double() / len(x_ND), _RIDGE)
        self._energy = max(float(output_NO.square().sum(1).mean()), 1e-30)

    def forget(self) -> None:
        """Free the memory."""
        self._h_DD = torch.zeros(0)

    def relative(self) -> tuple[Tensor, Tensor]:
        """Return second moment and weights such that squared errors are shares of the output's energy."""
        assert self._h_DD is not None
        return self._h_DD, self.old.weight_OIKK.flatten(1).double() / self._energy**0.5


def _collect(
    model: ResNet, chunk: Sequence[Layer], x: Tensor, readers: Sequence[_Reader], generator: torch.Generator
) -> Tensor:
    """Return the output of a chunk for all images, and show its readers their inputs and outputs."""
    rows: dict[str, list[Tensor]] = {r.layer.name: [] for r in readers}
    results: dict[str, list[Tensor]] = {r.layer.name: [] for r in readers}
    places = {r.layer.name: _places(r.layer, len(x), generator) for r in readers}
    after = {name: layer for layer in chunk for name in layer.inputs}
    outputs = []
    for part in _parts(len(x), chunk):
        inside = _run(model, chunk, x[part])
        outputs.append(inside[chunk[-1].name])
        for r in readers:
            out = r.old.output
            while out in after and after[out].op in ("add", "relu"):
                out = after[out].name
            rows[r.layer.name].append(_patches(inside[r.layer.inputs[0]], r.layer, places[r.layer.name][part]))
            results[r.layer.name].append(_pixels(inside[out], places[r.layer.name][part]))
    for r in readers:
        r.see(torch.cat(rows.pop(r.layer.name)), torch.cat(results.pop(r.layer.name)))
    return torch.cat(outputs)


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
    """Yield slices of the batch such that the tensors of a chunk fit in some 200 MB."""
    size = max(1, min(n, 50_000_000 // max(1, sum(layer.out_elements for layer in chunk))))
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
    """Return which output pixels of each of `n` images to look at (N, P)."""
    if layer.op == "linear":
        return torch.zeros(n, 1, dtype=torch.int64)
    pixels = layer.out_shape[1] * layer.out_shape[2]
    columns = layer.in_shape[0] // layer.groups * layer.kernel**2
    count = min(pixels, -(-max(_ROWS, _ROWS_PER_COLUMN * columns) // n))
    if count == pixels:
        return torch.arange(pixels).expand(n, pixels)
    return torch.rand(n, pixels, generator=generator).topk(count, dim=1).indices


def _patches(x_NCHW: Tensor, layer: Layer, places_NP: Tensor) -> Tensor:
    """Return the inputs of the named output pixels of a layer as rows (N * P, C * k * k)."""
    if layer.op == "linear":
        return x_NCHW
    padding, k = layer.padding, layer.kernel
    if padding:
        x_NCHW = F.pad(x_NCHW, (padding,) * 4)
    n, c, h, w = x_NCHW.shape
    y_NP, x_NP = places_NP // layer.out_shape[2] * layer.stride, places_NP % layer.out_shape[2] * layer.stride
    first_N1 = torch.arange(n)[:, None] * (h * w)
    rows = x_NCHW.permute(0, 2, 3, 1).reshape(n * h * w, c)
    out = torch.empty(places_NP.numel(), c, k * k)
    for i in range(k * k):
        out[:, :, i] = rows[(first_N1 + (y_NP + i // k) * w + x_NP + i % k).flatten()]
    return out.flatten(1)


def _pixels(x_NCHW: Tensor, places_NP: Tensor) -> Tensor:
    """Return the named pixels as rows (N * P, C)."""
    if x_NCHW.dim() == 2:
        return x_NCHW
    n, c, h, w = x_NCHW.shape
    rows = x_NCHW.permute(0, 2, 3, 1).reshape(n * h * w, c)
    return rows[(torch.arange(n)[:, None] * (h * w) + places_NP).flatten()]
