"""Rows of figures from manifests, and the four forms they are shown in: terminal, Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from rescompress.core.details import DenseDetails, DeployDetails, FileDetails, MeasuredDetails, TargetDetails
from rescompress.core.manifest import Manifest, StageResult, Status
from rescompress.core.metric import Metric
from rescompress.core.text import markdown, spreadsheet_cell
from rescompress.show.figures.columns import COLUMNS, Column, columns_of, conditions, duration, provenance

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.table import Table

DENSE = "dense"
DENSE_PREFIX = "dense_"
INT8 = "int8"
DOMINATED_MARK = "†"
NOT_REACHED = "not reached yet: run again to go on"
UNSTEADY = 0.05
"""Coefficient of variation of the processes' medians above which a latency is called unsteady, as `deploy` does."""
DOMINATED_NOTE = f"{DOMINATED_MARK} another row is at least as accurate and costs no more"


@dataclass(frozen=True)
class Row:
    """One line of a table: one stage of one run, or one run.

    Attributes:
        run: Name of the run.
        stage: Name of the stage; of a whole run, the stage whose accuracy counts.
        status: ``done``, ``skipped``, ``failed``, or ``unfinished``: not reached yet.
        reason: Why it was skipped or failed.
        metrics: By name; of a whole run, latencies are named ``p50_ms:<target>``.
        against_dense: Difference in points (accuracy) or ratio to the dense network of the same run, by metric.
        note: Where the latency comes from, or why there is none.
        created: When the run was made, ISO 8601.
        network: Architecture and parameters of the run's dense network, where it is known: what trends are told apart by.
    """

    run: str
    stage: str
    status: Status | Literal["unfinished"] = "done"
    reason: str | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)
    against_dense: dict[str, float] = field(default_factory=dict)
    note: str = ""
    created: str = ""
    network: str = ""


def rows_of(manifest: Manifest, run: str = "") -> list[Row]:
    """Return one row per stage of a run, in its order; the stages that it has not reached come last.

    Args:
        manifest: The run.
        run: Its name, shown when several runs stand in one table.
    """
    reached = [
        Row(
            run=run,
            stage=result.stage,
            status=result.status,
            reason=result.reason,
            metrics=dict(result.metrics),
            against_dense=_all_against(result.metrics, _dense_metrics(manifest, result)),
            note=_note(result),
            created=manifest.created,
        )
        for result in manifest.stages
    ]
    left = [
        Row(run=run, stage=name, status="unfinished", note=NOT_REACHED, created=manifest.created)
        for name in manifest.unfinished
    ]
    return reached + left


def run_row(manifest: Manifest, run: str) -> Row:
    """Return a whole run as one row: the figures of its last stage with accuracy, and its latency on every target.

    Args:
        manifest: The run.
        run: Its name.
    """
    done = [s for s in manifest.stages if s.status == "done"]
    last = next((s for s in reversed(done) if "top1" in s.metrics), done[-1] if done else None)
    metrics: dict[str, Metric] = {}
    base: dict[str, Metric] = {}
    if last is not None:
        for column in COLUMNS:
            if column.per_target:
                continue
            value = figure(manifest, last, column.metric)
            if value is not None:
                metrics[column.metric] = value
        base |= _dense_metrics(manifest, None) if last.stage != DENSE else {}
    timed: dict[str, StageResult] = {}
    for result in sorted(done, key=lambda s: s.is_deployment):  # what was measured on a board replaces what was predicted
        target = result.target
        if target is not None and "p50_ms" in result.metrics:
            timed[target] = result
        for column in COLUMNS:
            if target is not None and column.per_target and column.metric in result.metrics:
                metrics[f"{column.metric}:{target}"] = result.metrics[column.metric]
                dense = _dense_metrics(manifest, result).get(column.metric)
                if dense is not None:
                    base[f"{column.metric}:{target}"] = dense
    bad = [f"{s.stage} {s.status}: {s.reason}" for s in manifest.stages if s.status == "failed"]
    failed = bool(bad)
    if manifest.unfinished:
        bad.append(f"{', '.join(manifest.unfinished)} {NOT_REACHED}")
    return Row(
        run=run,
        stage=last.stage if last is not None else "",
        status="failed" if failed else "unfinished" if bad else "done",
        reason="; ".join(bad) or None,
        metrics=metrics,
        against_dense=_all_against(metrics, base),
        note="; ".join([*bad, *(mixed(last, timed.values()) if last is not None else ())]),
        created=manifest.created,
        network=_network(manifest),
    )


