"""TensorRT, on the device itself: engines are built for the GPU and the version that are here, and run here.

The code that builds is shared with tensorrt_rtx (`edge_targets.trt_build`), which runs without a GPU; the code that runs
engines is `edge_targets.infer`, which also travels to boards in bundles.
"""

from __future__ import annotations

import ctypes.util
import importlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from edge_targets.backends import Availability, Built, ModelRunner
from edge_targets.device import Precision, Target
from edge_targets.tensorrt_versions import capabilities
from edge_targets.trt_build import build_engine, recipe_for
from rescompress.core.artifact import file_sha256, write_bytes, write_text
from rescompress.core.errors import ModelFileError, ToolMissing
from rescompress.core.quantizers import Profile

PROFILE: Profile = "tensorrt"
COST_OF_PROFILE: Mapping[Profile, str] = MappingProxyType(
    {
        "openvino": "TensorRT does not read unsigned activations",
        "onnxruntime": "TensorRT does not read unsigned activations",
    }
)
OPSET = 17
STRONGLY_TYPED = True
BUILDS_HERE = False
RUNS_HERE = True
PACKAGE = "tensorrt"
REMEDY = "on a Jetson it comes with JetPack; elsewhere: pip install 'rescompress[tensorrt]'"


def _infer() -> Any:
    """Return `edge_targets.infer`; it is not typed, and it needs numpy, which the facts above do not."""
    return importlib.import_module("edge_targets.infer")


def available() -> Availability:
    """Return whether TensorRT and a GPU with its driver are here."""
    spec = importlib.util.find_spec("tensorrt")
    if spec is None or spec.origin is None:  # the package of type stubs leaves a folder of that name, without code
        return Availability(ok=False, reason="the Python module tensorrt is not installed", remedy=REMEDY)
    if ctypes.util.find_library("cuda") is None and ctypes.util.find_library("nvrm_gpu") is None:
        return Availability(ok=False, reason="no NVIDIA driver is here", remedy="run it on the device")
    import tensorrt

    return Availability(ok=True, version=tensorrt.__version__)


def record(trt: ModuleType, onnx_path: Path, precision: Precision, *, compute_capability: str | None) -> dict[str, Any]:
    """Return what is noted beside an engine: enough to refuse it where it cannot run, and to know where it came from.

    The spec, labels and preprocessing that the exporter stored in the ONNX file are copied from its metadata.
    """
    import onnx

    props = onnx.load(str(onnx_path), load_external_data=False).metadata_props
    return {
        "tensorrt": trt.__version__,
        "compute_capability": compute_capability,
        "onnx_sha256": file_sha256(onnx_path),
        "precision": precision,
        "metadata": {p.key: p.value for p in props},
    }


def build(onnx_path: Path, folder: Path, *, target: Target, precision: Precision, batch: int | None = None) -> Built:
    """Build the engine for the GPU that is here, as `edge_targets.backends.Backend.build` says.

    ``<engine>.json`` beside it holds its `record`; kernel timings are kept in ``timing.cache`` for the next build.
    """
    found = available()
    if not found:
        raise ToolMissing(f"TensorRT cannot build here: {found.reason}", where=f"--target {target.name}", remedy=found.remedy)
    if not onnx_path.is_file():
        raise ModelFileError("no such file", where=str(onnx_path), remedy="name an .onnx file")
    import tensorrt

    cache = folder / "timing.cache"
    engine = build_engine(
        tensorrt,
        onnx_path.read_bytes(),
        recipe=recipe_for(capabilities(tensorrt.__version__), precision),
        batch=batch,
        timing_cache=cache.read_bytes() if cache.is_file() else b"",
    )
    path = folder / f"{onnx_path.stem}.{precision}.engine"
    write_bytes(path, engine.content)
    if engine.timing_cache is not None:
        write_bytes(cache, engine.timing_cache)
    capability = _infer().Cuda().capability()
    note = record(tensorrt, onnx_path, precision, compute_capability=capability)
    write_text(Path(f"{path}.json"), json.dumps(note, indent=1) + "\n")
    return Built(
        path=path,
        status=f"built by TensorRT {tensorrt.__version__} for compute capability {capability}",
        details={
            "runtime_version": tensorrt.__version__,
            "precision": precision,
            "compute_capability": capability,
            "size_bytes": len(engine.content),
            "weights_bytes": engine.weights_bytes,
            "kernels": len(engine.layers),
        },
    )


def runner(path: Path, *, threads: int | None = None, batch: int | None = None) -> ModelRunner:
    """Return a runner for an engine, as `edge_targets.backends.Backend.runner` says; `threads` and `batch` do not matter.

    Raises:
        ToolMissing: TensorRT or a GPU is not here.
        ModelFileError: The file is no engine, or one of another GPU or version.
    """
    found = available()
    if not found:
        raise ToolMissing(f"TensorRT cannot run here: {found.reason}", where=str(path), remedy=found.remedy)
    import tensorrt

    return load_engine(path, tensorrt)


def load_engine(path: Path, trt: ModuleType, cuda: Any = None) -> ModelRunner:
    """Return a runner for an engine.

    Args:
        path: The engine.
        trt: The TensorRT module.
        cuda: The CUDA runtime; the system's when None.

    Raises:
        ModelFileError: The file is no engine, or one of another GPU or version.
    """
    if not path.is_file() or path.suffix == ".onnx":
        raise ModelFileError("is no engine", where=str(path), remedy="build one with `rescompress export` on the device")
    infer = _infer()
    try:
        engine: ModelRunner = infer.Engine(str(path), trt, cuda)
    except infer.EngineError as e:
        raise ModelFileError(str(e), where=str(path), remedy="build it again on this device") from e
    return engine
