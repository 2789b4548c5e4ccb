"""The trade-off table: ratios, dominance, marks, and its four forms."""

from __future__ import annotations

import ast
import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Command
from hypothesis import given
from hypothesis import strategies as st
from report_factory import latency, write_run

from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.metric import Metric, accuracy, counted
from rescompress.show.figures.columns import COLUMNS, conditions, duration, scaled
from rescompress.show.figures.tables import (
    Row,
    best,
    dominated,
    figure,
    processes,
    rows_of,
    run_row,
    sort_rows,
    to_csv,
    to_document,
    to_markdown,
    to_rich,
)
from rescompress.show.report.history import trends

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cli(rescompress: Command) -> Command:
    return lambda *args: rescompress(*args, code=None, COLUMNS="200")


def test_rows_carry_figures_and_stand_against_dense(tmp_path: Path) -> None:
    rows = {r.stage: r for r in rows_of(write_run(tmp_path))}
    assert rows["dense"].against_dense == {}
    assert rows["prune"].against_dense["macs"] == pytest.approx(34 / 69)
    assert rows["quantize"].against_dense["size_bytes"] == pytest.approx(260 / 1870)
    assert rows["quantize"].against_dense["top1"] == pytest.approx(-1.0)
    assert rows["target:rtx-4090"].note == "skipped: tensorrt_rtx is not installed"
    assert "predicted for Jetson Orin Nano 8GB" in rows["target:jetson"].note


def test_latency_is_compared_with_the_dense_network_only_under_equal_conditions() -> None:
    def ratio(base: Metric) -> float | None:
        dense = StageResult(stage="dense", status="done")
        target = StageResult(stage="target:cpu", status="done", metrics={"p50_ms": latency(2.0), "dense_p50_ms": base})
        return rows_of(Manifest(stages=(dense, target)))[1].against_dense.get("p50_ms")

    assert ratio(latency(4.0, precision="fp32")) == 0.5
    assert ratio(latency(4.0, provenance="predicted")) is None
    assert ratio(latency(4.0, device="other")) is None
    assert ratio(latency(4.0, threads=1)) is None
    assert ratio(latency(4.0, runtime="onnxruntime")) is None
    metrics = {"p50_ms": latency(2.0), "dense_p50_ms": latency(4.0, precision="fp32")}
    beside = Manifest(stages=(StageResult(stage="target:cpu", status="done", metrics=metrics),))
    assert rows_of(beside)[0].note.endswith("; dense: 4.00 ms fp32")


@pytest.mark.parametrize("fits", [False, True])
def test_a_row_says_that_its_file_overflows_in_float16(fits):
    half = {"float16": {"fits": fits, "overflows": []}}
    target = StageResult(stage="target:jetson", status="done", details=half)
    assert rows_of(Manifest(stages=(target,)))[0].note == ("" if fits else "overflows in float16")


def test_a_row_takes_no_figure_of_another_precision() -> None:
    """A float engine of a quantized network has another file and other answers; its MACs and parameters are the same."""

    def stage(name: str, size: int | None = None, top1: int | None = None, **p50: str) -> StageResult:
        metrics = {"macs": counted(9, "macs")} if not p50 else {"p50_ms": latency(1.0, device="jetson", **p50)}  # type: ignore[arg-type]
        metrics |= {} if size is None else {"size_bytes": counted(size, "bytes")}
        metrics |= {} if top1 is None else {"top1": accuracy(top1, 100, runtime="any")}
        return StageResult(stage=name, status="done", metrics=metrics)

    def row(deployed: StageResult) -> tuple[Row, Metric | None]:
        manifest = Manifest(stages=(stage("dense", 100, 90), stage("quantize", 25, 60), deployed))
        return run_row(manifest, "r"), figure(manifest, deployed, "top1")

    half, _ = row(stage("deploy:jetson", None, 90, precision="fp16"))
    assert (half.stage, half.metrics["macs"].value) == ("deploy:jetson", 9)
    assert "size_bytes" not in half.metrics
    int8, _ = row(stage("deploy:jetson", None, 60, precision="int8"))
    assert (int8.metrics["size_bytes"].value, int8.note) == (25, "")
    timed, top1 = row(stage("deploy:jetson", precision="fp16"))
    assert (timed.stage, timed.note) == ("quantize", "latency on jetson is of fp16, accuracy and size are of int8")
    assert top1 is not None
    assert top1.value == 0.9, "the float engine answers like the float network"


