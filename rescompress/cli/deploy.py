"""``rescompress deploy``: build and measure on the board over SSH, and bring engine and timings back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rescompress.cli.options import Data, InputShape, Labels, Seed
from rescompress.cli.output import Output, output_of

if TYPE_CHECKING:
    from compress.data import Inputs, Split
    from compress.evaluate import Evaluation
    from edge_targets.board_work import Deployment, DeployOptions, Job
    from edge_targets.device import Precision, Target
    from rescompress.core.manifest import StageResult

app = typer.Typer()

DEFAULT_FOLDER = Path("rescompress-out")
OUTCOMES = ".outcomes.json"


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
    data: Data = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Images of --data to run on the board.", show_default="all")
    ] = None,
    labels: Labels = None,
    seed: Seed = 0,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Processes that time the first batch; gates want 5.")] = 1,
    seconds: Annotated[int, typer.Option("--seconds", min=1, help="Seconds of samples per measurement.")] = 10,
    workspace: Annotated[int, typer.Option("--workspace", min=16, help="Scratch memory of the builder in MiB.")] = 1024,
    dla: Annotated[int | None, typer.Option("--dla", min=0, max=1, help="Use this deep-learning accelerator.")] = None,
    allow_fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Measure engines, too, whose layers do not run as asked; say so.")
    ] = False,
    sparsity: Annotated[bool, typer.Option("--sparsity", help="Use 2:4 sparse kernels where the weights allow it.")] = False,
    builds: Annotated[
        int, typer.Option("--builds", min=1, max=9, help="Engines built and timed per precision; the middle one is kept.")
    ] = 1,
    soak: Annotated[
        str | None, typer.Option("--soak", metavar="TIME", help="Run that long (30m): first minute against last.")
    ] = None,
    cold_start: Annotated[
        bool, typer.Option("--cold-start", help="Also time new processes, and frames after a second of idleness.")
    ] = False,
    streams: Annotated[
        int, typer.Option("--streams", min=1, max=16, help="Also time runs while this many streams run at once.")
    ] = 1,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Also time runs with their copies to and from the GPU.")
    ] = False,
    photo: Annotated[
        list[Path] | None,
        typer.Option("--photo", metavar="FILE", help="Also time the way from this image file to the classes; may be repeated."),
    ] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port of ssh.", show_default="ssh's")] = None,
    ssh_config: Annotated[Path | None, typer.Option("--ssh-config", help="Instead of ~/.ssh/config.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands for the board and stop.")] = False,
    out: Annotated[Path, typer.Option("--output", "-o", help="Where engines, logs and the manifest go.")] = DEFAULT_FOLDER,
) -> None:
    """Build FP16 and INT8 on the board, measure latency, throughput and power there, keep the faster, fetch it.

    With --data, accuracy is measured on the board too: images are preprocessed here and run through its engines.

    Example: rescompress deploy model_int8.onnx --baseline model.onnx --host nvidia@orin-nano --batches 1,8
    Example: rescompress deploy int8.safetensors --host nvidia@orin-nano --data photos/ --limit 2000 --runs 5
    """
    from edge_targets import board_probe, board_work, remote
    from edge_targets.board_statistics import Extras, parse_duration
    from edge_targets.catalog import load_target, survey
    from edge_targets.ssh import Board, Turn
    from rescompress.core.artifact import file_sha256
    from rescompress.core.errors import BadInput
    from rescompress.core.manifest import MANIFEST_NAME, load_manifest, update_manifest
    from rescompress.runs.stage import Opening

    output = output_of(ctx)
    sizes = _batches(batches)
    extras = Extras(parse_duration(soak) if soak is not None else 0, cold_start, streams, end_to_end)
    options = board_work.DeployOptions(
        sizes, seconds, workspace_mb=workspace, dla_core=dla, sparsity=sparsity, runs=runs, builds=builds, extras=extras
    )
    options = dataclasses.replace(options, allow_fallback=allow_fallback)
    if limit is not None and data is None:
        raise BadInput("limits the images of --data", where="--limit", remedy="give --data, or leave --limit out")
    named = load_target(target) if target else None
    if dry_run:
        assumed = named or load_target("jetson")
        jobs, notes = _jobs(model, baseline, sizes, input_shape, _folder(out, assumed), assumed)
        notes += _advice(assumed, jobs, dla) + (_sparsity(assumed, jobs) if sparsity else [])
        options = _with_photos(options, jobs, photo)
        lines = board_work.dry_run(assumed, jobs, options, scored=data is not None)
        output.hint(f"for {assumed.name} with TensorRT {assumed.tensorrt_version}; nothing was run")
        output.result({"target": assumed.name, "commands": lines, "notes": notes}, *lines, *notes)
        return
    if host is None:
        raise BadInput("which board?", where="--host", remedy="give --host user@board, or --dry-run to see the commands")
    board = Board(host, port, ssh_config)
    if (out / MANIFEST_NAME).is_file():
        load_manifest(out)  # what is wrong with it is told before any work
    found = board_probe.probe(board)
    on_board = _on_board(named, found, load_target)
    folder = _folder(out, on_board)
    jobs, notes = _jobs(model, baseline, sizes, input_shape, folder, on_board)
    notes += _advice(on_board, jobs, dla) + (_sparsity(on_board, jobs) if sparsity else [])
    notes += [f"left out when the board was identified: {error}" for error in survey()[1]]
    options = _with_photos(options, jobs, photo)
    images = _images(jobs, data, limit, labels, seed, output) if data is not None else None
    scores: dict[Precision, Evaluation] = {}
    score = _scorer(*images, scores, output) if images is not None else None
    with Turn(board, output.hint):
        done = remote.deploy(board, jobs, options, folder, target=named, found=found, score=score, say=output.hint)
    done = _with_scores(_with_sizes(done, jobs), scores, folder)
    done = dataclasses.replace(done, notes=(*notes, *done.notes))
    result, read = _stage(done, on_board, out), file_sha256(Opening(model).fetched().path)
    update_manifest(out, lambda m: m.with_stage(result.model_copy(update={"ancestry": m.ancestry(read)})))
    document = {
        **_row(done.best),
        "target": on_board.name,
        "tensorrt": found.version,
        "builder": "trtexec" if found.trtexec else "trt_builder",
        "power_mode": found.power_mode,
        "verdict": "measured" if all(r.stable for r in done.results) else "inconclusive",
        "results": [_row(r) for r in done.results],
        "notes": list(done.notes),
        "commands": list(done.commands),
        "manifest": str(out / MANIFEST_NAME),
    }
    told = done.best.statistics.get("conditions")
    if told:
        document["conditions"] = told
    _show(output, document)
    if done.unscored is not None:
        raise done.unscored
    if done.unmeasured is not None:
        raise done.unmeasured


def _folder(out: Path, target: Target) -> Path:
    """Return where the files of one board go; those of another stay as they are."""
    return out / "deploy" / target.name.replace("/", "_")


def _images(jobs: list[Job], data: str, limit: int | None, labels: str | None, seed: int, output: Output) -> tuple[Split, int]:
    """Return the images to evaluate on, preprocessed as the ONNX files say, and how many outputs the network has.

    Raises:
        BadInput: The data cannot be read, or a file does not say how its images are preprocessed.
    """
    from compress.data import load_dataset
    from rescompress.cli.options import Common

    inputs = _inputs(jobs)
    settings = Common(labels=labels, seed=seed).settings(data)
    assert settings.data is not None
    loaded = load_dataset(settings.data, inputs, seed=seed, labels=settings.labels, skip_corrupt=settings.skip_corrupt)
    for note in loaded.notes:
        output.hint(note)
    images = loaded.val if limit is None or limit >= len(loaded.val) else loaded.val.take(limit, seed)
    return images, inputs.outputs


def _inputs(jobs: list[Job]) -> Inputs:
    """Return how images become the input of all files.

    Raises:
        BadInput: A file does not say how its images are preprocessed, or they differ.
    """
    from rescompress.core.errors import ModelFileError
    from rescompress.runs.evaluation import onnx_inputs

    inputs = [onnx_inputs(job.onnx) for job in jobs]
    if any(i != inputs[0] for i in inputs):
        raise ModelFileError("the two files preprocess images differently", where="--baseline", remedy="export both again")
    return inputs[0]


def _with_photos(options: DeployOptions, jobs: list[Job], files: list[Path] | None) -> DeployOptions:
    """Return the options with the image files from which the way to the classes is timed; each is decoded here first.

    Raises:
        BadInput: One is no readable image, or a file does not say how its images are preprocessed.
    """
    if not files:
        return options
    import hashlib

    from compress.pixels import decode, dimensions
    from edge_targets.board_statistics import Photos
    from rescompress.core.artifact import file_sha256

    inputs = _inputs(jobs)
    digest, sizes = hashlib.sha256(), set()
    for file in files:
        decode(file, inputs.shape, inputs.preprocessing)
        digest.update(bytes.fromhex(file_sha256(file)))
        sizes.add("x".join(map(str, reversed(dimensions(file)))))
    what = f"image files: {len(files)} of {', '.join(sorted(sizes))} pixels, digest {digest.hexdigest()[:12]}"
    about = {"input_shape": list(inputs.shape), "preprocessing": inputs.preprocessing.model_dump(mode="json")}
    extras = dataclasses.replace(options.extras, photos=Photos(tuple(files), about, what))
    return dataclasses.replace(options, extras=extras)


def _scorer(images: Split, outputs: int, scores: dict[Precision, Evaluation], output: Output) -> Any:
    """Return what `remote.deploy` calls per engine; what it finds goes to `scores`."""
    from compress.evaluate import evaluate
    from edge_targets.board_session import PIECE_BYTES
    from rescompress.cli.progress import reporting

    def score(precision: Precision, runner: Any) -> None:
        first, _ = next(images.batches(1))
        piece = max(1, PIECE_BYTES // (first.numel() * 4))
        with reporting(output) as reporter:
            scores[precision] = evaluate(
                runner,
                images,
                batch_size=piece,
                outputs=outputs,
                progress=lambda n, total: reporter.progress(f"accuracy of {precision} on the board", n, total),
            )

    return score


def _with_scores(done: Deployment, scores: dict[Precision, Evaluation], folder: Path) -> Deployment:
    """Return the deployment with the accuracy of each engine among its metrics, and the outcomes among its files."""
    from rescompress.core.artifact import write_text

    results = []
    for result in done.results:
        found = scores.get(result.precision)
        if found is not None:
            p50 = result.metrics["p50_ms"]
            where = {"device": p50.device, "power_mode": p50.power_mode, "precision": p50.precision}
            metrics = result.metrics | {name: m.model_copy(update=where) for name, m in found.metrics.items()}
            path = folder / f"model_{result.precision}{OUTCOMES}"
            write_text(path, found.outcomes.model_dump_json(indent=1) + "\n")
            result = dataclasses.replace(result, metrics=metrics, files=(*result.files, path))
        results.append(result)
    best = next(r for r in results if r.precision == done.best.precision)
    notes = done.notes
    if done.unscored is not None:
        notes = (*notes, f"accuracy was not measured on the board: {done.unscored.what}")
    return dataclasses.replace(done, results=tuple(results), best=best, notes=notes)


def _with_sizes(done: Deployment, jobs: list[Job]) -> Deployment:
    """Return the deployment with the size of the file that each engine was built from, which is what export stages tell."""
    from rescompress.core.metric import counted

    sizes = {job.precision: counted(job.onnx.stat().st_size, "bytes") for job in jobs}
    results = tuple(dataclasses.replace(r, metrics={**r.metrics, "size_bytes": sizes[r.precision]}) for r in done.results)
    best = next(r for r in results if r.precision == done.best.precision)
    return dataclasses.replace(done, results=results, best=best)


def _batches(text: str) -> tuple[int, ...]:
    from rescompress.core.errors import BadInput

    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
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
    from compress.checkpoints.options import parse_shape
    from edge_targets.board_work import Job
    from edge_targets.fp8 import refuse_file
    from edge_targets.onnx_kernels import input_of, precision_of
    from edge_targets.trtexec import InputShapes
    from rescompress.core.errors import ModelFileError

    input_shape = parse_shape(shape) if shape else None
    notes: list[str] = []
    if model.suffix == ".onnx":
        files = [model, *([baseline] if baseline else [])]
    else:
        files, notes = _export(model, input_shape, folder, target, dynamic=len(batches) > 1, batch=batches[0])
    jobs = []
    for file in files:
        refuse_file(file)
        read = input_of(file, input_shape=input_shape)
        if read.batch is not None and batches != (read.batch,):
            raise ModelFileError(
                f"its batch is fixed to {read.batch}, asked for {', '.join(map(str, batches))}",
                where=str(file),
                remedy="export with --batch dynamic, or leave --batches out",
            )
        precision = precision_of(file, input_shape=input_shape)
        if precision == "fp32" and not target.strongly_typed:
            precision = target.device.best_float
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


def _advice(target: Target, jobs: list[Job], dla: int | None) -> list[str]:
    """Return what is to be known of the board that was taken, and what users report of its TensorRT."""
    from edge_targets.advice import advice_for
    from edge_targets.catalog import alias_notes

    return [*alias_notes(target), *map(str, advice_for(target, [job.precision for job in jobs], dla=dla is not None))]


def _sparsity(target: Target, jobs: list[Job]) -> list[str]:
    """Return what sparse kernels can bring each file at most, and which file has no zeros for them."""
    from edge_targets.onnx_kernels import kernels_of
    from edge_targets.sparsity import gain_note, gain_of, weights_note

    notes = []
    for job in jobs:
        shape, batch = (job.shapes.shape, job.shapes.opt_batch) if job.shapes else (None, 1)
        read = kernels_of(job.onnx, input_shape=shape)
        gain = gain_of(read.kernels, target.device, job.precision, batch=read.batch or batch)
        notes += [f"{job.precision}: {note}" for note in (gain_note(gain), weights_note(job.onnx)) if note is not None]
    return notes


def _export(
    model: Path, shape: tuple[int, int, int] | None, folder: Path, target: Target, *, dynamic: bool, batch: int
) -> tuple[list[Path], list[str]]:
    """Write a checkpoint as ONNX for the board, in float and, where it is quantized, in INT8; return files and notes.

    They are the files that ``export`` writes for this target.
    """
    from export.to_onnx import ExportOptions
    from rescompress.runs.stage import Opening
    from rescompress.runs.stages.shared import onnx_of, write_onnx
    from rescompress.runs.stages.target import for_target, profile_notes

    notes: list[str] = []
    opening = Opening(model, shape).fetched()
    checkpoint = opening.load(notes.append)
    options = ExportOptions("dynamic" if dynamic else batch, target.opset)
    variants = {"float": dataclasses.replace(checkpoint, quantization=None)}
    if checkpoint.quantization is not None and "int8" in target.precisions:
        variants["int8"] = checkpoint
    files = []
    for name, variant in variants.items():
        path = folder / f"{model.stem}.{name}.onnx"
        write_onnx(onnx_of(variant, for_target(options, variant, target)), path)
        files.append(path)
    return files, notes + (profile_notes(checkpoint, target) if "int8" in variants else [])


def _stage(done: Deployment, target: Target, root: Path) -> StageResult:
    from rescompress.core.artifact import Artifact
    from rescompress.core.details import DeployDetails
    from rescompress.core.manifest import DEPLOY, DEPLOY_PREFIX, StageResult

    def kind(file: Path) -> str:
        return "outcomes" if file.name.endswith(OUTCOMES) else {".engine": "engine", ".log": "log"}.get(file.suffix, "report")

    files = tuple(Artifact.of(kind(f), f, root) for f in done.best.files)
    details = DeployDetails(
        target=target.name,
        tensorrt=done.probe.version,
        model=done.probe.model,
        power_mode=done.probe.power_mode,
        clocks=done.probe.clocks,
        precision=done.best.precision,
        stable=done.best.stable,
        spread=done.best.spread,
        latency_runs=list(done.best.run_medians_ms),
        results={r.precision: {n: m.model_dump(mode="json") for n, m in r.metrics.items()} for r in done.results},
        **done.best.statistics,
        engine=done.best.details,
        notes=list(done.notes),
        commands=list(done.commands),
    )
    return StageResult(
        stage=DEPLOY_PREFIX + target.name,
        kind=DEPLOY,
        target=target.name,
        status="done",
        metrics=done.best.metrics,
        outputs=files,
        details=details,
    )


def _row(result: Any) -> dict[str, Any]:
    metrics = {name: metric.value for name, metric in result.metrics.items()}
    return {
        "precision": result.precision,
        "engine": str(result.engine),
        **metrics,
        "n": result.metrics["p50_ms"].n,
        "latency_runs": list(result.run_medians_ms),
        **_accuracy(result.metrics),
        "coefficient_of_variation": result.spread,
        "stable": result.stable,
        "layers": result.details.get("layers", []),
        "device": result.metrics["p50_ms"].device,
        "runtime": "tensorrt",
        "provenance": "measured",
    }


def _accuracy(metrics: Any) -> dict[str, Any]:
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
