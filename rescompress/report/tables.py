"""Rows of figures from manifests, and the four forms they are shown in: terminal, Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rescompress.core.manifest import Manifest, Status
from rescompress.core.metric import Metric
from rescompress.report.columns import COLUMNS, Column, conditions, provenance

if TYPE_CHECKING:
    from rich.table import Table

DENSE = "dense"
TARGET_PREFIX = "target:"
DOMINATED_MARK = "†"
DOMINATED_NOTE = f"{DOMINATED_MARK} another row is at least as accurate and costs no more"


@dataclass(frozen=True)
class Row:
    """One line of a table: one stage of one run.

    Attributes:
        run: Name of the run.
        stage: Name of the stage.
        status: ``done``, ``skipped`` or ``failed``.
        reason: Why it was skipped or failed.
        metrics: By name.
        against_dense: Difference in points (accuracy) or ratio to the dense network of the same run, by metric.
        note: Where the latency comes from, or why there is none.
    """

    run: str
    stage: str
    status: Status = "done"
    reason: str | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)
    against_dense: dict[str, float] = field(default_factory=dict)
    note: str = ""


def rows_of(manifest: Manifest, run: str = "") -> list[Row]:
    """Return one row per stage of a run, in its order.

    Args:
        manifest: The run.
        run: Its name, shown when several runs stand in one table.
    """
    dense = manifest.stage(DENSE)
    reference = dense.metrics if dense is not None else {}
    rows = []
    for result in manifest.stages:
        target = result.stage.removeprefix(TARGET_PREFIX) if result.stage.startswith(TARGET_PREFIX) else None
        against = {}
        for column in COLUMNS:
            value = result.metrics.get(column.metric)
            base = reference.get(f"{column.metric}:{target}") or reference.get(column.metric)
            if value is not None and base is not None and result.stage != DENSE:
                compared = _against(column, value, base)
                if compared is not None:
                    against[column.metric] = compared
        rows.append(
            Row(
                run=run,
                stage=result.stage,
                status=result.status,
                reason=result.reason,
                metrics=dict(result.metrics),
                against_dense=against,
                note=_note(result.status, result.reason, result.metrics, result.details),
            )
        )
    return rows


def _against(column: Column, value: Metric, base: Metric) -> float | None:
    if column.against_dense == "none" or conditions(value) != conditions(base):
        return None
    if column.against_dense == "difference":
        return 100 * (value.value - base.value)
    return value.value / base.value if base.value > 0 else None


def _note(status: Status, reason: str | None, metrics: dict[str, Metric], details: dict[str, Any]) -> str:
    parts = []
    if status != "done":
        parts.append(f"{status}: {reason}" if reason else status)
    latency = metrics.get("p50_ms")
    if latency is not None:
        parts.append(provenance(latency))
    engine = details.get("engine_status")
    if isinstance(engine, str) and engine and engine != reason:
        parts.append(engine)
    return "; ".join(parts)


def dominated(rows: Sequence[Row]) -> set[int]:
    """Return the positions of rows that another row beats (Pareto).

    Row A beats row B when its top-1 is at least as high, every cost that B has (MACs, parameters, size, latency) A has
    under the same conditions and is no higher, and something is strictly better.
    """
    return {i for i, row in enumerate(rows) if any(_beats(other, row) for j, other in enumerate(rows) if j != i)}


def _beats(a: Row, b: Row) -> bool:
    top_a, top_b = a.metrics.get("top1"), b.metrics.get("top1")
    if top_a is None or top_b is None or top_a.value < top_b.value:
        return False
    better = top_a.value > top_b.value
    costs = [c.metric for c in COLUMNS if c.brief and c.better == "lower" and c.metric in b.metrics]
    for name in costs:
        cost_a, cost_b = a.metrics.get(name), b.metrics[name]
        if cost_a is None or conditions(cost_a) != conditions(cost_b) or cost_a.value > cost_b.value:
            return False
        better = better or cost_a.value < cost_b.value
    return better and bool(costs)


def best(rows: Sequence[Row]) -> set[tuple[int, str]]:
    """Return (position of row, metric) of each best value among at least two that may be compared and differ."""
    marked: set[tuple[int, str]] = set()
    for column in COLUMNS:
        groups: dict[tuple[object, ...], list[tuple[int, float]]] = {}
        for i, row in enumerate(rows):
            metric = row.metrics.get(column.metric)
            if metric is not None:
                groups.setdefault(conditions(metric), []).append((i, metric.value))
        for members in groups.values():
            values = [v for _, v in members]
            if len(set(values)) > 1:
                top = max(values) if column.better == "higher" else min(values)
                marked |= {(i, column.metric) for i, v in members if v == top}
    return marked


def columns_for(rows: Sequence[Row], *, wide: bool) -> list[Column]:
    """Return the columns that at least one row fills; all of those when `wide`, the brief ones otherwise."""
    return [c for c in COLUMNS if (wide or c.brief) and any(c.metric in r.metrics for r in rows)]


def sort_rows(rows: Sequence[Row], metric: str) -> list[Row]:
    """Return the rows with the best value of `metric` first; rows without it come last, in their old order."""
    column = next(c for c in COLUMNS if c.metric == metric)
    sign = -1 if column.better == "higher" else 1

    def place(row: Row) -> tuple[bool, float]:
        found = row.metrics.get(metric)
        return (found is None, 0.0 if found is None else sign * found.value)

    return sorted(rows, key=place)


def cell_text(row: Row, column: Column) -> str:
    """Return a cell as people read it: the figure, and how it stands to the dense network; empty without a figure."""
    metric = row.metrics.get(column.metric)
    if metric is None:
        return ""
    text = column.text(metric)
    against = row.against_dense.get(column.metric)
    if against is None:
        return text
    if column.against_dense == "difference":
        return f"{text} ({against:+.2f})"
    return f"{text} ({against:.2f}x)" if against < 9.995 else f"{text} ({against:.1f}x)"


def _grid(rows: Sequence[Row], *, wide: bool) -> tuple[list[str], list[list[str]], list[Column]]:
    """Return headings and cells, and the figure columns among them."""
    columns = columns_for(rows, wide=wide)
    runs = len({r.run for r in rows}) > 1
    beaten = dominated(rows)
    head = (["run"] if runs else []) + ["stage"] + [c.title for c in columns] + ["latency from"]
    body = []
    for i, row in enumerate(rows):
        label = f"{row.stage} {DOMINATED_MARK}" if i in beaten else row.stage
        body.append(([row.run] if runs else []) + [label] + [cell_text(row, c) for c in columns] + [row.note])
    return head, body, columns


def to_rich(rows: Sequence[Row], *, wide: bool = False, title: str | None = None) -> Table:
    """Return the table for a terminal: the best value of each column bold, dominated rows dimmed."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    head, body, columns = _grid(rows, wide=wide)
    first = len(head) - len(columns) - 1
    marked, beaten = best(rows), dominated(rows)
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", pad_edge=False)
    for k, name in enumerate(head):
        figure = first <= k < len(head) - 1
        table.add_column(name, justify="right" if figure else "left", no_wrap=k < first, overflow="fold")
    for i, cells in enumerate(body):
        texts = []
        for k, cell in enumerate(cells):
            figure = first <= k < len(head) - 1
            bold = figure and (i, columns[k - first].metric) in marked
            texts.append(Text(cell, style="bold green" if bold else ""))
        style = "dim" if i in beaten else "red" if rows[i].status == "failed" else ""
        table.add_row(*texts, style=style)
    if beaten:
        table.caption = DOMINATED_NOTE
    return table


