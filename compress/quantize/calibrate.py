"""Calibration: how far each activation reaches, seen on data, by several estimators.

Shape suffixes: N batch, C channels, H height, W width, B histogram bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.finite import all_finite
from compress.processes import ALONE, Together
from compress.quantize.fake_quant import SMALLEST_RANGE
from compress.resnet import ResNet
from rescompress.core.errors import DataError
from rescompress.core.operations import ChannelSelect
from rescompress.core.quantizers import Quantizer

Estimator = Literal["mean-max", "max", "percentile", "mse"]
ESTIMATORS: tuple[Estimator, ...] = ("mean-max", "max", "percentile", "mse")

BINS = 4096
FEWEST_IMAGES = 2
REMEDY = "give some hundred images of the kind the network will see"


@dataclass(frozen=True)
class Reach:
    """How large the values of one tensor are.

    Attributes:
        largest: Largest magnitude over all images.
        mean_largest: Mean over the images of the largest magnitude in each.
        histogram: How many values have a magnitude in each of `BINS` equal steps from 0 to `largest`, float64 (B,).
    """

    largest: float
    mean_largest: float
    histogram: Tensor


def images(batches: Iterable[Tensor | Sequence[Tensor]], limit: int | None = None) -> list[Tensor]:
    """Return calibration batches (N, C, H, W) as a list, checked.

    Args:
        batches: Preprocessed images, or pairs of images and labels of which the labels are left aside.
        limit: Stop after this many images.

    Raises:
        DataError: No images, one image only, or values that are not finite.
    """
    kept: list[Tensor] = []
    count = 0
    for batch in batches:
        x_NCHW = batch if isinstance(batch, Tensor) else batch[0]
        if limit is not None:
            x_NCHW = x_NCHW[: limit - count]
        if not all_finite(x_NCHW):
            raise DataError("a calibration image holds NaN or infinity", remedy="check the images and the preprocessing")
        kept.append(x_NCHW)
        count += len(x_NCHW)
        if limit is not None and count >= limit:
            break
    if count == 0:
        raise DataError("no calibration data", remedy=REMEDY)
    if count < FEWEST_IMAGES:
        raise DataError("one image is too little to calibrate on", remedy=REMEDY)
    return kept


@torch.no_grad()
def observe(model: ResNet, batches: Sequence[Tensor], tensors: Iterable[str], sharing: Together = ALONE) -> dict[str, Reach]:
    """Return how far the named tensors of a float network reach, in two passes over the batches.

    A tensor inside a branch of a residual block that is zero on all images is left out: the network lives without it.

    Args:
        model: In eval mode.
        batches: Preprocessed images, each (N, C, H, W).
        tensors: Names of the walk's tensors.
        sharing: The processes that take a share of the batches each, and all return the whole, to the bit.

    Raises:
        DataError: A tensor holds NaN or infinity, or is zero everywhere and not by construction.
    """
    wanted = set(tensors)
    passed_by = {name for block in model.network.blocks for name in (*block.main, *block.shortcut)}
    per_image: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def note_largest(name: str, value: Tensor) -> None:
        if name in wanted:
            per_image[name].append(value.abs().flatten(1).amax(1))

    mine = batches[sharing.rank :: sharing.world]
    for x_NCHW in mine:
        model(x_NCHW, note_largest)
    shares = sharing.gather(per_image)
    largest_N = {
        name: torch.cat([shares[i % sharing.world][name][i // sharing.world] for i in range(len(batches))]).double()
        for name in per_image
    }
    for layer in model.layers:
        if layer.name not in wanted:
            continue
        if not all_finite(largest_N[layer.name]):
            raise DataError(f"the activation {layer.name} is not finite on calibration data", remedy="check the checkpoint")
        if isinstance(layer.operation, ChannelSelect) and max(layer.operation.channels) < 0:
            largest_N[layer.name].fill_(1.0)  # a shortcut pruned to nothing but zeros, which are zeros on any scale
        if largest_N[layer.name].max() <= SMALLEST_RANGE:
            if layer.name not in passed_by:
                raise no_scale(layer.name)
            wanted.discard(layer.name)
    histograms = {name: torch.zeros(BINS, dtype=torch.float64) for name in wanted}

    def note_histogram(name: str, value: Tensor) -> None:
        if name in wanted:
            counts = torch.histc(value.abs(), BINS, 0.0, float(largest_N[name].max()))
            histograms[name] += counts.double().cpu()

    for x_NCHW in mine:
        model(x_NCHW, note_histogram)
    counted = sharing.gather(histograms)  # whole numbers, so that the order of the sum is no matter
    histograms = {name: torch.stack([share[name] for share in counted]).sum(0) for name in histograms}
    return {name: Reach(float(largest_N[name].max()), float(largest_N[name].mean()), histograms[name]) for name in wanted}


def no_scale(tensor: str) -> DataError:
    """Return the error of an activation that is zero on all calibration images."""
    return DataError(
        f"the activation {tensor} is zero on all calibration images, so it has no scale",
        remedy="calibrate on other images, or check the checkpoint: the network computes nothing there",
    )


def range_of(reach: Reach, estimator: Estimator, *, levels: int, percentile: float) -> float:
    """Return the magnitude that the largest integer shall stand for.

    Args:
        reach: Of the tensor.
        estimator: ``mean-max``: mean over images of each one's largest value (NNCF's default); ``max``: largest value;
            ``percentile``: the magnitude below which that share of the values lies; ``mse``: least mean square error.
        levels: Largest integer: 127 or 255.
        percentile: In percent, for ``percentile``.
    """
    match estimator:
        case "max":
            return reach.largest
        case "mean-max":
            return reach.mean_largest
        case "percentile":
            cumulative_B = reach.histogram.cumsum(0)
            index = int(torch.searchsorted(cumulative_B, percentile / 100.0 * cumulative_B[-1]))
            return reach.largest * (min(index, BINS - 1) + 1) / BINS
        case "mse":
            return _least_square_error(reach, levels)


def _least_square_error(reach: Reach, levels: int) -> float:
    centres_B = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (reach.largest / BINS)
    best, best_error = reach.largest, float("inf")
    for candidate in torch.linspace(0.1, 1.0, 181, dtype=torch.float64).mul(reach.largest).tolist():
        step = candidate / levels
        rounded_B = (centres_B / step).round().clamp(max=levels) * step
        error = float(((rounded_B - centres_B).square() * reach.histogram).sum())
        if error < best_error:
            best, best_error = candidate, error
    return best


def activation_ranges(
    reaches: Mapping[str, Reach], quantizers: Iterable[Quantizer], estimator: Estimator, *, percentile: float
) -> dict[str, float]:
    """Return the range of every activation quantizer that does not share another's, by tensor name."""
    return {
        q.tensor: range_of(reaches[q.tensor], estimator, levels=q.high, percentile=percentile)
        for q in quantizers
        if q.kind == "activation" and q.shares is None
    }
