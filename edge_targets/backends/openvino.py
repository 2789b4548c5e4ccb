"""OpenVINO on the CPU: the runtime in which INT8 pays on x86."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edge_targets.backends import Availability, Built, cpu_threads, in_batches, room_for
from edge_targets.device import Precision, Target
from rescompress.core.artifact import atomic_path
from rescompress.core.errors import EnvironmentFailed, ModelFileError, ToolMissing
from rescompress.core.quantizers import Profile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PROFILE: Profile = "openvino"
COST_OF_PROFILE: Mapping[Profile, str] = MappingProxyType(
    {
        "tensorrt": "behind ReLU half of the levels are not used here",
        "onnxruntime": "OpenVINO leaves out a rounding in front of residual sums: answers differ a little",
    }
)
OPSET = 17
STRONGLY_TYPED = True
BUILDS_HERE = True
RUNS_HERE = True
PACKAGE = "openvino"
REMEDY = "pip install openvino"

# OpenVINO may compile element-wise operators into kernels of their own ("snippets"). In a quantized model of fixed shape
# it takes the Add of a residual block, with the rounding behind it, for such a kernel before the convolution in front of
# it could fuse with both: another pass over the tensor, in float32. A model with an open batch fuses without the option.
QUANTIZED_OPTIONS: Mapping[str, str] = MappingProxyType({"SNIPPETS_MODE": "DISABLE"})


_LARGER = 5
"""An INT8 network takes up to four times the ONNX file's bytes in OpenVINO's format, which holds its weights in float32."""


def available() -> Availability:
    """Return whether OpenVINO is installed."""
    if importlib.util.find_spec("openvino") is None:
        return Availability(ok=False, reason="openvino is not installed", remedy=REMEDY)
    return Availability(ok=True, version=importlib.metadata.version("openvino"))


def _read(path: Path, batch: int | None) -> Any:
    """Return the openvino.Model of an ONNX or .xml file, its batch fixed if asked."""
    if not available():
        raise ToolMissing("OpenVINO is not installed", where="--target cpu", remedy=REMEDY)
    if not path.is_file():
        raise ModelFileError("no such file", where=str(path), remedy="name an .onnx file")
    import openvino as ov

    try:
        model = ov.Core().read_model(str(path))
        if batch is not None and model.input(0).partial_shape[0].is_dynamic:
            shape = model.input(0).partial_shape
            shape[0] = batch
            model.reshape({model.input(0): shape})
    except RuntimeError as e:
        raise ModelFileError(
            f"OpenVINO cannot read it: {_first_line(e)}", where=str(path), remedy="check it with: rescompress lint"
        ) from e
    return model


def _first_line(error: Exception) -> str:
    """Return the line of an OpenVINO message that says what is wrong; the others name its source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    first = (telling or lines or ["no message"])[0]
    return f"{first} {telling[1]}" if first.endswith(":") and len(telling) > 1 else first


def build(onnx_path: Path, folder: Path, *, target: Target, precision: Precision, batch: int | None = None) -> Built:
    """Write OpenVINO's own format (``.xml`` and ``.bin``), as `edge_targets.backends.Backend.build` says.

    Weights keep the types of the ONNX file: nothing is silently rounded to float16.
    """
    import openvino as ov

    model = _read(onnx_path, batch)
    name = onnx_path.stem
    xml = folder / f"{name}.xml"
    with atomic_path(xml) as temporary:
        weights = temporary.with_suffix(".bin")
        try:
            ov.save_model(model, str(temporary), compress_to_fp16=False)
            weights.replace(xml.with_suffix(".bin"))
        except RuntimeError as e:
            temporary.write_bytes(b"")
            weights.unlink(missing_ok=True)
            room_for(folder, _LARGER * onnx_path.stat().st_size)  # where the disk is full, that is what is wrong
            raise EnvironmentFailed(f"OpenVINO cannot write it: {_first_line(e)}", where=str(xml), remedy="run again") from e
        finally:
            weights.unlink(missing_ok=True)
    size = xml.stat().st_size + xml.with_suffix(".bin").stat().st_size
    return Built(
        path=xml,
        status=f"built by OpenVINO {available().version}",
        details={
            "runtime_version": available().version,
            "precision": precision,
            "size_bytes": size,
            "compile_options": dict(QUANTIZED_OPTIONS) if _quantized(model) else {},
        },
    )


def _quantized(model: Any) -> bool:
    """Whether a model rounds activations: ONNX's Q/DQ pairs are FakeQuantize operators in OpenVINO."""
    return any(op.get_type_name() == "FakeQuantize" for op in model.get_ops())


class OpenVINORunner:
    """Runs one model on the CPU.

    Attributes:
        runtime: ``openvino``.
        threads: CPU threads it uses.
        options: Options that change OpenVINO's choice of kernels: `QUANTIZED_OPTIONS` for a quantized model, unless this
            OpenVINO refuses them.
        input_type: NumPy's name of the type of the model's input.
    """

    runtime = "openvino"

    def __init__(self, path: Path, *, threads: int | None, batch: int | None) -> None:
        model = _read(path, batch)
        self.threads = cpu_threads(threads)
        shape = model.input(0).partial_shape
        kind = model.input(0).get_element_type()
        self.input_type = "float32" if kind.is_dynamic() else str(kind.to_dtype())
        self.batch: int | None = None if shape[0].is_dynamic else shape[0].get_length()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.threads,
            # On CPUs with bfloat16 units OpenVINO would silently compute float32 layers in bfloat16.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self.options: Mapping[str, str] = dict(QUANTIZED_OPTIONS) if _quantized(model) else {}
        try:
            compiled = self._compile(model, settings)
        except RuntimeError as e:
            raise ModelFileError(
                f"OpenVINO cannot compile it: {_first_line(e)}", where=str(path), remedy="check it with: rescompress lint"
            ) from e
        self._request = compiled.create_infer_request()

    def _compile(self, model: Any, settings: Mapping[str, Any]) -> Any:
        """Return the model compiled with `options`; an OpenVINO that refuses those compiles without, and clears them."""
        import openvino as ov

        if self.options:
            try:
                return ov.Core().compile_model(model, "CPU", {**settings, **self.options})
            except RuntimeError:
                self.options = {}
        return ov.Core().compile_model(model, "CPU", dict(settings))

    def _run(self, x_NCHW: NDArray[Any]) -> NDArray[np.float32]:
        import numpy as np

        results = self._request.infer([x_NCHW], share_inputs=True, share_outputs=False)
        return np.asarray(results[0], dtype=np.float32)

    def __call__(self, batch_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits (N, K) for preprocessed images (N, C, H, W)."""
        return in_batches(self._run, batch_NCHW, self.batch, self.input_type)

    def __enter__(self) -> OpenVINORunner:
        """Return itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the model."""
        self._request = None


def runner(path: Path, *, threads: int | None = None, batch: int | None = None) -> OpenVINORunner:
    """Return a runner for an ``.onnx`` or ``.xml`` file, as `edge_targets.backends.Backend.runner` says."""
    return OpenVINORunner(path, threads=threads, batch=batch)