def _network(manifest: Manifest) -> str:
    dense = manifest.stage(DENSE)
    if dense is None:
        return ""
    params = dense.metrics.get("params")
    told = dense.details_as(DenseDetails)
    return f"{told.arch if told is not None else ''}/{params.value if params else '?'}"


def figure(manifest: Manifest, stage: StageResult, metric: str) -> Metric | None:
    """Return a figure of `stage`, or of the nearest stage before it that is no target (a target's network is its input's).

    The float engine of a quantized network is another file with other answers: its size and accuracy are taken only from a
    stage that computes in the same.
    """
    if metric in stage.metrics:
        return stage.metrics[metric]
    position = next(i for i, s in enumerate(manifest.stages) if s is stage or s == stage)
    before = [s for s in manifest.stages[:position] if s.target is None and s.status == "done" and metric in s.metrics]
    return next((s.metrics[metric] for s in reversed(before) if _holds_for(metric, s, stage)), None)


def _holds_for(metric: str, before: StageResult, stage: StageResult) -> bool:
    """Whether a figure of an earlier stage is one of `stage`, too."""
    if metric in ("macs", "params"):
        return True
    own, other = precision_of(stage), precision_of(before)
    if own is None or other is None:
        return False
    return own == other if metric == "size_bytes" else (own == INT8) == (other == INT8)


def precision_of(stage: StageResult) -> str | None:
    """Return what a stage's network computes in, or None if that is unknown; ``int8`` also where the rest of it is ``fp16``."""
    details = stage.details
    told = details.precision if isinstance(details, FileDetails | DeployDetails) else None
    if told is None:
        told = next((m.precision for m in map(stage.metrics.get, ("top1", "p50_ms")) if m is not None and m.precision), None)
    if told is None:
        told = INT8 if stage.kind == "quantize" else "fp32" if stage.kind in (DENSE, "prune", "finetune") else None
    return INT8 if told is not None and INT8 in told else told


def mixed(stage: StageResult, latencies: Iterable[StageResult]) -> list[str]:
    """Return a sentence for each latency that is of a float network where the accuracy of `stage` is of INT8, or the reverse.

    Args:
        stage: The stage whose accuracy and size count.
        latencies: Stages with a latency.
    """
    own = precision_of(stage)
    found = [(s, precision_of(s)) for s in latencies]
    return [
        f"latency on {s.target} is of {other}, accuracy and size are of {own}"
        for s, other in found
        if own is not None and other is not None and (own == INT8) != (other == INT8)
    ]


def _dense_metrics(manifest: Manifest, result: StageResult | None) -> dict[str, Metric]:
    """Return what a stage's figures are compared with: the dense stage's, and latencies measured beside its own."""
    dense = manifest.stage(DENSE)
    if result is not None and result.stage == DENSE:
        return {}
    base = dict(dense.metrics) if dense is not None else {}
    if result is not None:
        base |= {k.removeprefix(DENSE_PREFIX): m for k, m in result.metrics.items() if k.startswith(DENSE_PREFIX)}
    return base


def _all_against(metrics: Mapping[str, Metric], base: Mapping[str, Metric]) -> dict[str, float]:
    found = {}
    for column in columns_of(metrics):
        if column.metric in base:
            compared = _against(column, metrics[column.metric], base[column.metric])
            if compared is not None:
                found[column.metric] = compared
    return found


