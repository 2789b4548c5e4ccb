"""The gate on generated runs: its verdict is that of an independent computation, or an error that names the contradiction."""

from __future__ import annotations

import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rescompress.core.errors import BadInput
from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.metric import Metric, accuracy, counted
from rescompress.core.outcomes import Outcomes
from rescompress.show.gate import Limits, judge, load_run

scipy_optimize = pytest.importorskip("scipy.optimize")
scipy_stats = pytest.importorskip("scipy.stats")


def constrained_log_likelihood_q(n: int, lost: int, won: int, drop: float) -> float:
    """Return the q = p_won that makes the counts most likely under p_lost = q + drop, found by searching, not by a formula."""
    low, high = max(0.0, -drop), (1 - drop) / 2
    if high - low < 1e-12:
        return low

    def loss(q: float) -> float:
        parts = ((won, q), (lost, q + drop), (n - won - lost, 1 - 2 * q - drop))
        return -sum(k * math.log(max(p, 1e-300)) for k, p in parts if k)

    found = scipy_optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-13})
    return min((low, high, found.x), key=loss)


def bound(n: int, lost: int, won: int, tail: float) -> float:
    """Return the drop whose score test has this one-sided p-value."""
    z = scipy_stats.norm.ppf(tail)

    def excess(drop: float) -> float:
        q = constrained_log_likelihood_q(n, lost, won, drop)
        variance = n * (2 * q + drop - drop**2)
        return (lost - won - n * drop) / math.sqrt(max(variance, 1e-300)) - z

    low, high = -1 + 1e-9, 1 - 1e-9
    if excess(low) <= 0:  # with a single sample no drop at all is ruled out
        return -1.0
    return 1.0 if excess(high) >= 0 else float(scipy_optimize.brentq(excess, low, high, xtol=1e-10))


def expected(n: int, lost: int, won: int, limit: float) -> str | None:
    """Return the verdict, None where it is too near for the precision of the search."""
    lower, upper = bound(n, lost, won, 0.95), bound(n, lost, won, 0.05)
    margin = limit / 100
    if min(abs(upper - margin), abs(lower - margin)) < 1e-5:
        return None
    return "pass" if upper < margin else "fail" if lower > margin else "inconclusive"


def write(folder: Path, right: list[bool], size: int, edit: dict[str, Any]) -> Path:
    """Write a run of one network on one target, with one value edited afterwards."""
    outcomes = Outcomes.pack(right, "samples")
    metrics = {
        "top1": accuracy(outcomes.correct, len(right), runtime="torch"),
        "size_bytes": counted(size, "bytes"),
        "p50_ms": Metric(value=1.0, unit="ms", provenance="predicted", device="board", model="m"),
    }
    stage = StageResult(stage="target:board", status="done", metrics=metrics, details={"outcomes": outcomes.model_dump()})
    document = json.loads(Manifest(stages=(stage,)).model_dump_json())
    for (metric, key), value in edit.items():
        document["stages"][0]["metrics"][metric][key] = value
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    n = draw(st.integers(1, 4000))
    lost = draw(st.integers(0, min(n, 300)))
    won = draw(st.integers(0, min(n - lost, 300)))
    both = draw(st.integers(0, n - lost - won))
    edits: dict[tuple[str, str], Any] = {
        ("top1", "value"): draw(st.sampled_from([0.123456789, -1.0, 1.5, 1e308, math.nan, math.inf])),
        ("top1", "n"): draw(st.sampled_from([n + 1, 0, -n])),
        ("top1", "unit"): "percent",
        ("size_bytes", "value"): draw(st.sampled_from([0.0, -1.0, 1e308, math.nan])),
        ("size_bytes", "unit"): "MB",
        ("p50_ms", "value"): draw(st.sampled_from([0.0, -1.0, 1e308, math.nan])),
        ("p50_ms", "unit"): "s",
    }
    edit = draw(st.none() | st.sampled_from(sorted(edits)))
    return {
        "n": n, "lost": lost, "won": won, "both": both, "limit": draw(st.sampled_from([0.1, 0.5, 1.0, 3.0, 10.0])),
        "sizes": (draw(st.integers(1, 10**9)), draw(st.integers(1, 10**9))),
        "edit": {} if edit is None else {edit: edits[edit]}, "whose": draw(st.booleans()),
    }  # fmt: skip


def check(case: dict[str, Any]) -> None:
    n, lost, won, both = (case[k] for k in ("n", "lost", "won", "both"))
    pairs = [(True, False)] * lost + [(False, True)] * won + [(True, True)] * both + [(False, False)] * (n - lost - won - both)
    random.Random(n).shuffle(pairs)
    edits = (case["edit"], {}) if case["whose"] else ({}, case["edit"])
    with tempfile.TemporaryDirectory() as folder:
        old = write(Path(folder) / "old", [a for a, _ in pairs], case["sizes"][0], edits[0])
        new = write(Path(folder) / "new", [b for _, b in pairs], case["sizes"][1], edits[1])
        if case["edit"]:
            ((metric, _),) = case["edit"]
            with pytest.raises(BadInput, match=metric) as caught:
                judge(load_run(new), load_run(old), Limits(max_drop=case["limit"]))
            assert caught.value.exit_code == 5
            return
        report = judge(load_run(new), load_run(old), Limits(max_drop=case["limit"]))
    checks = {c.name: c for c in report.checks}
    wanted = expected(n, lost, won, case["limit"])
    if wanted is not None:
        assert checks["accuracy"].verdict == wanted, (case, checks["accuracy"])
    assert checks["accuracy"].value == pytest.approx(100 * (lost - won) / n)
    assert checks["size"].verdict == ("pass" if case["sizes"][1] / case["sizes"][0] <= 1.05 else "fail")
    assert checks["latency:board"].verdict == "pass"
    verdicts = [c.verdict for c in report.checks]
    assert report.verdict == next(v for v in ("fail", "inconclusive", "pass") if v in verdicts)


NEAR: dict[str, Any] = {"limit": 1.0, "sizes": (1, 1), "edit": {}, "whose": False}
"""Limits that a bound at 95 % keeps, and one at 97.5 % would not."""


@example({"n": 2000, "lost": 12, "won": 0, "both": 1500, **NEAR})
@example({"n": 1000, "lost": 8, "won": 5, "both": 700, **NEAR})
@given(cases())
@settings(max_examples=15, deadline=None)
def test_the_verdict_is_that_of_an_independent_computation(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.slow
@given(cases())
@settings(max_examples=300, deadline=None)
def test_the_verdict_is_that_of_an_independent_computation_in_many_cases(case: dict[str, Any]) -> None:
    check(case)
