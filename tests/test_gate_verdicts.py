"""The gate on whole runs: verdicts, exit codes, refusals, and what it writes for machines."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from command_line import Command
from hypothesis import given
from hypothesis import strategies as st
from report_factory import CLASSES, digest, latency, outcomes_with, write_run

from rescompress.core.details import TargetDetails
from rescompress.core.errors import BadInput, ConfigError
from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.metric import accuracy, counted
from rescompress.core.outcomes import Outcomes
from rescompress.show.gate import GateReport, Limits, Run, judge, limits_of, load_limits, load_run
from rescompress.show.gate.checks import _outcomes, baseline_of
from rescompress.show.gate.render import gitlab_code_quality, to_junit, to_markdown
from rescompress.show.report.history import history, load_runs
from rescompress.show.track import log as track

STEADY = [1.00, 1.01, 0.99, 1.02, 0.98]


@pytest.fixture
def cli(rescompress: Command) -> Command:
    return lambda *args, **variables: rescompress("gate", *args, code=None, **{"COLUMNS": "300", **variables})


def pair_of_runs(folder: Path, n: int = 5000, n_lost: int = 0, n_won: int = 0, **changes: Any) -> tuple[Path, Path]:
    """Write a baseline and a candidate that differs from it in so many samples, and in `changes`."""
    base, cand = outcomes_with(n, n_lost, n_won)
    write_run(folder / "base", n=n, final=base, runs_ms=STEADY)
    write_run(folder / "cand", n=n, final=cand, **{"runs_ms": STEADY, **changes})
    return folder / "cand", folder / "base"


def verdicts(report: GateReport) -> dict[str, str]:
    return {c.name: c.verdict for c in report.checks}


def judged(pair: tuple[Path, Path], **limits: Any) -> GateReport:
    return judge(load_run(pair[0]), load_run(pair[1]), Limits(**limits))


@pytest.mark.parametrize(
    ("n", "n_lost", "n_won", "verdict", "code"),
    [(5000, 30, 30, "pass", 0), (5000, 250, 50, "fail", 3), (360, 8, 4, "inconclusive", 6), (360, 0, 0, "pass", 0)],
)
def test_accuracy_decides_the_exit_code(
    cli: Command, tmp_path: Path, n: int, n_lost: int, n_won: int, verdict: str, code: int
) -> None:
    candidate, baseline = pair_of_runs(tmp_path, n, n_lost, n_won)
    done = cli(candidate, "--baseline", baseline, "--json")
    assert done.returncode == code, done.stderr
    document = json.loads(done.stdout)
    assert document["verdict"] == verdict
    check = document["checks"][0]
    assert check["name"] == "accuracy"
    assert check["value"] == pytest.approx(100 * (n_lost - n_won) / n)
    assert check["interval"][0] <= check["bounds"][0] <= check["value"] <= check["bounds"][1] <= check["interval"][1]
    assert (check["samples_needed"] is not None) == (verdict == "inconclusive")


def test_inconclusive_can_be_decided_beforehand(cli: Command, tmp_path: Path) -> None:
    candidate, baseline = pair_of_runs(tmp_path, 360, 8, 4)
    assert cli(candidate, "-b", baseline, "--on-inconclusive", "pass").returncode == 0
    done = cli(candidate, "-b", baseline, "--on-inconclusive", "fail")
    assert done.returncode == 3
    assert "inconclusive" in done.stderr
    assert "samples would decide" in cli(candidate, "-b", baseline).stdout


def test_latency_is_judged_over_processes(tmp_path: Path) -> None:
    slower = [1.2 * r for r in STEADY]
    assert verdicts(judged(pair_of_runs(tmp_path / "a", runs_ms=slower)))["latency:cpu"] == "fail"
    noisy = [1.0, 1.3, 0.8, 1.1, 0.95]
    assert verdicts(judged(pair_of_runs(tmp_path / "b", runs_ms=noisy)))["latency:cpu"] == "inconclusive"
    assert verdicts(judged(pair_of_runs(tmp_path / "c", runs_ms=[*STEADY, 1.5])))["latency:cpu"] == "pass"
    write_run(tmp_path / "same", runs_ms=noisy)
    same = next(c for c in judged((tmp_path / "same", tmp_path / "same")).checks if c.name == "latency:cpu")
    assert (same.verdict, same.interval) == ("pass", (1.0, 1.0)), "a run is not slower than itself"
    few = judged(pair_of_runs(tmp_path / "d", runs_ms=STEADY[:4]))
    assert verdicts(few)["latency:cpu"] == "inconclusive"
    assert "4 processes were measured, 5 are needed" in few.checks[2].message


def test_what_was_measured_on_a_board_is_judged(tmp_path: Path) -> None:
    """A run whose engine was deployed has a prediction for the board, too; measurements are compared with measurements."""

    def deployed(name: str, factor: float) -> Path:
        manifest = write_run(tmp_path / name)
        cpu = manifest.stage("target:cpu")
        assert cpu is not None
        runs = [factor * r for r in STEADY]
        on_board = {"device": "Jetson Orin Nano 8GB", "runtime": "tensorrt", "value": runs[2]}
        metrics = {"p50_ms": cpu.metrics["p50_ms"].model_copy(update=on_board)}
        stage = StageResult(stage="deploy:jetson", status="done", metrics=metrics, details={"latency_runs": runs})
        manifest.with_stage(stage).save(tmp_path / name)
        return tmp_path / name

    base, same, slow = deployed("base", 1.0), deployed("same", 1.0), deployed("slow", 3.0)
    assert verdicts(judged((same, base)))["latency:jetson"] == "pass"
    assert verdicts(judged((slow, base)))["latency:jetson"] == "fail"
    write_run(tmp_path / "predicted")
    check = next(c for c in judged((slow, tmp_path / "predicted")).checks if c.name == "latency:jetson")
    assert (check.verdict, "predicted" in check.baseline) == ("pass", True), "a prediction is compared with a prediction"


def _board(name: str, precision: str, n_right: int, size_bytes: int | None = None, *, quantized: int = 3000) -> Run:
    """Return a run whose INT8 network has 3,000 of 5,000 right, deployed in a precision with another accuracy."""

    def stage(name: str, right: int, size: int | None, **facts: Any) -> StageResult:
        inline = Outcomes.pack([True] * right + [False] * (5000 - right), "samples").model_dump()
        metrics = {"top1": accuracy(right, 5000, runtime="any")}
        metrics |= {} if size is None else {"size_bytes": counted(size, "bytes")}
        if facts:
            metrics["p50_ms"] = latency(1.0, device="jetson", runtime="tensorrt", precision=facts["precision"])
        return StageResult(stage=name, status="done", metrics=metrics, details={"outcomes": inline, **facts})

    stages = (
        stage("dense", 4500, 100_000_000),
        stage("quantize", quantized, 25_000_000),
        stage("deploy:jetson", n_right, size_bytes, precision=precision, latency_runs=STEADY),
    )
    return Run(name, Path(), Manifest(stages=stages))


def test_accuracy_size_and_latency_are_of_one_engine() -> None:
    """The faster engine of a board may be the float one, whose file is not that of the stage before."""
    base = _board("base", "int8", 4490, quantized=4490)
    report = judge(_board("cand", "fp16", 4500), base, Limits())
    checks = {c.name: c for c in report.checks}
    assert report.verdict == checks["size"].verdict == "inconclusive"
    assert checks["size"].message == "cannot be compared: cand has no size of deploy:jetson (fp16)"
    assert (checks["size"].baseline, checks["size"].candidate) == ("25.0 MB", "")
    told = "the candidate's deploy:jetson computes in fp16, the baseline's deploy:jetson in int8"
    for name in ("accuracy", "latency:jetson"):
        assert checks[name].message.endswith(told)
        assert f"{name}: {told}" in report.notes
    reverse = judge(base, _board("cand", "fp16", 4500), Limits())
    assert "cand has no size of" in next(c.message for c in reverse.checks if c.name == "size")
    sized = judge(_board("cand", "fp16", 4500, 50_000_000), base, Limits())
    size = next(c for c in sized.checks if c.name == "size")
    assert (size.verdict, size.value) == ("fail", 2.0)
    alike = judge(_board("cand", "int8", 4490, quantized=4490), base, Limits())
    assert (alike.verdict, alike.notes) == ("pass", ()), "the INT8 engine is of the INT8 file"


def test_a_latency_of_another_engine_than_the_accuracy_is_told() -> None:
    run = _board("run", "fp16", 4500)
    deployed = run.manifest.stages[-1]
    timed = deployed.model_copy(update={"metrics": {"p50_ms": deployed.metrics["p50_ms"]}})
    run = Run("run", Path(), run.manifest.with_stage(timed))
    assert judge(run, run, Limits()).notes == ("latency on jetson is of fp16, accuracy and size are of int8",)


def test_a_baseline_file_keeps_what_its_stages_compute_in() -> None:
    exported = StageResult(stage="export", status="done", details={"precision": "int8+fp16", "arch": "x"})
    saved = baseline_of(Run("r", Path(), Manifest(stages=(exported,), config_file="../../me/x.yaml", config={"data": "/me/x"})))
    assert saved.stages[0].details.document() == {"precision": "int8+fp16"}
    assert "me/" not in saved.model_dump_json(), "a file that is committed says nothing of folders"


def test_a_machine_that_drifted_between_the_runs_is_told_from_a_slower_network(cli: Command, tmp_path: Path) -> None:
    """Each run measured the same dense network in turns with its own: today everything takes 1.3 times as long."""
    waves = [1.0, 1.4, 1.1, 0.9, 1.25]
    own = [0.5 * w for w in waves]
    today = [1.3 * w for w in (1.05, 0.9, 1.3, 1.0, 1.1)]
    changes = {"runs_ms": [0.5 * w for w in today], "dense_runs_ms": today}
    base, cand = outcomes_with(5000, 0, 0)
    write_run(tmp_path / "base", n=5000, final=base, runs_ms=own, dense_runs_ms=waves)

    def check(name: str, **more: Any) -> Any:
        write_run(tmp_path / name, n=5000, final=cand, **{**changes, **more})
        report = judged((tmp_path / name, tmp_path / "base"))
        return next(c for c in report.checks if c.name == "latency:cpu")

    same = check("same")
    assert (same.verdict, round(same.value, 6)) == ("pass", 1.0)
    assert "measured in turns with each (1.241 times its earlier self)" in same.message
    slower = check("slower", runs_ms=[0.6 * w for w in today])
    assert (slower.verdict, round(slower.value, 6)) == ("fail", 1.2)
    assert check("other-runtime", openvino="2027.0.0").verdict != "pass", (
        "a slower runtime must not hide behind the dense network"
    )
    assert cli(tmp_path / "base", "--save-baseline", tmp_path / "b.json").returncode == 0
    assert judged((tmp_path / "same", tmp_path / "b.json")).checks[2] == same


@pytest.mark.parametrize(
    "change",
    [
        {"device": "other cpu"},
        {"runtime": "onnxruntime"},
        {"threads": 1},
        {"batch": 8},
        {"power_mode": "15W"},
        {"provenance": "predicted"},
    ],
)
def test_latency_is_compared_only_between_equals(tmp_path: Path, change: dict[str, Any]) -> None:
    pair = pair_of_runs(tmp_path)
    _replace_latency(pair[0], "target:cpu", latency(1.0, **change))
    report = judged(pair)
    assert verdicts(report)["latency:cpu"] == "inconclusive"
    assert next(iter(change)).replace("_", " ") in next(c.message for c in report.checks if c.name == "latency:cpu")


def test_predictions_are_compared_exactly_and_only_by_one_model(tmp_path: Path) -> None:
    pair = pair_of_runs(tmp_path, jetson_ms=0.36)
    check = next(c for c in judged(pair).checks if c.name == "latency:jetson")
    assert (check.verdict, check.interval) == ("fail", None)
    assert check.value == pytest.approx(0.36 / 0.31)
    _replace_latency(pair[0], "target:jetson", latency(0.36, **_jetson(model="roofline-2")))
    assert verdicts(judged(pair))["latency:jetson"] == "inconclusive"


def _jetson(**extra: Any) -> dict[str, Any]:
    return {"provenance": "predicted", "device": "Jetson Orin Nano 8GB", "runtime": "tensorrt", **extra}


def _replace_latency(folder: Path, stage: str, metric: Any) -> None:
    manifest = load_run(folder).manifest
    old = manifest.stage(stage)
    assert old is not None
    manifest.with_stage(old.model_copy(update={"metrics": {**old.metrics, "p50_ms": metric}})).save(folder)


def test_size_and_counts_are_exact(tmp_path: Path) -> None:
    pair = pair_of_runs(tmp_path, size_bytes=273_001, macs=34_000_001, params=229_999)
    report = judged(pair, max_macs=1.0, max_params=1.0)
    found = verdicts(report)
    assert (found["size"], found["macs"], found["params"]) == ("fail", "fail", "pass")
    assert verdicts(judged(pair_of_runs(tmp_path / "edge", size_bytes=273_000)))["size"] == "pass"


def test_a_far_better_candidate_means_a_stale_baseline(tmp_path: Path) -> None:
    pair = pair_of_runs(tmp_path, 5000, 0, 200, size_bytes=100_000, runs_ms=[r / 2 for r in STEADY], jetson_ms=0.2)
    report = judged(pair)
    assert report.verdict == "pass"
    assert report.stale_baseline == ("accuracy", "size", "latency:cpu", "latency:jetson")
    assert judged(pair_of_runs(tmp_path / "same")).stale_baseline == ()


def test_targets_of_one_run_only_are_named(tmp_path: Path) -> None:
    pair = pair_of_runs(tmp_path)
    manifest = load_run(pair[0]).manifest
    manifest.model_copy(update={"stages": tuple(s for s in manifest.stages if s.stage != "target:jetson")}).save(pair[0])
    report = judged(pair)
    assert verdicts(report)["target:jetson"] == report.verdict == "fail"
    assert "the baseline has the latency of target:jetson" in next(
        c.message for c in report.checks if c.name == "target:jetson"
    )
    assert judged(pair, on_missing="inconclusive").verdict == "inconclusive"
    report = judged(pair, on_missing="pass")
    assert "latency:jetson" not in verdicts(report)
    assert report.verdict == "pass"
    assert any("target:jetson is not judged" in note for note in report.notes)
    demanded = judged(pair, max_latency={"jetson": 1.1}, on_missing="pass")
    assert verdicts(demanded)["latency:jetson"] == "inconclusive"
    with pytest.raises(BadInput, match="jetsom"):
        judged(pair, max_latency={"jetsom": 1.1})
    unasked = judged(pair, max_latency={"jetson": None})
    assert unasked.verdict == "pass", "no figure of the target would be judged"
    assert judged(pair[::-1]).verdict == "pass", "a target more is no loss"


@pytest.mark.parametrize("status", ["skipped", "failed"])
def test_a_target_that_came_to_nothing_is_no_pass(cli: Command, tmp_path: Path, status: str) -> None:
    pair = pair_of_runs(tmp_path)
    manifest = load_run(pair[0]).manifest
    manifest.with_stage(StageResult(stage="target:cpu", status=status, reason="openvino is missing")).save(pair[0])  # type: ignore[arg-type]
    done = cli(pair[0], "-b", pair[1])
    assert done.returncode == 3
    assert "openvino is missing" in done.stdout
    assert cli(pair[0], "-b", pair[1], "--on-missing", "pass").returncode == {"skipped": 0, "failed": 3}[status]


def test_the_accuracy_of_every_target_is_judged(tmp_path: Path) -> None:
    """Two runtimes need not give the same answers; one that lost its accuracy must not hide behind the other."""
    good, bad = outcomes_with(5000, 600, 0)
    for name, outcomes in (("base", good), ("cand", bad)):
        write_run(tmp_path / name, n=5000, final=outcomes, runs_ms=STEADY)
        manifest = load_run(tmp_path / name).manifest
        cpu = write_run(tmp_path / "other", n=5000, final=good, runs_ms=STEADY).stage("target:cpu")
        assert cpu is not None
        inline = TargetDetails(**cpu.details.given() | {"outcomes": good.model_dump()})
        moved = {"stage": "target:cpu-ort", "target": "cpu-ort", "outputs": (), "details": inline}
        manifest.with_stage(cpu.model_copy(update=moved)).save(tmp_path / name)
    pair = (tmp_path / "cand", tmp_path / "base")
    assert {k: v for k, v in verdicts(judged(pair)).items() if "accuracy" in k} == {"accuracy": "pass", "accuracy:cpu": "fail"}
    assert verdicts(judged(pair, stage="target:cpu-ort")).keys() & {"accuracy:cpu"} == set(), "one stage alone was asked for"


def test_a_failed_stage_fails_the_gate(tmp_path: Path) -> None:
    pair = pair_of_runs(tmp_path)
    manifest = load_run(pair[0]).manifest
    manifest.with_stage(StageResult(stage="target:rtx-4090", status="failed", reason="the build broke")).save(pair[0])
    assert verdicts(judged(pair))["stage:target:rtx-4090"] == "fail"


def test_a_run_that_is_not_finished_is_not_judged_unless_a_stage_is_named(tmp_path: Path) -> None:
    pair = pair_of_runs(tmp_path)
    manifest = load_run(pair[0]).manifest
    manifest.model_copy(update={"unfinished": ("target:rtx-4090",)}).save(pair[0])
    with pytest.raises(BadInput, match="target:rtx-4090 not reached"):
        judged(pair)
    assert judged(pair, stage="quantize").checks
    manifest.model_copy(update={"unfinished": ("target:rtx-4090",)}).with_stage(
        StageResult(stage="export", status="failed", reason="the disk is full")
    ).save(pair[0])
    assert verdicts(judged(pair))["stage:export"] == "fail"


def test_limits_come_from_yaml_and_flags_win(cli: Command, tmp_path: Path) -> None:
    candidate, baseline = pair_of_runs(tmp_path, 5000, 250, 50)
    limits = tmp_path / "limits.yaml"
    limits.write_text("max_drop: 6\nmax_size: null\nmax_latency: {cpu: 1.2, jetson: null}\nstage: quantize\n")
    done = cli(candidate, "-b", baseline, "--limits", limits, "--json")
    assert done.returncode == 0, done.stderr
    checks = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    assert set(checks) == {"accuracy", "latency:cpu"}
    assert checks["latency:cpu"]["limit"] == 1.2
    assert cli(candidate, "-b", baseline, "--limits", limits, "--max-drop", 1).returncode == 3
    assert cli(candidate, "-b", baseline, "--limits", limits, "--max-drop", "inf", "--max-latency", "inf").returncode == 5


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("max_dorp: 1", "max_drop"),
        ("max_drop: -1", "max_drop"),
        ("max_drop: .nan", "max_drop"),
        ("max_size: 0", "max_size"),
        ("max_latency: {cpu: fast}", "max_latency"),
        ("on_inconclusive: maybe", "on_inconclusive"),
        ("- max_drop", "no mapping"),
        ("max_drop: [", "no YAML"),
    ],
)
def test_bad_limits_are_named(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=word):
        load_limits(path)
    with pytest.raises(ConfigError):
        load_limits(tmp_path / "absent.yaml")


def test_flags_are_checked_like_the_file() -> None:
    with pytest.raises(ConfigError, match="max_size"):
        limits_of({"max_size": -1.0}, where="command line")


# Refusals ---------------------------------------------------------------------------------------------------------------


def _with_outcomes(folder: Path, outcomes: Outcomes) -> Path:
    write_run(folder, n=outcomes.n, final=outcomes, runs_ms=STEADY)
    return folder


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (Outcomes.pack([True] * 999, digest(999), CLASSES), "999 and 1000"),
        (Outcomes.pack([True] * 1000, digest(1000, "test"), CLASSES), "same order"),
        (Outcomes.pack([True] * 1000, digest(1000), (*CLASSES[:9], "truck")), "class 9 is 'truck' and 'class 9'"),
        (Outcomes.pack([True] * 1000, digest(1000), CLASSES[:9]), "9 and 10"),
    ],
)
def test_outcomes_of_other_data_are_refused(cli: Command, tmp_path: Path, other: Outcomes, word: str) -> None:
    base = _with_outcomes(tmp_path / "base", Outcomes.pack([True] * 1000, digest(1000), CLASSES))
    done = cli(_with_outcomes(tmp_path / "cand", other), "-b", base)
    assert done.returncode == 5
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def _break(folder: Path, what: str) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    stages = document["stages"]
    if what == "schema":
        document["schema_version"] = 99
    elif what == "truncated":
        path.write_text(path.read_text()[:500])
        return
    elif what == "empty":
        document["stages"] = []
    elif what == "no accuracy":
        for s in stages:
            s["metrics"].pop("top1", None)
    elif what == "no outcomes":
        for s in stages:
            s["outputs"] = []
    elif what == "outcomes missing":
        (folder / "target-cpu" / "outcomes.json").unlink()
    elif what == "outcomes changed":
        (folder / "target-cpu" / "outcomes.json").write_text("{}")
    elif what == "outcomes damaged":
        for s in stages:
            s["details"]["outcomes"] = {"n": 10, "samples_sha256": "0", "bits": "AAAA"}
    elif what == "latency runs":
        for s in stages:
            s["details"]["latency_runs"] = [1, 2, "3", 4, 5]
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("schema", "layout 99"),
        ("truncated", "no manifest"),
        ("empty", "no finished stage"),
        ("no accuracy", "accuracy"),
        ("no outcomes", "paired"),
        ("outcomes missing", "missing"),
        ("outcomes changed", "changed since the run"),
        ("outcomes damaged", "damaged"),
        ("latency runs", "latency_runs"),
    ],
)
@pytest.mark.parametrize("which", ["cand", "base"])
def test_damaged_runs_are_refused(tmp_path: Path, what: str, word: str, which: str) -> None:
    pair_of_runs(tmp_path, 500)
    _break(tmp_path / which, what)
    with pytest.raises(BadInput) as caught:
        judged((tmp_path / "cand", tmp_path / "base"))
    assert word in str(caught.value)


def test_a_baseline_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, n=100)
    good = load_run(tmp_path)
    stopped = Run("stopped", tmp_path, good.manifest.model_copy(update={"unfinished": ("target:rtx-4090",)}))
    with pytest.raises(BadInput, match=r"stopped.*target:rtx-4090 not reached|target:rtx-4090 not reached.*stopped"):
        judge(good, stopped, Limits())


@pytest.mark.parametrize(("n_lost", "n_won", "told"), [(30, 10, "drops by 0.40 points"), (10, 30, "rises by 0.40 points")])
def test_the_message_says_which_way_accuracy_went(tmp_path: Path, n_lost: int, n_won: int, told: str) -> None:
    message = judged(pair_of_runs(tmp_path, 5000, n_lost, n_won)).checks[0].message
    assert message.startswith(f"top-1 of target:cpu {told} on 5000 samples ({n_lost} lost, {n_won} won;")


def test_only_what_is_surely_better_by_more_than_the_limit_is_stale(tmp_path: Path) -> None:
    """0.4 points with a limit of 1, and 6 % with one of 5 % but runs that differ by 4 %, leave the baseline as it is."""
    report = judged(pair_of_runs(tmp_path, 5000, 0, 20, runs_ms=[0.94 * r for r in STEADY]))
    check = next(c for c in report.checks if c.name == "latency:cpu")
    assert report.checks[0].bounds is not None
    assert report.checks[0].bounds[1] < 0, "it is surely better"
    assert check.value is not None
    assert check.value * check.limit < 1
    assert report.stale_baseline == ()


def test_outcomes_with_bits_behind_the_last_sample_are_damaged() -> None:
    def found(content: bytes) -> Outcomes:
        inline = {"n": 13, "samples_sha256": "x", "bits": base64.b64encode(content).decode()}
        result = StageResult(stage="dense", status="done", details={"outcomes": inline})
        return _outcomes(Run("r", Path(), Manifest(stages=(result,))), result)

    assert found(b"\xff\xf8").correct == 13
    for padding in (0xF9, 0xFA, 0xFC):
        with pytest.raises(BadInput, match="damaged"):
            found(bytes([0xFF, padding]))


def test_dense_runs_that_are_not_as_many_say_nothing_of_a_drift(tmp_path: Path) -> None:
    changes = {"n": 100, "runs_ms": STEADY}
    for name, dense in (("base", STEADY), ("same", STEADY), ("short", STEADY[:4])):
        write_run(tmp_path / name, dense_runs_ms=dense, **changes)  # type: ignore[arg-type]

    def told(candidate: str, baseline: str) -> str:
        report = judged((tmp_path / candidate, tmp_path / baseline))
        return next(c.message for c in report.checks if c.name == "latency:cpu")

    write_run(tmp_path / "same", dense_runs_ms=STEADY, n=100, runs_ms=[1.01 * r for r in STEADY])
    assert "measured in turns" in told("same", "base")
    assert "measured in turns" not in told("same", "short")
    assert "measured in turns" not in told("short", "same")


@pytest.mark.parametrize("value", [-5.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("stage", "metric", "told"),
    [
        ("target:cpu", "size_bytes", "size"),
        ("target:cpu", "p50_ms", "latency:cpu"),
        ("target:jetson", "p50_ms", "latency:jetson"),
    ],
)
@pytest.mark.parametrize("whose", ["candidate", "baseline"])
def test_figures_that_nothing_real_has_are_refused(
    tmp_path: Path, whose: str, stage: str, metric: str, told: str, value: float
) -> None:
    write_run(tmp_path, n=100, runs_ms=STEADY)
    good = load_run(tmp_path)
    old = good.manifest.stage(stage)
    assert old is not None
    changed = {**old.metrics, metric: old.metrics[metric].model_copy(update={"value": value})}
    bad = Run("bad", tmp_path, good.manifest.with_stage(old.model_copy(update={"metrics": changed})))
    with pytest.raises(BadInput, match=f"the {whose}'s {told} is {value:g}") as caught:
        judge(*((bad, good) if whose == "candidate" else (good, bad)), Limits())
    assert caught.value.exit_code == 5


def _edited(folder: Path, stage: str, change: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(next(s for s in document["stages"] if s["stage"] == stage))
    path.write_text(json.dumps(document))
    return folder


def _metric(name: str, **facts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda stage: stage["metrics"][name].update(facts)


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "top-1": (_metric("top1", value=0.1, std_error=0.1), r"top1 is 10\.00 %, the outcomes say \d\d\.\d\d %"),
    "top-1 is no number": (_metric("top1", value=float("nan")), "top1 is nan fraction|finite number"),
    "top-1 above one": (_metric("top1", value=1.5), r"top1 is 1\.5 fraction"),
    "top-1 below zero": (_metric("top1", value=-1.0), "top1 is -1 fraction"),
    "samples": (_metric("top1", n=77), "top1 is of 77 samples, the outcomes are of 1000"),
    "latency": (_metric("p50_ms", value=100.0), r"p50_ms is 100 ms, the processes it is from took 0\.98 to 1\.02 ms"),
    "latency of any size": (_metric("p50_ms", value=1e308), r"p50_ms is 1e\+308 ms"),
    "latency below zero": (_metric("p99_ms", value=-1.0), "p99_ms is -1 ms"),
    "unit of time": (_metric("p50_ms", unit="s"), "p50_ms is in s, expected ms"),
    "unit of size": (_metric("size_bytes", unit="MB"), "size_bytes is in MB, expected bytes"),
    "size": (_metric("size_bytes", value=0.0), "size_bytes is 0 bytes"),
    "top-1 beside no outcomes": (
        lambda s: (s["outputs"].clear(), s["metrics"]["top1"].update(value=0.5)),
        r"top1 is 50\.00 ± 0\.\d+ %, but of 1000 samples that is known to ± 1\.58",
    ),
    "top-1 of no number of samples": (
        lambda s: (s["outputs"].clear(), s["metrics"]["top1"].update(value=0.50005, std_error=0.2)),
        "top1 is 50.005 %, which is no number of 1000 samples",
    ),
    "deviation": (_metric("top1", std_error=-0.1), "std_error of top1 is -0.1 fraction"),
    "threads": (_metric("p50_ms", threads=-2), "threads of p50_ms is -2"),
    "size of the file": (
        lambda s: s["outputs"].append({"kind": "onnx", "path": "m.onnx", "sha256": "0", "size_bytes": 7}),
        "size_bytes is 260000, the file m.onnx has 7 bytes",
    ),
    "latency below its interval": (_metric("p50_ms", low=5.0), "outside of its own interval, whose low is 5"),
    "latency above its interval": (_metric("p50_ms", high=0.5), r"outside of its own interval, whose high is 0\.5"),
    "part of a byte": (_metric("size_bytes", value=260_000.5), r"size_bytes is 260000\.5 bytes, which is no whole number"),
    "a number as text": (_metric("p50_ms", value="1.0"), "should be a number"),
    "samples as a word": (_metric("top1", n=True), "should be a number"),
    "top-5 below top-1": (
        lambda s: s["metrics"].update(top5={"value": 0.5, "unit": "fraction", "provenance": "measured"}),
        r"top5 is 50\.00 %, less than top1",
    ),
    "MACs of one network": (
        lambda s: s.update(
            of="finetune", metrics=s["metrics"] | {"macs": {"value": 7, "unit": "macs", "provenance": "counted"}}
        ),
        r"macs is 7, finetune has 34000000 of the same network",
    ),
    "files of the engine": (
        lambda s: (
            s["outputs"].append({"kind": "engine", "path": "m.xml", "sha256": "0", "size_bytes": 7}),
            s["metrics"].update(engine_bytes={"value": 9, "unit": "bytes", "provenance": "counted"}),
        ),
        "engine_bytes is 9, its files have 7 bytes",
    ),
    "another target": (lambda s: s["details"].update(target="cpu-ort"), "is about 'cpu-ort' and about 'cpu'"),
    "precision of the file": (
        lambda s: (s["details"].update(precision="fp32"), s["metrics"]["p50_ms"].update(precision="int8+fp16")),
        r"p50_ms is of int8\+fp16, the file of fp32",
    ),
    "copies of samples that are not there": (
        lambda s: s["details"].update(outcomes=Outcomes.pack([True] * 9, "0", copies=[9]).model_dump()),
        "outcomes are damaged",
    ),
    "outcomes in the manifest": (
        lambda s: s["details"].update(outcomes=Outcomes.pack([True] * 1000, digest(1000), CLASSES).model_dump()),
        r"in the manifest \(1000 of 1000 right\) are not those in the file \(\d+ of 1000 right\)",
    ),
    "outcomes beside the run": (
        lambda s: s["outputs"][0].update(path="../base/target-cpu/outcomes.json"),
        r"outside of the run: \.\./base",
    ),
    "skipped without a reason": (lambda s: s.update(status="skipped"), "target:cpu: is skipped, and does not tell why"),
    "skipped with figures": (
        lambda s: s.update(status="skipped", reason="no board"),
        "is skipped, and tells of work all the same: top1",
    ),
    "failed with files": (
        lambda s: s.update(status="failed", reason="no room", metrics={}),
        "is failed, and tells of work all the same: target-cpu/outcomes.json",
    ),
    "done with a reason": (lambda s: s.update(reason="no board"), "is done, and tells why it is not: no board"),
    "outcomes anywhere": (lambda s: s["outputs"][0].update(path="/etc/passwd"), "outside of the run: /etc/passwd"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
@pytest.mark.parametrize("whose", ["cand", "base"])
def test_a_manifest_that_contradicts_its_evidence_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, whose: str
) -> None:
    tracker = SimpleNamespace(check=lambda address: None, log=lambda *_: pytest.fail("it was recorded"))
    monkeypatch.setattr("rescompress.show.track._tracker", lambda kind: tracker)
    change, told = CONTRADICTIONS[what]
    pair_of_runs(tmp_path, 1000)
    assert judged((tmp_path / "cand", tmp_path / "base")).verdict == "pass"
    _edited(tmp_path / whose, "target:cpu", change)
    with pytest.raises(BadInput, match=told) as caught:
        judged((tmp_path / "cand", tmp_path / "base"))
    assert caught.value.exit_code == 5
    for shown in (load_runs, history, lambda runs: track("mlflow:here", runs[0])):
        with pytest.raises(BadInput, match=told):  # nor is it shown, or recorded elsewhere
            shown([tmp_path / whose])


def test_a_stage_stands_once(tmp_path: Path) -> None:
    candidate, baseline = pair_of_runs(tmp_path, 1000)
    path = candidate / "manifest.json"
    document = json.loads(path.read_text())
    document["stages"].append(next(s for s in document["stages"] if s["stage"] == "target:cpu"))
    path.write_text(json.dumps(document))
    with pytest.raises(BadInput, match="target:cpu: stands twice"):
        judged((candidate, baseline))


def test_an_empty_folder_and_a_missing_baseline_are_refused(cli: Command, tmp_path: Path) -> None:
    candidate, _ = pair_of_runs(tmp_path, 500)
    (tmp_path / "empty").mkdir()
    for arguments in ([candidate, "-b", tmp_path / "empty"], [candidate, "-b", tmp_path / "absent"], [candidate]):
        done = cli(*arguments)
        assert done.returncode == 5
        assert "->" in done.stderr
    assert cli(candidate, "-b", candidate, "--stage", "quantise").returncode == 5
    assert "quantize" in cli(candidate, "-b", candidate, "--stage", "quantise").stderr


@given(st.binary(max_size=200))
def test_outcomes_of_any_bytes_are_read_or_refused(content: bytes) -> None:
    inline = {"n": 13, "samples_sha256": "x", "bits": base64.b64encode(content).decode()}
    result = StageResult(stage="dense", status="done", details={"outcomes": inline})
    try:
        found = _outcomes(Run("r", Path(), Manifest(stages=(result,))), result)
    except BadInput:
        return
    assert len(found.unpack()) == 13
    assert found.correct == sum(found.unpack())


# What it writes ---------------------------------------------------------------------------------------------------------


def test_a_baseline_is_judged_by_before_it_is_renewed(cli: Command, tmp_path: Path) -> None:
    """Into its own file, too: there the candidate was compared with itself."""
    worse, better = pair_of_runs(tmp_path, 5000, 400, 20)
    saved = tmp_path / "baseline.json"
    cli(better, "--save-baseline", saved)
    kept = saved.read_bytes()
    done = cli(worse, "--baseline", saved, "--save-baseline", saved)
    assert done.returncode == 3
    assert "baseline not written: the verdict is fail" in done.stderr
    assert saved.read_bytes() == kept
    assert cli(better, "--baseline", saved, "--save-baseline", tmp_path / "next.json").returncode == 0
    assert (tmp_path / "next.json").read_bytes() == kept


def test_a_run_that_did_not_finish_is_no_baseline(cli: Command, tmp_path: Path) -> None:
    run, _ = pair_of_runs(tmp_path, 500, 6, 4)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["unfinished"] = ["export"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    done = cli(run, "--save-baseline", tmp_path / "b.json")
    assert done.returncode == 5
    assert "did not finish" in done.stderr
    assert not (tmp_path / "b.json").exists()


def test_a_saved_baseline_is_one_small_file_with_the_same_verdicts(cli: Command, tmp_path: Path) -> None:
    candidate, baseline = pair_of_runs(tmp_path, 5000, 60, 40, runs_ms=[1.01 * r for r in STEADY])
    saved = tmp_path / "baseline.json"
    done = cli(baseline, "--save-baseline", saved)
    assert done.returncode == 0, done.stderr
    assert saved.stat().st_size < 20_000
    expected = judged((candidate, baseline))
    found = judged((candidate, saved))
    assert found.checks == expected.checks
    for path in baseline.rglob("outcomes.json"):
        path.unlink()
    assert judged((candidate, saved)).checks == expected.checks


def test_junit_says_what_failed(tmp_path: Path) -> None:
    report = judged(pair_of_runs(tmp_path, 360, 8, 4, size_bytes=500_000))
    for inconclusive_fails, failures in ((True, 2), (False, 1)):
        suites = ElementTree.fromstring(to_junit(report, inconclusive_fails=inconclusive_fails))
        assert suites.get("failures") == str(failures) == str(len(suites.findall(".//failure")))
        assert suites.get("tests") == str(len(report.checks)) == str(len(suites.findall(".//testcase")))
        assert suites.get("skipped") == str(len(suites.findall(".//skipped")))
    assert {c.get("name") for c in suites.iter("testcase")} == set(verdicts(report))


def test_files_and_annotations_for_ci(cli: Command, tmp_path: Path) -> None:
    candidate, baseline = pair_of_runs(tmp_path, 5000, 250, 50)
    step, output = tmp_path / "step.md", tmp_path / "output"
    step.write_text("before\n")
    done = cli(
        candidate, "-b", baseline, "--json", "--summary", tmp_path / "s.md", "--junit", tmp_path / "j.xml",
        GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(step), GITHUB_OUTPUT=str(output),
    )  # fmt: skip
    assert done.returncode == 3
    json.loads(done.stdout)
    annotation = next(line for line in done.stderr.splitlines() if line.startswith("::error"))
    assert annotation.startswith("::error title=rescompress gate%3A accuracy::top-1 of")
    assert "95 %25" in annotation
    assert step.read_text() == "before\n" + (tmp_path / "s.md").read_text()
    assert output.read_text() == "verdict=fail\n"
    ElementTree.parse(tmp_path / "j.xml")
    cli(candidate, "-b", baseline, GITLAB_CI="true", CI_PROJECT_DIR=str(tmp_path))
    findings = json.loads((tmp_path / "gl-code-quality-report.json").read_text())
    assert [f["severity"] for f in findings] == ["critical"]
    assert findings[0]["location"] == {"path": "cand", "lines": {"begin": 1}}
    assert len({f["fingerprint"] for f in findings}) == len(findings)


def test_summary_holds_every_check_and_the_stages(tmp_path: Path) -> None:
    report = judged(pair_of_runs(tmp_path, 360, 8, 4))
    text = to_markdown(report, trade_off="| a |\n|---|\n")
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| check"))
    columns = lines[head].count("|")
    for i in range(len(report.checks) + 2):
        assert lines[head + i].count("|") == columns
    assert "samples would decide" in text
    assert "<details>" in text
    assert json.loads(gitlab_code_quality(report, "x"))[0]["severity"] == "minor"


BLOCKER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "numpy", "onnx", "onnxruntime", "openvino", "nncf", "scipy", "sklearn", "PIL",
                                      "torchvision", "accelerate", "safetensors", "onnx_ir"}:
            raise ImportError(f"{name} is not for a gate")
sys.meta_path.insert(0, Refuse())
sys.argv = ["rescompress", *sys.argv[1:]]
from rescompress.cli.app import main
main()
"""


