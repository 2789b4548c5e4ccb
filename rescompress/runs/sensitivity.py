"""How sensitive a network is to removing the channels of each group, and to quantizing each layer."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from compress.checkpoints.base import Checkpoint, on_device
from compress.data import Inputs, load_dataset
from compress.device import computing_on
from compress.prune import measure
from compress.prune.method import Curves
from compress.quantize import ptq
from compress.quantize.sensitivity import sensitivities
from rescompress.core.settings import QuantizeSettings, SensitivitySettings
from rescompress.runs.reporter import Reporter
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Opening
from rescompress.runs.stages.shared import prepare

_INT8_BATCH = 64
_INT8_BATCHES = 4
"""Batches that each layer alone is measured on: 256 images."""


@dataclass(frozen=True)
class Sensitivity:
    """What was measured.

    Attributes:
        arch: Name of the architecture.
        method: The pruning method whose errors these are.
        curves: Its errors, by group.
        int8: What quantizing each layer alone does, most first, JSON values; None where it was not asked for.
    """

    arch: str
    method: str
    curves: Curves
    int8: list[dict[str, Any]] | None = None

    @property
    def document(self) -> dict[str, Any]:
        """All of it, JSON values."""
        found: dict[str, Any] = {
            "method": self.method,
            "unit": self.curves.unit,
            "groups": {name: {"order": list(c.order), "error": list(c.error)} for name, c in self.curves.groups.items()},
            "blocks": dict(self.curves.blocks),
        }
        return found if self.int8 is None else found | {"int8": self.int8}


def measure_sensitivity(
    opening: Opening, common: Settings, settings: SensitivitySettings, *, reporter: Reporter
) -> Sensitivity:
    """Return how sensitive a checkpoint is to pruning and, if wanted, to quantization.

    Args:
        opening: The checkpoint.
        common: Data, or none, and seed.
        settings: What is measured.
        reporter: Where progress goes.

    Raises:
        BadInput: The file or the data is wrong, or the method needs images.
    """
    prepare(common)
    checkpoint = opening.load(reporter.note)
    images = None
    if common.data is not None:
        dataset = load_dataset(
            common.data,
            Inputs.of(checkpoint.spec),
            seed=common.seed,
            labels=common.labels,
            skip_corrupt=common.skip_corrupt,
        )
        for text in dataset.notes:
            reporter.note(text)
        images = dataset.train.take(settings.calib, common.seed).tensor()
    with computing_on(common.torch_device()) as device:
        here, there = on_device(checkpoint, device), images.to(device) if images is not None else None
        curves = measure(
            here,
            method=settings.method,
            scope=settings.scope,
            calibration_x=there,
            seed=common.seed,
            progress=reporter.progress,
            note=reporter.note,
        )
        layers = _int8(here, there, reporter) if settings.int8 and there is not None else None
    return Sensitivity(checkpoint.spec.arch, settings.method, curves, layers)


def _int8(checkpoint: Checkpoint, images: Tensor, reporter: Reporter) -> list[dict[str, Any]]:
    """Return how sensitive each layer is to quantization."""
    batches = [images[start : start + _INT8_BATCH] for start in range(0, len(images), _INT8_BATCH)]
    quantized = ptq(checkpoint, batches, QuantizeSettings(calibration="mse", bias_correction=False))
    tell = functools.partial(reporter.progress, "quantizing one layer at a time")
    return [asdict(found) for found in sensitivities(quantized, batches[:_INT8_BATCHES], progress=tell)]
