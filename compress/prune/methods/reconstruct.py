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

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.finite import all_finite
from compress.prune.activations import (
    Inside,
    Rows,
    advance,
    chunk_name,
    chunks_of,
    empty_for,
    parts,
    patches,
    pixels_at,
    pixels_per_image,
    places_of,
    usable_images,
)
from compress.prune.apply import channels_kept
from compress.prune.fold import Folded, folded, unfolded
from compress.prune.groups import ChannelGroup, Sizes, is_plain
from compress.prune.method import Context, Curves, ErrorCurve
from compress.prune.plan import PruningPlan
from compress.prune.solve import add_gram, damped, mirrored, obs_curve, refit, ridge_for
from compress.resnet import ResNet, build_model
from rescompress.core.errors import DataError
from rescompress.core.graph import Layer
from rescompress.core.operations import Add, BatchNorm, Conv, Relu, Weighted
from rescompress.core.recipe import network_of

DESCRIPTION = "what the rest repairs best goes first; refits every block to the dense network; needs images, no labels"
NEEDS_DATA = True

_MOST_COLUMNS = 12_288
"""Inputs of a layer beyond which it is not refitted: time grows with their cube (a 3x3 convolution of 2,048 channels, as behind
the dilated ResNet-50 of DeepLab, has 18,432)."""
_TARGETS = "targets"
_TARGET_BYTES = 4 << 30
"""Most memory for what all layers of the dense network make; beyond it the dense network runs once more."""
_GUARD_IMAGES = 128
"""Images on which a refitted block is compared with the block as it was cut."""


def curves(context: Context) -> Curves:
    """Return curves in summed relative error of the layers that read a group, behind their ReLU."""
    dense = build_model(context.checkpoint.spec, context.checkpoint.state_dict).requires_grad_(False)
    sizes = Sizes(context.checkpoint.spec)
    layers = sizes.network.by_name
    x = usable_images(context, sizes.network)
    seers = {c: _Reader(layers[c], context.checkpoint) for g in context.groups for c in g.consumers if is_plain(layers[c])}
    readers = {g.name: [seers[c] for c in g.consumers if c in seers] for g in context.groups}
    for name, rs in readers.items():
        for r in rs:
            r.waiting.add(name)
    generator = torch.Generator("cpu").manual_seed(context.seed)
    targets = _Targets.affordable(context.checkpoint, sizes.layers, len(x), context.seed)
    found: dict[str, ErrorCurve] = {}
    blocks: dict[str, float] = {}
    for chunk in chunks_of(sizes.network):
        inside = {layer.name for layer in chunk}
        here = [r for r in seers.values() if r.layer.name in inside]
        x, dropped = _collect(dense, chunk, x, here, generator, targets, price=chunk_name(chunk) in context.blocks)
        if not all_finite(x):
            raise DataError(
                f"the dense network's tensors behind {chunk[0].name} hold NaN or infinity",
                remedy="check the checkpoint and the data",
            )
        if chunk_name(chunk) in context.blocks:
            blocks[chunk_name(chunk)] = dropped
        for group, rs in readers.items():
            if group not in found and all(r.ready for r in rs):
                g = sizes.groups[group]
                found[group] = obs_curve([r.relative(g) for r in rs], g.size)
                for r in rs:
                    r.done(group)
                context.progress("measuring channels", len(found), len(readers))
    if targets is not None:
        context.scratch[_TARGETS] = targets
    return Curves({g.name: found[g.name] for g in context.groups}, blocks, unit="summed relative error of layers")


class _Reader:
    """A layer that reads a group, with the second moment of its inputs once they have been seen."""

    def __init__(self, layer: Layer, checkpoint: Checkpoint) -> None:
        self.layer = layer
        self.old = folded(checkpoint, layer)
        self.ready = False
        self.waiting: set[str] = set()
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
        add_gram(self._gram_DD, x_ND)
        self._sum_D += x_ND.sum(0, dtype=torch.float64)
        self._energy += float(output_NO.square().sum(dtype=torch.float64))
        self._rows += len(x_ND)

    def done(self, group: str) -> None:
        """Free the memory, once no group waits for it."""
        self.waiting.discard(group)
        if not self.waiting:
            self._gram_DD = self._sum_D = self._shift_D = torch.zeros(0)

    def relative(self, group: ChannelGroup) -> tuple[Tensor, Tensor]:
        """Return second moment and weights of a group's columns such that squared errors are shares of the output's energy.

        Where nothing passes the ReLU, or what is read never changes (the bias can say it), there is nothing to lose: the
        weights are zero.
        """
        mean_D = self._sum_D / self._rows
        h_DD = mirrored(self._gram_DD).div_(self._rows).addr_(mean_D, mean_D, alpha=-1.0)
        weight_OD = self.old.weight_OIKK.flatten(1).double()
        channels = group.indices(self.layer.inputs[0])
        if channels != list(range(self.layer.in_shape[0])):
            taps = weight_OD.shape[1] // self.layer.in_shape[0]
            columns = (torch.tensor(channels)[:, None] * taps + torch.arange(taps)).flatten()
            h_DD, weight_OD = h_DD[columns][:, columns], weight_OD[:, columns]
        matters = self._energy > 0 and float(h_DD.diagonal().mean()) > 0
        weight_OD = weight_OD / (self._energy / self._rows) ** 0.5 if matters else torch.zeros_like(weight_OD)
        return damped(h_DD, ridge_for(self._rows, len(h_DD))), weight_OD


