"""Channels go first that the remaining ones replace best; then every layer is refitted to the dense network.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from rescompress.core.layers import GLOBAL_POOLS, Layer, walk

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
        here = [r for rs in readers.values() for r in rs if r.layer.name in inside]
        x, dropped = _collect(dense, chunk, x, here, generator)
        if not bool(torch.isfinite(x).all()):
            raise DataError(
                f"the dense network's tensors behind {chunk[0].name} hold NaN or infinity",
                remedy="check the checkpoint and the data",
            )
        if _chunk_name(chunk) in context.blocks:
            blocks[_chunk_name(chunk)] = dropped
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
        self.ready = False
        self._gram_DD = torch.zeros(0)
        self._sum_D = self._shift_D = torch.zeros(0)
        self._energy = 0.0
        self._rows = 0

    def see(self, x_ND: Tensor, output_NO: Tensor) -> None:
        """Take in inputs, and what the layer (with the shortcut, if one is added) makes of them."""
        if not self._rows:
            self._gram_DD = torch.zeros(x_ND.shape[1], x_ND.shape[1])
            self._sum_D = torch.zeros(x_ND.shape[1], dtype=torch.float64)
            self._shift_D = x_ND.mean(0)
        x_ND = x_ND - self._shift_D  # a mean far from zero would drown the variance in rounding
        self._gram_DD.addmm_(x_ND.T, x_ND)
        self._sum_D += x_ND.sum(0, dtype=torch.float64)
        self._energy += float(output_NO.square().sum(dtype=torch.float64))
        self._rows += len(x_ND)

    def forget(self) -> None:
        """Free the memory."""
        self._gram_DD = self._sum_D = self._shift_D = torch.zeros(0)

    def relative(self) -> tuple[Tensor, Tensor]:
        """Return second moment and weights such that squared errors are shares of the output's energy."""
        mean_D = self._sum_D / self._rows
        h_DD = self._gram_DD.double().div_(self._rows).addr_(mean_D, mean_D, alpha=-1.0)
        energy = max(self._energy / self._rows, 1e-30)
        return damped(h_DD, _RIDGE), self.old.weight_OIKK.flatten(1).double() / energy**0.5


def _collect(
    model: ResNet, chunk: Sequence[Layer], x: Tensor, readers: Sequence[_Reader], generator: torch.Generator
) -> tuple[Tensor, float]:
    """Return the output of a chunk for all images, and the error of leaving it out; show its readers what they need."""
    places = {r.layer.name: _places(r.layer, len(x), generator) for r in readers}
    after = {name: layer for layer in chunk for name in layer.inputs}
    lost = energy = 0.0

    def watch(part: slice, inside: _Inside) -> None:
        nonlocal lost, energy
        for r in readers:
            out = r.old.output
            while out in after and after[out].op in ("add", "relu"):
                out = after[out].name
            there = places[r.layer.name][part]
            r.see(_patches(inside[r.layer.inputs[0]], r.layer, there), _pixels(inside[out], there))
        enters, leaves = inside[chunk[0].inputs[0]], inside[chunk[-1].name]
        if enters.shape == leaves.shape:
            lost += float((leaves - enters).square().sum())
            energy += float(leaves.square().sum())

    x = _advance(model, chunk, x, own=chunk[0].block is not None, watch=watch)
    for r in readers:
        r.ready = True
    return x, lost / max(energy, 1e-30)


def compensate(context: Context, plan: PruningPlan, pruned: Checkpoint) -> Checkpoint:
    """Return the pruned checkpoint, every layer of it refitted to the dense network on the calibration images."""
    dense_layers = walk(context.checkpoint.spec)
    keep = channels_kept(context.checkpoint.spec, plan)
    left = right = _images(context, dense_layers)
    dense = build_model(context.checkpoint.spec, context.checkpoint.state_dict).requires_grad_(False)
    work = _Work(pruned)
    generator = torch.Generator().manual_seed(context.seed + 1)
    remaining = {_chunk_name(c): c for c in _chunks(walk(pruned.spec))}
    changed = False
    for done, chunk in enumerate(chunks := _chunks(dense_layers), 1):
        small = remaining.get(_chunk_name(chunk))
        changed = changed or small is None or any(len(keep[a.name]) != a.out_shape[0] for a in chunk)
        if not changed:
            left = right = _advance(dense, chunk, left, own=chunk[0].block is not None)
        elif small is None:
            left = _advance(dense, chunk, left, own=right is not left)
        else:
            jobs = _jobs(work.checkpoint, small)
            places = {job.layer.name: _places(job.layer, len(left), generator) for job in jobs}
            own = right is not left and chunk[0].block is not None
            left, targets = _targets(dense, chunk, left, jobs, places, keep, own=own)
            if jobs:
                _refit_chunk(work, small, jobs, right, places, targets)
            right = _advance(work.model, small, right, own=chunk[0].block is not None)
        context.progress("repairing blocks", done, len(chunks))
    return work.checkpoint


