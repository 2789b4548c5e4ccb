"""bench: any input type, files that cannot be counted, true causes, figures that a machine cannot have; and full disks."""

from __future__ import annotations

import errno
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edge_targets import benchmark
from edge_targets.backends import load_backend
from edge_targets.benchmark import Candidate, Effort, measure_processes, time_runner
from edge_targets.catalog import load_target
from edge_targets.latency import Overrides, clocks
from rescompress.core.errors import BadInput, EnvironmentFailed, ModelFileError
from rescompress.runs.config import RunConfig
from rescompress.runs.plan import run_plan
from rescompress.runs.settings import Settings

DIGITS = Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors"
RUNTIMES = ["onnxruntime", "openvino"]
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
}


def typed(path: Path, kind: str, *, batch: int | str = 1) -> Path:
    """Write a network that takes images of a type, and turns them into float32 itself."""
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["f", "w"], ["c"], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    w = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TYPES[kind], [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])],
        [numpy_helper.from_array(w, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class Spy:
    """A runner that notes which types it is fed."""

    runtime = "none"

    def __init__(self, input_type: str) -> None:
        self.input_type, self.fed = input_type, list[str]()

    def __call__(self, x: np.ndarray) -> None:
        self.fed.append(x.dtype.name)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", RUNTIMES)
def test_images_have_the_type_of_the_input(tmp_path, name, kind):
    backend = load_backend(name)
    if not backend.available():
        pytest.skip(str(backend.available().reason))
    path = typed(tmp_path / "m.onnx", kind)
    with backend.runner(path, threads=1) as runner:
        assert runner.input_type == kind
        spy = Spy(runner.input_type)
        time_runner(spy, (3, 8, 8), batch=1, seconds=0, min_iterations=1)
        assert spy.fed == [kind]
        x = np.random.default_rng(1).integers(0, 100, (3, 3, 8, 8))
        reference = ReferenceEvaluator(onnx.load(path))
        expected = np.concatenate([reference.run(None, {"x": x[i : i + 1].astype(kind)})[0] for i in range(3)])
        np.testing.assert_allclose(runner(x.astype(np.float32)), expected, rtol=2e-3, atol=1e-3)


def foreign(path: Path) -> Path:
    """Write a file with an operator of onnxruntime's own that nothing here can count."""
    model = onnx.load(typed(path, "float32"))
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    conv.output[0] = "before"
    model.graph.node.append(helper.make_node("BiasGelu", ["flat", "b"], ["y"], domain="com.microsoft"))
    model.graph.node[-2].output[0] = "flat"
    conv.output[0] = "c"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.float32), "b"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    return path


def test_what_cannot_be_counted_is_measured_and_the_precision_left_open(rescompress, tmp_path):
    path = foreign(tmp_path / "m.onnx")
    done = rescompress("bench", path, "-t", "cpu-ort", "--seconds", "0.1", "--rounds", 1, "--threads", 1, "--json")
    found = json.loads(done.stdout)
    assert found["precision"] is None
    assert found["p50_ms"] > 0
    assert any("com.microsoft.BiasGelu" in note for note in found["notes"])
    assert "BiasGelu" in rescompress("predict", path, "-t", "jetson", code=5).stderr


QUICK = Effort(warmup_s=0.0, seconds=0.01, rounds=1, min_iterations=1)


def test_what_a_runtime_says_is_the_error(tmp_path):
    """A network that loads and cannot run: a Reshape whose sizes do not fit what it gets."""
    model = onnx.load(typed(tmp_path / "m.onnx", "float32", batch="n"))
    flatten = model.graph.node[-1]
    flatten.op_type = "Reshape"
    flatten.input.append("shape")
    model.graph.initializer.append(numpy_helper.from_array(np.array([7, 3], np.int64), "shape"))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=r"Reshape|shape") as error:
        measure_processes([Candidate(tmp_path / "m.onnx", "onnxruntime", (3, 8, 8), threads=1)], effort=QUICK)
    assert "memory" not in str(error.value)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import sys; sys.stderr.write('first\\nlibfoo.so: cannot open\\n'); sys.exit(3)", ["ended with 3", "libfoo.so"]),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ["SIGKILL", "memory is short"]),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ["SIGSEGV", "it said nothing"]),
    ],
)
def test_the_end_of_a_measuring_process_is_told_as_it_was(tmp_path, monkeypatch, script, words):
    popen = benchmark.subprocess.Popen

    def another(arguments, **more):
        return popen([arguments[0], "-c", f"import sys; sys.stdin.readline(); {script}"], **more)

    monkeypatch.setattr(benchmark.subprocess, "Popen", another)
    with pytest.raises(EnvironmentFailed) as error:
        measure_processes([Candidate(tmp_path / "m.onnx", "onnxruntime", (3, 8, 8), threads=1)], effort=QUICK)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("extra", [1, 100_000])