def _against(column: Column, value: Metric, base: Metric) -> float | None:
    if column.against_dense == "none" or conditions(value) != conditions(base):
        return None
    if column.against_dense == "difference":
        return 100 * (value.value - base.value)
    return value.value / base.value if base.value > 0 else None


def _note(result: StageResult) -> str:
    parts = []
    if result.status != "done":
        parts.append(f"{result.status}: {result.reason}" if result.reason else result.status)
    latency = result.metrics.get("p50_ms")
    if latency is not None:
        parts.append(provenance(latency) + processes(result))
    dense = result.metrics.get("dense_p50_ms")
    if latency is not None and dense is not None:
        parts.append(f"dense: {duration(dense.value)} {dense.precision or ''}".rstrip())
    file, target = result.details_as(FileDetails), result.details_as(TargetDetails)
    if target is not None and target.engine_status and target.engine_status != result.reason:
        parts.append(target.engine_status)
    if file is not None and file.float16 is not None and file.float16.get("fits") is False:
        parts.append("overflows in float16")
    return "; ".join(parts)


def processes(result: StageResult) -> str:
    """Return the spread between the processes of a measured latency, such as ``, 5 processes 0.149 to 0.287 ms, unsteady``."""
    details = result.details_as(MeasuredDetails)
    runs = details.latency_runs if details is not None else []
    if not runs:
        return ""
    unsteady = ", unsteady" if len(runs) > 1 and stdev(runs) > UNSTEADY * fmean(runs) else ""
    return f", {len(runs)} processes {duration(min(runs))[:-3]} to {duration(max(runs))}{unsteady}"


def dominated(rows: Sequence[Row]) -> set[int]:
    """Return the positions of rows that another row beats (Pareto).

    Row A beats row B when its top-1 on as many samples is at least as high, every cost that B has (MACs, parameters, size,
    latency) A has under the same conditions and is no higher, and something is strictly better.

    Sets of rows are bits of integers here: one walk along each figure, in order of its values, leaves for every row the set
    of those that are at least as good in all of its figures, and the set of those that are as good in all.
    """
    figures: dict[tuple[object, ...], list[tuple[float, int]]] = {}
    found: dict[int, tuple[object, ...]] = {}
    for i, row in enumerate(rows):
        top1 = row.metrics.get("top1")
        costs = [c.metric for c in columns_of(row.metrics) if c.is_cost]
        if top1 is None or math.isnan(top1.value):
            continue
        group = conditions(top1)
        figures.setdefault(("top1", group), []).append((-top1.value, i))
        for name in costs:
            metric = row.metrics[name]
            figures.setdefault((name, group, conditions(metric)), []).append((metric.value, i))
        if costs:
            found[i] = group
    as_good, equal = dict.fromkeys(found, -1), dict.fromkeys(found, -1)
    for values in figures.values():
        up_to = 0
        for _, several in groupby(sorted(values), key=lambda value: value[0]):
            those = [i for _, i in several]
            alike = sum(1 << i for i in those)
            up_to |= alike
            for i in those:
                if i in found:
                    as_good[i] &= up_to
                    equal[i] &= alike
    return {i for i in found if as_good[i] & ~equal[i]}


def best(rows: Sequence[Row]) -> set[tuple[int, str]]:
    """Return (position of row, metric) of each best value among at least two that may be compared and differ."""
    marked: set[tuple[int, str]] = set()
    for column in columns_for(rows, wide=True):
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
    found = columns_of({name for row in rows for name in row.metrics})
    return [c for c in found if wide or c.brief]


def sort_rows(rows: Sequence[Row], metric: str) -> list[Row]:
    """Return the rows with the best value of `metric` first; rows without it come last, in their old order."""
    column = columns_of({metric})[0]
    sign = -1 if column.better == "higher" else 1

    def place(row: Row) -> tuple[bool, float]:
        found = row.metrics.get(metric)
        return (found is None, 0.0 if found is None else sign * found.value)

    return sorted(rows, key=place)


