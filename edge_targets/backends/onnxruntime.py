"""onnxruntime on the CPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edge_targets.backends import Availability, Built, cpu_threads, in_batches
from edge_targets.device import Precision, Target
from rescompress.core.artifact import atomic_path
from rescompress.core.errors import ModelFileError, ToolMissing
from rescompress.core.quantizers import Profile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PROFILE: Profile = "onnxruntime"
COST_OF_PROFILE: Mapping[Profile, str] = MappingProxyType(
    {
        "tensorrt": "expect more latency here: onnxruntime is slow with signed activations on x86",
        "openvino": "expect more latency here: onnxruntime runs the ends of main branches in float",
    }
)
OPSET = 17
STRONGLY_TYPED = True
BUILDS_HERE = True
RUNS_HERE = True
PACKAGE = "onnxruntime"
REMEDY = "pip install onnxruntime"


def available() -> Availability:
    """Return whether onnxruntime is installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return Availability(ok=False, reason="onnxruntime is not installed", remedy=REMEDY)
    return Availability(ok=True, version=importlib.metadata.version("onnxruntime"))


def _session(path: Path, threads: int, batch: int | None, optimized: Path | None = None) -> Any:
    if not available():
        raise ToolMissing("onnxruntime is not installed", where="--target cpu-ort", remedy=REMEDY)
    if not path.is_file():
        raise ModelFileError("no such file", where=str(path), remedy="name an .onnx file")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle threads that spin take the cores from whatever else runs, another runtime under measurement included.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if optimized is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
    try:
        if batch is not None:
            for name in _free_dimensions(path):
                options.add_free_dimension_override_by_name(name, batch)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime has one exception class per error code and no common base
        raise ModelFileError(
            f"onnxruntime cannot load it: {str(e).splitlines()[0]}", where=str(path), remedy="check it with: rescompress lint"
        ) from e


def _free_dimensions(path: Path) -> list[str]:
    """Return the names of the free first dimensions of the model's inputs."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    first = [i.type.tensor_type.shape.dim[0] for i in model.graph.input if i.type.tensor_type.shape.dim]
    return sorted({d.dim_param for d in first if d.dim_param})


def build(onnx_path: Path, folder: Path, *, target: Target, precision: Precision, batch: int | None = None) -> Built:
    """Write the graph after onnxruntime's optimisations, as `edge_targets.backends.Backend.build` says.

    Only optimisations that do not depend on this CPU are applied, so the file runs wherever onnxruntime does.
    """
    out = folder / f"{onnx_path.stem}.ort.onnx"
    with atomic_path(out) as temporary:
        _session(onnx_path, 1, batch, temporary)
    version = available().version
    return Built(
        path=out,
        status=f"optimised by onnxruntime {version}",
        details={"runtime_version": version, "precision": precision, "size_bytes": out.stat().st_size},
    )


class OnnxRuntimeRunner:
    """Runs one model on the CPU.

    Attributes:
        runtime: ``onnxruntime``.
        options: None are set that change its choice of kernels.
        threads: CPU threads it uses.
    """

    runtime = "onnxruntime"
    options: Mapping[str, str] = MappingProxyType({})

    def __init__(self, path: Path, *, threads: int | None, batch: int | None) -> None:
        self.threads = cpu_threads(threads)
        self._session = _session(path, self.threads, batch)
        first = self._session.get_inputs()[0]
        size = first.shape[0]
        self.batch: int | None = size if isinstance(size, int) and size > 0 else None
        self._input = first.name

    def _run(self, x_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        import numpy as np

        return np.asarray(self._session.run(None, {self._input: x_NCHW})[0], dtype=np.float32)

    def __call__(self, batch_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits (N, K) for preprocessed images (N, C, H, W)."""
        return in_batches(self._run, batch_NCHW, self.batch)

    def __enter__(self) -> OnnxRuntimeRunner:
        """Return itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the model."""
        self._session = None


def runner(path: Path, *, threads: int | None = None, batch: int | None = None) -> OnnxRuntimeRunner:
    """Return a runner for an ``.onnx`` file, as `edge_targets.backends.Backend.runner` says."""
    return OnnxRuntimeRunner(path, threads=threads, batch=batch)
