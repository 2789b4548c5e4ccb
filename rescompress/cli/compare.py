"""`rescompress compare`: stages of one run, runs side by side, or runs over time."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rescompress.cli.output import output_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rescompress.show.report.history import Trend

app = typer.Typer()


class Format(StrEnum):
    """How the table is written."""

    table = "table"
    md = "md"
    csv = "csv"
    json = "json"


@app.command()
def compare(
    ctx: typer.Context,
    runs: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of runs, or manifest files.", show_default=False)
    ],
    form: Annotated[Format, typer.Option("--format", "-f", help="Form of the table.")] = Format.table,
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort", metavar="METRIC", help="Best value first: top1, macs, size_bytes, p50_ms:cpu ...", show_default=False
        ),
    ] = None,
    stages: Annotated[bool, typer.Option("--stages", help="Every stage of several runs, not one row per run.")] = False,
    history: Annotated[bool, typer.Option("--history", help="All runs below the folders, oldest first, with trends.")] = False,
) -> None:
    """Show accuracy, latency, size, MACs and parameters beside the dense network: of every stage of a run, or of runs.

    Example: rescompress compare runs/half runs/third --format md
    """
    from rescompress.core.errors import BadInput, nearest
    from rescompress.show.figures import tables
    from rescompress.show.report import history as past

    output = output_of(ctx)
    loaded = past.history(runs) if history else past.load_runs(runs)
    if stages or (len(loaded) == 1 and not history):
        rows = [row for name, manifest in loaded for row in tables.rows_of(manifest, name)]
    else:
        rows = past.run_rows(loaded)
    if sort is not None:
        known = [c.metric for c in tables.columns_for(rows, wide=True)]
        if sort not in known:
            raise BadInput(f"no such metric in these runs: {sort}", where="--sort", remedy=nearest(sort, known))
        rows = tables.sort_rows(rows, sort)
    going = past.trends(rows) if history and sort is None else []
    if form is Format.json:
        output.json = True
    wide = output.verbosity > 0
    if output.json or form is Format.table:
        document: dict[str, Any] = {}
        if output.json:
            document = {"rows": tables.to_document(rows)} | ({"trends": _trend_document(going)} if history else {})
        output.result(document, tables.to_rich(rows, wide=wide), *([_trend_table(going)] if going else []))
    elif form is Format.csv:
        output.text(tables.to_csv(rows))
    else:
        output.text(tables.to_markdown(rows, wide=wide) + _trend_markdown(going))


def _trend_document(going: Sequence[Trend]) -> list[dict[str, Any]]:
    return [
        {
            "metric": t.column.metric,
            "unit": "points" if t.column.against_dense == "difference" else "ratio",
            "since_first": t.since_first,
            "since_previous": t.since_previous,
            "values": [m.value for _, m in t.points],
        }
        for t in going
    ]


TREND_HEAD = ("figure", "newest", "since the first", "since the previous", "trend")


def _trend_cells(trend: Trend) -> list[str]:
    changes = [trend.change_text(trend.since_first), trend.change_text(trend.since_previous)]
    return [trend.column.title, trend.column.text(trend.points[-1][1]), *changes, trend.bars]


def _trend_table(going: Sequence[Trend]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in TREND_HEAD:
        table.add_column(name, justify="left" if name in ("figure", "trend") else "right")
    for trend in going:
        table.add_row(*_trend_cells(trend))
    return table


def _trend_markdown(going: Sequence[Trend]) -> str:
    from rescompress.core.text import markdown

    if not going:
        return ""
    lines = ["", "| " + " | ".join(TREND_HEAD) + " |", "|---|---:|---:|---:|---|"]
    return "\n".join([*lines, *("| " + " | ".join(map(markdown, _trend_cells(t))) + " |" for t in going)]) + "\n"