def _collect(
    model: ResNet,
    chunk: Sequence[Layer],
    x: Tensor,
    readers: Sequence[_Reader],
    generator: torch.Generator,
    targets: _Targets | None,
    *,
    price: bool,
) -> tuple[Tensor, float]:
    """Return the output of a chunk for all images, and the error of leaving it out; show its readers what they need.

    Args:
        model: The dense network.
        chunk: Its layers.
        x: What enters.
        readers: Those inside the chunk.
        generator: Chooses pixels.
        targets: Keeps what the layers make, for the repair.
        price: Whether the error of leaving the chunk out is asked for; else it is 0.
    """
    places = {r.layer.name: places_of(r.layer, len(x), generator) for r in readers}
    sums = _sums(chunk)
    lost = energy = 0.0

    def watch(part: slice, inside: Inside) -> None:
        nonlocal lost, energy
        for r in readers:
            out = sums.get(r.old.output, r.old.output)
            there = places[r.layer.name][part]
            r.see(patches(inside[r.layer.inputs[0]], r.layer, there), pixels_at(inside[out], there))
        if targets is not None:
            targets.see(chunk, part, inside)
        if price:
            enters, leaves = inside[chunk[0].inputs[0]], inside[chunk[-1].name]
            lost += float((leaves - enters).square().sum())
            energy += float(leaves.square().sum())

    x = advance(model, chunk, x, own=chunk[0].block is not None, watch=watch)
    for r in readers:
        r.ready = True
    return x, lost / max(energy, 1e-30)


def _sums(chunk: Sequence[Layer]) -> dict[str, str]:
    """Return, per tensor of a chunk, what comes behind the sums and ReLUs that read it, where nothing else does."""
    readers: dict[str, list[Layer]] = {}
    for layer in chunk:
        for name in dict.fromkeys(layer.inputs):
            readers.setdefault(name, []).append(layer)
    found: dict[str, str] = {}
    for layer in reversed(chunk):
        after = readers.get(layer.name, [])
        if len(after) == 1 and isinstance(after[0].operation, Add | Relu):
            found[layer.name] = found.get(after[0].name, after[0].name)
    return found


def compensate(context: Context, plan: PruningPlan, pruned: Checkpoint) -> Checkpoint:
    """Return the pruned checkpoint, every layer of it refitted to the dense network on the calibration images."""
    dense_network = network_of(context.checkpoint.spec)
    keep = channels_kept(context.checkpoint.spec, plan)
    left = right = usable_images(context, dense_network)
    known = context.scratch.pop(_TARGETS, None)
    dense = build_model(context.checkpoint.spec, context.checkpoint.state_dict).requires_grad_(False)
    work = _Work(pruned)
    remaining = {chunk_name(c): c for c in chunks_of(network_of(pruned.spec))}
    changed = False
    for done, chunk in enumerate(chunks := chunks_of(dense_network), 1):
        in_block = chunk[0].block is not None
        small = remaining.get(chunk_name(chunk))
        changed = changed or small is None or any(len(keep[a.name]) != a.out_shape[0] for a in chunk)
        if not changed:
            left = right = advance(dense, chunk, left, own=in_block)
        else:
            targets = known if isinstance(known, _Targets) else _Targets(context.checkpoint, len(right), context.seed)
            if targets is not known:
                watch = functools.partial(targets.see, chunk) if small is not None else _look_away
                left = advance(dense, chunk, left, own=right is not left and in_block, watch=watch)
            if small is not None:
                inside = _refit_chunk(work, small, right, targets, keep)
                right = advance(work.model, small, right, own=in_block, known=inside)
        context.progress("repairing blocks", done, len(chunks))
    if work.left:
        context.note(f"not refitted, since they read more than {_MOST_COLUMNS:,} numbers: {', '.join(work.left)}")
    return work.checkpoint


