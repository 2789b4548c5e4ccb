"""A dynamic batch stays dynamic in everything an export delivers; only what measures fixes it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from edge_targets.backends import tensorrt as trt_backend
from edge_targets.backends import tensorrt_rtx as rtx_backend
from edge_targets.catalog import load_target
from edge_targets.trt_build import build_engine
from edge_targets.trtexec import InputShapes
from export.parity import Parity

stage = import_module("rescompress.runs.stages.target")  # the package has a function of this name
DIGITS = Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors"


def first_dimension(path):
    if path.suffix == ".onnx":
        dim = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0]
        return dim.dim_value or None
    openvino = pytest.importorskip("openvino")
    batch = openvino.Core().read_model(path).input(0).partial_shape[0]
    return None if batch.is_dynamic else batch.get_length()


@pytest.mark.parametrize(("target", "engine"), [("cpu", "model.xml"), ("cpu-ort", "model.ort.onnx")])
@pytest.mark.parametrize(("asked", "delivered", "measured"), [("dynamic", None, 1), ("3", 3, 3)])
def test_engines_have_the_batch_that_was_asked_for(
    rescompress, monkeypatch, tmp_path, target, engine, asked, delivered, measured
):
    candidates = []

    def measure(runs):
        candidates.extend(runs)
        return [SimpleNamespace(metrics={}, process_medians_ms=(1.0,), process_p99_ms=(1.0,), runtime_options={}) for _ in runs]

    monkeypatch.setattr(stage, "measure_processes", measure)
    same = Parity(1, 0.0, 0.0, 1.0, 1.0, 1)
    monkeypatch.setattr(import_module("rescompress.runs.stages.export"), "check_parity", lambda *_: (same, None, "no images"))
    rescompress("export", DIGITS, "--target", target, "--batch", asked, "-o", "out", cwd=tmp_path)
    assert [first_dimension(tmp_path / "out" / name) for name in ("model.onnx", engine)] == [delivered, delivered]
    assert [c.batch for c in candidates] == [measured]


class Builder:
    """A double of the TensorRT module that stops once the profile is known."""

    class Stop(Exception):
        pass

    def __init__(self):
        self.profile = None
        self.__name__, self.__version__ = "tensorrt", "10.3.0"
        self.ILogger = type("ILogger", (), {"__init__": lambda _: None})
        self.NetworkDefinitionCreationFlag = SimpleNamespace()
        self.ProfilingVerbosity = SimpleNamespace(DETAILED=0)
        image = SimpleNamespace(name="input", shape=(-1, 3, 16, 16))
        network = SimpleNamespace(num_inputs=1, get_input=lambda _: image)
        self.OnnxParser = lambda *_: SimpleNamespace(parse=lambda _: True)
        self.Builder = lambda _: SimpleNamespace(
            create_network=lambda _: network,
            create_builder_config=SimpleNamespace,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=self.shapes),
        )

    def shapes(self, _, *shapes):
        self.profile = [shape[0] for shape in shapes]
        raise self.Stop


@pytest.mark.parametrize(
    ("batch", "opt_batch", "expected"),
    [
        (None, None, [InputShapes.min_batch, InputShapes.opt_batch, InputShapes.max_batch]),
        (4, None, [1, 4, 4]),
        (4, 2, [1, 2, 4]),
        (1, None, [1, 1, 1]),
    ],
)
def test_tensorrt_takes_a_dynamic_batch_from_a_profile(batch, opt_batch, expected):
    double = Builder()
    with pytest.raises(Builder.Stop):
        build_engine(double, b"", batch=batch, opt_batch=opt_batch)
    assert double.profile == expected


@pytest.mark.parametrize(("backend", "target"), [(trt_backend, "jetson"), (rtx_backend, "rtx-sm86")])
def test_tensorrt_backends_hand_an_open_batch_on(monkeypatch, tmp_path, backend, target):
    asked = []

    def build(*_, batch=1, **__):
        asked.append(batch)
        raise Builder.Stop

    monkeypatch.setattr(backend, "build_engine", build)
    monkeypatch.setattr(backend, "available", lambda: True)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.0.0"))
    model = tmp_path / "model.onnx"
    model.write_bytes(b"")
    for batch in (None, 2):
        with pytest.raises(Builder.Stop):
            backend.build(model, tmp_path, target=load_target(target), precision="fp32", batch=batch)
    assert asked == [None, 2]
