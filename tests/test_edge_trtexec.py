"""trtexec: command lines by version, and every format it prints."""

import json
import re

import pytest

from edge_targets.trtexec import (
    BuildOptions,
    InputShapes,
    TimingOptions,
    build_command,
    profile_command,
    quoted,
    timing_command,
)
from edge_targets.trtexec_log import parse_log, read_layer_info, read_profile, read_times
from rescompress.core.errors import ModelFileError, TargetError

SHAPES = InputShapes("input", (3, 224, 224), 1, 4, 8)


@pytest.mark.parametrize(
    ("version", "has", "lacks"),
    [
        (
            "8.2.1",
            {"--int8", "--fp16", "--buildOnly", "--workspace=1024"},
            {"--memPoolSize", "--skipInference", "--stronglyTyped"},
        ),
        (
            "8.5.2",
            {"--int8", "--fp16", "--buildOnly", "--memPoolSize=workspace:1024"},
            {"--workspace", "--skipInference", "--stronglyTyped"},
        ),
        ("8.6.2", {"--int8", "--fp16", "--skipInference"}, {"--workspace", "--buildOnly", "--stronglyTyped"}),
        ("10.3.0", {"--int8", "--fp16", "--skipInference"}, {"--workspace", "--buildOnly", "--stronglyTyped"}),
        ("10.13.3", {"--stronglyTyped", "--skipInference"}, {"--int8", "--fp16", "--workspace", "--buildOnly"}),
        ("10.16.2", {"--stronglyTyped", "--skipInference"}, {"--int8", "--fp16", "--workspace", "--buildOnly"}),
        ("11.1.0", {"--skipInference"}, {"--int8", "--fp16", "--best", "--workspace", "--buildOnly", "--stronglyTyped"}),
    ],
)
def test_build_flags_by_version(version, has, lacks):
    command = build_command(version, "m.onnx", "m.engine", BuildOptions("int8"))
    assert has <= set(command)
    assert not lacks & {c.split("=")[0] for c in command}


def test_precisions_profiles_and_the_rest():
    assert "--fp16" in build_command("8.6", "m", "e", BuildOptions("fp16"))
    assert not {"--fp16", "--int8"} & set(build_command("8.6", "m", "e", BuildOptions("fp32")))
    full = BuildOptions("int8", shapes=SHAPES, timing_cache="t.cache", dla_core=1, sparsity=True)
    command = build_command("10.3", "m", "e", full, layer_info="l.json")
    for flag in (
        "--minShapes=input:1x3x224x224",
        "--optShapes=input:4x3x224x224",
        "--maxShapes=input:8x3x224x224",
        "--timingCacheFile=t.cache",
        "--sparsity=enable",
        "--useDLACore=1",
        "--allowGPUFallback",
        "--exportLayerInfo=l.json",
        "--profilingVerbosity=detailed",
    ):
        assert flag in command
    with pytest.raises(TargetError, match="DLA"):
        build_command("10.13", "m", "e", BuildOptions("int8", dla_core=0))


@pytest.mark.parametrize("version", ["8.2", "8.5", "10.3", "11.1"])
def test_every_version_times_the_same_thing(version):
    command = timing_command(version, "e", TimingOptions(shapes=SHAPES, batch=8), times="t.json")
    assert {
        "--noDataTransfers",
        "--useSpinWait",
        "--useCudaGraph",
        "--shapes=input:8x3x224x224",
        "--exportTimes=t.json",
    } <= set(command)
    profile = profile_command(version, "e", TimingOptions(), profile="p.json")
    assert {"--dumpProfile", "--separateProfileRun", "--exportProfile=p.json"} <= set(profile)


def test_odd_file_names_survive_the_shell():
    line = quoted(build_command("10.3", 'my model\'s "x".onnx', "e", BuildOptions("fp16")))
    assert "'--onnx=my model'\"'\"'s \"x\".onnx'" in line


