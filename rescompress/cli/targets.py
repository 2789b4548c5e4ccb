"""``rescompress targets`` and ``rescompress predict``: what is known of the devices, and latencies without them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rescompress.cli import options as opt
from rescompress.cli.options import InputShape
from rescompress.cli.output import Output, output_of

if TYPE_CHECKING:
    from edge_targets.device import Device, Target
    from edge_targets.kernels import Kernel

app = typer.Typer()


@app.command()
def targets(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="One target, in full: modes, releases, sources.", show_default=False)
    ] = None,
) -> None:
    """List the edge targets: device, runtime, precisions, alignment, power modes.

    Example: rescompress targets jetson-agx-orin-64gb
    """
    from edge_targets.catalog import alias_notes, load_target, survey

    output = output_of(ctx)
    if name is not None:
        chosen = load_target(name)
        output.result([_document(chosen)], _details(chosen))
        return
    found, left_out = survey()
    aliases = {t.alias: t for t in found if t.alias is not None}
    documents = [_document(t) for t in found if t.alias is None]
    documents += [{**_document(t), "name": alias, "alias_of": t.name} for alias, t in aliases.items()]
    output.result(documents, _table([t for t in found if t.alias is None]))
    for error in left_out:
        output.hint(f"left out: {error}")
    for note in alias_notes(aliases["jetson"]) if "jetson" in aliases else []:
        output.hint(note)
    output.hint("`rescompress targets NAME` shows one with its sources")


def _document(target: Target) -> dict[str, Any]:
    device = target.device
    return {
        "name": target.name,
        "device": device.title,
        "runtime": target.runtime,
        "precisions": list(target.precisions),
        "sm": device.compute_capability,
        "sm_count": device.mode().sm_count if device.modes else None,
        "align": device.align,
        "opset": target.opset,
        "profile": target.profile,
        "tensorrt": target.tensorrt_version,
        "jetpack": target.jetpack,
        "strongly_typed": target.strongly_typed if target.profile == "tensorrt" else None,
        "peak_tops": {p: round(device.peak_tops(p), 2) for p in device.precisions} if device.modes else None,
        "predicts_latency": bool(device.modes),
        "facts": device.model_dump(mode="json"),
    }


def _table(found: list[Target]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("target", "device", "runtime", "precisions", "align", "GPU", "power modes (first: highest clocks)"):
        table.add_column(title, overflow="fold")
    for target in found:
        device = target.device
        runtime = f"TensorRT {target.tensorrt_version}" if target.tensorrt_version else target.runtime
        gpu = (
            f"{device.mode().sm_count} SM, {device.mode().gpu_mhz:g} MHz" if device.modes else (device.compute_capability or "")
        )
        table.add_row(
            target.name,
            device.title,
            runtime,
            " ".join(device.precisions),
            str(target.align()),
            gpu,
            ", ".join(m.name for m in device.modes),
        )
    return table


def _details(target: Target) -> Any:
    from rich.table import Table

    device = target.device
    table = Table(title=f"{target.name}: {device.title}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("fact")
    table.add_column("value")
    table.add_column("source", overflow="fold")
    if target.alias:
        table.add_row("alias", f"{target.alias} -> {target.name}", "")
    table.add_row("runtime", target.runtime, "")
    table.add_row("align", ", ".join(f"{p}: {n}" for p, n in device.align.items()), device.align_source)
    for field in type(device).model_fields:
        figure = getattr(device, field)
        if hasattr(figure, "source"):
            table.add_row(field, f"{figure.value:g}", figure.source + ("" if figure.verified else " (unverified)"))
    for mode in device.modes:
        mark = " (default)" if mode.name == device.default_mode else ""
        value = f"{mode.sm_count} SM, GPU {mode.gpu_mhz:g} MHz, EMC {mode.emc_mhz:g} MHz"
        table.add_row(f"mode {mode.name}{mark}", value, mode.source + ("" if mode.verified else " (unverified)"))
    for release in device.software:
        mark = " (default)" if release.jetpack == device.default_jetpack else ""
        parts = {"TensorRT": release.tensorrt, "CUDA": release.cuda, "L4T": release.l4t, "Python": release.python}
        value = ", ".join(f"{name} {version}" for name, version in parts.items() if version)
        table.add_row(f"JetPack {release.jetpack}{mark}", value, release.source + ("" if release.verified else " (unverified)"))
    for note in device.notes:
        table.add_row("note", note, "")
    return table


@app.command()
def predict(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint, .onnx file, or arch:NAME such as arch:resnet50.")],
    target: Annotated[
        str, typer.Option("--target", "-t", help="A Jetson (`rescompress targets`).", autocompletion=opt.targets)
    ] = "jetson",
    precision: Annotated[
        str, typer.Option("--precision", help="fp32, fp16, int8; auto: what the file is, else the fastest.")
    ] = "auto",
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Images per call.", show_default="1, or what the file is fixed to")
    ] = None,
    input_shape: InputShape = None,
    power_mode: Annotated[
        str | None, typer.Option("--power-mode", help="Of the device.", show_default="highest clocks")
    ] = None,
    sm_count: Annotated[
        int | None, typer.Option("--sm-count", help="Active multiprocessors.", show_default="the mode's")
    ] = None,
    gpu_mhz: Annotated[float | None, typer.Option("--gpu-mhz", help="GPU clock.", show_default="the mode's")] = None,
    emc_mhz: Annotated[float | None, typer.Option("--emc-mhz", help="Memory clock.", show_default="the mode's")] = None,
    slowest: Annotated[int, typer.Option("--slowest", min=0, help="Kernels to show.")] = 10,
) -> None:
    """Predict the latency on a device that is not here, with an error band, per kernel and in total.

    Example: rescompress predict arch:resnet50 --target jetson-orin-nano-8gb-super --precision int8 --power-mode 25W
    """
    from edge_targets.catalog import alias_notes, load_target
    from edge_targets.latency import Overrides, as_document, predict_kernels

    chosen = load_target(target)
    output = output_of(ctx)
    kernels, own, fixed = _kernels(model, input_shape, chosen.device, output)
    if fixed is not None and batch not in (None, fixed):
        output.hint(f"{model} is fixed to {fixed} images per call: the figure is of the same network exported for {batch}")
    wanted = chosen.check_precision(own if precision == "auto" else precision)
    prediction = predict_kernels(
        kernels,
        chosen.device,
        precision=wanted,
        batch=batch or fixed or 1,
        power_mode=power_mode,
        overrides=Overrides(sm_count, gpu_mhz, emc_mhz),
    )
    document = {"model_file": model, "target": chosen.name, "alias": chosen.alias, **as_document(prediction)}
    document["notes"] += alias_notes(chosen)
    output.result(document, _prediction_table(document, slowest), _summary(document), *document["notes"])


def _kernels(
    model: str, input_shape: str | None, device: Device, output: Output
) -> tuple[list[Kernel], str | None, int | None]:
    """Return the kernels of a model, the precision it is written in and its batch (None where these are open)."""
    from compress.checkpoints.options import parse_shape
    from edge_targets.fp8 import refuse_file
    from edge_targets.kernels import fuse
    from edge_targets.onnx_kernels import kernels_of
    from rescompress.core.layers import walk

    shape = parse_shape(input_shape) if input_shape else None
    if model.startswith("arch:"):
        from compress.zoo import spec

        found = spec(model.removeprefix("arch:"))
        return fuse(walk(found if shape is None else found.replace(input_shape=shape))), None, None
    path = Path(model)
    if path.suffix == ".onnx":
        refuse_file(path)
        read = kernels_of(path, input_shape=shape)
        # A float32 file leaves the choice to the builder, which may use FP16; any other file has made it.
        return list(read.kernels), device.best_float if read.precision == "fp32" else read.precision, read.batch
    from rescompress.runs.stage import Opening

    checkpoint = Opening(path, shape).fetched().load(lambda text: output.hint(f"note: {text}"))
    return fuse(walk(checkpoint.spec)), "int8" if checkpoint.quantization else None, None


def _prediction_table(document: dict[str, Any], slowest: int) -> Any:
    from rich.table import Table

    shown = sorted(document["layers"], key=lambda k: -k["ms"])[:slowest]
    table = Table(title=f"slowest kernels of {len(document['layers'])}", title_justify="left", box=None, pad_edge=False)
    for title in ("kernel", "kind"):
        table.add_column(title)
    for title in ("ms", "share", "overhead", "compute", "memory"):
        table.add_column(title, justify="right")
    for k in shown:
        share = f"{k['ms'] / document['p50_ms']:.1%}"
        table.add_row(
            k["name"],
            k["kind"],
            f"{k['ms']:.4f}",
            share,
            f"{k['overhead_ms']:.4f}",
            f"{k['compute_ms']:.4f}",
            f"{k['memory_ms']:.4f}",
        )
    return table


def _summary(document: dict[str, Any]) -> str:
    mode = (
        f"{document['power_mode']}: {document['sm_count']} SM, GPU {document['gpu_mhz']:g} MHz, EMC {document['emc_mhz']:g} MHz"
    )
    return (
        f"\n{document['p50_ms']:.3f} ms predicted (band {document['low_ms']:.3f} to {document['high_ms']:.3f}) on "
        f"{document['device']}, {document['precision']}, batch {document['batch']}, {mode}"
    )
