"""From a trained ResNet checkpoint to a smaller, faster, INT8-exact artifact for an edge device.

The same steps as the command line, as functions; heavy packages are imported when a function is first used.

    import rescompress as rc

    dense = rc.load("resnet32.th")
    data = rc.load_dataset("photos/", dense)
    half = rc.prune(dense, macs=0.5, images=data)
    tuned = rc.finetune(half, data, teacher=dense, epochs=10)
    int8 = rc.quantize(tuned, data)
    rc.compare(dense, half, tuned, int8, data=data)
    rc.export(int8, "out/", target="jetson")
    rc.run("run.yaml")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.checkpoints import load_checkpoint, save_checkpoint
    from compress.checkpoints import load_checkpoint as load
    from compress.checkpoints.base import Checkpoint
    from compress.importers.module import from_module
    from compress.prune import Budget, PruneResult
    from compress.train import train
    from rescompress.api import (
        build_model,
        compare,
        evaluate,
        export,
        export_onnx,
        finetune,
        lint,
        load_dataset,
        predict_latency,
        prune,
        qat,
        quantize,
        run,
        sensitivity,
    )
    from rescompress.core.manifest import load_manifest
    from rescompress.core.settings import TrainSettings
    from rescompress.core.spec import ModelSpec

_HOME = {
    "Budget": ("compress.prune", "Budget"),
    "Checkpoint": ("compress.checkpoints.base", "Checkpoint"),
    "ModelSpec": ("rescompress.core.spec", "ModelSpec"),
    "PruneResult": ("compress.prune", "PruneResult"),
    "TrainSettings": ("rescompress.core.settings", "TrainSettings"),
    "build_model": ("rescompress.api", "build_model"),
    "compare": ("rescompress.api", "compare"),
    "evaluate": ("rescompress.api", "evaluate"),
    "export": ("rescompress.api", "export"),
    "export_onnx": ("rescompress.api", "export_onnx"),
    "finetune": ("rescompress.api", "finetune"),
    "from_module": ("compress.importers.module", "from_module"),
    "lint": ("rescompress.api", "lint"),
    "load": ("compress.checkpoints", "load_checkpoint"),
    "load_checkpoint": ("compress.checkpoints", "load_checkpoint"),
    "load_dataset": ("rescompress.api", "load_dataset"),
    "load_manifest": ("rescompress.core.manifest", "load_manifest"),
    "predict_latency": ("rescompress.api", "predict_latency"),
    "prune": ("rescompress.api", "prune"),
    "qat": ("rescompress.api", "qat"),
    "quantize": ("rescompress.api", "quantize"),
    "run": ("rescompress.api", "run"),
    "save_checkpoint": ("compress.checkpoints", "save_checkpoint"),
    "sensitivity": ("rescompress.api", "sensitivity"),
    "train": ("compress.train", "train"),
}

__all__ = [
    "Budget",
    "Checkpoint",
    "ModelSpec",
    "PruneResult",
    "TrainSettings",
    "build_model",
    "compare",
    "evaluate",
    "export",
    "export_onnx",
    "finetune",
    "from_module",
    "lint",
    "load",
    "load_checkpoint",
    "load_dataset",
    "load_manifest",
    "predict_latency",
    "prune",
    "qat",
    "quantize",
    "run",
    "save_checkpoint",
    "sensitivity",
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