def test_accuracies_of_different_samples_are_not_compared() -> None:
    def change(n: int) -> float | None:
        stages = [
            StageResult(stage=name, status="done", metrics={"top1": top1})
            for name, top1 in (
                ("dense", accuracy(90, 100, runtime="torch")),
                ("prune", accuracy(n * 8 // 10, n, runtime="torch")),
            )
        ]
        return rows_of(Manifest(stages=tuple(stages)))[1].against_dense.get("top1")

    assert change(100) == pytest.approx(-10.0)
    assert change(1000) is None


def test_processes_that_disagree_are_called_unsteady() -> None:
    def words(*runs: float) -> str:
        return processes(StageResult(stage="target:cpu", status="done", details={"latency_runs": list(runs)}))

    assert words(1.0, 1.01, 0.99) == ", 3 processes 0.990 to 1.01 ms"
    assert words(0.57, 12.6, 4.0) == ", 3 processes 0.570 to 12.6 ms, unsteady"
    assert words(2.0) == ", 1 processes 2.00 to 2.00 ms"
    assert words() == ""
    assert words(99, 100, 101) == ", 3 processes 99.0 to 101 ms", "1 % is steady, however long it takes"
    assert words(0.0099, 0.0100, 0.0130).endswith(", unsteady")


def test_every_form_tells_measured_from_predicted(tmp_path: Path) -> None:
    rows = rows_of(write_run(tmp_path))
    markdown = to_markdown(rows)
    assert "~0.310 ms predicted, 0.248 to 0.403" in markdown
    assert "measured on cpu: openvino int8, 2 threads, batch 1" in markdown
    table = {r["stage"]: r for r in csv.DictReader(io.StringIO(to_csv(rows)))}
    assert table["target:cpu"]["p50_ms_provenance"] == "measured"
    assert table["target:jetson"]["p50_ms_provenance"] == "predicted"
    assert float(table["dense"]["macs"]) == 69_000_000
    document = {r["stage"]: r for r in to_document(rows)}
    assert document["target:jetson"]["metrics"]["p50_ms"]["provenance"] == "predicted"
    json.dumps(document, allow_nan=False)


def test_what_was_measured_on_a_board_stands_for_a_run_wherever_its_stage_is() -> None:
    board = StageResult(stage="deploy:jetson", status="done", metrics={"p50_ms": latency(2.0, device="jetson")})
    predicted = latency(1.0, provenance="predicted", device="jetson")
    target = StageResult(stage="target:jetson", status="done", metrics={"p50_ms": predicted})
    for stages in ((board, target), (target, board)):
        assert run_row(Manifest(stages=stages), "r").metrics["p50_ms:jetson"].provenance == "measured"


def test_csv_cells_stand_below_their_names() -> None:
    dense = StageResult(
        stage="dense", status="done", metrics={"top1": accuracy(90, 100, runtime="any"), "size_bytes": counted(400, "bytes")}
    )
    last = StageResult(
        stage="quantize", status="done", metrics={"top1": accuracy(80, 100, runtime="any"), "size_bytes": counted(100, "bytes")}
    )
    _, row = csv.DictReader(io.StringIO(to_csv(rows_of(Manifest(stages=(dense, last))))))
    assert {k: float(row[k]) for k in row if k.startswith(("top1", "size"))} == pytest.approx(
        {
            "top1": 0.8,
            "top1_points_to_dense": -10,
            "top1_std_error": 0.04,
            "top1_n": 100,
            "size_bytes": 100,
            "size_bytes_ratio_to_dense": 0.25,
        }
    )


def random_rows() -> st.SearchStrategy[list[Row]]:
    def row(values: tuple[int, int | None, float | None, bool]) -> Row:
        top, size, p50, predicted = values
        metrics = {"top1": accuracy(top, 10, runtime="torch")}
        if size is not None:
            metrics["size_bytes"] = counted(size, "bytes")
        if p50 is not None:
            metrics["p50_ms"] = latency(p50, provenance="predicted" if predicted else "measured")
        return Row(run="", stage="s", metrics=metrics)

    few = st.tuples(
        st.integers(0, 4), st.none() | st.integers(1, 4), st.none() | st.sampled_from([1.0, 2.0, 3.0]), st.booleans()
    )
    return st.lists(few.map(row), max_size=8)


@given(random_rows())
def test_dominance_is_a_strict_order_and_leaves_a_front(rows: list[Row]) -> None:
    beaten = dominated(rows)
    assert len(beaten) < len(rows) or not rows
    front = [r for i, r in enumerate(rows) if i not in beaten]
    assert dominated(front) == set()
    for i in beaten:
        assert dominated([*front, rows[i]]) == {len(front)}, "each beaten row is beaten by one of the front (transitivity)"


def test_accuracies_of_other_samples_dominate_nothing() -> None:
    def row(right: int, n: int, size: int) -> Row:
        metrics = {"top1": accuracy(right, n, runtime="torch"), "size_bytes": counted(size, "bytes")}
        return Row(run="r", stage="s", metrics=metrics)

    many = row(9490, 10_000, 1100)
    assert dominated([row(19, 20, 1000), many]) == set(), "95 % of 20 images say little"
    assert dominated([row(9500, 10_000, 1000), many]) == {1}


@given(random_rows())
def test_best_marks_the_extreme_of_each_comparable_group(rows: list[Row]) -> None:
    for i, name in best(rows):
        metric = rows[i].metrics[name]
        peers = [r.metrics[name] for r in rows if name in r.metrics and conditions(r.metrics[name]) == conditions(metric)]
        values = [p.value for p in peers]
        assert metric.value == (max(values) if name == "top1" else min(values))
        assert len(set(values)) > 1


def test_sorting_puts_the_best_first_and_the_missing_last(tmp_path: Path) -> None:
    rows = rows_of(write_run(tmp_path))
    assert sort_rows(rows, "top1")[0].stage == "dense"
    by_latency = sort_rows(rows, "p50_ms")
    assert [r.stage for r in by_latency[:2]] == ["target:jetson", "target:cpu"]
    assert [r.stage for r in by_latency[2:]] == [r.stage for r in rows if "p50_ms" not in r.metrics]


def test_stages_that_were_not_reached_stand_in_the_table(tmp_path: Path) -> None:
    manifest = write_run(tmp_path).model_copy(update={"unfinished": ("target:far",)})
    last = rows_of(manifest)[-1]
    assert (last.stage, last.status, last.metrics) == ("target:far", "unfinished", {})
    assert "target:far" in to_markdown(rows_of(manifest))
    whole = run_row(manifest, "x")
    assert whole.status == "unfinished"
    assert "target:far" in whole.note


def test_markdown_cells_stay_in_their_columns() -> None:
    rows = rows_of(Manifest(stages=(StageResult(stage="target:a|b", status="failed", reason="no\nroom | here"),)))
    lines = to_markdown(rows).splitlines()
    assert len(lines) == 3, lines
    assert lines[2].replace("\\|", "").count("|") == lines[0].count("|")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.00 k"),
        (1000, "1.00 k"),
        (69_123_456, "69.1 M"),
        (4.09e9, "4.09 G"),
        (999_999, "1.00 M"),
    ],
)
def test_counts_read_well(value: float, text: str) -> None:
    assert scaled(value) == text