def to_markdown(rows: Sequence[Row], *, wide: bool = False) -> str:
    """Return the table as Markdown: best values bold, dominated rows with a dagger."""
    head, body, columns = _grid(rows, wide=wide)
    first = len(head) - len(columns) - 1
    marked = best(rows)
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---:" if first <= k < len(head) - 1 else "---" for k in range(len(head))) + "|",
    ]
    for i, cells in enumerate(body):
        out = []
        for k, cell in enumerate(cells):
            text = cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
            figure = first <= k < len(head) - 1
            out.append(f"**{text}**" if figure and (i, columns[k - first].metric) in marked else text)
        lines.append("| " + " | ".join(out) + " |")
    if dominated(rows):
        lines += ["", DOMINATED_NOTE]
    return "\n".join(lines) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Return the table as CSV: plain numbers in base units, provenance in columns of its own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = columns_for(rows, wide=True)
    names = ["run", "stage", "status", "reason"]
    for column in columns:
        names.append(column.metric)
        if column.metric == "top1":
            names += ["top1_std_error", "top1_n"]
        if column.against_dense != "none":
            names.append(f"{column.metric}_{'points' if column.against_dense == 'difference' else 'ratio'}_to_dense")
    circumstances = ["provenance", "device", "runtime", "precision", "threads", "batch", "power_mode", "low", "high", "n"]
    names += [f"latency_{c}" for c in circumstances] + ["dominated"]
    writer.writerow(names)
    beaten = dominated(rows)
    for i, row in enumerate(rows):
        cells: list[object] = [row.run, row.stage, row.status, row.reason]
        for column in columns:
            metric = row.metrics.get(column.metric)
            cells.append(None if metric is None else _number(metric.value))
            if column.metric == "top1":
                cells += [metric.std_error, metric.n] if metric is not None else [None, None]
            if column.against_dense != "none":
                cells.append(row.against_dense.get(column.metric))
        latency = row.metrics.get("p50_ms")
        cells += [None if latency is None else getattr(latency, c) for c in circumstances]
        cells.append(int(i in beaten))
        writer.writerow(["" if c is None else c for c in cells])
    return out.getvalue()


def _number(value: float) -> int | float:
    return int(value) if value == int(value) and abs(value) >= 1000 else value


def to_document(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON values: every metric whole, with its provenance."""
    beaten, marked = dominated(rows), best(rows)
    return [
        {
            "run": row.run,
            "stage": row.stage,
            "status": row.status,
            "reason": row.reason,
            "metrics": {name: m.model_dump(exclude_none=True) for name, m in row.metrics.items()},
            "against_dense": row.against_dense,
            "dominated": i in beaten,
            "best": sorted(name for j, name in marked if j == i),
            "note": row.note,
        }
        for i, row in enumerate(rows)
    ]
