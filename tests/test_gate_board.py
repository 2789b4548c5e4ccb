"""The gate on what a board tells beside the latency, and the report of a soak."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_gate_verdicts import STEADY, judged, verdicts

from edge_targets.board_statistics import soak_details
from rescompress.core.errors import BadInput
from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.metric import Metric, accuracy
from rescompress.show.figures.columns import COLUMNS
from rescompress.show.gate import Limits, Run, judge, load_run
from rescompress.show.gate.checks import OF_ITSELF, PER_PROCESS, baseline_of
from rescompress.show.report.html import page


def board(**changes: Any) -> Run:
    """Return a run with one deployment; `changes` are values of its figures, each with five processes."""

    def metric(value: float, unit: str = "ms", **more: Any) -> Metric:
        where = {"device": "orin", "runtime": "tensorrt", "batch": 1, "power_mode": "15W", "precision": "int8"}
        return Metric(value=value, unit=unit, provenance="measured", n=10, **{**where, **more})

    factor = {name: changes.get(name, 1.0) for name in PER_PROCESS}
    metrics = {"p50_ms": metric(1.0)} | {PER_PROCESS[n]: metric(f * STEADY[0]) for n, f in factor.items() if f}
    soak = changes.get("soak", (1.0, 0.99, 1.01))
    if soak:
        metrics["soak_ratio"] = metric(soak[0], "ratio", low=soak[1], high=soak[2])
        metrics["build_ratio"] = metric(changes.get("build_spread", 1.02), "ratio")
    metrics |= {"top1": accuracy(9, 10, runtime="tensorrt"), **changes.get("metrics", {})}
    details = {"latency_runs": STEADY, "conditions": changes.get("conditions", {"contention_ms": "2 streams"})}
    runs = changes.get("processes", 5)
    details |= {f"{PER_PROCESS[n]}_runs": [f * s for s in STEADY[:runs]] for n, f in factor.items() if f}
    details |= changes.get("details", {})
    stage = StageResult(stage="deploy:orin", status="done", metrics=metrics, details=details)
    return Run(changes.get("name", "run"), Path(), Manifest.model_validate({**HEAD, "stages": (stage,)}))


HEAD: dict[str, Any] = {"rescompress_version": "0", "created": "2026-01-01T00:00:00+00:00", "environment": {}}
OFF: dict[str, Any] = {"max_drop": None, "max_latency": None, "max_size": None}


def of(candidate: Run, baseline: Run, **limits: Any) -> dict[str, str]:
    return {c.name: c.verdict for c in judge(candidate, baseline, Limits(**{**OFF, **limits})).checks}


@pytest.mark.parametrize("name", PER_PROCESS)
def test_each_figure_is_judged_over_its_own_processes(name: str) -> None:
    limit = {f"max_{name}": 1.1}
    assert of(board(), board(), **limit) == {f"{name}:orin": "pass"}
    assert of(board(**{name: 1.3}), board(), **limit) == {f"{name}:orin": "fail"}
    assert of(board(**{name: 1.1}), board(), **limit) == {f"{name}:orin": "inconclusive"}
    others = {other: 9.0 for other in PER_PROCESS if other != name}
    assert of(board(**others), board(), **limit) == {f"{name}:orin": "pass"}, "another figure decides nothing"
    assert of(board(**{name: 1.3, "processes": 4}), board(), **limit) == {f"{name}:orin": "inconclusive"}
    assert of(board(**{name: None}), board(), **limit) == {f"{name}:orin": "inconclusive"}, "a lost figure is no pass"
    assert of(board(**{name: None}), board(**{name: None}), **limit) == {name: "inconclusive"}


def test_figures_of_other_conditions_are_not_compared() -> None:
    report = judge(board(conditions={"contention_ms": "4 streams"}), board(), Limits(**OFF, max_contention=2.0))
    assert report.verdict == "inconclusive"
    assert "4 streams" in report.checks[0].message
    assert "2 streams" in report.checks[0].message


@pytest.mark.parametrize(
    ("soak", "verdict"), [((1.02, 1.01, 1.03), "pass"), ((1.2, 1.15, 1.25), "fail"), ((1.05, 1.0, 1.12), "inconclusive")]
)
def test_a_soak_is_judged_by_itself_with_its_band(soak: tuple[float, float, float], verdict: str) -> None:
    assert of(board(soak=soak), board(soak=None), max_soak=1.05) == {"soak:orin": verdict}


def test_builds_are_judged_by_themselves() -> None:
    assert of(board(), board(), max_build_spread=1.05) == {"build_spread:orin": "pass"}
    assert of(board(build_spread=1.06), board(), max_build_spread=1.05) == {"build_spread:orin": "fail"}
    assert of(board(soak=None), board(), max_build_spread=1.05) == {"build_spread": "inconclusive"}
    with pytest.raises(BadInput):
        of(board(build_spread=-1.0), board(), max_build_spread=1.05)


def test_nothing_of_it_is_judged_by_default() -> None:
    limits = Limits(max_drop=None, max_size=None)
    worse = board(**dict.fromkeys(PER_PROCESS, 9.0), soak=(9.0, 9.0, 9.0))
    assert verdicts(judge(worse, board(), limits)) == {"latency:orin": "pass"}


def test_a_baseline_file_keeps_what_decides() -> None:
    saved = Run("saved", Path(), baseline_of(board()))
    for name in PER_PROCESS:
        assert of(board(**{name: 1.3}), saved, **{f"max_{name}": 1.1}) == {f"{name}:orin": "fail"}


def test_every_figure_has_a_limit_and_a_column() -> None:
    columns = {c.metric for c in COLUMNS}
    for name, metric in {**PER_PROCESS, **OF_ITSELF}.items():
        assert f"max_{name}" in Limits.model_fields
        assert metric in columns


@pytest.mark.parametrize("bad", [{"value": -1.0}, {"unit": "s"}, {"value": 1e12}])
def test_figures_that_nothing_real_has_are_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    run = board()
    wrong = run.manifest.stages[0].metrics["cold_start_ms"].model_copy(update=bad)
    board(metrics={"cold_start_ms": wrong}).manifest.save(tmp_path)
    with pytest.raises(BadInput, match="cold_start_ms"):
        load_run(tmp_path)


def test_the_report_draws_a_soak_and_survives_a_damaged_one(tmp_path: Path) -> None:
    lines = [f"GR3D_FREQ 99%@[{1020 - 10 * i}] GPU@{50 + i}C VDD_IN 9000mW/9000mW" for i in range(20)]
    soak = soak_details(20, [(10, 1.0), (10, 1.25)], ["\n".join(lines[:10]), "\n".join(lines[10:])])
    text = page([("run", board(details={"soak": soak}).manifest)])
    for title in ("latency p50, ms", "GPU clock, MHz", "temperature, °C", "power, W"):
        assert f"deploy:orin: {title} during the soak" in text
    assert "during the soak" not in page([("run", board().manifest)])
    for damaged in (
        {},
        {"parts": 1, "trace": 2},
        {"parts": [1, {"from_s": "x"}], "trace": {"columns": ["s", 3], "rows": [1, [None], ["<b>", 2]]}},
        {"trace": {"columns": [["s"]], "rows": [[1]]}},
    ):
        page([("run", board(details={"soak": damaged}).manifest)])
    json.dumps(soak)


def test_p99_of_a_computer_is_judged_too(tmp_path: Path) -> None:
    from test_gate_verdicts import pair_of_runs

    report = judged(pair_of_runs(tmp_path), max_p99=1.05)
    assert verdicts(report)[next(n for n in verdicts(report) if n.startswith("p99"))] == "inconclusive", "no processes are kept"
