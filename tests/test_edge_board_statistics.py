"""Figures beside the latency of a warm stream: series of tegrastats, the plan of a soak, which command lines measure what."""

import io
import json
import math
import statistics
import sys
from contextlib import redirect_stdout
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_targets.benchmark import Conditions, summarize
from edge_targets.board_statistics import (
    EDGE_S,
    PART_S,
    TRACE_ROWS,
    Photos,
    conditions,
    jitter,
    median_of_builds,
    parts_of,
    soak_details,
    soak_note,
    soak_ratio,
    steps,
    wall_ms,
)
from edge_targets.tegrastats import Reading, parse_trace
from edge_targets.tensorrt_versions import capabilities
from edge_targets.trtexec import TimingOptions
from rescompress.core.described import duration
from rescompress.core.errors import BadInput, EnvironmentFailed
from rescompress.core.settings import DeploySettings

ORIN = (
    "11-28-2026 10:00:0{s} RAM 2448/7620MB (lfb 4x4MB) SWAP 0/3810MB (cached 0MB) CPU [1%@729,off] EMC_FREQ 0%@2133 "
    "GR3D_FREQ {load}%@[{mhz},{mhz}] NVDEC off cpu@49.4C soc2@46.1C gpu@{c}C tj@50C VDD_IN {mw}mW/4900mW"
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (ORIN.format(s=0, load=45, mhz=1300, c=54.5, mw=5000), Reading(0, 45, 1300, 54.5, 5, 2448)),
        ("RAM 1/2MB GR3D_FREQ 45%@[0,918] GPU@54.5C", Reading(0, 45, 918, 54.5, None, 1)),
        ("RAM 1000/3956MB GR3D_FREQ 99%@921 PLL@30C CPU@33C GPU@31C POM_5V_IN 2145/2100", Reading(0, 99, 921, 31, 2.145, 1000)),
        ("GR3D_FREQ 0% cv0@-256C GPU@-256C tj@48.125C", Reading(0, 0, None, 48.125, None, None)),
        ("GR3D_FREQ @[1575,1575,1575] VIN 30000mW/30000mW", Reading(0, None, 1575, None, 30, None)),
        ("GR3D_FREQ x%@[a] GPU@hotC VDD_IN 1e9mW/2mW", Reading(0)),
        ("notGPU@50C GPU@50Cx", Reading(0)),
    ],
    ids=["Orin", "one cluster off", "Nano", "sensor off", "Thor", "garbage", "other words"],
)
def test_a_line_of_tegrastats(line, expected):
    assert parse_trace(line, interval_s=1.0) == [expected]


def test_a_line_that_tells_nothing_takes_its_time():
    assert [r.s for r in parse_trace("RAM 1/2MB\n\n???\nRAM 2/2MB\n", interval_s=0.5)] == [0, 0.5, 1.0]


@given(st.integers(10, 24 * 3600))
def test_a_soak_is_cut_into_parts_that_take_as_long_as_it(seconds):
    parts = parts_of(seconds)
    assert sum(parts) == seconds
    assert parts[0] == parts[-1] == min(EDGE_S, seconds // 2)
    assert all(1 <= p <= PART_S for p in parts)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("24h", 86400)])
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "9s", "25h", "-30m", "1e3s", "30 minutes", "\u0663\u0660m", "nanm", "0.1s"])
def test_durations_that_are_none(text):
    with pytest.raises(BadInput, match="no time from") as e:
        duration(text)
    assert "30m" in e.value.remedy


FULL = DeploySettings(soak=600, cold_start=True, streams=2, end_to_end=True, runs=2)


def planned(version, flags=frozenset(), settings=FULL):
    return steps(capabilities(version), flags, settings, "/w/m.engine", TimingOptions(duration_s=10), executable="trtexec")


