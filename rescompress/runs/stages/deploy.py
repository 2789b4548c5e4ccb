"""The stage of a board: engines built, timed and, with images, scored on it over SSH."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.data import Inputs, Split, load_dataset
from compress.evaluate import Evaluation, evaluate
from compress.pixels import decode, dimensions
from edge_targets import remote
from edge_targets.advice import advice_for
from edge_targets.board_session import PIECE_BYTES, Score
from edge_targets.board_statistics import Photos
from edge_targets.board_work import Deployment, Job, Measured, dry_run
from edge_targets.catalog import alias_notes, survey
from edge_targets.device import Precision, Target
from edge_targets.fp8 import refuse_file
from edge_targets.onnx_kernels import input_of, kernels_of, precision_of
from edge_targets.sparsity import gain_note, gain_of, weights_note
from edge_targets.ssh import Turn
from edge_targets.trtexec import InputShapes
from export.to_onnx import ExportOptions
from rescompress.core.artifact import file_sha256, write_text
from rescompress.core.details import DeployDetails, Engine
from rescompress.core.errors import ModelFileError
from rescompress.core.metric import Metric, counted
from rescompress.core.runner import Runner
from rescompress.core.settings import DeploySettings
from rescompress.runs.fingerprint import held_to
from rescompress.runs.reporter import Reporter
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Context, Opening, Outcome
from rescompress.runs.stages.shared import onnx_inputs, onnx_of, write_onnx
from rescompress.runs.stages.target import for_target, profile_notes

if TYPE_CHECKING:  # a step loads its work when it runs, so that the work may know the step by its type alone
    from rescompress.runs.steps import Deploy

OUTCOMES = ".outcomes.json"


def deployed(context: Context, step: Deploy) -> Outcome:
    """Build each file on the board, measure the engines there and fetch them; the figures are those of the fastest."""
    folder, target = context.folder / step.folder, step.target
    with contextlib.ExitStack() as held:
        for source in (step.source, step.baseline):
            if source is not None and source.path is not None and source.sha256 is not None:
                held.enter_context(held_to(source.path, source.sha256))
        assert step.source.opening is not None
        floating = step.baseline.opening if step.baseline is not None else None
        jobs, notes = jobs_for(step.source.opening, floating, step.settings, target, folder)
        notes += _advice(target, jobs, step.settings)
        notes += [f"left out when the board was identified: {error}" for error in survey()[1]]
        photos = _photos(jobs, step.settings.photo)
        scores: dict[Precision, Evaluation] = {}
        score = None
        if step.common.data is not None:
            inputs = _inputs(jobs)
            images = _images(inputs, step.settings.limit, step.common, context.reporter)
            score = scoring(images, inputs.outputs, scores, context.reporter)
        with Turn(step.board, context.reporter.note):
            done = remote.deploy(
                step.board,
                jobs,
                step.settings,
                folder,
                photos=photos,
                target=step.named,
                found=step.found,
                score=score,
                say=context.reporter.note,
            )
    done = _with_scores(_with_sizes(done, jobs), scores, folder)
    results = [done.best, *(r for r in done.results if r is not done.best)]
    return Outcome(
        done.best.metrics,
        [(_kind(file), file) for result in results for file in result.files],
        _details(done, results, target, [*notes, *done.notes], context.folder),
        incomplete=done.unscored or done.unmeasured,
    )


def _kind(file: Path) -> str:
    return "outcomes" if file.name.endswith(OUTCOMES) else {".engine": "engine", ".log": "log"}.get(file.suffix, "report")


def _details(done: Deployment, results: Sequence[Measured], target: Target, notes: list[str], root: Path) -> DeployDetails:
    return DeployDetails(
        target=target.name,
        tensorrt=done.probe.version,
        builder="trtexec" if done.probe.trtexec else "trt_builder",
        model=done.probe.model,
        power_mode=done.probe.power_mode,
        clocks=done.probe.clocks,
        precision=done.best.precision,
        stable=done.best.stable,
        spread=done.best.spread,
        latency_runs=list(done.best.run_medians_ms),
        results={r.precision: {n: m.model_dump(mode="json") for n, m in r.metrics.items()} for r in done.results},
        engines={
            r.precision: Engine(
                path=r.engine.relative_to(root).as_posix(),
                latency_runs=list(r.run_medians_ms),
                stable=r.stable,
                spread=r.spread,
                layers=r.details.get("layers", []),
            )
            for r in done.results
        },
        **done.best.statistics,
        engine=done.best.details,
        notes=notes,
        commands=list(done.commands),
    )


def planned(
    opening: Opening, baseline: Opening | None, settings: DeploySettings, target: Target, *, scored: bool
) -> tuple[list[str], list[str]]:
    """Return the commands that would run on a board with the usual TensorRT, and notes; no file is left behind.

    Args:
        opening: The network.
        baseline: The same in float32, beside a quantized ONNX file.
        settings: What is measured.
        target: The board.
        scored: Whether accuracy is measured, too.
    """
    with tempfile.TemporaryDirectory(prefix="rescompress-plan-") as folder:
        jobs, notes = jobs_for(opening, baseline, settings, target, Path(folder))
        notes += _advice(target, jobs, settings)
        photos = _photos(jobs, settings.photo)
        return dry_run(target, jobs, settings, photos=photos, scored=scored), notes


def jobs_for(
    opening: Opening, baseline: Opening | None, settings: DeploySettings, target: Target, folder: Path
) -> tuple[list[Job], list[str]]:
    """Return what to build, and what the user should know about it; a checkpoint is written as ONNX into `folder`.

    Raises:
        BadInput: A file is missing or is no model, or its batch is fixed to another size.
    """
    batches, shape = settings.batches, opening.input_shape
    files, notes = [opening.path, *([baseline.path] if baseline is not None else [])], list[str]()
    if opening.path.suffix != ".onnx":
        files, notes = _exported(opening, batches, target, folder)
    jobs = []
    for file in files:
        refuse_file(file)
        read = input_of(file, input_shape=shape)
        if read.batch is not None and batches != (read.batch,):
            raise ModelFileError(
                f"its batch is fixed to {read.batch}, asked for {', '.join(map(str, batches))}",
                where=str(file),
                remedy="export with --batch dynamic, or leave --batches out",
            )
        precision = precision_of(file, input_shape=shape)
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


def _advice(target: Target, jobs: Sequence[Job], settings: DeploySettings) -> list[str]:
    """Return what is to be known of the board, what users report of its TensorRT, and what sparse kernels can bring."""
    reported = advice_for(target, [job.precision for job in jobs], dla=settings.dla is not None)
    return [*alias_notes(target), *map(str, reported), *(_sparsity(target, jobs) if settings.sparsity else [])]


def _exported(opening: Opening, batches: tuple[int, ...], target: Target, folder: Path) -> tuple[list[Path], list[str]]:
    """Write a checkpoint as ONNX for the board, in float and, where it is quantized, in INT8; return files and notes.

    They are the files that ``export`` writes for this target.
    """
    notes: list[str] = []
    checkpoint = opening.load(notes.append)
    options = ExportOptions("dynamic" if len(batches) > 1 else batches[0], target.opset)
    variants = {"float": dataclasses.replace(checkpoint, quantization=None)}
    if checkpoint.quantization is not None and "int8" in target.precisions:
        variants["int8"] = checkpoint
    files = []
    for name, variant in variants.items():
        path = folder / f"{opening.path.stem}.{name}.onnx"
        write_onnx(onnx_of(variant, for_target(options, variant, target)), path)
        files.append(path)
    return files, notes + (profile_notes(checkpoint, target) if "int8" in variants else [])


def _sparsity(target: Target, jobs: Sequence[Job]) -> list[str]:
    """Return what sparse kernels can bring each file at most, and which file has no zeros for them."""
    notes = []
    for job in jobs:
        shape, batch = (job.shapes.shape, job.shapes.opt_batch) if job.shapes else (None, 1)
        read = kernels_of(job.onnx, input_shape=shape)
        gain = gain_of(read.kernels, target.device, job.precision, batch=read.batch or batch)
        notes += [f"{job.precision}: {note}" for note in (gain_note(gain), weights_note(job.onnx)) if note is not None]
    return notes


def _inputs(jobs: Sequence[Job]) -> Inputs:
    """Return how images become the input of all files.

    Raises:
        BadInput: A file does not say how its images are preprocessed, or they differ.
    """
    inputs = [onnx_inputs(job.onnx) for job in jobs]
    if any(i != inputs[0] for i in inputs):
        raise ModelFileError("the two files preprocess images differently", where="--baseline", remedy="export both again")
    return inputs[0]


def _images(inputs: Inputs, limit: int | None, common: Settings, reporter: Reporter) -> Split:
    """Return the images to evaluate on, preprocessed as the ONNX files say.

    Raises:
        BadInput: The data cannot be read.
    """
    assert common.data is not None
    loaded = load_dataset(common.data, inputs, seed=common.seed, labels=common.labels, skip_corrupt=common.skip_corrupt)
    for note in loaded.notes:
        reporter.note(note)
    return loaded.val if limit is None or limit >= len(loaded.val) else loaded.val.take(limit, common.seed)


def _photos(jobs: Sequence[Job], files: Sequence[str]) -> Photos | None:
    """Return the image files from which the way to the classes is timed, None without any; each is decoded here first.

    Raises:
        BadInput: One is no readable image, or a file does not say how its images are preprocessed.
    """
    if not files:
        return None
    inputs = _inputs(jobs)
    digest, sizes = hashlib.sha256(), set()
    for file in map(Path, files):
        decode(file, inputs.shape, inputs.preprocessing)
        digest.update(bytes.fromhex(file_sha256(file)))
        sizes.add("x".join(map(str, reversed(dimensions(file)))))
    what = f"image files: {len(files)} of {', '.join(sorted(sizes))} pixels, digest {digest.hexdigest()[:12]}"
    about = {"input_shape": list(inputs.shape), "preprocessing": inputs.preprocessing.model_dump(mode="json")}
    return Photos(tuple(map(Path, files)), about, what)


def scoring(images: Split, outputs: int, scores: dict[Precision, Evaluation], reporter: Reporter) -> Score:
    """Return what `remote.deploy` calls per engine; what it finds goes to `scores`."""

    def score(precision: Precision, runner: Runner) -> None:
        first, _ = next(images.batches(1))
        piece = max(1, PIECE_BYTES // (first.numel() * 4))
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
    notes = done.notes
    if done.unscored is not None:
        notes = (*notes, f"accuracy was not measured on the board: {done.unscored.what}")
    return dataclasses.replace(done, results=tuple(results), best=_best(done, results), notes=notes)


def _with_sizes(done: Deployment, jobs: Sequence[Job]) -> Deployment:
    """Return the deployment with the size of the file that each engine was built from, which is what export stages tell."""
    sizes: dict[Precision, Metric] = {job.precision: counted(job.onnx.stat().st_size, "bytes") for job in jobs}
    results = [dataclasses.replace(r, metrics={**r.metrics, "size_bytes": sizes[r.precision]}) for r in done.results]
    return dataclasses.replace(done, results=tuple(results), best=_best(done, results))


def _best(done: Deployment, results: Sequence[Measured]) -> Measured:
    return next(r for r in results if r.precision == done.best.precision)