def cell_text(row: Row, column: Column) -> str:
    """Return a cell as people read it: the figure, and how it stands to the dense network; empty without a figure."""
    return " ".join(cell_parts(row, column))


def cell_parts(row: Row, column: Column) -> list[str]:
    """Return a cell's figure and, in brackets, how it stands to the dense network, where there is either."""
    metric = row.metrics.get(column.metric)
    if metric is None:
        return []
    parts = [column.text(metric)]
    against = row.against_dense.get(column.metric)
    if against is not None and column.against_dense == "difference":
        parts.append(f"({against:+.2f})")
    elif against is not None:
        parts.append(f"({against:.2f}x)" if against < 9.995 else f"({against:.1f}x)")
    return parts


@dataclass(frozen=True)
class _Grid:
    """A table before it takes a form: headings, cells, and which columns are figures."""

    head: list[str]
    body: list[list[str]]
    columns: list[Column | None]


def _grid(rows: Sequence[Row], *, wide: bool, mark: str = DOMINATED_MARK) -> _Grid:
    figures = columns_for(rows, wide=wide)
    runs, created = len({r.run for r in rows}) > 1, len({r.created for r in rows}) > 1
    beaten = dominated(rows)
    head = ["run"] * runs + ["made"] * created + ["stage"] + [c.title for c in figures]
    columns: list[Column | None] = [*[None] * (len(head) - len(figures)), *figures]
    notes = any(row.note for row in rows)
    if notes:
        head.append("latency from" if any("p50_ms" in r.metrics for r in rows) else "note")
        columns.append(None)
    body = []
    for i, row in enumerate(rows):
        label = f"{row.stage} {mark}" if i in beaten else row.stage
        names = [row.run] * runs + [row.created[:16].replace("T", " ")] * created + [label]
        body.append(names + [cell_text(row, c) for c in figures] + [row.note] * notes)
    return _Grid(head, body, columns)


def footnotes(rows: Sequence[Row]) -> list[str]:
    """Return what a reader must know below a table: where latencies per target come from, and what the dagger means."""
    notes = []
    for column in columns_for(rows, wide=False):
        if ":" in column.metric:
            found = dict.fromkeys(provenance(r.metrics[column.metric]) for r in rows if column.metric in r.metrics)
            notes.append(f"{column.title}: {' | '.join(found)}")
    if dominated(rows):
        notes.append(DOMINATED_NOTE)
    return notes


def to_rich(rows: Sequence[Row], *, wide: bool = False, title: str | None = None) -> RenderableType:
    """Return the table for a terminal: the best value of each column bold, dominated rows dimmed.

    Where a line is too narrow for it, what stands in brackets goes below its figure.
    """
    return _TerminalTable(tuple(rows), wide, title)