def _look_away(part: slice, inside: Inside) -> None:
    """Take nothing."""


class _Targets:
    """What the dense network makes at some pixels of every layer: what the layers of the pruned one are fitted to."""

    def __init__(self, checkpoint: Checkpoint, images: int, seed: int) -> None:
        self._checkpoint = checkpoint
        self._images = images
        self._seed = seed
        self._jobs: dict[str, list[_Job]] = {}
        self._places: dict[str, Tensor] = {}
        self._rows: dict[str, Rows] = {}

    @classmethod
    def affordable(cls, checkpoint: Checkpoint, layers: Sequence[Layer], images: int, seed: int) -> _Targets | None:
        """Return targets for all layers at once, or None where they would take too much memory."""
        numbers = sum(
            images * pixels_per_image(layer, images) * layer.out_shape[0]
            for layer in layers
            if isinstance(layer.operation, Weighted)
        )
        return cls(checkpoint, images, seed) if 4 * numbers <= _TARGET_BYTES else None

    def see(self, chunk: Sequence[Layer], part: slice, inside: Inside) -> None:
        """Take in what the dense network makes of some images in one of its chunks."""
        name = chunk_name(chunk)
        if name not in self._jobs:
            self._jobs[name] = _jobs(self._checkpoint, chunk)
            for job in self._jobs[name]:
                generator = torch.Generator("cpu").manual_seed(self._seed * 1_000_003 + zlib.crc32(job.layer.name.encode()))
                self._places[job.layer.name] = places_of(job.layer, self._images, generator)
                self._rows[job.layer.name] = Rows(self._images)
        for job in self._jobs[name]:
            there = self._places[job.layer.name][part]
            self._rows[job.layer.name].put(part, pixels_at(inside[job.target], there))

    def places(self, layer: str) -> Tensor:
        """Return the pixels of a layer that are looked at (N, P)."""
        return self._places[layer]

    def take(self, job: _Job, keep: Tensor) -> Tensor:
        """Return the rows of a layer, channels `keep` of them, and forget them."""
        return self._rows.pop(job.layer.name).take()[:, keep]


class _Work:
    """The pruned network while it is refitted: as tensors, and as a model that runs.

    Attributes:
        checkpoint: As tensors.
        model: That runs.
        left: Layers that are too wide to be refitted.
    """

    def __init__(self, pruned: Checkpoint) -> None:
        self.left: list[str] = []
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


