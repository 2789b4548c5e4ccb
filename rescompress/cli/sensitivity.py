"""`rescompress sensitivity` and `rescompress methods`: where a network is soft, and what can choose channels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rescompress.cli import options, workspace
from rescompress.cli.output import output_of
from rescompress.core.choices import Scope

if TYPE_CHECKING:
    from torch import Tensor

    from compress.checkpoints.base import Checkpoint
    from rescompress.reporter import Reporter

app = typer.Typer()


@app.command()
def sensitivity(
    ctx: typer.Context,
    checkpoint: options.Checkpoint,
    data: options.Data = None,
    method: options.Method = None,
    scope: Annotated[Scope, typer.Option("--scope", help="Channels inside blocks, or residual streams too.")] = "inner",
    calib: Annotated[int, typer.Option("--calib", min=1, help="Calibration images.")] = 512,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Draw the curves: FILE.svg or FILE.png.", show_default=False),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Also: how much each layer minds INT8. Needs --data.")] = False,
    labels: options.Labels = None,
    input_shape: options.InputShape = None,
    preprocess: options.Preprocess = None,
    arch_option: options.ArchOption = None,
    allow_pickle: options.AllowPickle = False,
    seed: options.Seed = 0,
    threads: options.Threads = None,
) -> None:
    """Show what removing channels of each group would cost, and with -o draw it.

    Example: rescompress sensitivity resnet32.pt --data cifar10 -o curves.svg
    Example: rescompress sensitivity resnet32.pt --data cifar10 --int8
    """
    from pathlib import Path

    from rescompress.core.errors import BadInput

    sink = output_of(ctx)
    picture = Path(output) if output else None
    if picture is not None and picture.suffix.lower() not in (".svg", ".png"):
        raise BadInput(f"cannot draw a '{picture.suffix}' file", where="-o", remedy="name a .svg or .png file")
    if int8 and data is None:
        raise BadInput("what INT8 does shows on images only", where="--int8", remedy="give --data")
    workspace.check_output(checkpoint, picture)
    import torch
    from rich.table import Table

    from compress.data import load_dataset
    from compress.prune import measure
    from compress.prune.picture import draw
    from rescompress.cli.progress import reporting

    if threads is not None:
        torch.set_num_threads(threads)
    opening = workspace.opening(
        checkpoint, input_shape=input_shape, preprocess=preprocess, arch_options=arch_option or (), allow_pickle=allow_pickle
    )
    loaded = opening.load()
    chosen = method or ("reconstruct" if data is not None else "magnitude")
    if data is None and method is None:
        sink.hint("no --data: weights only; with images, reconstruct says what the rest of the network can repair")
    images, layers_int8 = None, None
    with reporting(sink) as reporter:
        if data is not None:
            dataset = load_dataset(data, loaded.spec, seed=seed, labels=workspace.parse_labels(labels))
            for text in dataset.notes:
                reporter.note(text)
            images = dataset.train.take(calib, seed).tensor()
        curves = measure(
            loaded,
            method=chosen,
            scope=scope,
            calibration_x=images,
            seed=seed,
            progress=reporter.progress,
            note=reporter.note,
        )
        if int8 and images is not None:
            layers_int8 = _int8(loaded, images, reporter)
    if picture is not None:
        draw(curves, f"{loaded.spec.arch}: {chosen}", picture)
        sink.hint(f"wrote {picture}")
    document: dict[str, Any] = {
        "method": chosen,
        "unit": curves.unit,
        "groups": {name: {"order": list(c.order), "error": list(c.error)} for name, c in curves.groups.items()},
        "blocks": dict(curves.blocks),
        "picture": str(picture) if picture else None,
    }
    table = Table(title=f"{loaded.spec.arch}, {chosen}: {curves.unit}")
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
    shown: list[Any] = [table]
    if curves.blocks:
        blocks = Table(title="leaving out a whole block")
        blocks.add_column("block")
        blocks.add_column("error", justify="right")
        for name, error in curves.blocks.items():
            blocks.add_row(name, f"{error:.3g}")
        shown.append(blocks)
    if layers_int8 is not None:
        layers = Table(title="quantizing one layer alone to INT8: divergence of the predictions")
        layers.add_column("layer")
        layers.add_column("nats", justify="right")
        layers.add_column("of it by the weights", justify="right")
        document["int8"] = layers_int8
        for found in layers_int8:
            layers.add_row(found["layer"], f"{found['divergence']:.2g}", f"{100 * found['weight_share']:.0f} %")
        shown.append(layers)
    sink.result(document, *shown)


def _int8(checkpoint: Checkpoint, images: Tensor, reporter: Reporter) -> list[dict[str, Any]]:
    """Return how much each layer minds being quantized, measured on at most 256 of the images."""
    from dataclasses import asdict

    from compress.quantize import ptq
    from compress.quantize.sensitivity import sensitivities

    batches = [images[start : start + 64] for start in range(0, len(images), 64)]
    quantized = ptq(checkpoint, batches, calibration="mse", bias_correction=False)
    tell = functools.partial(reporter.progress, "quantizing one layer at a time")
    return [asdict(found) for found in sensitivities(quantized, batches[:4], progress=tell)]


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
