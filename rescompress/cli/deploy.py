"""``rescompress deploy``: build and measure on the board over SSH, and bring engine and timings back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rescompress.cli import options as opt
from rescompress.cli import workspace
from rescompress.cli.from_settings import Options, with_options
from rescompress.cli.options import Common, Data, InputShape
from rescompress.cli.output import Output, output_of
from rescompress.core.details import DeployDetails
from rescompress.core.evidence import load_sound
from rescompress.core.manifest import MANIFEST_NAME, StageResult
from rescompress.core.metric import Metric
from rescompress.core.settings import DeploySettings

app = typer.Typer()


@app.command()
@with_options
def deploy(
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint, or .onnx file.")],
    host: Annotated[str | None, typer.Option("--host", metavar="USER@HOST", help="The board, as ssh knows it.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "-t", help="Which board it is.", show_default="what it says itself", autocompletion=opt.targets
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="The same network in float32, to compare a quantized .onnx with.")
    ] = None,
    *,
    settings: Annotated[DeploySettings, Options()],
    input_shape: InputShape = None,
    data: Data = None,
    common: Annotated[Common, Options(only=("labels", "seed"))],
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port of ssh.", show_default="ssh's")] = None,
    ssh_config: Annotated[Path | None, typer.Option("--ssh-config", help="Instead of ~/.ssh/config.")] = None,
    cached: Annotated[
        bool, typer.Option("--cached", help="Take what was measured before, where all that it depends on is the same.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands for the board and stop.")] = False,
    out: Annotated[Path, typer.Option("--output", "-o", help="Where engines, logs and the manifest go.")] = workspace.WORKSPACE,
) -> None:
    """Build FP16 and INT8 on the board, measure latency, throughput and power there, keep the faster, fetch it.

    With --data, accuracy is measured on the board too: images are preprocessed here and run through its engines.

    Example: rescompress deploy model_int8.onnx --baseline model.onnx --host nvidia@orin-nano --batches 1,8
    Example: rescompress deploy int8.safetensors --host nvidia@orin-nano --data photos/ --limit 2000 --runs 5
    """
    from compress.checkpoints.options import parse_shape
    from edge_targets.board_probe import probe
    from edge_targets.catalog import load_target
    from edge_targets.ssh import Board
    from rescompress.cli.progress import reporting
    from rescompress.core.errors import BadInput
    from rescompress.runs.pipeline import run_beside
    from rescompress.runs.plan import Builder
    from rescompress.runs.stage import Opening

    output = output_of(ctx)
    if settings.limit is not None and data is None:
        raise BadInput("limits the images of --data", where="--limit", remedy="give --data, or leave --limit out")
    named = load_target(target) if target is not None else None
    opening = Opening(model, parse_shape(input_shape) if input_shape else None).fetched()
    floating = Opening(baseline) if baseline is not None else None
    if dry_run:
        from rescompress.runs.stages.deploy import planned

        assumed = named or load_target("jetson")
        lines, notes = planned(opening, floating, settings, assumed, scored=data is not None)
        output.hint(f"for {assumed.name} with TensorRT {assumed.tensorrt_version}; nothing was run")
        output.result({"target": assumed.name, "commands": lines, "notes": notes}, *lines, *notes)
        return
    if host is None:
        raise BadInput("which board?", where="--host", remedy="give --host user@board, or --dry-run to see the commands")
    board = Board(host, port, ssh_config)
    if (out / MANIFEST_NAME).is_file():
        load_sound(out)  # what is wrong with it is told before any work
    builder = Builder(opening, common.settings(data))
    stage = builder.deploy(settings, board, probe(board), named=target, baseline=floating)
    with reporting(output) as reporter:
        done = run_beside(stage, out, reporter=reporter, again=not cached)
    _show(output, _document(done.result, out))
    if done.incomplete is not None:
        raise done.incomplete


def _document(result: StageResult, out: Path) -> dict[str, Any]:
    """Return what is printed of a deployment: the figures of the fastest engine, and a row for each."""
    details = result.details_as(DeployDetails)
    assert details is not None
    rows = {precision: _row(details, precision, out) for precision in details.engines}
    document = {
        **rows[str(details.precision)],
        "target": details.target,
        "tensorrt": details.tensorrt,
        "builder": details.builder,
        "power_mode": details.power_mode,
        "verdict": "measured" if all(engine.stable for engine in details.engines.values()) else "inconclusive",
        "results": list(rows.values()),
        "notes": details.notes,
        "commands": details.commands,
        "manifest": str(out / MANIFEST_NAME),
    }
    return document | ({"conditions": details.conditions} if details.conditions else {})


def _row(details: DeployDetails, precision: str, out: Path) -> dict[str, Any]:
    engine = details.engines[precision]
    metrics = {name: Metric.model_validate(metric) for name, metric in details.results[precision].items()}
    p50 = metrics["p50_ms"]
    return {
        "precision": precision,
        "engine": str(out / engine.path),
        **{name: metric.value for name, metric in metrics.items()},
        "n": p50.n,
        "latency_runs": engine.latency_runs,
        **_accuracy(metrics),
        "coefficient_of_variation": engine.spread,
        "stable": engine.stable,
        "layers": engine.layers,
        "device": p50.device,
        "runtime": "tensorrt",
        "provenance": "measured",
    }


def _accuracy(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Return the standard error of top-1 and its number of images; both keys are there even where it was not measured."""
    top1 = metrics.get("top1")
    return {"top1_std_error": top1.std_error if top1 else None, "top1_n": top1.n if top1 else None}


def _ran(layers: list[dict[str, Any]]) -> str:
    """Return how many layers run in what and where: ``of 21 convolutions and matrix products 20 in int8 (gpu), ...``."""
    from collections import Counter

    counts = Counter((row["ran"] or "a type not told", row["unit"] or "unit not told") for row in layers)
    texts = [f"{n} in {ran} ({unit})" for (ran, unit), n in counts.most_common()]
    return f"of {len(layers)} convolutions and matrix products {', '.join(texts)}"


def _show(output: Output, document: dict[str, Any]) -> None:
    from rich.table import Table

    title = f"measured on {document['device']}, TensorRT {document['tensorrt']}, mode {document['power_mode'] or 'unknown'}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("precision", "p50 ms", "p90 ms", "p99 ms", "variation", "images/s", "W", "images/s/W", "top-1"):
        table.add_column(column, overflow="fold")
    for r in document["results"]:
        optional = [f"{r[k]:.2f}" if k in r else "" for k in ("power_w", "images_per_s_per_w")]
        top1 = f"{100 * r['top1']:.2f} ± {100 * r['top1_std_error']:.2f} %" if "top1" in r else ""
        mark = " (fastest)" if r["precision"] == document["precision"] else ""
        numbers = [f"{r[k]:.3f}" for k in ("p50_ms", "p90_ms", "p99_ms")]
        steady = f"{r['coefficient_of_variation']:.1%}" + ("" if r["stable"] else " inconclusive")
        table.add_row(r["precision"] + mark, *numbers, steady, f"{r['images_per_s']:.0f}", *optional, top1)
    lines = [f"{r['precision']}: {r['engine']}" for r in document["results"]]
    for name, how in document.get("conditions", {}).items():
        lines.append(f"{name} {document[name]:.3f}: {how}")
    lines += [f"{r['precision']}: {_ran(r['layers'])}" for r in document["results"] if r["layers"]]
    if document["top1_n"]:
        lines.append(f"accuracy of {document['top1_n']} images, computed on the board")
    output.result(document, table, *lines, *document["notes"])