def _refit_chunk(
    work: _Work, small: Sequence[Layer], right: Tensor, targets: _Targets, keep: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Refit every convolution and linear layer of one chunk; a block that is no better for it stays as it was.

    Returns the tensors inside the chunk that are known for all images now.

    Args:
        work: The pruned network so far.
        small: The layers.
        right: What enters the chunk in the pruned network.
        targets: What the dense network makes of them.
        keep: Channels that stay, per dense tensor.
    """
    cached = {small[0].inputs[0]: right}
    jobs = _jobs(work.checkpoint, small)
    work.left += [job.layer.name for job in jobs if _columns(job.layer) > _MOST_COLUMNS]
    jobs = [job for job in jobs if _columns(job.layer) <= _MOST_COLUMNS]
    if not jobs:
        return cached
    wanted = {job.layer.name: targets.take(job, keep[job.target]) for job in jobs}
    last = jobs[-1]
    guard = _Guard(last, targets.places(last.layer.name), wanted[last.layer.name]) if last.skip else None
    before = guard.error(work.model, small, cached) if guard else 0.0
    old = {name: work.checkpoint.state_dict[name] for job in jobs for name in _tensor_names(work.checkpoint, job.layer)}
    for job in jobs:
        reads = job.layer.inputs[0]
        known = reads in cached
        there = targets.places(job.layer.name)
        rows, skips = Rows(len(right)), Rows(len(right))
        fresh: Tensor | None = None
        for part in parts(len(right), small):
            inside = Inside(work.model, small, cached, part)
            value = inside[reads]
            rows.put(part, patches(value, job.layer, there[part]))
            if job.skip:
                skips.put(part, pixels_at(inside[job.skip], there[part]))
            if not known:
                fresh = fresh if fresh is not None else empty_for(len(right), value)
                fresh[part] = value
        if fresh is not None:  # what the next layer needs can be computed from this
            cached = {small[0].inputs[0]: right, reads: fresh}
        skip_NO = skips.take() if job.skip else None
        work.set(_solve(work.checkpoint, job, rows.take(), wanted.pop(job.layer.name), skip_NO))
    if guard and guard.error(work.model, small, cached) > before:
        work.set(old)
        return {small[0].inputs[0]: right}
    return cached


@dataclass(frozen=True)
class _Guard:
    """Tells whether a block's output has come nearer to the dense network's, on the first of the images.

    Attributes:
        job: The layer that ends the block.
        places_NP: Its pixels.
        target_NO: What the dense network makes there.
    """

    job: _Job
    places_NP: Tensor
    target_NO: Tensor

    def error(self, model: ResNet, chunk: Sequence[Layer], known: Mapping[str, Tensor]) -> float:
        """Return the summed squared error, behind the ReLU where there is one."""
        images, per_image = min(_GUARD_IMAGES, len(self.places_NP)), self.places_NP.shape[1]
        total = 0.0
        for part in parts(images, chunk):
            out_NO = pixels_at(Inside(model, chunk, known, part)[self.job.target], self.places_NP[part])
            target_NO = self.target_NO[part.start * per_image : part.stop * per_image]
            if self.job.relu:
                out_NO, target_NO = out_NO.clamp_min(0), target_NO.clamp_min(0)
            total += float((out_NO - target_NO).square().sum())
        return total


@dataclass(frozen=True)
class _Job:
    """One layer to refit: against which dense tensor, with what added, and whether a ReLU follows."""

    layer: Layer
    target: str
    skip: str | None
    relu: bool


def _jobs(work: Checkpoint, small: Sequence[Layer]) -> list[_Job]:
    readers: dict[str, list[Layer]] = {}
    for layer in small:
        for name in dict.fromkeys(layer.inputs):
            readers.setdefault(name, []).append(layer)
    summed: set[str] = set()
    jobs = []
    for layer in small:
        if not isinstance(layer.operation, Weighted) or (isinstance(layer.operation, Conv) and layer.operation.frozen):
            continue
        out = folded(work, layer).output
        after = readers.get(out, [])
        add = after[0] if len(after) == 1 and isinstance(after[0].operation, Add) else None
        if add is not None and add.inputs[0] != add.inputs[1] and _ends_last(add, out, small) and add.name not in summed:
            summed.add(add.name)
            behind = readers.get(add.name, [])
            relu = len(behind) == 1 and isinstance(behind[0].operation, Relu)
            jobs.append(_Job(layer, add.name, next(n for n in add.inputs if n != out), relu))
        else:
            jobs.append(_Job(layer, out, None, len(after) == 1 and isinstance(after[0].operation, Relu)))
    last = [j for j in jobs if j.skip]
    return [j for j in jobs if not j.skip] + last


def _columns(layer: Layer) -> int:
    """Return how many numbers one output of a layer is made of."""
    return math.prod(layer.weight_shape[1:])


def _ends_last(add: Layer, out: str, small: Sequence[Layer]) -> bool:
    """Whether `out` is the branch of an Add to repair against the sum: the first, or the one that a convolution ends."""
    made = {layer.name: layer for layer in small}
    other = next(n for n in add.inputs if n != out)
    if add.inputs[0] == out:
        return True
    maker = made.get(other)
    while maker is not None and isinstance(maker.operation, BatchNorm):
        maker = made.get(maker.inputs[0])
    return maker is None or not isinstance(maker.operation, Weighted)


def _solve(checkpoint: Checkpoint, job: _Job, x_ND: Tensor, target_NO: Tensor, skip_NO: Tensor | None) -> dict[str, Tensor]:
    """Return the refitted tensors of one layer."""
    old = folded(checkpoint, job.layer)
    has_bias = f"{job.layer.name}.bias" in checkpoint.state_dict or old.output != job.layer.name
    shape = old.weight_OIKK.shape
    op = job.layer.operation
    groups = op.groups if isinstance(op, Conv) else 1
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
        )
        fits.append(fit)
    new = Folded(torch.cat([f.w_OD for f in fits]).reshape(shape), torch.cat([f.b_O for f in fits]), old.output)
    mean, var = torch.cat([f.mean_O for f in fits]), torch.cat([f.var_O for f in fits])
    return unfolded(checkpoint, job.layer, new, mean, var)


def _tensor_names(checkpoint: Checkpoint, layer: Layer) -> list[str]:
    """Return the names of the tensors of a layer and of the BatchNorm behind it."""
    owners = (layer.name, folded(checkpoint, layer).output)
    return [name for name in checkpoint.state_dict if name.rpartition(".")[0] in owners]
