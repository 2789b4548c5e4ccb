"""What trackers record of a run: settings as flat text, figures by name, training curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rescompress.core.details import TrainedDetails
from rescompress.core.manifest import Manifest


def settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Return nested settings as flat names and texts: ``prune.macs``, ``0.5``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def figures(manifest: Manifest) -> Iterator[tuple[str, float]]:
    """Return every figure of every stage: ``quantize/top1``, ``target/cpu/p50_ms``."""
    for stage in manifest.stages:
        for name, metric in stage.metrics.items():
            yield f"{stage.stage.replace(':', '/')}/{name}", metric.value


def curves(manifest: Manifest) -> Iterator[tuple[str, int, float]]:
    """Return name, epoch (from 1) and value of everything that was logged per epoch: ``finetune/train/loss``."""
    for stage in manifest.stages:
        details = stage.details_as(TrainedDetails)
        for i, entry in enumerate(details.epochs if details is not None else ()):
            for name, value in entry.items():
                if name not in ("epoch", "step", "steps") and value is not None:
                    yield f"{stage.stage.replace(':', '/')}/train/{name}", i + 1, value