NEW = """&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec --loadEngine=m.plan
[01/01/1970-00:00:59] [I] Selected Device: Orin
[01/01/1970-00:00:59] [I] SMs: 8
[01/01/1970-00:00:59] [I] Application Compute Clock Rate: 0.625 GHz
[01/01/1970-00:01:02] [V] Throughput: the observed throughput computed by dividing the number of queries by the walltime.
[01/01/1970-00:01:02] [I] Throughput: 417.3 qps
[01/01/1970-00:01:02] [I] Latency: min = 2.4 ms, max = 2.9 ms, mean = 2.5 ms, median = 2.5 ms, percentile(90%) = 2.6 ms
[01/01/1970-00:01:02] [I] GPU Compute Time: min = 2.31 ms, max = 2.8 ms, mean = 2.41 ms, median = 2.4 ms, \
percentile(90%) = 2.5 ms, percentile(95%) = 2.6 ms, percentile(99%) = 2.7 ms
[01/01/1970-00:01:02] [W] * GPU compute time is unstable, with coefficient of variance = 6.5%.
&&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec --loadEngine=m.plan
[W] a warning on stderr may follow
"""
OLD = """[06/17/2021-18:54:01] [I] Host Latency
[06/17/2021-18:54:01] [I] min: 10.1 ms (end to end 10.2 ms)
[06/17/2021-18:54:01] [I] GPU Compute
[06/17/2021-18:54:01] [I] min: 9.0 ms
[06/17/2021-18:54:01] [I] max: 9.9 ms
[06/17/2021-18:54:01] [I] mean: 9.2 ms
[06/17/2021-18:54:01] [I] median: 9.1 ms
[06/17/2021-18:54:01] [I] percentile: 9.8 ms at 99%
"""


def test_a_log_of_10_3():
    log = parse_log(NEW)
    assert log.status == "passed"
    assert log.version == (10, 3)
    assert log.throughput_qps == 417.3
    assert (log.gpu_compute.median, log.gpu_compute.percentiles[99.0]) == (2.4, 2.7)
    assert log.latency.minimum == 2.4
    assert log.spread == pytest.approx(0.065)
    assert (log.device, log.sm_count, log.clock_mhz) == ("Orin", 8, 625)


def test_a_log_without_timestamps_or_equal_signs():
    log = parse_log("GPU Compute Time: min = 2.31 ms, max 2.8 ms, mean 2.41 ms, median = 2.4 ms, percentile(99%) = 2.7 ms")
    assert (log.gpu_compute.maximum, log.gpu_compute.mean) == (2.8, 2.41)
    assert log.status == "incomplete"


def test_a_log_of_7():
    log = parse_log(OLD)
    assert (log.gpu_compute.minimum, log.gpu_compute.median, log.gpu_compute.percentiles) == (9.0, 9.1, {99.0: 9.8})
    assert log.latency.minimum == 10.1


def test_a_run_that_died_is_no_success():
    died = parse_log(NEW.split("&&&& PASSED")[0] + "trtexec: graph.cpp:1059: Assertion `0 && false' failed.\n")
    assert died.status == "incomplete"
    assert "Assertion" in died.errors[0]
    failed = parse_log("[E] Error[10]: no kernel\n&&&& FAILED TensorRT.trtexec [TensorRT v8502] # trtexec")
    assert (failed.status, failed.version, failed.errors) == ("failed", (8, 5), ("Error[10]: no kernel",))


@pytest.mark.parametrize(
    "table",
    [
        "[I]           Layer   Time (ms)   Avg. Time (ms)   Median Time (ms)   Time %\n"
        "[I]   conv1 + relu      442.05           0.0102             0.0101     32.4\n"
        "[I]           Total     1365.00           0.0306             0.0303    100.0\n",
        "[I]    Time(ms)     Avg.(ms)   Median(ms)   Time(%)   Layer\n"
        "[I]      442.05       0.0102       0.0101      32.4   conv1 + relu\n"
        "[I]     1365.00       0.0306       0.0303     100.0   Total\n",
    ],
)
def test_profile_tables_with_the_name_first_or_last(table):
    (row,) = parse_log(table).layers
    assert (row.name, row.average_ms, row.percent) == ("conv1 + relu", 0.0102, 32.4)


