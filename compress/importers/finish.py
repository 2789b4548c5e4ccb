"""The last step of every way in: facts that no graph tells, the check of the numbers, the proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress import zoo
from compress.checkpoints.base import Checkpoint, LoadOptions
from compress.finite import all_finite
from compress.importers.network import Read
from compress.importers.proof import Original, proven
from compress.preprocessing import Statement
from rescompress.core.errors import CheckpointError
from rescompress.core.operations import Affine
from rescompress.core.spec import Preprocessing


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        format: The way in: ``onnx``, ``module``, ``torch.export``, ``torchscript``, ``keras``.
        path: Name of the file, or None.
        arch: What to call the network.
        container: Of the file.
        notes: What was assumed or left out.
        warnings: Those of them that every command tells.
        input_stated: Whether somebody stated the input's size.
        preprocessing: What images go through, where the file says so.
        labels: Names of the classes, likewise.
    """

    format: str
    path: str | None
    arch: str
    container: str | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    input_stated: bool = True
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] | None = None


def checkpoint_of(
    read: Read, original: Original | None, options: LoadOptions, source: Source, *, images: Tensor | None = None
) -> Checkpoint:
    """Return the checkpoint of what was read, proven where the original can be run.

    Args:
        read: The network.
        original: The program that it was read from, or None where it cannot be run.
        options: What the user states.
        source: Where it comes from.
        images: Prepared images to compare outputs on, beside random numbers.

    Raises:
        CheckpointError: A number is not finite, or the original computes something else.
    """
    check_values(read.tensors)
    shape = read.network.input_shape
    notes, warnings = list(source.notes), list(source.warnings)
    if not source.input_stated:
        notes.append(f"the input is taken to be {'x'.join(map(str, shape))} (else: --input)")
    preprocessing = source.preprocessing or zoo.preprocessing("imagenet", shape)
    front = _own_scaling(read) if source.preprocessing is None and options.preprocess is None else None
    if front is not None:
        name, colours = front
        if colours is None:
            warnings.append(f"the network scales its images itself ({name}): state --preprocess, which is done before that")
        else:
            preprocessing = zoo.preprocessing(colours, shape)
            meant = "0..255" if colours == "raw" else "0..1"
            warnings.append(f"the network scales its images itself ({name}): it is taken to be given pixels of {meant}")
    if options.preprocess is not None:
        preprocessing = Statement.parse(options.preprocess).over(preprocessing, shape)
    if preprocessing.assumed:
        warnings.append(
            f"preprocessing is taken to be '{preprocessing.name}' (else: --preprocess {'|'.join(zoo.PREPROCESSING_NAMES)})"
        )
    classes = read.network.num_classes
    labels = source.labels if source.labels is not None and classes in (len(source.labels), 1) else None
    arch = options.arch.get("arch", read.network.arch)
    network = read.network.replace(preprocessing=preprocessing, labels=labels, arch=arch)
    read = dataclasses.replace(read, network=network)
    provenance: dict[str, object] = {
        "format": source.format,
        "container": source.container,
        "path": source.path,
        "notes": [*notes, *warnings],
        "warnings": warnings,
    }
    checkpoint = Checkpoint(network, dict(read.tensors), None, provenance)
    return checkpoint if original is None else proven(checkpoint, read, original, images)


def _own_scaling(read: Read) -> tuple[str, str | None] | None:
    """Return the constants by which a network scales its images before anything else, and the preprocessing that fits them.

    Colours are None where it is open whether pixels of 0..1 or of 0..255 are meant; all is None where nothing is scaled.
    """
    at, network = [n.name for n in read.network.nodes if n.operation.op == "input"], read.network
    while True:
        readers = [n for n in network.nodes if set(at) & set(n.inputs)]
        if len(readers) != 1:
            return None
        (node,) = readers
        if isinstance(node.operation, Affine):
            break
        if node.operation.op != "channel_select":
            return None
        at = [node.name]
    factor = read.tensors[f"{node.name}.weight"]
    shift = read.tensors.get(f"{node.name}.bias", torch.zeros_like(factor))
    if bool((factor.abs() <= _PER_BYTE).all()) or (bool((factor == 1).all()) and float(shift.abs().max()) > _OF_BYTES):
        return node.name, "raw"
    mean, std = -shift / factor, 1 / factor.abs()
    usual = bool(((mean >= 0) & (mean <= 1) & (std >= _STD[0]) & (std <= _STD[1])).all())
    return node.name, "rescale" if usual else None


_PER_BYTE = 0.1
"""What images are multiplied by at most where their pixels are 0..255: no usual normalisation makes less than 26 of 255."""
_OF_BYTES = 20.0
"""A shift of so much, and nothing else, belongs to pixels of 0..255."""
_STD = (0.1, 0.7)
"""What pixels of 0..1 are divided by."""


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a number is NaN or infinite, or a variance is negative."""
    for name, value in tensors.items():
        if value.is_floating_point() and not all_finite(value):
            bad = int((~torch.isfinite(value)).sum())
            raise CheckpointError(f"{name} holds {bad} values that are NaN or infinite", remedy="use an earlier checkpoint")
        if name.endswith(".running_var") and bool((value < 0).any()):
            raise CheckpointError(f"{name} holds negative variances", remedy="use an earlier checkpoint")
