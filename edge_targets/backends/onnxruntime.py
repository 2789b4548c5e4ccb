"""onnxruntime on the CPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from edge_targets.backends import Availability, Built, cpu_threads, in_batches, room_for
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


_TYPES: Mapping[str, str] = MappingProxyType(
    {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
    | {f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)
"""NumPy's name of each of onnxruntime's types that an image can have."""


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
    from export.session import open_session

    try:
        level: Literal["all", "extended"] = "all" if optimized is None else "extended"
        return open_session(path, threads=threads, level=level, batch=batch, optimized=optimized)
    except Exception as e:  # onnxruntime has one exception class per error code and no common base
        raise ModelFileError(
            f"onnxruntime cannot load it: {str(e).splitlines()[0]}", where=str(path), remedy="check it with: rescompress lint"
        ) from e


def build(onnx_path: Path, folder: Path, *, target: Target, precision: Precision, batch: int | None = None) -> Built:
    """Write the graph after onnxruntime's optimisations, as `edge_targets.backends.Backend.build` says.

    Only optimisations that do not depend on this CPU are applied, so the file runs wherever onnxruntime does.
    """
    out = folder / f"{onnx_path.stem}.ort.onnx"
    with atomic_path(out) as temporary:
        try:
            _session(onnx_path, 1, batch, temporary)
        except ModelFileError:
            room_for(folder, 2 * onnx_path.stat().st_size)  # where the disk is full, that is what is wrong
            raise
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
        input_type: NumPy's name of the type of the model's input.
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
        self.input_type = _TYPES.get(first.type, "float32")

    def _run(self, x_NCHW: NDArray[Any]) -> NDArray[np.float32]:
        import numpy as np

        return np.asarray(self._session.run(None, {self._input: x_NCHW})[0], dtype=np.float32)

    def __call__(self, batch_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits (N, K) for preprocessed images (N, C, H, W)."""
        return in_batches(self._run, batch_NCHW, self.batch, self.input_type)

    def __enter__(self) -> OnnxRuntimeRunner:
        """Return itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the model."""
        self._session = None


def runner(path: Path, *, threads: int | None = None, batch: int | None = None) -> OnnxRuntimeRunner:
    """Return a runner for an ``.onnx`` file, as `edge_targets.backends.Backend.runner` says."""
    return OnnxRuntimeRunner(path, threads=threads, batch=batch)
