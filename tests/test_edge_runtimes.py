"""A runtime is one file: every one keeps the contract, and one more file (with a device that names it) is all it takes."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_targets import backends
from edge_targets.backends import Availability, Built, load_backend
from edge_targets.catalog import all_targets, load_target
from rescompress.core import plugins
from rescompress.core.errors import BadInput, RescompressError

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "resnet20_digits.safetensors"
RUNTIMES = plugins.names(backends.PACKAGE)


@pytest.fixture
def model(tmp_path):
    """A small network for one image."""
    constant = helper.make_tensor("w", TensorProto.FLOAT, [12, 4], np.arange(48, dtype=np.float32))
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [constant],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_keeps_the_contract(name, model, tmp_path):
    backend = load_backend(name)  # facts and signatures: `rescompress.testing.check_runtime`
    found = backend.available()
    assert isinstance(found, Availability)
    if not found:
        assert found.reason
        assert found.remedy
        with pytest.raises(RescompressError) as e:
            backend.runner(model)
        assert e.value.remedy
    elif backend.BUILDS_HERE:
        target = next((t for t in all_targets() if t.runtime == name), None)
        assert target is not None, f"no file of edge_targets/devices says `runtime: {name}`"
        built = backend.build(model, tmp_path, target=target, precision="fp32")
        assert isinstance(built, Built)
        json.dumps(built.details)
        assert built.path is None or built.path.is_file()
        if backend.RUNS_HERE:
            x_NCHW = np.random.default_rng(0).standard_normal((3, 3, 2, 2)).astype(np.float32)
            with backend.runner(model, threads=1) as runner:
                assert (runner.runtime, runner.batch) == (name, 1)
                assert dict(runner.options) == {}
                expected = x_NCHW.reshape(3, 12) @ np.arange(48, dtype=np.float32).reshape(12, 4)
                np.testing.assert_allclose(runner(x_NCHW), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("target", "profile", "opset", "strongly_typed", "builds_here"),
    [
        ("cpu", "openvino", 17, True, True),
        ("cpu-ort", "onnxruntime", 17, True, True),
        ("rtx-sm86", "tensorrt", 19, True, True),
        ("jetson-agx-orin-64gb", "tensorrt", 19, False, False),
        ("jetson-thor-t5000", "tensorrt", 19, True, False),
        ("jetson-nano", "tensorrt", 13, False, False),
    ],
)
def test_what_targets_know_of_their_runtime(target, profile, opset, strongly_typed, builds_here):
    found = load_target(target)
    assert (found.profile, found.opset) == (profile, opset)
    assert (found.strongly_typed, found.builds_here) == (strongly_typed, builds_here)


def test_facts_are_read_without_the_runtimes():
    code = (
        "import sys; from edge_targets.catalog import all_targets; "
        "[(t.profile, t.opset, t.strongly_typed, t.builds_here) for t in all_targets()]; "
        "print([m for m in ('numpy', 'torch', 'onnx', 'openvino', 'onnxruntime', 'tensorrt') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_runtime_without_its_facts_is_refused(monkeypatch):
    monkeypatch.delattr("edge_targets.backends.openvino.PROFILE")
    monkeypatch.delattr("edge_targets.backends.openvino.OPSET")
    with pytest.raises(BadInput, match="lacks PROFILE, OPSET"):
        load_backend("openvino")


RUNTIME = '''
"""A runtime for the test: onnxruntime under another name."""

from edge_targets.backends import Availability, Built, onnxruntime

PROFILE = "onnxruntime"
COST_OF_PROFILE = {}
OPSET = 18
STRONGLY_TYPED = True
BUILDS_HERE = True
RUNS_HERE = True
PACKAGE = "hypothesis"
REMEDY = "listen"


def available():
    return Availability(ok=True, version="1.0")


def build(onnx_path, folder, *, target, precision, batch=None):
    path = folder / "model.echo"
    path.write_bytes(onnx_path.read_bytes())
    return Built(path, "echoed")


class Runner(onnxruntime.OnnxRuntimeRunner):
    runtime = "echo"
    options = {"LOUD": "YES"}


def runner(path, *, threads=None, batch=None):
    return Runner(path, threads=threads, batch=batch)
'''
DEVICE = """
name: echo-box
title: An echo
architecture: host
runtime: echo
precisions: [fp32, int8]
align: {fp32: 8, int8: 16}
align_source: written for a test
"""


COMMANDS = (
    ("targets", "echo-box"),
    ("export", DIGITS, "-t", "echo-box", "--threads", "1"),
    ("bench", "rescompress-out/echo-box/model.onnx", "-t", "echo-box", "--seconds", "0.1", "--rounds", "1", "--threads", "1"),
    ("evaluate", "rescompress-out/echo-box/model.onnx", "-d", "builtin:digits", "--runtime", "echo"),
    ("doctor",),
)
RUN_ALL = """
import contextlib, io, json, sys
from edge_targets.benchmark import Effort
from rescompress.cli.app import main
Effort.__init__.__defaults__ = (0.05, 0.1, 1, 2)  # what export measures is no matter here
outputs = []
for words in json.loads(sys.argv[1]):
    sys.argv, out = ["rescompress", *words, "--json"], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main()
    outputs.append(json.loads(out.getvalue()))
print(json.dumps(outputs))
"""


def test_one_file_and_a_device_add_a_runtime(tmp_path):
    packages = tmp_path / "packages"
    shutil.copytree(ROOT / "edge_targets", packages / "edge_targets", ignore=shutil.ignore_patterns("__pycache__"))
    (packages / "edge_targets" / "backends" / "echo.py").write_text(RUNTIME)
    (packages / "edge_targets" / "devices" / "echo-box.yaml").write_text(DEVICE)
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps([[str(word) for word in words] for words in COMMANDS])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (listed,), exported, measured, scored, told = json.loads(done.stdout)
    assert (listed["runtime"], listed["profile"], listed["opset"]) == ("echo", "onnxruntime", 18)
    assert (exported["precision"], exported["opset"], exported["engine_status"]) == ("fp32", 18, "echoed")
    assert (tmp_path / exported["engine"]).name == "model.echo"
    assert (exported["latency"]["runtime"], exported["latency"]["provenance"]) == ("echo", "measured")
    assert (measured["runtime"], measured["runtime_options"]) == ("echo", {"LOUD": "YES"})
    assert (scored["runtime"], scored["top1"] > 0.9) == ("echo", True)
    (piece,) = [p for p in told["pieces"] if p["name"] == "hypothesis"]
    version = importlib.metadata.version("hypothesis")
    assert (piece["found"], piece["purpose"], piece["remedy"]) == (version, "targets that run echo", "listen")
    assert told["environment"]["packages"]["hypothesis"] == version


def test_another_profile_costs_something_neutral_where_the_runtime_says_nothing(monkeypatch):
    from types import SimpleNamespace

    from rescompress.runs.stages.target import profile_notes

    monkeypatch.setattr("edge_targets.backends.openvino.COST_OF_PROFILE", {})
    (note,) = profile_notes(SimpleNamespace(quantization=SimpleNamespace(profile="tensorrt")), load_target("cpu"))
    assert note.endswith("it may be slower here, or less exact")


def test_an_unknown_runtime_is_named_with_the_nearest(monkeypatch, capsys):
    from rescompress.cli.app import main

    monkeypatch.setattr("sys.argv", ["rescompress", "evaluate", "m.onnx", "-d", "builtin:digits", "--runtime", "openvinoo"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 5
    assert "did you mean 'openvino'" in capsys.readouterr().err
