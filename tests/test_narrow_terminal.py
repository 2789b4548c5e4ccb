"""On a terminal of 80 columns no figure, word or name of an option is cut."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rescompress.cli import bench
from rescompress.cli.app import COMMANDS
from rescompress.core.errors import BadInput
from rescompress.show.gate.checks import Check, GateReport
from rescompress.show.gate.render import to_rich


def shown(what: Any, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(what)
    return out.getvalue()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "search"])
def test_help_names_every_option_in_full_and_none_that_is_not_its_own(rescompress: Any, command: str) -> None:
    text = rescompress(command, "--help", COLUMNS="80").stdout
    assert not re.findall(r"--[\w-]*…", text)
    assert "--install-completion" not in text
    assert "--json" in text


def checks(*latencies: str) -> list[Check]:
    figures = {"baseline": "10.2 ms over 5 processes", "candidate": "10.4 ms over 5 processes"}
    accuracy = Check(
        name="accuracy",
        verdict="inconclusive",
        value=0.0,
        limit=1.0,
        unit="points",
        interval=(-1.88, 1.88),
        baseline="74.00 %",
        candidate="74.00 %",
        message="",
    )
    timed = [
        Check(name=n, verdict="inconclusive", value=1.02, limit=1.05, interval=(0.646, 1.181), message="", **figures)
        for n in latencies
    ]
    return [accuracy, *timed]


def report_of(*found: Check) -> GateReport:
    return GateReport("inconclusive", found, (), (), "old", "new")


def test_the_table_of_a_gate_breaks_no_word_on_eighty_columns() -> None:
    report = report_of(*checks("latency:cpu", "latency:cpu-ort"))
    text = shown(to_rich(report), 80)
    for word in ("inconclusive", "latency:cpu-ort", "baseline", "candidate", "two-sided", "processes", "10.2 ms", "1.020x"):
        assert word in text, text
    assert "10.2 ms over 5 processes   10.4 ms over 5 processes" in shown(to_rich(report), 160)
    long = report_of(*checks("latency:jetson-orin-nano-8gb-super"))
    assert "1.020x" in shown(to_rich(long), 80)


def row(model: str) -> dict[str, Any]:
    figures = {"p50_ms": 24.068, "p50_low_ms": 24.04, "p50_high_ms": 124.096, "p90_ms": 35.52, "p99_ms": 39.123, "spread": 0.81}
    return {
        "model": model,
        "target": "cpu-ort",
        "precision": "fp32",
        "batch": 1,
        "images_per_s": 42,
        "n": 22,
        "device": "a CPU",
        "threads": 2,
        "latency_runs": [24.04, 124.096],
        **figures,
    }


def test_the_figures_of_bench_are_whole_on_any_line() -> None:
    what = bench._table([row("rescompress-out/cpu-ort/model.onnx")])
    for width in (60, 80, 200):
        text = " ".join(shown(what, width).split())
        for figure in ("24.068", "24.040-124.096", "35.520", "39.123", "81%", "range of 2 processes", "42"):
            assert figure in text, text
        assert "…" not in text
    assert len(shown(what, 200).splitlines()) == 3


def test_a_latency_budget_for_a_target_without_prediction_is_refused_before_any_work(rescompress: Any, tmp_path: Path) -> None:
    net = tmp_path / "no-such-net.pt"
    done = rescompress("prune", net, "--latency", 0.5, "--target", "cpu", code=BadInput.exit_code, cwd=tmp_path)
    assert "no latency is predicted" in done.stderr