@pytest.mark.parametrize("version", ["8.2.1", "8.6.2", "10.3.0", "11.4.1"])
def test_every_version_is_asked_in_its_own_flags(version):
    todo, notes = planned(version)
    assert notes == []
    by = {
        what: [s for s in todo if s.what == what] for what in ("end_to_end", "contention", "cold_start", "first_frame", "soak")
    }
    assert {k: len(v) for k, v in by.items()} == {
        "end_to_end": 2, "contention": 2, "cold_start": 5, "first_frame": 2, "soak": 4,
    }  # fmt: skip
    new = version.startswith("11")
    for s in todo:
        words = s.command
        copies = "--noDataTransfers" not in words
        assert copies == (s.what == "end_to_end")
        assert ("--includeDataTransfers" in words) == (new and copies)
        assert ("--useCudaGraph" in words) == (s.what != "cold_start")
        assert ("--noCudaGraph" in words) == (new and s.what == "cold_start")
        assert any(w.startswith("--idleTime=") for w in words) == (s.what == "first_frame")
        streams = [w for w in words if "treams=" in w]
        flag = "--streams=2" if version == "8.2.1" else "--infStreams=2"
        assert streams == ([flag] if s.what == "contention" else [])
        assert len([w for w in words if w.startswith("--avgRuns")]) == 1
    assert [s.what for s in todo][-4:] == ["soak"] * 4
    lasts = [int(w.split("=")[1]) for s in by["soak"] for w in s.command if w.startswith("--duration")]
    assert lasts == parts_of(600)
    assert [s.times is not None for s in by["soak"]] == [True, False, False, True]


def test_flags_that_trtexec_names_win_over_its_version():
    flags = frozenset({"--streams", "--dataTransfers", "--idleTime"})
    todo, _ = planned("11.4.1", flags)
    words = {w for s in todo for w in s.command}
    assert {"--streams=2", "--dataTransfers"} <= words
    assert not words & {"--infStreams=2", "--includeDataTransfers", "--noCudaGraph"}


def test_a_figure_that_this_trtexec_cannot_give_is_named():
    todo, notes = planned("10.3", frozenset({"--infStreams"}))
    assert not [s for s in todo if s.what == "first_frame"]
    assert "--idleTime" in notes[0]


@pytest.mark.parametrize("dla", [None, 1])
def test_the_way_from_files_is_timed_by_what_classifies_there(tmp_path, dla):
    photos = Photos((tmp_path / "a b.jpg", tmp_path / "c.png"), {}, "image files: 2 of 640x480 pixels, digest 0123")
    timing = TimingOptions(duration_s=10, batch=4, dla_core=dla)
    settings = DeploySettings(photo=tuple(map(str, photos.files)), runs=3)
    assert settings.more
    todo, notes = steps(capabilities("10.3"), frozenset(), settings, "/w/m.engine", timing, executable="trtexec")
    assert notes == []
    assert [(s.what, s.number) for s in todo] == [("from_file", 1), ("from_file", 2), ("from_file", 3)]
    words = todo[0].command
    assert words[:5] == ("python3", "/w/infer.py", "/w/m.engine", "/w/photo0", "/w/photo1")
    assert {"--about=/w/model.json", "--batch=4", "--time=10", f"--times={todo[0].times}"} <= set(words)
    assert ("--dla=1" in words) == (dla is not None)
    ((name, told),) = conditions(settings, photos).items()
    assert name == "from_file_ms"
    assert "digest 0123" in told


def test_nothing_is_planned_that_was_not_asked_for():
    assert planned("10.3", settings=DeploySettings()) == ([], [])
    assert not DeploySettings().more
    assert {s.what for s in planned("10.3", settings=DeploySettings(end_to_end=True))[0]} == {"end_to_end"}


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9))
def test_the_build_that_is_kept_is_in_the_middle(medians):
    kept = medians[median_of_builds(medians)]
    assert kept == statistics.median_low(medians)


def pooled(samples):
    return summarize(samples, Conditions(device="d", runtime="tensorrt", batch=1))


def test_jitter_is_p99_less_p50_of_the_pool_and_of_each_process():
    first, second = [1.0] * 98 + [2.0] * 2, [1.0] * 90 + [3.0] * 10
    metrics, runs = jitter([first, second], pooled(first + second))
    assert metrics["jitter_ms"].value == pytest.approx(pooled(first + second)["p99_ms"].value - 1.0)
    assert runs == {"p99_ms_runs": [2.0, 3.0], "jitter_ms_runs": [1.0, 2.0]}
    assert "jitter_ms_runs" not in jitter([[1.0] * 5], pooled([1.0] * 5))[1]


def test_the_ratio_of_a_soak_and_its_band():
    first, last = [1.0 + i / 1000 for i in range(100)], [1.2 + i / 1000 for i in range(100)]
    found = soak_ratio(first, last, pooled(first)["p50_ms"])
    assert found.value == pytest.approx(statistics.median(last) / statistics.median(first))
    assert found.low < found.value < found.high
    assert found.unit == "ratio"


