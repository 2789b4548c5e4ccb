"""`rescompress sensitivity` and `rescompress methods`: where a network is soft, and what can choose channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rescompress.cli import options
from rescompress.cli.from_settings import Options, with_options
from rescompress.cli.output import output_of
from rescompress.core.settings import SensitivitySettings

if TYPE_CHECKING:
    from rich.table import Table

    from rescompress.runs.sensitivity import Sensitivity

app = typer.Typer()


@app.command()
@with_options
def sensitivity(
    ctx: typer.Context,
    checkpoint: options.Checkpoint,
    settings: Annotated[SensitivitySettings, Options()],
    stated: Annotated[options.Stated, Options()],
    common: Annotated[options.Common, Options(only=("labels", "skip_corrupt", "seed", "device", "threads"))],
    data: options.Data = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Draw the curves: FILE.svg or FILE.png.", show_default=False),
    ] = None,
) -> None:
    """Show what removing channels of each group would cost, and with -o draw it.

    Example: rescompress sensitivity resnet32.pt --data cifar10 -o curves.svg
    Example: rescompress sensitivity resnet32.pt --data cifar10 --int8
    """
    from pathlib import Path

    from rescompress.core.errors import BadInput
    from rescompress.runs.claims import check_outputs

    sink = output_of(ctx)
    picture = Path(output).expanduser() if output else None
    if picture is not None and picture.suffix.lower() not in (".svg", ".png"):
        raise BadInput(f"cannot draw a '{picture.suffix}' file", where="-o", remedy="name a .svg or .png file")
    if settings.int8 and data is None:
        raise BadInput("what INT8 does shows on images only", where="--int8", remedy="give --data")
    check_outputs({"--output": picture}, [checkpoint])
    opening = stated.opening(checkpoint)
    shared = common.settings(data)
    from rescompress.cli.progress import reporting
    from rescompress.runs.sensitivity import measure_sensitivity  # takes seconds to import

    if data is None and "method" not in settings.model_fields_set:
        sink.hint("no --data: weights only; with images, reconstruct says what the rest of the network can repair")
        settings = settings.model_copy(update={"method": options.WITHOUT_DATA})
    with reporting(sink) as reporter:
        found = measure_sensitivity(opening, shared, settings, reporter=reporter)
    if picture is not None:
        from compress.prune.picture import draw

        draw(found.curves, f"{found.arch}: {found.method}", picture)
        sink.hint(f"wrote {picture}")
    document = found.document | {"picture": str(picture) if picture else None}
    sink.result(document, *_tables(found))


def _tables(found: Sensitivity) -> list[Table]:
    """Return what is shown: groups, and blocks and INT8 layers where they were measured."""
    from rich.table import Table

    curves = found.curves
    table = Table(title=f"{found.arch}, {found.method}: {curves.unit}")
    table.add_column("group")
    table.add_column("units", justify="right")
    for head in ("25 % gone", "50 % gone", "75 % gone"):
        table.add_column(head, justify="right")
    table.add_column("half gone, beside the others")
    errors = {
        name: [c.error[min(round(f * len(c.order)), len(c.order) - 1)] for f in (0.25, 0.5, 0.75)]
        for name, c in curves.groups.items()
    }
    worst = max((e[1] for e in errors.values()), default=0.0) or 1.0
    for name, row in errors.items():
        bar = "█" * round(30 * row[1] / worst)
        table.add_row(name, str(len(curves.groups[name].order)), *(f"{e:.3g}" for e in row), bar)
    shown = [table]
    if curves.blocks:
        blocks = Table(title="leaving out a whole block")
        blocks.add_column("block")
        blocks.add_column("error", justify="right")
        for name, error in curves.blocks.items():
            blocks.add_row(name, f"{error:.3g}")
        shown.append(blocks)
    if found.int8 is not None:
        layers = Table(title="quantizing one layer alone to INT8: divergence of the predictions")
        layers.add_column("layer")
        layers.add_column("nats", justify="right")
        layers.add_column("of it by the weights", justify="right")
        for layer in found.int8:
            layers.add_row(layer["layer"], f"{layer['divergence']:.2g}", f"{100 * layer['weight_share']:.0f} %")
        shown.append(layers)
    return shown


@app.command()
def methods(ctx: typer.Context) -> None:
    """List the pruning methods.

    Example: rescompress methods --json
    """
    from rich.table import Table

    from compress.prune import load_method, method_names

    rows = [(name, load_method(name)) for name in method_names()]
    table = Table(title="pruning methods")
    for head in ("name", "needs images", "what goes first"):
        table.add_column(head)
    for name, m in rows:
        table.add_row(name, "yes" if m.NEEDS_DATA else "no", m.DESCRIPTION)
    output_of(ctx).result([{"name": n, "needs_data": m.NEEDS_DATA, "description": m.DESCRIPTION} for n, m in rows], table)