def test_the_published_logs(shared):
    folder = shared / "reference" / "trtexec_logs"
    if not folder.is_dir():
        pytest.skip("no published logs here")
    seen = 0
    for path in sorted(folder.glob("trt*.txt")):
        if "json" in path.name or "help" in path.name:
            continue
        text = path.read_text(errors="replace")
        log = parse_log(text)
        plain = [line for line in text.splitlines() if "[V]" not in line]
        qps = [m[1] for line in plain if (m := re.search(r"Throughput: ([\d.]+) qps", line))]
        assert log.throughput_qps == (float(qps[-1]) if qps else None), path.name
        ends = [m[1].lower() for line in plain if (m := re.match(r"&&&& (PASSED|FAILED)", line))]
        assert log.status == (ends[-1] if ends else "incomplete"), path.name
        compute = [line for line in plain if "GPU Compute Time: min" in line]
        if compute:
            numbers = [float(n) for n in re.findall(r"= ([\d.]+) ms", compute[-1])]
            stats = log.gpu_compute
            assert [stats.minimum, stats.maximum, stats.mean, stats.median, *stats.percentiles.values()] == numbers, path.name
        versions = re.findall(r"\[TensorRT v(\d+)\]", text)
        if versions:
            digits = versions[0]
            expected = (int(digits[:-4]), int(digits[-4:-2])) if len(digits) == 6 else (int(digits[0]), int(digits[1]))
            assert log.version == expected, path.name
        seen += 1
    assert seen >= 14
    assert parse_log((folder / "trt7_multiline_issue1310_excerpt.txt").read_text()).gpu_compute.median == 9.17056
    assert parse_log((folder / "trt8.4.10_agx_orin_build_fail_excerpt.txt").read_text()).errors
    assert parse_log((folder / "trt10.16.1_h100_result-04.txt").read_text()).skipped_inference
    assert parse_log((folder / "trt10.16.1_h100_result-08_enqueuebound.txt").read_text()).bound_by_enqueue
    assert len(parse_log((folder / "trt8.5.10_agx_orin_mnist_best_excerpt.txt").read_text()).layers) >= 4
    names = [x.name for x in parse_log((folder / "trt10.16.1_h100_result-05.txt").read_text()).layers]
    assert "node_conv2d_myl0_1" in names
    assert any(" " in n for n in names)
    info = read_layer_info(folder / "trt10.16.1_exportLayerInfo.json.txt")
    assert info[0].nodes == ("node_conv2d", "node_relu")
    assert info[0].weights == "fp32"


def test_json_files(tmp_path):
    times = tmp_path / "t.json"
    times.write_text(json.dumps([{"startComputeMs": 0, "computeMs": 1.5, "latencyMs": 9}, {"computeMs": 1.7}]))
    assert read_times(times) == [1.5, 1.7]
    profile = tmp_path / "p.json"
    profile.write_text(json.dumps([{"count": 3}, {"name": "a", "timeMs": 3, "averageMs": 1.0, "percentage": 100}]))
    assert read_profile(profile)[0].average_ms == 1.0
    info = tmp_path / "l.json"
    info.write_text(json.dumps({"Layers": ["conv1", "conv2"], "Bindings": ["input"]}))
    assert [x.name for x in read_layer_info(info)] == ["conv1", "conv2"]
    times.write_text("[]")
    with pytest.raises(ModelFileError, match="no run"):
        read_times(times)
    times.write_text('[{"computeMs"')
    with pytest.raises(ModelFileError):
        read_times(times)


def test_the_last_word_of_a_log_decides():
    passed = "&&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec"
    assert parse_log(f"{passed}\n{passed.replace('PASSED', 'FAILED')}").status == "failed"
    assert parse_log(f"{passed.replace('PASSED', 'FAILED')}\n{passed}").status == "passed"


def test_a_log_tells_size_and_time_of_the_build():
    log = parse_log("[I] Engine built in 41.5 sec.\n[I] Created engine with size: 25.3 MiB\n")
    assert (log.build_s, log.engine_mib) == (41.5, 25.3)


def test_a_profile_tells_the_share_of_a_layer(tmp_path):
    rows = [{"count": 3}, {"name": "a", "timeMs": 3, "averageMs": 1.0, "percentage": 25.5}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (row,) = read_profile(tmp_path / "p.json")
    assert (row.name, row.average_ms, row.percent) == ("a", 1.0, 25.5)