def trace(loads, mhz, celsius, mw):
    return "\n".join(ORIN.format(s=i % 10, load=load, mhz=mhz, c=celsius, mw=mw) for i, load in enumerate(loads)) + "\n"


def test_a_soak_that_throttles_is_told():
    traces = [trace([0, *[99] * 9], 1020, 50, 9000), trace([99] * 30, 900, 70, 8000), trace([*[99] * 9, 0], 816, 80, 7000)]
    found = soak_details(50, [(10, 1.0), (30, 1.1), (10, 1.25)], traces)
    assert found["clock_mhz"] == [1020, 816]
    assert found["temperature_c"] == [50, 80]
    assert found["hottest_c"] == 80
    assert found["power_w"] == [9, 7]
    assert found["throttled"] is True
    assert [p["from_s"] for p in found["parts"]] == [0, 10, 40]
    assert len(found["trace"]["rows"]) == 50
    assert found["trace"]["rows"][0] == [0, 0, 1020, 50, 9, 2448]
    assert "1020 to 816 MHz" in soak_note(found, 1.25)
    assert "the GPU clock fell" in soak_note(found, 1.25)
    json.dumps(found, allow_nan=False)


def test_without_tegrastats_nothing_of_it_is_claimed():
    found = soak_details(120, [(60, 1.0), (60, math.nan)], ["", ""])
    assert found["throttled"] is None
    assert found["clock_mhz"] is found["temperature_c"] is found["power_w"] is found["hottest_c"] is None
    assert found["parts"][1] == {"from_s": 60, "seconds": 60, "p50_ms": None}
    assert found["trace"]["rows"] == []
    assert "unknown" in soak_note(found, 1.0)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("lines", [1, TRACE_ROWS, TRACE_ROWS + 1, 4 * TRACE_ROWS - 1])
def test_a_long_trace_is_averaged_not_cut(lines):
    text = "\n".join(f"RAM {i}/99999MB" for i in range(lines))
    rows = soak_details(120, [(60, 1.0), (60, 1.0)], [text, ""])["trace"]["rows"]
    assert len(rows) <= TRACE_ROWS
    each = math.ceil(lines / TRACE_ROWS)
    assert rows[0][-1] == pytest.approx(statistics.fmean(range(min(each, lines))), abs=1e-3)
    assert rows[-1][0] + each >= lines
    assert rows[-1][-1] >= lines - 1 - each


def test_the_clock_around_a_process(tmp_path):
    log = tmp_path / "log"
    log.write_text("&&&& PASSED\n@@wall 1700000000000000000 1700000000250000000\n")
    assert wall_ms(log) == 250
    for text in ("", "@@wall 1700000000N 1700000001N\n", "@@wall 1700000000250000000 1700000000000000000\n"):
        log.write_text(text)
        with pytest.raises(EnvironmentFailed, match="nanoseconds"):
            wall_ms(log)


def run(*words):
    from rescompress.cli.app import main

    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["rescompress", *map(str, words)]),
        redirect_stdout(out),
        pytest.raises(SystemExit) as e,
    ):
        main()
    return e.value.code or 0, out.getvalue()


def test_a_dry_run_shows_all_of_them(tmp_path):
    from test_edge_deploy import write_onnx

    model = write_onnx(tmp_path / "m.onnx")
    plain = run("deploy", model, "--dry-run", "--target", "jetson", "--json")
    assert plain[0] == 0
    more = ("--builds", "3", "--soak", "5m", "--cold-start", "--streams", "2", "--end-to-end")
    code, text = run("deploy", model, "--dry-run", "--target", "jetson", "--json", *more)
    assert code == 0
    lines = json.loads(text)["commands"]
    assert sum("--onnx=" in line for line in lines) == 3
    assert len({w for line in lines for w in line.split() if w.startswith("--timingCacheFile")}) == 3
    assert sum("--idleTime=" in line for line in lines) == 1
    assert sum("--infStreams=2" in line for line in lines) == 1
    assert sum("--duration=60 " in line + " " for line in lines) == 2
    assert not [line for line in json.loads(plain[1])["commands"] if "idle" in line or "build1" in line]