def test_more_threads_than_the_machine_has_are_refused(tmp_path, rescompress, extra):
    most = max(os.cpu_count() or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    path = typed(tmp_path / "m.onnx", "float32")
    done = rescompress("bench", path, "-t", "cpu-ort", "--threads", most + extra, code=5)
    assert f"1 to {most}" in done.stderr


def test_too_many_threads_are_refused_before_a_run_trains():
    most = max(os.cpu_count() or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    config = RunConfig(checkpoint=str(DIGITS), data="builtin:digits", targets=["cpu-ort"])
    with pytest.raises(BadInput, match="threads cannot run at once"):
        run_plan(config, Settings("builtin:digits", threads=most + 1))
    here_only = config.model_copy(update={"targets": ["jetson"]})  # nothing is measured on this machine
    run_plan(here_only, Settings("builtin:digits", threads=most + 1))
    run_plan(config, Settings("builtin:digits", threads=most))


def ends_when_its_input_does(code: str, first: str) -> None:
    words = [sys.executable, "-P", "-c", code]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen(words, **pipes) as process:
        process.stdin.write(first)
        process.stdin.flush()
        assert process.stdout.readline()
        assert process.poll() is None
        process.stdin.close()
        try:
            process.wait(timeout=30)
        finally:
            process.kill()


@pytest.mark.skipif(not hasattr(select, "poll"), reason="needs poll")
def test_a_measuring_process_notices_that_the_other_side_is_gone():
    ends_when_its_input_does(
        "import time; from edge_targets import benchmark; benchmark._end_with_the_other_side(0.05); print('on', flush=True);"
        "time.sleep(600)",
        "",
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(select, "poll"), reason="needs poll")
def test_a_measuring_process_ends_in_the_middle_of_a_measurement(tmp_path):
    asked = {"path": str(typed(tmp_path / "m.onnx", "float32")), "runtime": "onnxruntime", "shape": [3, 8, 8], "batch": 1}
    lines = [asked | {"threads": 1}, {"seconds": 600, "min_iterations": 1}]
    ends_when_its_input_does(
        "import runpy; runpy.run_module('edge_targets.benchmark', run_name='__main__')",
        "".join(json.dumps(line) + "\n" for line in lines),
    )


DEVICE = load_target("jetson-agx-orin-64gb").device


@pytest.mark.parametrize("name", ["sm_count", "gpu_mhz", "emc_mhz"])
def test_figures_that_no_board_has_are_refused_with_the_range(name):
    own = max(getattr(mode, name) for mode in DEVICE.modes)
    for wrong in (own * 3, 99_999_999_999, *([] if name == "sm_count" else [1e300, 1e-300])):
        with pytest.raises(BadInput, match="out of the range") as error:
            clocks(DEVICE, None, Overrides(**{name: wrong}))
        assert "give 1" in str(error.value.remedy)
    assert own in clocks(DEVICE, None, Overrides(**{name: own}))


def test_a_batch_beyond_the_memory_of_the_board_is_refused(rescompress):
    assert "GB" in rescompress("predict", "arch:resnet18", "-t", "jetson", "--batch", 10**18, code=5).stderr
    rescompress("predict", "arch:resnet18", "-t", "jetson", "--batch", 64)


def test_endless_measurements_are_refused(rescompress, tmp_path):
    for seconds in ("inf", "1e300"):
        rescompress("bench", typed(tmp_path / "m.onnx", "float32"), "-t", "cpu-ort", "--seconds", seconds, code=2)


@pytest.fixture
def small_disk():
    """Return a folder that holds few bytes: a tmpfs, where one may be mounted."""
    import subprocess

    folder = Path(tempfile.mkdtemp())
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", folder], capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


def large(path: Path) -> Path:
    model = onnx.load(typed(path, "float32"))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w"))
    w = np.random.default_rng(0).standard_normal((4, 20_000)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(w, "v"))
    model.graph.node[-1].output[0] = "flat"
    model.graph.node.append(helper.make_node("MatMul", ["flat", "v"], ["y"]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 20_000
    onnx.save(model, path)
    return path


TARGETS = {"onnxruntime": "cpu-ort", "openvino": "cpu"}


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, small_disk, name):
    backend = load_backend(name)
    if not backend.available():
        pytest.skip(str(backend.available().reason))
    path = large(tmp_path / "m.onnx")
    with pytest.raises(EnvironmentFailed, match="disk is full"):
        backend.build(path, small_disk, target=load_target(TARGETS[name]), precision="fp32")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_full_disk_is_known_by_what_the_system_says(tmp_path, monkeypatch, name):
    """As above where nothing can be mounted: the runtime fails, and then our own bytes do."""
    backend = load_backend(name)
    if not backend.available():
        pytest.skip(str(backend.available().reason))
    path = typed(tmp_path / "m.onnx", "float32")
    out = tmp_path / "out"
    out.mkdir()

    def full(folder: Path, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(f"edge_targets.backends.{name}.room_for", full)
    monkeypatch.setattr("openvino.save_model" if name == "openvino" else "export.session.open_session", fail)
    with pytest.raises(EnvironmentFailed, match="disk is full"):
        backend.build(path, out, target=load_target(TARGETS[name]), precision="fp32")
    assert list(out.iterdir()) == []


@pytest.mark.slow
def test_the_size_of_an_engine_is_that_of_all_it_loads(rescompress, tmp_path):
    digits = Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors"
    rescompress("export", digits, "-t", "cpu", "--threads", 1, cwd=tmp_path)
    folder = tmp_path / "rescompress-out"
    stage = next(s for s in json.loads((folder / "manifest.json").read_text())["stages"] if s["stage"] == "target:cpu")
    sizes = {name: metric["value"] for name, metric in stage["metrics"].items() if name.endswith("_bytes")}
    loaded = sum((folder / "cpu" / f"model.{end}").stat().st_size for end in ("xml", "bin"))
    assert sizes == {"size_bytes": (folder / "cpu" / "model.onnx").stat().st_size, "engine_bytes": loaded}
