"""``rescompress deploy``: build and measure on the board over SSH, and bring engine and timings back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rescompress.cli.options import InputShape
from rescompress.cli.output import Output, output_of

if TYPE_CHECKING:
    from edge_targets.device import Target
    from edge_targets.remote import Deployment, Job
    from rescompress.core.manifest import StageResult

app = typer.Typer()

DEFAULT_FOLDER = Path("rescompress-out")


@app.command()
def deploy(
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint, or .onnx file.")],
    host: Annotated[str | None, typer.Option("--host", metavar="USER@HOST", help="The board, as ssh knows it.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Which board it is.", show_default="what it says itself")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="The same network in float32, to compare a quantized .onnx with.")
    ] = None,
    batches: Annotated[str, typer.Option("--batches", help="Batches to time; the first is the latency that counts.")] = "1",
    input_shape: InputShape = None,
    seconds: Annotated[int, typer.Option("--seconds", min=1, help="Seconds of samples per measurement.")] = 10,
    workspace: Annotated[int, typer.Option("--workspace", min=16, help="Scratch memory of the builder in MiB.")] = 1024,
    dla: Annotated[int | None, typer.Option("--dla", min=0, max=1, help="Use this deep-learning accelerator.")] = None,
    sparsity: Annotated[bool, typer.Option("--sparsity", help="Use 2:4 sparse kernels where the weights allow it.")] = False,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port of ssh.", show_default="ssh's")] = None,
    ssh_config: Annotated[Path | None, typer.Option("--ssh-config", help="Instead of ~/.ssh/config.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands for the board and stop.")] = False,
    out: Annotated[Path, typer.Option("--output", "-o", help="Where engines, logs and the manifest go.")] = DEFAULT_FOLDER,
) -> None:
    """Build FP16 and INT8 on the board, measure latency, throughput and power there, keep the faster, fetch it.

    Example: rescompress deploy model_int8.onnx --baseline model.onnx --host nvidia@orin-nano --batches 1,8
    """
    from edge_targets import remote
    from edge_targets.catalog import load_target
    from edge_targets.ssh import Board
    from rescompress.core.errors import BadInput
    from rescompress.core.manifest import MANIFEST_NAME, Manifest, load_manifest

    output = output_of(ctx)
    sizes = _batches(batches)
    options = remote.DeployOptions(sizes, seconds, workspace_mb=workspace, dla_core=dla, sparsity=sparsity)
    named = load_target(target) if target else None
    folder = out / "deploy"
    if dry_run:
        assumed = named or load_target("jetson")
        jobs, notes = _jobs(model, baseline, sizes, input_shape, folder, assumed)
        lines = remote.dry_run(assumed, jobs, options)
        output.hint(f"for {assumed.name} with TensorRT {assumed.tensorrt_version}; nothing was run")
        from rich.markup import escape

        shown = [escape(line) for line in lines]
        output.result({"target": assumed.name, "commands": lines, "notes": notes}, *shown, *notes)
        return
    if host is None:
        raise BadInput("which board?", where="--host", remedy="give --host user@board, or --dry-run to see the commands")
    board = Board(host, port, ssh_config)
    found = remote.probe(board)
    on_board = _on_board(named, found, load_target)
    jobs, notes = _jobs(model, baseline, sizes, input_shape, folder, on_board)
    done = remote.deploy(board, jobs, options, folder, target=named, found=found, say=output.hint)
    done = dataclasses.replace(done, notes=(*notes, *done.notes))
    result = _stage(done, on_board, out)
    manifest = load_manifest(out) if (out / MANIFEST_NAME).is_file() else Manifest()
    manifest.with_stage(result).save(out)
    document = {
        **_row(done, done.best),
        "target": on_board.name,
        "tensorrt": found.version,
        "power_mode": found.power_mode,
        "verdict": "measured" if all(r.stable for r in done.results) else "inconclusive",
        "results": [_row(done, r) for r in done.results],
        "notes": list(done.notes),
        "commands": list(done.commands),
        "manifest": str(out / MANIFEST_NAME),
    }
    _show(output, document)


def _batches(text: str) -> tuple[int, ...]:
    from rescompress.core.errors import BadInput

    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdigit() and int(p) > 0 for p in parts):
        raise BadInput(f"'{text}' names no batches", where="--batches", remedy="write 1 or 1,8,32")
    return tuple(dict.fromkeys(int(p) for p in parts))


def _on_board(named: Target | None, found: Any, load_target: Any) -> Target:
    """Return the target with the TensorRT that the board really has."""
    chosen: Target = load_target(found.device) if found.device else named or load_target("jetson")
    return chosen.model_copy(update={"tensorrt_version": found.version})


def _jobs(
    model: Path, baseline: Path | None, batches: tuple[int, ...], shape: str | None, folder: Path, target: Target
) -> tuple[list[Job], list[str]]:
    """Return what to build, and what the user should know about it.

    Raises:
        BadInput: A file is missing or is no model, or its batch is fixed to another size.
    """
    from edge_targets.onnx_kernels import kernels_of
    from edge_targets.remote import Job
    from edge_targets.trtexec import InputShapes
    from rescompress.cli.inspect import parse_shape
    from rescompress.core.errors import ModelFileError

    input_shape = parse_shape(shape) if shape else None
    notes: list[str] = []
    if model.suffix == ".onnx":
        files = [model, *([baseline] if baseline else [])]
    else:
        files = _export(model, input_shape, folder, target, dynamic=len(batches) > 1, batch=batches[0])
    jobs = []
    for file in files:
        read = kernels_of(file, input_shape=input_shape)
        if read.batch is not None and batches != (read.batch,):
            raise ModelFileError(
                f"its batch is fixed to {read.batch}, asked for {', '.join(map(str, batches))}",
                where=str(file),
                remedy="export with --batch dynamic, or leave --batches out",
            )
        precision = read.precision
        if precision == "fp32" and not target.strongly_typed and "fp16" in target.precisions:
            precision = "fp16"
        target.check_precision(precision)
        shapes = None
        if read.batch is None:
            shapes = InputShapes(read.input_name, read.input_shape, min(batches), batches[0], max(batches))
        jobs.append(Job(precision, file, shapes))
    if len({j.precision for j in jobs}) < len(jobs):
        raise ModelFileError(
            f"both files would be built in {jobs[0].precision}", where=str(files[-1]), remedy="give one of them, or another"
        )
    if len(jobs) == 1 and jobs[0].precision == "int8":
        notes.append("no float engine to compare with: give --baseline FLOAT.onnx, or deploy the checkpoint")
    return jobs, notes


def _export(
    model: Path, shape: tuple[int, int, int] | None, folder: Path, target: Target, *, dynamic: bool, batch: int
) -> list[Path]:
    """Write a checkpoint as ONNX for the board, in float and, where it is quantized, in INT8; return the files."""
    from compress.checkpoints import load_checkpoint
    from export.to_onnx import ExportOptions, to_onnx
    from rescompress.core.artifact import write_bytes

    checkpoint = load_checkpoint(model, input_shape=shape)
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in checkpoint.state_dict.items()}
    wanted: Any = "dynamic" if dynamic else batch
    half = target.strongly_typed and "fp16" in target.precisions
    files = []
    for name in ("float", *(("int8",) if checkpoint.quantization and "int8" in target.precisions else ())):
        precision: Any = ("int8+fp16" if half else "int8") if name == "int8" else ("fp16" if half else "fp32")
        quantization = checkpoint.quantization if name == "int8" else None
        proto = to_onnx(checkpoint.spec, tensors, quantization, ExportOptions(wanted, target.opset, precision))
        path = folder / f"{model.stem}.{name}.onnx"
        write_bytes(path, proto.SerializeToString())
        files.append(path)
    return files


def _stage(done: Deployment, target: Target, root: Path) -> StageResult:
    from rescompress.core.artifact import Artifact
    from rescompress.core.manifest import StageResult

    kinds = {".engine": "engine", ".log": "log"}
    files = tuple(Artifact.of(kinds.get(f.suffix, "report"), f, root) for f in done.best.files)
    return StageResult(
        stage=f"deploy:{target.name}",
        status="done",
        metrics=done.best.metrics,
        outputs=files,
        details={
            "target": target.name,
            "tensorrt": done.probe.version,
            "model": done.probe.model,
            "power_mode": done.probe.power_mode,
            "clocks": done.probe.clocks,
            "precision": done.best.precision,
            "stable": done.best.stable,
            "spread": done.best.spread,
            "results": {r.precision: {n: m.model_dump(mode="json") for n, m in r.metrics.items()} for r in done.results},
            "engine": done.best.details,
            "notes": list(done.notes),
            "commands": list(done.commands),
        },
    )


def _row(done: Deployment, result: Any) -> dict[str, Any]:
    metrics = {name: metric.value for name, metric in result.metrics.items()}
    return {
        "precision": result.precision,
        "engine": str(result.engine),
        **metrics,
        "n": result.metrics["p50_ms"].n,
        "coefficient_of_variation": result.spread,
        "stable": result.stable,
        "device": result.metrics["p50_ms"].device,
        "runtime": "tensorrt",
        "provenance": "measured",
    }


def _show(output: Output, document: dict[str, Any]) -> None:
    from rich.table import Table

    title = f"measured on {document['device']}, TensorRT {document['tensorrt']}, mode {document['power_mode'] or 'unknown'}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("precision", "p50 ms", "p90 ms", "p99 ms", "variation", "images/s", "W", "images/s/W", "engine"):
        table.add_column(column, overflow="fold")
    for r in document["results"]:
        optional = [f"{r[k]:.2f}" if k in r else "" for k in ("power_w", "images_per_s_per_w")]
        mark = " (fastest)" if r["precision"] == document["precision"] else ""
        numbers = [f"{r[k]:.3f}" for k in ("p50_ms", "p90_ms", "p99_ms")]
        steady = f"{r['coefficient_of_variation']:.1%}" + ("" if r["stable"] else " inconclusive")
        table.add_row(r["precision"] + mark, *numbers, steady, f"{r['images_per_s']:.0f}", *optional, r["engine"])
    output.result(document, table, *document["notes"])
