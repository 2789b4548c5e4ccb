"""TensorRT for RTX: a real TensorRT parser and builder that needs no GPU, so it proves a file before a board sees it.

It builds for RTX GPUs only, never for a Jetson: what it says is whether the file parses and which convolutions run in
INT8, not how fast they run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from edge_targets.backends import Availability, Built, ModelRunner
from edge_targets.device import Precision, Target
from edge_targets.trt_build import Engine, build_engine
from rescompress.core.artifact import write_bytes
from rescompress.core.errors import ModelFileError, ToolMissing
from rescompress.core.quantizers import Profile

PROFILE: Profile = "tensorrt"
COST_OF_PROFILE: Mapping[Profile, str] = MappingProxyType(
    {
        "openvino": "TensorRT does not read unsigned activations",
        "onnxruntime": "TensorRT does not read unsigned activations",
    }
)
OPSET = 19
STRONGLY_TYPED = True
BUILDS_HERE = True
RUNS_HERE = False
PACKAGE = "tensorrt-rtx"
REMEDY = "pip install 'rescompress[rtx]'"
GATE_CAPABILITY = "8.6"
"""What a file for any other device is tried on: Ampere, the architecture of the Jetson Orin."""


def available() -> Availability:
    """Return whether tensorrt_rtx is installed."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return Availability(ok=False, reason="tensorrt_rtx is not installed", remedy=REMEDY)
    return Availability(ok=True, version=_version())


def _version() -> str | None:
    for name in ("tensorrt-rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu12"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def engine(onnx_path: Path, *, compute_capability: str = GATE_CAPABILITY, batch: int | None = None) -> Engine:
    """Return the engine of an ONNX file for a GPU that need not be here.

    Raises:
        ToolMissing: tensorrt_rtx is not installed.
        ModelFileError: There is no such file, or the parser refuses it.
        EnvironmentFailed: The build failed.
    """
    if not available():
        raise ToolMissing("TensorRT for RTX is not installed", remedy=REMEDY)
    if not onnx_path.is_file():
        raise ModelFileError("no such file", where=str(onnx_path), remedy="name an .onnx file")
    import tensorrt_rtx

    return build_engine(tensorrt_rtx, onnx_path.read_bytes(), compute_capability=compute_capability, batch=batch)


def build(onnx_path: Path, folder: Path, *, target: Target, precision: Precision, batch: int | None = None) -> Built:
    """Write the engine, as `edge_targets.backends.Backend.build` says; ``details`` names the type of every convolution.

    ``details["convolutions"]`` maps each Conv node of the file to the type its kernel computes in (``Int8``, ``Half``,
    ``Float``); ``details["int8_convolutions"]`` counts the first kind.
    """
    capability = target.device.compute_capability or GATE_CAPABILITY
    built = engine(onnx_path, compute_capability=capability, batch=batch)
    path = folder / f"{onnx_path.stem}.sm{capability.replace('.', '')}.engine"
    write_bytes(path, built.content)
    types = built.compute_types(conv_nodes(onnx_path))
    int8 = sum(t == "Int8" for t in types.values())
    return Built(
        path=path,
        status=f"built by TensorRT for RTX {available().version}; {int8} of {len(types)} convolutions in INT8",
        details={
            "runtime_version": available().version,
            "precision": precision,
            "compute_capability": capability,
            "size_bytes": len(built.content),
            "weights_bytes": built.weights_bytes,
            "kernels": len(built.layers),
            "convolutions": dict(types),
            "int8_convolutions": int8,
        },
    )


def conv_nodes(onnx_path: Path) -> list[str]:
    """Return the names of the Conv nodes of an ONNX file."""
    import onnx

    return [node.name for node in onnx.load(onnx_path, load_external_data=False).graph.node if node.op_type == "Conv"]


def runner(path: Path, *, threads: int | None = None, batch: int | None = None) -> ModelRunner:
    """Refuse: a TensorRT for RTX engine runs on an NVIDIA GPU only, and this project times its engines on the board.

    Raises:
        ToolMissing: Always.
    """
    raise ToolMissing(
        "a TensorRT for RTX engine runs on an RTX GPU with its driver only",
        where=str(path),
        remedy="run the .onnx file with --runtime onnxruntime or openvino",
    )
