"""What layers read and make on the calibration images: the network run piece by piece, and rows of pixels for fits.

A *chunk* is a block, or a layer outside of blocks with what follows it; where more than one tensor is needed later on, it goes
on until only one is. Only the tensors between chunks are kept for all images; what lies inside is computed for some images
at a time, when it is asked for. Tensors are channels last: rows of
pixels are views then, and convolutions are quicker.

Shape suffixes: N images or rows, C channels, H height, W width, P pixels of an image, D input columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.prune.fold import gain, shift
from compress.prune.method import Context
from compress.resnet import ResNet
from rescompress.core.graph import INPUT, Layer, Network
from rescompress.core.operations import Conv, GlobalPool, Linear

_ROWS = 32_768
"""Pixels that a layer is fitted to, if there are so many."""
_ROWS_PER_COLUMN = 12
"""Pixels per input column, where that is more."""
_STREAM_BYTES = 4 << 30
"""Most memory for the residual streams of the dense and the pruned network together."""


class Rows:
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


def usable_images(context: Context, network: Network) -> Tensor:
    """Return as many calibration images as the memory allows."""
    x = context.images()
    widest = max(chunk[0].in_elements for chunk in chunks_of(network))
    most = max(1, _STREAM_BYTES // (8 * widest))
    if most < len(x):
        context.note(f"{most} of the {len(x)} calibration images are used: more would take over {_STREAM_BYTES >> 30} GiB")
    return x[:most].contiguous(memory_format=torch.channels_last)


def chunks_of(network: Network) -> list[list[Layer]]:
    """Return the layers by block; each layer outside of blocks with the elementwise layers and pools after it.

    A chunk reads one tensor of those before it, the first input of its first layer, and later ones read its last layer only.
    """
    layers = network.layers[1:]
    last_read = {name: i for i, layer in enumerate(layers) for name in layer.inputs}
    pieces: list[list[Layer]] = [[]]
    held = last_read[INPUT]  # where the last reader is of all tensors but the newest
    for i, layer in enumerate(layers):
        pieces[-1].append(layer)
        if held <= i < len(layers) - 1:
            pieces.append([])
        held = max(held, last_read.get(layer.name, i))
    chunks: list[list[Layer]] = []
    for piece in pieces:
        first, before = piece[0], chunks[-1] if chunks else []
        block = first.block
        joins = bool(before) and block == before[-1].block
        if joins and block is None:
            joins = not isinstance(first.operation, Conv | Linear | GlobalPool)
        if joins:
            before += piece
        else:
            chunks.append(piece)
    return chunks


def chunk_name(chunk: Sequence[Layer]) -> str:
    """Return the block's name where the chunk is one, else its first layer's."""
    block = chunk[0].block
    return block if block is not None and all(layer.block == block for layer in chunk) else chunk[0].name


def parts(n: int, chunk: Sequence[Layer]) -> Iterator[slice]:
    """Yield slices of the batch such that the tensors of a chunk fit in some 60 MB."""
    size = max(1, min(n, 16_000_000 // max(1, sum(layer.out_elements for layer in chunk))))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


class Inside:
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
            conv = self._layers.get(layer.inputs[0]) if layer.inputs else None
            folds = conv is not None and self._model.network.folded_norms.get(conv.name) is layer
            if conv is not None and folds and isinstance(conv.operation, Conv) and conv.name not in self._values:
                self._values[name] = self._normed(conv, conv.operation, layer)
            else:
                self._values[name] = self._model.compute(layer, [self[i] for i in layer.inputs])
        return self._values[name]

    def _normed(self, conv: Layer, op: Conv, norm: Layer) -> Tensor:
        """Return a convolution with the BatchNorm behind it, in one go: nobody asks for what lies between."""
        first, then = self._model.get_submodule(conv.name), self._model.get_submodule(norm.name)
        assert isinstance(first, nn.Conv2d)
        assert isinstance(then, nn.BatchNorm2d)
        assert then.running_mean is not None
        tensors = {f"{norm.name}.{k}": v for k, v in then.state_dict().items()}
        scale_O = gain(tensors, norm)
        before_O = then.running_mean if first.bias is None else then.running_mean - first.bias
        weight = first.weight * scale_O[:, None, None, None]
        bias_O = shift(tensors, norm) - before_O * scale_O
        x = F.pad(self[conv.inputs[0]], _pads(op))
        return F.conv2d(x, weight, bias_O, op.stride, 0, op.dilation, op.groups)


def _pads(op: Conv) -> list[int]:
    top, left, bottom, right = op.pads
    return [left, right, top, bottom]


def empty_for(images: int, like: Tensor) -> Tensor:
    """Return memory for a tensor of all images, channels last where it has pixels."""
    shape = (images, *like.shape[1:])
    layout = torch.channels_last if like.dim() == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, memory_format=layout)


def advance(
    model: ResNet,
    chunk: Sequence[Layer],
    x_NCHW: Tensor,
    *,
    own: bool,
    known: Mapping[str, Tensor] | None = None,
    watch: Callable[[slice, Inside], None] = lambda part, inside: None,
) -> Tensor:
    """Return the output of a chunk for all images.

    Args:
        model: The network.
        chunk: Its layers.
        x_NCHW: What enters.
        own: Whether the output may overwrite it.
        known: Tensors inside the chunk that have been computed already, of all images.
        watch: Called with each part of the images and its tensors.
    """
    out: Tensor | None = None
    for part in parts(len(x_NCHW), chunk):
        inside = Inside(model, chunk, {**(known or {}), chunk[0].inputs[0]: x_NCHW}, part)
        watch(part, inside)
        value = inside[chunk[-1].name]
        if out is None:
            reuse = own and value.shape[1:] == x_NCHW.shape[1:]
            out = x_NCHW if reuse else empty_for(len(x_NCHW), value)
        out[part] = value
    assert out is not None
    return out


def pixels_per_image(layer: Layer, n: int) -> int:
    """Return how many output pixels of each of `n` images are looked at."""
    if not isinstance(layer.operation, Conv):
        return 1
    columns = math.prod(layer.weight_shape[1:])
    return min(layer.out_shape[1] * layer.out_shape[2], -(-max(_ROWS, _ROWS_PER_COLUMN * columns) // n))


def places_of(layer: Layer, n: int, generator: torch.Generator) -> Tensor:
    """Return which output pixels of each of `n` images to look at (N, P)."""
    if not isinstance(layer.operation, Conv):
        return torch.zeros(n, 1, dtype=torch.int64)
    pixels, count = layer.out_shape[1] * layer.out_shape[2], pixels_per_image(layer, n)
    if count == pixels:
        return torch.arange(pixels).expand(n, pixels)
    return torch.rand(n, pixels, generator=generator, device="cpu").topk(count, dim=1).indices.to(torch.get_default_device())


def patches(x_NCHW: Tensor, layer: Layer, places_NP: Tensor) -> Tensor:
    """Return the inputs of the named output pixels of a layer as rows (N * P, C * KH * KW)."""
    op = layer.operation
    if not isinstance(op, Conv):
        return x_NCHW
    if any(op.pads):
        x_NCHW = F.pad(x_NCHW, _pads(op))
    n, c, h, w = x_NCHW.shape
    y_NP, x_NP = places_NP // layer.out_shape[2] * op.stride[0], places_NP % layer.out_shape[2] * op.stride[1]
    first_N1 = torch.arange(n)[:, None] * (h * w)
    rows = x_NCHW.permute(0, 2, 3, 1).reshape(n * h * w, c)
    out = torch.empty(places_NP.numel(), c, op.kernel[0] * op.kernel[1])
    for i in range(out.shape[2]):
        down, along = i // op.kernel[1] * op.dilation[0], i % op.kernel[1] * op.dilation[1]
        out[:, :, i] = rows[(first_N1 + (y_NP + down) * w + x_NP + along).flatten()]
    return out.flatten(1)


def pixels_at(x_NCHW: Tensor, places_NP: Tensor) -> Tensor:
    """Return the named pixels as rows (N * P, C)."""
    if x_NCHW.dim() == 2:
        return x_NCHW
    n, c, h, w = x_NCHW.shape
    rows = x_NCHW.permute(0, 2, 3, 1).reshape(n * h * w, c)
    return rows[(torch.arange(n)[:, None] * (h * w) + places_NP).flatten()]
