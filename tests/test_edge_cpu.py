"""CPU runtimes: the same logits, any number of images, measured in processes of their own; and the commands around them."""

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from edge_targets import benchmark
from edge_targets.backends import PACKAGE, in_batches
from edge_targets.backends import onnxruntime as ort
from edge_targets.backends import openvino as ov
from edge_targets.benchmark import Candidate, Conditions, Effort, even, measure_processes, summarize
from edge_targets.catalog import load_target
from edge_targets.onnx_kernels import kernels_of
from rescompress.cli import bench as bench_command
from rescompress.cli.app import main
from rescompress.core import plugins
from rescompress.core.errors import BadInput, EnvironmentFailed, ModelFileError

QUICK = Effort(warmup_s=0.05, seconds=0.2, rounds=2)


def write_onnx(path, batch="N", size=8):
    rng = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(rng.standard_normal((8, 3, 3, 3)).astype(np.float32), "w"),
        numpy_helper.from_array(rng.standard_normal((10, 8)).astype(np.float32), "f"),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="conv1"),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["q"]),
        helper.make_node("Gemm", ["q", "f"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.mark.parametrize("batch", ["N", 1, 4])
def test_runtimes_agree_for_any_number_of_images(tmp_path, batch):
    path = write_onnx(tmp_path / "m.onnx", batch)
    x = np.random.default_rng(1).standard_normal((7, 3, 8, 8)).astype(np.float32)
    with ort.runner(path, threads=1) as a, ov.runner(path, threads=1) as b:
        assert (a.runtime, b.runtime) == ("onnxruntime", "openvino")
        expected = np.concatenate([ort.runner(write_onnx(tmp_path / "one.onnx", 1), threads=1)(x[i : i + 1]) for i in range(7)])
        np.testing.assert_allclose(a(x), expected, atol=1e-5)
        np.testing.assert_allclose(b(x), expected, atol=1e-5)
        first, second = b(x[:4]), b(x[3:])
        np.testing.assert_allclose(first, expected[:4], atol=1e-5)
        np.testing.assert_allclose(second, expected[3:], atol=1e-5)


@pytest.mark.parametrize("backend", [ort, ov], ids=["onnxruntime", "openvino"])
def test_a_built_artifact_computes_the_same(tmp_path, backend):
    path = write_onnx(tmp_path / "m.onnx")
    built = backend.build(path, tmp_path / "out", target=load_target("cpu"), precision="fp32", batch=2)
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(backend.runner(built.path)(x), backend.runner(path)(x), atol=1e-5)
    assert built.details["size_bytes"] > 0
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".partial")]


@pytest.mark.parametrize("backend", [ort, ov], ids=["onnxruntime", "openvino"])
def test_files_that_are_none_are_refused(tmp_path, backend):
    with pytest.raises(ModelFileError, match="no such file"):
        backend.runner(tmp_path / "absent.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(write_onnx(tmp_path / "m.onnx").read_bytes()[:300])
    with pytest.raises(ModelFileError, match="cannot"):
        backend.runner(broken)


def test_every_backend_offers_the_protocol():
    names = plugins.names(PACKAGE)
    assert {"openvino", "onnxruntime", "tensorrt", "tensorrt_rtx"} <= set(names)
    for name in names:
        backend = plugins.load(PACKAGE, name)
        found = backend.available()
        assert found.ok or (found.reason and found.remedy)
        assert callable(backend.build)
        assert callable(backend.runner)


@given(n=st.integers(1, 20), batch=st.integers(1, 7))
def test_batches_are_padded_and_cut(n, batch):
    seen = []

    def call(x):
        seen.append(len(x))
        return x.sum(axis=(1, 2, 3))[:, None]

    x = np.random.default_rng(n).standard_normal((n, 1, 2, 2)).astype(np.float32)
    np.testing.assert_allclose(in_batches(call, x, batch), x.sum(axis=(1, 2, 3))[:, None], rtol=1e-6)
    assert set(seen) == {batch} or seen == [n]


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=200))
def test_percentiles_are_those_of_numpy(samples):
    found = summarize(samples, Conditions(device="d", runtime="r", batch=2))
    for name, q in (("p50_ms", 50), ("p90_ms", 90), ("p99_ms", 99)):
        assert found[name].value == pytest.approx(np.percentile(samples, q), rel=1e-9)
    assert found["p50_ms"].low <= found["p50_ms"].value <= found["p50_ms"].high
    assert found["images_per_s"].value == pytest.approx(2000 / np.mean(samples))
    assert all(m.provenance == "measured" and m.n == len(samples) for m in found.values())