@given(st.floats(1e-3, 1e13))
def test_scaled_counts_keep_three_digits(value: float) -> None:
    number, _, prefix = scaled(value).partition(" ")
    back = float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[prefix]
    assert abs(back - value) <= max(0.0051 * value, 0.51 if value >= 99.95 and not prefix else 0.0051)


def test_durations_read_well() -> None:
    assert [duration(v) for v in (0.4123, 1.234, 12.34, 123.4)] == ["0.412 ms", "1.23 ms", "12.3 ms", "123 ms"]


@pytest.mark.parametrize("width", [80, 100, 220])
def test_the_terminal_table_fits_and_breaks_no_figure(tmp_path: Path, width: int) -> None:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(to_rich(rows_of(write_run(tmp_path))))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for words in (
        "dense", "prune", "quantize", "88.00 ± 1.03 %", "(-1.00)", "34.0 M", "(0.49x)", "1.20 ms", "(0.45x)",
        "~0.310 ms", "predicted", "0.248 to 0.403", "target:cpu: measured on cpu",
        "target:rtx-4090: skipped: tensorrt_rtx is not installed",
    ):  # fmt: skip
        assert words in text, (words, text)


@pytest.mark.parametrize("width", [60, 80, 100, 250])
def test_runs_side_by_side_fit_every_terminal(tmp_path: Path, width: int) -> None:
    from rich.console import Console

    rows = [run_row(write_run(tmp_path / name, macs=macs), name) for name, macs in (("first-run", 34), ("second-run", 20))]
    rows.append(replace(rows[0], run="third-run"))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(to_rich(rows))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for words in ("first-run", "second-run", "third-run"):
        assert words in text, (words, text)
    assert text.count("88.00 ± 1.03 %") == text.count("1.20 ms") == text.count("~0.310 ms") == 3


def test_columns_have_unique_metrics() -> None:
    assert len({c.metric for c in COLUMNS}) == len(COLUMNS)