def _targets(
    dense: ResNet,
    chunk: Sequence[Layer],
    left: Tensor,
    jobs: Sequence[_Job],
    places: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    *,
    own: bool,
) -> tuple[Tensor, dict[str, _Rows]]:
    """Return the dense network's output of a chunk, and what each layer of it is to be fitted to, by name."""
    targets = {job.layer.name: _Rows(len(left)) for job in jobs}

    def collect(part: slice, inside: _Inside) -> None:
        for job in jobs:
            value = inside[job.target].index_select(1, keep[job.target])
            targets[job.layer.name].put(part, _pixels(value, places[job.layer.name][part]))

    return _advance(dense, chunk, left, own=own, watch=collect), targets


class _Work:
    """The pruned network while it is refitted: as tensors, and as a model that runs."""

    def __init__(self, pruned: Checkpoint) -> None:
        self.checkpoint = Checkpoint(pruned.spec, dict(pruned.state_dict), None, pruned.provenance)
        self.model = build_model(pruned.spec, pruned.state_dict).requires_grad_(False)

    def set(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace some tensors."""
        self.checkpoint = Checkpoint(
            self.checkpoint.spec, {**self.checkpoint.state_dict, **tensors}, None, self.checkpoint.provenance
        )
        for name, value in tensors.items():
            path, _, leaf = name.rpartition(".")
            getattr(self.model.get_submodule(path), leaf).copy_(value)


class _Rows:
    """Rows (N * P, C) of all images, put together part by part."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._rows_ND = torch.empty(0)

    def put(self, part: slice, rows_ND: Tensor) -> None:
        """Take in the rows of some images."""
        per = len(rows_ND) // (part.stop - part.start)
        if not len(self._rows_ND):
            self._rows_ND = rows_ND.new_empty(per * self._images, rows_ND.shape[1])
        self._rows_ND[part.start * per : part.stop * per] = rows_ND

    def take(self) -> Tensor:
        """Return the rows, and forget them."""
        rows_ND, self._rows_ND = self._rows_ND, torch.empty(0)
        return rows_ND


def _refit_chunk(
    work: _Work,
    small: Sequence[Layer],
    jobs: Sequence[_Job],
    right: Tensor,
    places: Mapping[str, Tensor],
    targets: Mapping[str, _Rows],
) -> None:
    """Refit every convolution and linear layer of one chunk; a block that is no better for it stays as it was.

    Args:
        work: The pruned network so far.
        small: The layers.
        jobs: What to refit, in this order.
        right: What enters the chunk in the pruned network.
        places: The pixels of each layer to look at.
        targets: What the dense network makes of them.
    """
    cached = {small[0].inputs[0]: right}
    last = jobs[-1]
    old_NO = _Rows(len(right))
    if last.skip:
        for part in _parts(len(right), small):
            inside = _Inside(work.model, small, cached, part)
            old_NO.put(part, _pixels(inside[last.target], places[last.layer.name][part]))
    old = {name: work.checkpoint.state_dict[name] for job in jobs for name in _tensor_names(work.checkpoint, job.layer)}
    for job in jobs:
        reads = job.layer.inputs[0]
        known = reads in cached
        rows, skips = _Rows(len(right)), _Rows(len(right))
        fresh: Tensor | None = None
        for part in _parts(len(right), small):
            inside = _Inside(work.model, small, cached, part)
            value = inside[reads]
            rows.put(part, _patches(value, job.layer, places[job.layer.name][part]))
            if job.skip:
                skips.put(part, _pixels(inside[job.skip], places[job.layer.name][part]))
            if not known:
                fresh = fresh if fresh is not None else _empty(len(right), value)
                fresh[part] = value
        if fresh is not None:  # what the next layer needs can be computed from this
            cached = {small[0].inputs[0]: right, reads: fresh}
        target_NO = targets[job.layer.name].take()
        tensors, error = _solve(work.checkpoint, job, rows.take(), target_NO, skips.take() if job.skip else None)
        work.set(tensors)
        if job is last and last.skip:
            before = float((old_NO.take().clamp_min(0) - target_NO.clamp_min(0)).square().mean())
            if error > before:
                work.set(old)


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


def _solve(
    checkpoint: Checkpoint, job: _Job, x_ND: Tensor, target_NO: Tensor, skip_NO: Tensor | None
) -> tuple[dict[str, Tensor], float]:
    """Return the refitted tensors of one layer, and the mean squared error that is left."""
    old = folded(checkpoint, job.layer)
    has_bias = f"{job.layer.name}.bias" in checkpoint.state_dict or old.output != job.layer.name
    shape = old.weight_OIKK.shape
    groups = job.layer.groups
    fits = []
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
        fits.append(fit)
    new = Folded(torch.cat([f.w_OD for f in fits]).reshape(shape), torch.cat([f.b_O for f in fits]), old.output)
    mean, var = torch.cat([f.mean_O for f in fits]), torch.cat([f.var_O for f in fits])
    return unfolded(checkpoint, job.layer, new, mean, var), sum(f.after for f in fits) / groups


def _tensor_names(checkpoint: Checkpoint, layer: Layer) -> list[str]:
    """Return the names of the tensors of a layer and of the BatchNorm behind it."""
    owners = (layer.name, folded(checkpoint, layer).output)
    return [name for name in checkpoint.state_dict if name.rpartition(".")[0] in owners]


def _images(context: Context, layers: Sequence[Layer]) -> Tensor:
    """Return as many calibration images as the memory allows."""
    x = context.images()
    widest = max(layer.in_elements for layer in layers if layer.name.endswith(".conv1") or layer.op == "input")
    most = max(1, _STREAM_BYTES // (8 * widest))
    if most < len(x):
        context.note(f"{most} of the {len(x)} calibration images are used: more would take over {_STREAM_BYTES >> 30} GiB")
    return x[:most].contiguous(memory_format=torch.channels_last)


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
            if layer.op in ("conv", "linear", *GLOBAL_POOLS):
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


class _Inside:
    """The tensors inside a chunk for some of the images, each computed when it is asked for."""

    def __init__(self, model: ResNet, chunk: Sequence[Layer], known: Mapping[str, Tensor], part: slice) -> None:
        """Start from tensors that are known for all images.

        Args:
            model: The network.
            chunk: Its layers.
            known: Tensors of all images, by name; what enters the chunk is among them.
            part: The images.
        """
        self._model = model
        self._layers = {layer.name: layer for layer in chunk}
        self._values = {name: value[part] for name, value in known.items()}

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor of the chunk."""
        if name not in self._values:
            layer = self._layers[name]
            self._values[name] = self._model.compute(layer, [self[i] for i in layer.inputs])
        return self._values[name]


def _empty(images: int, like: Tensor) -> Tensor:
    """Return memory for a tensor of all images, channels last where it has pixels."""
    shape = (images, *like.shape[1:])
    layout = torch.channels_last if like.dim() == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, memory_format=layout)


def _advance(
    model: ResNet,
    chunk: Sequence[Layer],
    x_NCHW: Tensor,
    *,
    own: bool,
    watch: Callable[[slice, _Inside], None] = lambda part, inside: None,
) -> Tensor:
    """Return the output of a chunk for all images.

    Args:
        model: The network.
        chunk: Its layers.
        x_NCHW: What enters.
        own: Whether the output may overwrite it.
        watch: Called with each part of the images and its tensors.
    """
    out: Tensor | None = None
    for part in _parts(len(x_NCHW), chunk):
        inside = _Inside(model, chunk, {chunk[0].inputs[0]: x_NCHW}, part)
        watch(part, inside)
        value = inside[chunk[-1].name]
        if out is None:
            reuse = own and value.shape[1:] == x_NCHW.shape[1:]
            out = x_NCHW if reuse else _empty(len(x_NCHW), value)
        out[part] = value
    assert out is not None
    return out


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