def test_gate_compare_need_nothing_heavy_and_are_quick(tmp_path: Path) -> None:
    import resource

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    candidate, baseline = pair_of_runs(tmp_path, 50_000, 600, 500)
    limits = tmp_path / "limits.yaml"
    limits.write_text("max_drop: 1.0\n")
    for command in (["gate", candidate, "-b", baseline, "--limits", limits], ["compare", candidate, baseline]):
        start = used()
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(BLOCKER), *map(str, command)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert used() - start < 2, "seconds of processor time, so that a busy machine does not matter"


def test_outcomes_that_know_samples_by_size_are_not_paired(tmp_path: Path) -> None:
    base, cand = outcomes_with(5000, 1, 1)
    old = [known.model_copy(update={"scheme": None}) for known in (base, cand)]
    for known, other in ((old[0], cand.model_copy(update={"samples_sha256": "0"})), old):
        write_run(tmp_path / "base", n=5000, final=known, runs_ms=STEADY)
        write_run(tmp_path / "cand", n=5000, final=other, runs_ms=STEADY)
        with pytest.raises(BadInput, match="by name and size") as caught:
            judged((tmp_path / "cand", tmp_path / "base"))
        assert "record the outcomes again" in str(caught.value.remedy)
    write_run(tmp_path / "cand", n=5000, final=cand, runs_ms=STEADY)
    assert verdicts(judged((tmp_path / "cand", tmp_path / "base")))["accuracy"] == "pass", "arrays were always known by content"