def test_the_interval_of_the_median_holds_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        p50 = summarize(list(np.exp(rng.standard_normal(60))), Conditions(device="d", runtime="r", batch=1))["p50_ms"]
        inside += p50.low <= 1.0 <= p50.high
    assert inside / 400 >= 0.93


def test_measuring_runs_in_other_processes_and_says_on_what(tmp_path):
    path = write_onnx(tmp_path / "m.onnx")
    candidates = [Candidate(path, name, (3, 8, 8), 2, 1, "fp32") for name in ("openvino", "onnxruntime")]
    with mock.patch.object(benchmark, "time_runner", side_effect=AssertionError("measured in this process")):
        found = [m.metrics for m in measure_processes(candidates, effort=QUICK)]
    for metrics, candidate in zip(found, candidates, strict=True):
        p50 = metrics["p50_ms"]
        assert (p50.runtime, p50.batch, p50.threads, p50.precision) == (candidate.runtime, 2, 1, "fp32")
        assert p50.n >= 8
        assert p50.device
        assert 0 < p50.value <= metrics["p90_ms"].value <= metrics["p99_ms"].value


def test_the_band_of_a_latency_is_that_of_the_processes(tmp_path):
    path = write_onnx(tmp_path / "m.onnx")
    (found,) = measure_processes([Candidate(path, "onnxruntime", (3, 8, 8), 1, 1, "fp32")], effort=QUICK)
    p50, medians = found.metrics["p50_ms"], found.process_medians_ms
    assert len(medians) == QUICK.rounds
    assert (p50.low, p50.high) == (min(medians), max(medians))
    assert p50.low <= p50.value <= p50.high


def test_errors_of_a_measuring_process_keep_their_class(tmp_path):
    with pytest.raises(ModelFileError, match="no such file"):
        measure_processes([Candidate(tmp_path / "absent.onnx", "openvino", (3, 8, 8))], effort=QUICK)
    with pytest.raises(ModelFileError, match="takes 4 images per call"):
        measure_processes([Candidate(write_onnx(tmp_path / "m.onnx", 4), "onnxruntime", (3, 8, 8))], effort=QUICK)
    with pytest.raises(BadInput, match="unknown runtime"):
        measure_processes([Candidate(write_onnx(tmp_path / "m.onnx"), "onnxruntim", (3, 8, 8))], effort=QUICK)


def test_a_measuring_process_that_dies_is_an_error(tmp_path):
    with mock.patch.object(sys, "executable", "/bin/false"), pytest.raises(EnvironmentFailed, match="ended with 1"):
        measure_processes([Candidate(write_onnx(tmp_path / "m.onnx"), "onnxruntime", (3, 8, 8))], effort=QUICK)


def test_a_slow_process_counts_as_much_as_a_fast_one():
    processes = [[1.0 + i / 1000 for i in range(300)], [10.0] * 30, [10.0] * 31]
    levelled = even(processes)
    assert [len(p) for p in levelled] == [30, 30, 30]
    assert levelled[0][0] == 1.0
    assert levelled[0][-1] > 1.28, "spread over the whole time"
    p50 = summarize([ms for p in levelled for ms in p], Conditions(device="d", runtime="r", batch=1))["p50_ms"]
    assert p50.value == 10.0, "the median process took 10 ms"


