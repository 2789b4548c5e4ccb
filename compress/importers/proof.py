"""Whether a network computes what the program computes that it was read from: both run, and every output is compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.importers.network import Read
from compress.resnet import ResNet, build_model
from rescompress.core.errors import CheckpointError

TOLERANCE = 1e-4
"""Largest difference of an output, relative to its largest number."""
IMAGES = 2
LARGE = 128
"""Pixels of a side: of larger ones a single image is compared, for it takes seconds."""
ENDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "softmax": lambda y: y.softmax(1),
    "log_softmax": lambda y: y.log_softmax(1),
    "sigmoid": torch.sigmoid,
}

Run = Callable[[Tensor], Sequence[Tensor]]
Observe = Callable[[Tensor], Mapping[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Original:
    """The program that a network was read from.

    Attributes:
        what: What runs it, for people.
        run: Returns its outputs for images (N, C, H, W).
        observe: Returns its tensors by name for one image, or None where it cannot.
        double: As `run`, in double precision; None where it cannot.
    """

    what: str
    run: Run
    observe: Observe | None = None
    double: Run | None = None


def random_images(shape: Sequence[int], count: int = IMAGES) -> Tensor:
    """Return images of normally distributed numbers, the same on every call."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far a network and its original are apart.

    Attributes:
        off: Largest difference of an output, relative to its largest number.
        double: Whether double precision was needed: in single precision rounding alone moves the outputs further than what is
            allowed, as it does in deep networks with gates and random weights.
    """

    off: float
    double: bool = False


def prove(read: Read, original: Original, images: Tensor | None = None) -> Agreement:
    """Return how far what the network and the program compute is apart.

    Args:
        read: The network.
        original: The program.
        images: Prepared images (N, C, H, W) beside random numbers.

    Raises:
        CheckpointError: An output differs by more than `TOLERANCE`; the first tensor that does is named.
    """
    model = build_model(read.network, read.tensors)
    worst = 0.0
    shape = read.network.input_shape
    count = IMAGES if shape[1] * shape[2] <= LARGE**2 else 1
    batches = [random_images(shape, count)] + ([images] if images is not None else [])
    with torch.no_grad():
        for x_NCHW in batches:
            theirs = original.run(x_NCHW)
            ours = model.outputs(x_NCHW)
            if len(theirs) != len(ours):
                raise CheckpointError(f"{original.what} makes {len(theirs)} outputs where {len(ours)} were read")
            for output, end, mine, wanted in zip(read.network.outputs, read.ends, ours, theirs, strict=True):
                off = difference(ENDS[end](mine), wanted)
                worst = max(worst, off)
                if not off <= TOLERANCE:
                    if (
                        all(bool(torch.isfinite(t).all()) for t in theirs)
                        and (exact := _in_double(read, original, batches)) is not None
                    ):
                        return exact
                    raise _differs(read, original, model, x_NCHW[:1], output.name, off)
    return Agreement(worst)


def _in_double(read: Read, original: Original, batches: Sequence[Tensor]) -> Agreement | None:
    """Return how far both are apart in double precision; None where the original cannot, or they differ there as well."""
    if original.double is None:
        return None
    model = build_model(read.network, read.tensors).double()
    worst = 0.0
    for x_NCHW in batches:
        try:
            theirs = original.double(x_NCHW.double())
        except Exception:  # a stranger's module that makes single numbers of its own
            return None
        for end, mine, wanted in zip(read.ends, model.outputs(x_NCHW.double()), theirs, strict=True):
            if wanted.dtype != torch.float64 or mine.numel() != wanted.numel():
                return None
            mine = ENDS[end](mine)
            worst = max(worst, float((mine - wanted.reshape(mine.shape)).abs().max() / wanted.abs().max().clamp(min=1e-12)))
    return Agreement(worst, double=True) if worst <= TOLERANCE / 10 else None


def difference(mine: Tensor, wanted: Tensor) -> float:
    """Return the largest difference relative to the largest number; infinite where sizes differ or a number is not finite."""
    if mine.numel() != wanted.numel():
        return float("inf")
    mine, wanted = mine.detach(), wanted.detach().float().reshape(mine.shape)
    off = float((mine - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-12)
    return off if off == off else float("inf")


def _differs(read: Read, original: Original, model: ResNet, x_NCHW: Tensor, output: str, off: float) -> CheckpointError:
    """Return the error that names the first tensor that differs."""
    where = f"output '{output}'"
    if original.observe is not None:
        mine: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor) -> None:
            mine[name] = value

        model.outputs(x_NCHW, keep)
        theirs = original.observe(x_NCHW)
        for name, value in mine.items():
            wanted = theirs.get(read.sources.get(name, ""))
            if wanted is not None and tuple(wanted.shape) == tuple(value.shape) and not difference(value, wanted) <= TOLERANCE:
                where = f"the first tensor that differs is '{read.sources[name]}' ({name}); output '{output}'"
                break
    return CheckpointError(
        f"{original.what} computes something else than the network read from it: {where} is off by {off:.2g} of its largest "
        "number",
        remedy="report this with the file: nothing that is not proven is used",
    )


def proven(checkpoint: Checkpoint, read: Read, original: Original, images: Tensor | None = None) -> Checkpoint:
    """Return the checkpoint with what proves it among its notes.

    Raises:
        CheckpointError: It computes something else than the original.
    """
    found = prove(read, original, images)
    notes = cast("list[str]", checkpoint.provenance.get("notes", []))
    seen = "random input" + (" and the images given" if images is not None else "")
    off = f"{found.off:.1g} of their largest number"
    off += " in double precision (in single precision rounding alone moves them further)" if found.double else ""
    told = [f"proven against {original.what} on {seen}: outputs differ by at most {off}"]
    told += [
        f"output '{o.name}' are logits: the {e} at the end is left to the reader"
        for o, e in zip(read.network.outputs, read.ends, strict=True)
        if e
    ]
    return dataclasses.replace(checkpoint, provenance={**checkpoint.provenance, "notes": [*notes, *told]})
