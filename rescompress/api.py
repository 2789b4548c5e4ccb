"""What the Python face offers beyond the functions of the siblings: steps that need two of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.quantize import on_grid, ptq
from edge_targets.catalog import load_target
from export.to_onnx import ExportOptions
from rescompress.core.layers import walk
from rescompress.core.manifest import Manifest
from rescompress.runs.config import load_config
from rescompress.runs.pipeline import folder_of, run_stages
from rescompress.runs.plan import run_plan
from rescompress.runs.reporter import Reporter, Silent
from rescompress.runs.settings import Settings
from rescompress.runs.stages.shared import onnx_of, write_onnx

if TYPE_CHECKING:
    from edge_targets.latency import LatencyPrediction


def export_onnx(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    target: str | None = None,
    batch: int | Literal["dynamic"] = 1,
    opset: int | None = None,
) -> Path:
    """Write a checkpoint as ONNX and return the path; INT8 with its Q/DQ if it is quantized.

    Args:
        checkpoint: Float or quantized.
        path: The file.
        target: An edge target, whose opset is taken.
        batch: Images per call, or ``dynamic``.
        opset: Takes precedence over the target's.

    Raises:
        BadInput: An option makes no sense, or the target is unknown.
        EnvironmentFailed: The file cannot be written.
    """
    chosen = opset or (load_target(target).opset if target else ExportOptions().opset)
    write_onnx(onnx_of(checkpoint, ExportOptions(batch=batch, opset=chosen)), Path(path))
    return Path(path)


def quantize(checkpoint: Checkpoint, batches: Iterable[Tensor | Sequence[Tensor]], **options: Any) -> Checkpoint:
    """Return the checkpoint calibrated to INT8, its biases at multiples of the step that integer kernels add in.

    Args:
        checkpoint: A float network.
        batches: Preprocessed calibration images (N, C, H, W), or pairs whose second part is left aside.
        options: As `compress.quantize.ptq` takes them: ``profile``, ``calibration``, ``keep_float`` and others.

    Raises:
        CheckpointError: Already quantized, or a weight that is not finite.
        DataError: Too few images, or an activation that is not finite or zero everywhere.
        ConfigError: A layer of `keep_float` that is not there, or an unknown calibration.
    """
    return on_grid(ptq(checkpoint, batches, **options))


def predict_latency(
    checkpoint: Checkpoint, target: str, *, precision: str = "auto", batch: int = 1, power_mode: str | None = None
) -> LatencyPrediction:
    """Return the predicted latency of a network on a device, with its band.

    Args:
        checkpoint: The network.
        target: An edge target with a latency model.
        precision: ``fp32``, ``fp16``, ``int8``, or the fastest of the target.
        batch: Images per call.
        power_mode: Of the device.

    Raises:
        TargetError: The target is unknown or has no latency model.
    """
    from edge_targets.latency import predict

    chosen = load_target(target)
    return predict(
        walk(checkpoint.spec),
        chosen.device,
        precision=chosen.check_precision(precision),
        batch=batch,
        power_mode=power_mode,
    )


def run(
    config: str | Path, folder: str | Path | None = None, *, overrides: tuple[str, ...] = (), reporter: Reporter | None = None
) -> Manifest:
    """Run a config's stages, or what is left of them, and return the manifest.

    Args:
        config: A YAML file.
        folder: Where the results go; ``rescompress-out/<name of the config>`` by default.
        overrides: Assignments such as ``prune.macs=0.3``.
        reporter: Where progress goes.

    Raises:
        RescompressError: What is wrong, where, and what to do.
    """
    loaded = load_config(Path(config), overrides)
    stages = run_plan(loaded, Settings(loaded.data, loaded.labels, loaded.seed))
    place = Path(folder) if folder is not None else folder_of(Path(config), Path("rescompress-out"))
    settings = loaded.model_dump(mode="json")
    return run_stages(stages, place, settings, reporter=reporter or Silent(), config_file=Path(config)).manifest