@dataclass(frozen=True)
class _TerminalTable:
    """A table that knows its width only when it is printed."""

    rows: tuple[Row, ...]
    wide: bool
    title: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the table, in the form that fits, and its notes."""
        from rich.text import Text

        rows = [replace(row, note="") for row in self.rows]
        columns = _grid(rows, wide=self.wide).columns
        for stacked in (False, True):
            head, body = self._cells(rows, stacked=stacked)
            widths = [_width(cells) for cells in zip(head, *body, strict=True)]
            if len(rows) > MANY_ROWS and sum(widths) + GAP * len(widths) <= options.max_width:
                yield from self._plain(rows, head, body, columns, widths)
                break
            if stacked:
                widths = [w if column else min(w, FOLDED) for w, column in zip(widths, columns, strict=True)]
            if sum(widths) + GAP * len(widths) - 1 <= options.max_width:
                yield self._build(rows, head, body)
                break
        else:
            yield from self._transposed(rows, options.max_width)
        several = len({r.run for r in rows}) > 1
        for row in self.rows:
            if row.note:
                name = f"{row.run} {row.stage}" if several else row.stage
                style = "red" if row.status == "failed" else "dim"
                told = f"{name}: {row.note}"
                yield _Lines(told, style) if len(rows) > MANY_ROWS else Text(told, style=style)
        for note in footnotes(rows):
            yield Text(note, style="dim")

    def _cells(self, rows: Sequence[Row], *, stacked: bool) -> tuple[list[str], list[list[str]]]:
        """Return headings and cells; when `stacked`, what stands in brackets goes below its figure."""
        grid = _grid(rows, wide=self.wide)
        if not stacked:
            return grid.head, grid.body
        head = [h.replace(" ", "\n") if c else h for h, c in zip(grid.head, grid.columns, strict=True)]
        body = []
        for row, cells in zip(rows, grid.body, strict=True):
            body.append([_stacked(row, c) if c else cell for cell, c in zip(cells, grid.columns, strict=True)])
        return head, body

    def _build(self, rows: Sequence[Row], head: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
        from rich.text import Text

        columns = _grid(rows, wide=self.wide).columns
        marked, beaten = best(rows), dominated(rows)
        table = self._empty()
        for title, column in zip(head, columns, strict=True):
            table.add_column(title, justify="right" if column else "left", no_wrap=column is not None, overflow="fold")
        for i, cells in enumerate(body):
            texts = [
                Text(cell, style="bold green" if column is not None and (i, column.metric) in marked else "")
                for cell, column in zip(cells, columns, strict=True)
            ]
            table.add_row(*texts, style="dim" if i in beaten else "red" if rows[i].status == "failed" else "")
        return table

    def _plain(
        self,
        rows: Sequence[Row],
        head: Sequence[str],
        body: Sequence[Sequence[str]],
        columns: Sequence[Column | None],
        widths: Sequence[int],
    ) -> Iterator[RenderableType]:
        """Yield the table line by line, best values unmarked: laying out many thousand cells one by one takes a minute."""
        beaten = dominated(rows)

        def lines(cells: Sequence[str]) -> list[str]:
            parts = [cell.split("\n") for cell in cells]
            padded = []
            for k in range(max(map(len, parts))):
                row = [part[k] if k < len(part) else "" for part in parts]
                fit = [cell.rjust(w) if c else cell.ljust(w) for cell, w, c in zip(row, widths, columns, strict=True)]
                padded.append(" " + (" " * GAP).join(fit))
            return padded

        yield _Lines("\n".join(lines(head)), "bold")
        yield _Lines(" " + "─" * (sum(widths) + GAP * (len(widths) - 1)), "")
        for i, cells in enumerate(body):
            style = "dim" if i in beaten else "red" if rows[i].status == "failed" else ""
            yield _Lines("\n".join(lines(cells)), style)

    def _transposed(self, rows: Sequence[Row], width: int) -> Iterator[Table]:
        """Yield tables with one column per row and as many columns as fit: for many figures on a narrow line."""
        from rich.text import Text

        grid = _grid(rows, wide=self.wide)
        marked = best(rows)
        names = max(_width(grid.head), 1)
        each = max(_width([*cells, *(_stacked(r, c) for c in grid.columns if c)]) for r, cells in self._named(rows, grid))
        many = max(1, (width - names - GAP) // (each + GAP))
        for start in range(0, len(rows), many):
            table = self._empty()
            table.show_header = False
            table.add_column(overflow="fold")
            for _ in rows[start : start + many]:
                table.add_column(justify="right", overflow="fold")
            for k, (title, column) in enumerate(zip(grid.head, grid.columns, strict=True)):
                texts = []
                for i in range(start, min(start + many, len(rows))):
                    bold = column is not None and (i, column.metric) in marked
                    cell = _stacked(rows[i], column) if column else grid.body[i][k]
                    texts.append(Text(cell, style="bold green" if bold else ""))
                table.add_row(Text(title), *texts)
            yield table

    def _named(self, rows: Sequence[Row], grid: _Grid) -> Iterator[tuple[Row, list[str]]]:
        for row, cells in zip(rows, grid.body, strict=True):
            yield row, [cell for cell, column in zip(cells, grid.columns, strict=True) if column is None]

    def _empty(self) -> Table:
        from rich import box
        from rich.table import Table

        return Table(title=self.title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)


@dataclass(frozen=True)
class _Lines:
    """Lines that are as wide as they are: nothing in them is laid out."""

    text: str
    style: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """Yield them."""
        from rich.segment import Segment

        yield Segment(self.text + "\n", console.get_style(self.style) if self.style else None)


MANY_ROWS = 500
"""A table with more rows than this is laid out by the widest cell of each column alone."""

GAP = 3
"""Blanks between the columns of a terminal table."""

FOLDED = 10
"""A name may be folded to this width before the table takes another form."""


def _stacked(row: Row, column: Column) -> str:
    return "\n".join(p.replace(" predicted, ", "\npredicted\n") for p in cell_parts(row, column))


def _width(cells: Iterable[str]) -> int:
    return max((len(line) for cell in cells for line in cell.split("\n")), default=0)


def to_markdown(rows: Sequence[Row], *, wide: bool = False) -> str:
    """Return the table as Markdown: best values bold, dominated rows with a dagger."""
    grid = _grid(rows, wide=wide)
    marked = best(rows)
    lines = [
        "| " + " | ".join(map(markdown, grid.head)) + " |",
        "|" + "|".join("---:" if column else "---" for column in grid.columns) + "|",
    ]
    for i, cells in enumerate(grid.body):
        out = []
        for cell, column in zip(cells, grid.columns, strict=True):
            text = markdown(cell)
            out.append(f"**{text}**" if column and (i, column.metric) in marked else text)
        lines.append("| " + " | ".join(out) + " |")
    for note in footnotes(rows):
        lines += ["", markdown(note)]
    return "\n".join(lines) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Return the table as CSV: plain numbers in base units, provenance of every latency in columns of its own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")

    def write(cells: Iterable[object]) -> None:
        writer.writerow([spreadsheet_cell(c) if isinstance(c, str) else "" if c is None else c for c in cells])

    columns = columns_for(rows, wide=True)
    names = ["run", "created", "stage", "status", "reason"]
    for column in columns:
        names.append(column.metric)
        if column.against_dense != "none":
            names.append(f"{column.metric}_{'points' if column.against_dense == 'difference' else 'ratio'}_to_dense")
        names += [f"{column.metric}_{fact}" for fact in _facts(column)]
    write([*names, "dominated"])
    beaten = dominated(rows)
    for i, row in enumerate(rows):
        cells: list[object] = [row.run, row.created, row.stage, row.status, row.reason]
        for column in columns:
            metric = row.metrics.get(column.metric)
            cells.append(None if metric is None else _number(metric.value))
            if column.against_dense != "none":
                cells.append(row.against_dense.get(column.metric))
            cells += [None if metric is None else getattr(metric, fact) for fact in _facts(column)]
        write([*cells, int(i in beaten)])
    return out.getvalue()


def _facts(column: Column) -> tuple[str, ...]:
    """Return what is told beside a figure in CSV."""
    base = column.metric.partition(":")[0]
    if base == "top1":
        return ("std_error", "n")
    if base == "p50_ms":
        return ("provenance", "device", "runtime", "precision", "threads", "batch", "power_mode", "low", "high", "n")
    return ()


def _number(value: float) -> int | float:
    return int(value) if value == int(value) and abs(value) >= 1000 else value


def to_document(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON values: every metric whole, with its provenance."""
    beaten, marked = dominated(rows), best(rows)
    return [
        {
            "run": row.run,
            "created": row.created,
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
