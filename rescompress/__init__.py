"""From a trained ResNet checkpoint to a smaller, faster, INT8-exact artifact for an edge device.

The same steps as the command line, as functions; heavy packages are imported when a function is first used.

    import rescompress as rc

    dense = rc.load_checkpoint("resnet32.th")
    data = rc.load_dataset("photos/", dense.spec)
    half = rc.prune(dense, budget=rc.Budget(kind="macs", value=0.5), calibration_x=data.train.take(512, 0).tensor())
    rc.save_checkpoint(half.checkpoint, "half.safetensors")
    int8 = rc.quantize(half.checkpoint, data.train.take(512, 0).batches(64))
    rc.export_onnx(int8, "half-int8.onnx")
    rc.run("run.yaml")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.checkpoints import load_checkpoint, save_checkpoint
    from compress.checkpoints.base import Checkpoint
    from compress.data import load_dataset
    from compress.evaluate import evaluate
    from compress.importers.module import from_module, into_module
    from compress.prune import Budget, prune
    from compress.resnet import build_model
    from compress.train import train
    from rescompress.api import export_onnx, predict_latency, quantize, run
    from rescompress.core.manifest import load_manifest
    from rescompress.core.settings import TrainSettings
    from rescompress.core.spec import ModelSpec

_HOME = {
    "Budget": ("compress.prune", "Budget"),
    "Checkpoint": ("compress.checkpoints.base", "Checkpoint"),
    "ModelSpec": ("rescompress.core.spec", "ModelSpec"),
    "TrainSettings": ("rescompress.core.settings", "TrainSettings"),
    "build_model": ("compress.resnet", "build_model"),
    "evaluate": ("compress.evaluate", "evaluate"),
    "export_onnx": ("rescompress.api", "export_onnx"),
    "from_module": ("compress.importers.module", "from_module"),
    "into_module": ("compress.importers.module", "into_module"),
    "load_checkpoint": ("compress.checkpoints", "load_checkpoint"),
    "load_dataset": ("compress.data", "load_dataset"),
    "load_manifest": ("rescompress.core.manifest", "load_manifest"),
    "predict_latency": ("rescompress.api", "predict_latency"),
    "prune": ("compress.prune", "prune"),
    "quantize": ("rescompress.api", "quantize"),
    "run": ("rescompress.api", "run"),
    "save_checkpoint": ("compress.checkpoints", "save_checkpoint"),
    "train": ("compress.train", "train"),
}

__all__ = [
    "Budget",
    "Checkpoint",
    "ModelSpec",
    "TrainSettings",
    "build_model",
    "evaluate",
    "export_onnx",
    "from_module",
    "into_module",
    "load_checkpoint",
    "load_dataset",
    "load_manifest",
    "predict_latency",
    "prune",
    "quantize",
    "run",
    "save_checkpoint",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'rescompress' has no attribute '{name}'")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
