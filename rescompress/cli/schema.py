"""`rescompress schema`: JSON Schemas of what commands print and of the files that they read and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rescompress.cli.output import output_of

app = typer.Typer()


@app.command()
def schema(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Document; without it they are listed.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for all of them, as NAME.json.", show_default=False)
    ] = None,
) -> None:
    """Print the JSON Schema of a document: what a command prints with --json, or a file such as the manifest.

    Example: rescompress schema evaluate
    """
    from rescompress.core.artifact import write_text
    from rescompress.core.errors import BadInput, nearest
    from rescompress.show.documents import SCHEMAS, described, schema_of

    out = output_of(ctx)
    if name is not None and name not in SCHEMAS:
        raise BadInput(f"there is no document '{name}'", where="schema", remedy=nearest(name, SCHEMAS))
    if output is not None:
        for one in SCHEMAS if name is None else (name,):
            write_text(output / f"{one}.json", json.dumps(schema_of(one), indent=1) + "\n")
        out.hint(f"written to {output}")
    if name is not None:
        out.json = True
        out.result(schema_of(name))
        return
    from rich.table import Table

    rows = described()
    table = Table("document", "what it is", title="JSON Schemas", title_justify="left")
    for row in rows:
        table.add_row(row["name"], row["description"])
    out.result(rows, table)
