"""2:4 sparsity: two of every four input channels of a weight are zero, which sparse tensor cores run at double rate.

The weights stay dense tensors with zeros in them; a runtime that knows the pattern (TensorRT on Ampere and later, with its
sparse kernels allowed) may use it, any other computes as before. Four neighbouring input channels at one kernel position
make a group, as those kernels have it (NVIDIA Ampere white paper, "fine-grained structured sparsity").

The zeros are chosen row by row by Optimal Brain Surgeon on the second moment of the layer's inputs, four columns after four
columns, and the columns to come make up for them, in the order of SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774,
section 3). Layers are taken in order of computation, each on the inputs that the sparse network gives it.

Shape suffixes: N rows, D input columns (channel by channel, kernel positions inside), O outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.finite import all_finite
from compress.prune.activations import Inside, Rows, advance, chunks_of, parts, patches, places_of, usable_images
from compress.prune.fold import folded
from compress.prune.method import Context
from compress.prune.solve import damped, second_moment
from compress.resnet import ResNet, build_model
from rescompress.core.errors import DataError
from rescompress.core.graph import Layer
from rescompress.core.operations import Conv, Weighted
from rescompress.core.recipe import network_of

PATTERN = "2:4"
_RIDGE = 1e-2


@dataclass(frozen=True)
class Sparse:
    """A network with the pattern.

    Attributes:
        checkpoint: Its tensors.
        layers: The layers that have it.
        left_dense: The layers that cannot: their input channels are no multiple of four.
    """

    checkpoint: Checkpoint
    layers: tuple[str, ...]
    left_dense: tuple[str, ...]


def fits(layer: Layer) -> bool:
    """Return whether a layer can have the pattern."""
    op = layer.operation
    return isinstance(op, Weighted) and not (isinstance(op, Conv) and op.frozen) and layer.weight_shape[1] % 4 == 0


def has_pattern(weight: Tensor) -> bool:
    """Return whether of every four neighbouring input channels at least two are zero, everywhere in a weight (OI or OIKK).

    A weight that is zero altogether does not count.
    """
    if weight.dim() < 2 or weight.shape[1] % 4 or not bool((weight != 0).any()):
        return False
    fours = weight.reshape(len(weight), weight.shape[1] // 4, 4, -1)
    return bool(((fours != 0).sum(2) <= 2).all())


def sparsify(context: Context, checkpoint: Checkpoint) -> Sparse:
    """Return the network with the 2:4 pattern in every layer that can have it.

    Args:
        context: For the images, the seed and the progress.
        checkpoint: A float network.

    Raises:
        BadInput: There are no images.
        DataError: They do not fit the network, or hold NaN.
    """
    network = network_of(checkpoint.spec)
    x = usable_images(context, network)
    tensors = dict(checkpoint.state_dict)
    model = build_model(checkpoint.spec, tensors).requires_grad_(False)
    generator = torch.Generator("cpu").manual_seed(context.seed + 2)
    done: list[str] = []
    dense: list[str] = []
    chunks = chunks_of(network)
    for number, chunk in enumerate(chunks, 1):
        for layer in chunk:
            if not isinstance(layer.operation, Weighted):
                continue
            if not fits(layer):
                dense.append(layer.name)
                continue
            new = _sparse_layer(Checkpoint(checkpoint.spec, tensors), layer, _inputs(model, chunk, layer, x, generator))
            tensors |= new
            model.load_state_dict(new, strict=False)
            done.append(layer.name)
        x = advance(model, chunk, x, own=chunk[0].block is not None)
        if not all_finite(x):
            raise DataError(f"the network's tensors behind {chunk[0].name} hold NaN or infinity", remedy="check the checkpoint")
        context.progress("making weights sparse", number, len(chunks))
    return Sparse(Checkpoint(checkpoint.spec, tensors, None, checkpoint.provenance), tuple(done), tuple(dense))


def _inputs(model: ResNet, chunk: Sequence[Layer], layer: Layer, x: Tensor, generator: torch.Generator) -> Tensor:
    """Return input rows of a layer (N, D)."""
    places_NP = places_of(layer, len(x), generator)
    rows = Rows(len(x))
    for part in parts(len(x), chunk):
        inside = Inside(model, chunk, {chunk[0].inputs[0]: x}, part)
        rows.put(part, patches(inside[layer.inputs[0]], layer, places_NP[part]))
    return rows.take()


def _sparse_layer(checkpoint: Checkpoint, layer: Layer, x_ND: Tensor) -> Mapping[str, Tensor]:
    """Return the tensors of one layer that change: the weight, and what keeps the mean of its output."""
    name = layer.name
    w = checkpoint.state_dict[f"{name}.weight"]
    mean_D = x_ND.mean(0)
    x_ND = x_ND - mean_D
    groups = layer.operation.groups if isinstance(layer.operation, Conv) else 1
    columns, outputs = x_ND.shape[1] // groups, len(w) // groups
    rows, shifts = [], []
    for g in range(groups):
        part_ND = x_ND[:, g * columns : (g + 1) * columns]
        h_DD = damped(second_moment(part_ND), _RIDGE)
        old_OD = w[g * outputs : (g + 1) * outputs].flatten(1).double()
        new_OD = two_of_four(h_DD, old_OD, w[0, 0].numel())
        rows.append(new_OD)
        shifts.append((old_OD - new_OD) @ mean_D[g * columns : (g + 1) * columns].double())
    shift_O = torch.cat(shifts)
    new = {f"{name}.weight": torch.cat(rows).reshape(w.shape).to(w.dtype).contiguous()}
    norm = folded(checkpoint, layer).output
    if norm != name:
        mean = checkpoint.state_dict[f"{norm}.running_mean"]
        new[f"{norm}.running_mean"] = (mean.double() - shift_O).to(mean.dtype)
    elif f"{name}.bias" in checkpoint.state_dict:
        bias = checkpoint.state_dict[f"{name}.bias"]
        new[f"{name}.bias"] = (bias.double() + shift_O).to(bias.dtype)
    return new


def two_of_four(h_DD: Tensor, w_OD: Tensor, positions: int) -> Tensor:
    """Return weights with two zeros in every four neighbouring channels, the others adjusted.

    With ``u`` the upper Cholesky factor of ``h^-1``, the inverse over the columns not yet settled is ``u^T u`` of the rest.
    Of every four columns the pair S goes whose removal costs least, ``w_S (h^-1_SS)^-1 w_S^T``; the other two and the
    columns to come take ``-w_S (h^-1_SS)^-1 h^-1_S:``.

    Args:
        h_DD: Second moment of the inputs, positive definite; float64.
        w_OD: Weights; float64.
        positions: Kernel positions of a channel, which are neighbouring columns.
    """
    d = len(h_DD)
    order = torch.arange(d).view(-1, positions).T.flatten()  # position by position, so that four channels are neighbours
    h_DD = h_DD[order][:, order]
    u_DD = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h_DD)), upper=True)
    w_OD = w_OD[:, order].clone()
    for start in range(0, d, 4):
        four = slice(start, start + 4)
        u_44 = u_DD[four, four]
        gone_O4, blame_O4 = _cheapest_pair(u_44.T @ u_44, w_OD[:, four])
        w_OD[:, start:] -= (blame_O4 @ u_44.T) @ u_DD[four, start:]
        w_OD[:, four] = w_OD[:, four].masked_fill(gone_O4, 0.0)
    return w_OD[:, torch.argsort(order)]


def _cheapest_pair(inverse_44: Tensor, w_O4: Tensor) -> tuple[Tensor, Tensor]:
    """Return, per row, which two of four columns cost least to remove together, as a mask, and ``w_S (h^-1_SS)^-1`` there."""
    pairs = torch.tensor(list(itertools.combinations(range(4), 2)))
    blocks_P22 = inverse_44[pairs[:, :, None], pairs[:, None, :]]
    w_PO2 = w_O4[:, pairs].transpose(0, 1)
    blame_PO2 = torch.linalg.solve(blocks_P22, w_PO2.transpose(1, 2)).transpose(1, 2)
    best_O = (blame_PO2 * w_PO2).sum(2).argmin(0)
    gone_O4 = torch.zeros_like(w_O4, dtype=torch.bool).scatter_(1, pairs[best_O], value=True)
    return gone_O4, torch.zeros_like(w_O4).scatter_(1, pairs[best_O], blame_PO2[best_O, torch.arange(len(w_O4))])