def test_copies_of_samples_count_once(tmp_path: Path) -> None:
    base, cand = outcomes_with(360, 8, 4)
    pairs = [Outcomes.pack(known.unpack() * 25, digest(9000), CLASSES, range(360, 9000)) for known in (base, cand)]
    found = []
    for n, (b, c) in ((360, (base, cand)), (9000, pairs)):
        write_run(tmp_path / f"base{n}", n=n, final=b, runs_ms=STEADY)
        write_run(tmp_path / f"cand{n}", n=n, final=c, runs_ms=STEADY)
        found.append(next(k for k in judged((tmp_path / f"cand{n}", tmp_path / f"base{n}")).checks if k.name == "accuracy"))
    assert found[0].interval == found[1].interval
    assert found[0].verdict == found[1].verdict == "inconclusive"
    assert "8640 copies" in found[1].message
    broken = pairs[0].model_copy(update={"copies": (9000,)})
    write_run(tmp_path / "base9000", n=9000, final=broken, runs_ms=STEADY)
    with pytest.raises(BadInput, match="damaged"):
        judged((tmp_path / "cand9000", tmp_path / "base9000"))


@pytest.mark.parametrize("command", ["compare", "report", "gate"])
def test_no_command_shows_an_accuracy_that_was_edited(tmp_path: Path, command: str, rescompress: Command) -> None:
    candidate, baseline = pair_of_runs(tmp_path, 1000)
    page = ["-o", str(tmp_path / "page.html")] if command == "report" else []
    page = ["--baseline", str(baseline)] if command == "gate" else page
    assert rescompress(command, candidate, *page, code=None).returncode == 0
    (tmp_path / "page.html").unlink(missing_ok=True)
    _edited(candidate, "target:cpu", _metric("top1", value=1.0, std_error=0.0))
    done = rescompress(command, candidate, *page, code=None)
    assert done.returncode == 5
    assert "target:cpu: top1 is 100.00 %, the outcomes say" in done.stderr
    assert "100.00" not in done.stdout
    assert not (tmp_path / "page.html").exists()


def test_a_byte_order_mark_in_front_of_a_baseline_is_no_part_of_it(tmp_path: Path, cli: Command) -> None:
    """Editors and shells of Windows write one."""
    candidate, baseline = pair_of_runs(tmp_path, 1000)
    saved = tmp_path / "baseline.json"
    cli(baseline, "--save-baseline", saved)
    expected = judged((candidate, saved))
    saved.write_bytes(b"\xef\xbb\xbf" + saved.read_bytes().replace(b"\n", b"\r\n"))
    assert judged((candidate, saved)).checks == expected.checks