def run(*words):
    """Run the command line in this process; return exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["rescompress", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return ended.value.code or 0, out.getvalue(), err.getvalue()


def test_targets_lists_everything_as_json():
    code, out, _ = run("targets", "--json")
    assert code == 0
    rows = {r["name"]: r for r in json.loads(out)}
    assert {"cpu", "cpu-ort", "rtx-sm86", "jetson", "arm", "jetson-nano", "jetson-agx-orin-64gb", "intel-vnni"} <= set(rows)
    assert rows["jetson"]["alias_of"] in rows
    orin = rows["jetson-agx-orin-64gb"]
    assert (orin["runtime"], orin["sm"], orin["precisions"]) == ("tensorrt", "8.7", ["fp32", "fp16", "int8"])
    assert orin["facts"]["max_gpu_mhz"]["source"]
    assert run("targets")[0] == 0
    assert run("targets", "jetson-nano")[0] == 0
    assert run("targets", "jetson-nana")[0] == 5


def test_predict_takes_names_and_foreign_files(tmp_path):
    code, out, _ = run("predict", "arch:resnet50", "--target", "jetson-agx-orin-64gb", "--precision", "int8", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["provenance"] == "predicted"
    assert found["low_ms"] < found["p50_ms"] < found["high_ms"]
    assert sum(k["ms"] for k in found["layers"]) == pytest.approx(found["p50_ms"])
    slower = json.loads(
        run(
            "predict",
            "arch:resnet50",
            "-t",
            "jetson-agx-orin-64gb",
            "--precision",
            "int8",
            "--gpu-mhz",
            612,
            "--sm-count",
            8,
            "--json",
        )[1]
    )
    assert slower["p50_ms"] > 1.8 * found["p50_ms"]
    path = write_onnx(tmp_path / "m.onnx")
    assert json.loads(run("predict", path, "--json")[1])["precision"] == "fp16"
    assert run("predict", path, "--input", "3x9x9")[0] == 5
    assert run("predict", "arch:resnet50", "--target", "cpu")[0] == 5
    assert run("predict", "arch:resnet5")[0] == 5
    assert run("predict", tmp_path / "absent.onnx")[0] == 5


def test_predict_takes_the_batch_that_a_file_is_fixed_to(tmp_path):
    def predicted(path, *arguments):
        return json.loads(run("predict", path, *arguments, "--json")[1])

    free = write_onnx(tmp_path / "free.onnx")
    fixed = write_onnx(tmp_path / "fixed.onnx", batch=8)
    assert predicted(free)["batch"] == 1
    of_eight = predicted(free, "--batch", 8)
    for found in (predicted(fixed), predicted(fixed, "--batch", 8)):
        assert (found["batch"], found["p50_ms"]) == (8, of_eight["p50_ms"])
    code, out, err = run("predict", fixed, "--batch", 1, "--json")
    assert (code, json.loads(out)["p50_ms"]) == (0, predicted(free)["p50_ms"])
    assert "is fixed to 8 images per call" in err


def test_open_image_sides_need_an_input_shape(tmp_path):
    path = write_onnx(tmp_path / "m.onnx", size="side")
    with pytest.raises(ModelFileError, match="size of its input open"):
        kernels_of(path)
    read = kernels_of(path, input_shape=(3, 16, 16))
    assert [k.kind for k in read.kernels] == ["move", "conv", "pool", "linear"]
    assert read.kernels[1].macs == 16 * 16 * 8 * 27
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ModelFileError):
        kernels_of(tmp_path / "text.onnx")


def test_bench_measures_and_has_the_promised_keys(tmp_path):
    path = write_onnx(tmp_path / "m.onnx")
    code, out, _ = run("bench", path, "--target", "cpu-ort", "--seconds", "0.2", "--rounds", 1, "--threads", 1, "--json")
    assert code == 0
    found = json.loads(out)
    assert {"p50_ms", "p90_ms", "p99_ms", "n", "device", "runtime", "threads", "provenance"} <= set(found)
    assert (found["runtime"], found["threads"], found["provenance"]) == ("onnxruntime", 1, "measured")
    assert run("bench", tmp_path / "absent.onnx")[0] == 5
    if not Path("/proc/device-tree/model").exists() and "CUDA_HOME" not in os.environ:
        code, _, err = run("bench", path, "--target", "jetson")
        assert code == 4
        assert "predict" in err


def row(target, precision, p50, processes=5):
    return {
        "model": f"{precision}.onnx",
        "target": target,
        "precision": precision,
        "batch": 1,
        "p50_ms": p50,
        "p50_low_ms": p50 * 0.98,
        "p50_high_ms": p50 * 1.02,
        "latency_runs": [p50] * processes,
    }


def test_the_table_says_where_int8_is_slower_and_which_runtime_is_better():
    rows = [row("cpu-ort", "fp32", 30.0), row("cpu-ort", "int8", 50.0), row("cpu", "fp32", 32.0), row("cpu", "int8", 10.0)]
    notes = bench_command._notes(rows)
    assert any("INT8 is slower than fp32 on cpu-ort" in n for n in notes)
    assert not any("slower" in n and "on cpu:" in n for n in notes)
    assert any("fastest: int8.onnx on cpu " in n for n in notes)
    assert bench_command._notes([row("cpu", "fp32", 30.0), row("cpu", "int8", 30.5)]) == []


@pytest.mark.parametrize("processes", [1, 2, 4, 5])
def test_few_processes_decide_nothing(processes):
    rows = [row("cpu-ort", "fp32", 30.0, processes), row("cpu", "int8", 10.0, 5), row("cpu", "fp32", 5.0, 5)]
    notes = bench_command._notes(rows)
    assert (f"{processes} process" in notes[0]) == (processes < 5)
    assert ("INT8 is slower" in notes[0]) == (processes == 5)
    assert len(notes) == (1 if processes < 5 else 2)
    assert bench_command._notes(rows[:1]) == []


@pytest.mark.parametrize(("processes", "head"), [(1, "95 % in 1 process"), (2, "range of 2 processes")])
def test_the_table_says_what_its_interval_is(processes, head):
    more = {"device": "d", "threads": 1, "p90_ms": 1.0, "p99_ms": 1.0, "spread": 0.1, "images_per_s": 1.0, "n": 9}
    table = bench_command._table([row("cpu", "fp32", 1.0, processes) | more])
    for width in (200, 60):  # in its heading, and in the lines that stand where a table has no room
        console = Console(width=width, file=io.StringIO())
        console.print(table)
        assert head in console.file.getvalue()


@pytest.mark.parametrize("processes", [2, 5])
def test_the_range_of_processes_holds_the_true_median_as_often_as_the_docs_say(processes):
    medians = np.random.default_rng(0).standard_normal((20000, processes))
    inside = np.mean((medians.min(axis=1) <= 0) & (medians.max(axis=1) >= 0))
    assert inside == pytest.approx(1 - 2 * 0.5**processes, abs=0.01)


def test_a_call_is_timed_in_ms_at_the_batch_and_as_often_as_asked():
    shapes = []

    def runner(x):
        shapes.append(x.shape)
        time.sleep(0.02)

    samples = benchmark.time_runner(runner, (3, 4, 5), batch=2, seconds=0.0, min_iterations=3)
    assert 15 < np.median(samples) < 100
    assert len(samples) == 3
    assert set(shapes) == {(2, 3, 4, 5)}


class Worker:
    """A measuring process that notes what it is asked, in place of one."""

    def __init__(self, asked, samples):
        self.asked, self.samples, self.runtime_options = asked, samples, {}

    def ask(self, question):
        self.asked.append(question)
        return {"samples_ms": self.samples}


def test_a_warm_up_comes_first_and_every_process_counts_alike(monkeypatch):
    asked, runs = [], iter([[1.0] * 300, [3.0] * 100])
    monkeypatch.setattr(benchmark, "_worker", lambda candidate: contextlib.nullcontext(Worker(asked, next(runs))))
    effort = Effort(warmup_s=0.7, seconds=8.0, rounds=2, min_iterations=9)
    (found,) = measure_processes([Candidate(Path("m"), "onnxruntime", (3, 8, 8))], effort=effort)
    assert asked == [{"seconds": s, "min_iterations": 9} for s in (0.7, 4.0)] * 2
    assert found.metrics["mean_ms"].value == pytest.approx(2.0)
    assert found.metrics["p50_ms"].n == 200


def test_a_measuring_process_gets_its_threads(monkeypatch):
    given_environment, given_first, given_threads = {}, {}, []

    def popen(words, env, **more):
        given_environment.update(env)
        return mock.MagicMock()

    monkeypatch.setattr(benchmark.subprocess, "Popen", popen)
    monkeypatch.setattr(benchmark._Worker, "ask", lambda worker, first: given_first.update(first) or {"options": {}})
    with benchmark._worker(Candidate(Path("m"), "onnxruntime", (3, 8, 8), threads=3)):
        assert (given_environment["OMP_NUM_THREADS"], given_first["threads"]) == ("3", 3)

    def runner(path, *, threads, batch):
        given_threads.append(threads)
        return contextlib.nullcontext(mock.Mock(batch=None, options={}))

    monkeypatch.setattr(benchmark, "load_backend", lambda name: mock.Mock(runner=runner))
    benchmark._serve(io.StringIO(json.dumps({**given_first, "shape": [3, 8, 8]}) + "\n"), io.StringIO())
    assert given_threads == [3]


def test_a_file_made_for_one_batch_is_read_with_that_batch(tmp_path):
    """As torch writes ``x.view(x.size(0), -1)``: the batch stands in a Reshape."""
    weights = [
        numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w"),
        numpy_helper.from_array(np.ones((4, 10), np.float32), "v"),
        numpy_helper.from_array(np.array([8, -1]), "rows"),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"]),
        helper.make_node("GlobalAveragePool", ["y"], ["p"]),
        helper.make_node("Reshape", ["p", "rows"], ["f"]),
        helper.make_node("MatMul", ["f", "v"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [8, 3, 6, 6])],
        [helper.make_tensor_value_info("z", 1, [8, 10])],
        weights,
    )
    path = tmp_path / "eight.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    found = kernels_of(path)
    assert found.batch == 8
    shapes = {k.kind: (k.pixels, k.in_width, k.width) for k in found.kernels}
    assert shapes["conv"] == (16, 3, 4)
    assert shapes["linear"] == (1, 4, 10)