def test_every_column_shows_what_something_records() -> None:
    """A column of a misspelt metric would be empty in every table, and nobody would know."""
    written: set[object] = set()
    for folder in ("compress", "edge_targets", "rescompress/runs"):
        for path in (ROOT / folder).rglob("*.py"):
            written |= {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert [c.metric for c in COLUMNS if c.metric not in written] == []


def test_cli_compares_two_runs(cli: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", size_bytes=200_000)
    done = cli("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {r["run"] for r in rows} == {"a", "b"}
    assert cli("compare", str(tmp_path / "a"), "--format", "md").stdout.startswith("| stage |")
    assert "finetune" in cli("compare", str(tmp_path / "a")).stdout


def test_cli_refuses_what_is_no_run(cli: Command, tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text('{"stages": [{]')
    write_run(tmp_path / "good")
    for arguments, word in (
        ([str(tmp_path / "absent")], "no such manifest"),
        ([str(tmp_path / "damaged")], "is no manifest"),
        ([str(tmp_path)], "no such manifest"),
        ([str(tmp_path / "good"), "--sort", "top"], "top1"),
    ):
        done = cli("compare", *arguments)
        assert done.returncode == 5
        assert word in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_runs_side_by_side_have_one_latency_column_per_target(cli: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", size_bytes=200_000, p50_ms=0.9, created="2026-01-03T00:00:00Z")
    rows = {r["run"]: r for r in json.loads(cli("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json").stdout)["rows"]}
    assert set(rows) == {"a", "b"}
    assert rows["a"]["dominated"]
    assert rows["b"]["best"] == ["p50_ms:cpu", "size_bytes"] or set(rows["b"]["best"]) == {
        "p50_ms:cpu",
        "p99_ms:cpu",
        "size_bytes",
    }
    assert rows["b"]["against_dense"]["p50_ms:cpu"] == pytest.approx(1 / 2.2)
    assert rows["b"]["against_dense"]["macs"] == pytest.approx(34 / 69), "MACs come from the stage before the target"
    markdown = cli("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "md").stdout
    assert "latency p50 cpu" in markdown
    assert "latency p50 jetson: predicted for Jetson Orin Nano 8GB" in markdown
    assert cli("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--stages").stdout.count("finetune") == 2


def test_history_is_in_order_of_time_and_tells_trends(cli: Command, tmp_path: Path) -> None:
    for k, size in enumerate((260_000, 250_000, 300_000)):
        write_run(tmp_path / f"run{2 - k}", size_bytes=size, created=f"2026-01-0{k + 1}T00:00:00Z")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "manifest.json").write_text("broken")
    document = json.loads(cli("compare", "--history", str(tmp_path), "--json").stdout)
    assert [r["run"] for r in document["rows"]] == ["run2", "run1", "run0"]
    size = next(t for t in document["trends"] if t["metric"] == "size_bytes")
    assert size["values"] == [260_000, 250_000, 300_000]
    assert size["since_first"] == pytest.approx(300 / 260)
    assert size["since_previous"] == pytest.approx(300 / 250)
    assert "▁" in cli("compare", "--history", str(tmp_path)).stdout
    assert cli("compare", "--history", str(tmp_path / ".hidden" / "x")).returncode == 5


def test_a_trend_follows_one_network_among_runs_of_several(cli: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "a", size_bytes=260_000, created="2026-01-01T00:00:00Z")
    other = write_run(tmp_path / "b", size_bytes=900_000, created="2026-01-02T00:00:00Z")
    dense = other.stages[0]
    larger = dense.model_copy(update={"metrics": dense.metrics | {"params": counted(25_000_000, "params")}})
    other.model_copy(update={"stages": (larger, *other.stages[1:])}).save(tmp_path / "b")
    write_run(tmp_path / "c", size_bytes=130_000, created="2026-01-03T00:00:00Z")
    document = json.loads(cli("compare", "--history", str(tmp_path), "--json").stdout)
    assert [r["run"] for r in document["rows"]] == ["a", "b", "c"]
    size = next(t for t in document["trends"] if t["metric"] == "size_bytes")
    assert size["values"] == [260_000, 130_000]
    assert size["since_previous"] == pytest.approx(0.5)


def test_history_leaves_out_latencies_of_other_conditions(tmp_path: Path) -> None:
    def row(value: float, **facts: object) -> Row:
        return Row(run="r", stage="target:cpu", metrics={"p50_ms:cpu": latency(value, **facts)})  # type: ignore[arg-type]

    found = trends([row(9.0, device="old"), row(2.0), row(1.0)])
    assert [m.value for _, m in found[0].points] == [2.0, 1.0]
