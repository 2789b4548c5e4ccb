"""Whether a Keras ResNet read by the names of its layers computes what its configuration says: both run on one image."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from compress import zoo
from compress.checkpoints.base import Checkpoint, LoadOptions
from compress.checkpoints.files import Opened
from compress.importers.keras_config import traced
from compress.importers.network import Read
from compress.importers.proof import difference
from compress.pixels import normalise
from compress.resnet import build_model
from rescompress.core.errors import CheckpointError
from rescompress.core.spec import Preprocessing

TOLERANCE = 1e-3
"""Largest difference of an output, relative to its largest number: half of the layers add in another order."""


def compare(opened: Opened, checkpoint: Checkpoint, options: LoadOptions) -> list[str]:
    """Return notes: none where the file's configuration computes what was read by the names of its layers.

    Args:
        opened: The file; it holds a configuration.
        checkpoint: What was read.
        options: What the user states.

    Raises:
        CheckpointError: It computes something else.
    """
    try:
        read, own = _traced(opened, checkpoint, options)
    except CheckpointError as e:
        return [f"its configuration {e.what}, so it was not compared with the network read by the names of its layers"]
    ours, wanted = _outputs(checkpoint, read, own, stated=options.preprocess is not None)
    if wanted.ndim == 4 and ours.ndim == 2:  # a network without a head ends in features here
        wanted = wanted.mean((2, 3))
    off = difference(ours, wanted)
    if off > TOLERANCE:
        raise CheckpointError(
            f"its configuration computes something else than a ResNet of keras.applications ({off:.2g} of its largest output)",
            remedy="supported: ResNet50, ResNet101, ResNet152 of keras.applications, unchanged",
        )
    return []


def _traced(opened: Opened, checkpoint: Checkpoint, options: LoadOptions) -> tuple[Read, Preprocessing | None]:
    shape = checkpoint.spec.input_shape
    try:
        read, own, _ = traced(opened, dataclasses.replace(options, input_shape=shape))
    except CheckpointError:
        if options.input_shape is None:
            raise
        read, own, _ = traced(
            opened, dataclasses.replace(options, input_shape=None)
        )  # stated for another size than it was made
    return read, own


def _outputs(checkpoint: Checkpoint, read: Read, own: Preprocessing | None, *, stated: bool) -> tuple[Tensor, Tensor]:
    """Return what both make of one image: of the same pixels where both prepare them, else of the same noise."""
    shape = read.network.input_shape
    spec = checkpoint.spec.replace(input_shape=shape)
    generator = torch.Generator().manual_seed(0)
    if stated or spec.preprocessing.assumed:
        mine = theirs = torch.randn(1, *shape, generator=generator)
    else:
        pixels = torch.randint(0, 256, (1, *shape), generator=generator, dtype=torch.uint8)
        mine, theirs = (normalise(pixels, p) for p in (spec.preprocessing, own or zoo.preprocessing("raw", shape)))
    with torch.no_grad():
        return build_model(spec, checkpoint.state_dict)(mine), build_model(read.network, read.tensors).outputs(theirs)[0]
