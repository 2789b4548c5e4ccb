"""`rescompress compare`: stages of one run, or runs side by side."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rescompress.cli.output import output_of

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
        typer.Option("--sort", metavar="METRIC", help="Best value of this metric first: top1, macs, size_bytes, p50_ms ..."),
    ] = None,
) -> None:
    """Show accuracy, latency, size, MACs and parameters of every stage, beside the dense network.

    Example: rescompress compare runs/half runs/third --format md
    """
    from rescompress.core.errors import BadInput, nearest
    from rescompress.core.manifest import load_manifest
    from rescompress.report import tables
    from rescompress.report.columns import COLUMNS

    output = output_of(ctx)
    if sort is not None and sort not in {c.metric for c in COLUMNS}:
        raise BadInput(f"no such metric: {sort}", where="--sort", remedy=nearest(sort, [c.metric for c in COLUMNS]))
    manifests = [load_manifest(path) for path in runs]
    rows = [row for name, manifest in zip(run_names(runs), manifests, strict=True) for row in tables.rows_of(manifest, name)]
    if not rows:
        raise BadInput("the run holds no stage yet", where=str(runs[0]), remedy="run the pipeline first")
    if sort is not None:
        rows = tables.sort_rows(rows, sort)
    if form is Format.json:
        output.json = True
    wide = output.verbosity > 0
    if output.json or form is Format.table:
        output.result({"rows": tables.to_document(rows)}, tables.to_rich(rows, wide=wide))
    else:
        sys.stdout.write(tables.to_csv(rows) if form is Format.csv else tables.to_markdown(rows, wide=wide))


def run_names(paths: list[Path]) -> list[str]:
    """Return a short, unique name per run: as many trailing parts of its folder as it takes."""
    folders = [(p if p.is_dir() else p.parent).resolve() for p in paths]
    for depth in range(1, 32):
        names = ["/".join(f.parts[-depth:]) for f in folders]
        if len(set(names)) == len(set(folders)):
            return names
    return [str(f) for f in folders]
