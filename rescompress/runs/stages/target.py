"""The stage of one edge target: built and measured here, or prepared for the device and predicted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoints import load_checkpoint
from compress.checkpoints.base import Checkpoint
from edge_targets.advice import advice_for
from edge_targets.backends import load_backend
from edge_targets.benchmark import Candidate, measure_processes, options_note
from edge_targets.bundle import write_bundle
from edge_targets.catalog import alias_notes
from edge_targets.device import Target, base_precision
from edge_targets.fp8 import refusal
from edge_targets.latency import predict
from edge_targets.trtexec import InputShapes
from export.half import HalfCheck
from export.to_onnx import FP16_SCALE_OPSET, ExportOptions
from rescompress.core.details import TargetDetails
from rescompress.core.errors import BadInput, ToolMissing
from rescompress.core.layers import walk
from rescompress.core.manifest import TARGET_PREFIX
from rescompress.core.metric import Metric, counted
from rescompress.runs.file_check import lint_findings, validity_gate
from rescompress.runs.stage import Context, Outcome
from rescompress.runs.stages.export import as_exported, export_options, file_for, in_host
from rescompress.runs.stages.shared import (
    dataset,
    evaluate_runner,
    onnx_of,
    outcomes_file,
    prepare,
    scores_classes,
    write_onnx,
)

if TYPE_CHECKING:  # a step loads its work when it runs, so that the work may know the step by its type alone
    from rescompress.runs.steps import ForTarget

_NEUTRAL_COST = "it may be slower here, or less exact"


class _Draft(TargetDetails, frozen=False):
    """The details while they are found."""


@dataclasses.dataclass
class _Made:
    """What the stage has made so far.

    Attributes:
        checkpoint: The network, as it is exported.
        options: What kind of file.
        path: The file.
        metrics: By name.
        files: Kind and path of each file written.
        details: While they are found.
    """

    checkpoint: Checkpoint
    options: ExportOptions
    path: Path
    metrics: dict[str, Metric]
    files: list[tuple[str, Path]]
    details: _Draft


def target(context: Context, step: ForTarget) -> Outcome:
    """What becomes of the network on one edge target: built and measured here, or prepared for it and predicted."""
    common, chosen = step.common, step.target
    prepare(common)
    if step.settings.precision == "fp8":
        raise refusal(chosen.device)
    checkpoint = step.source.load(context)
    if step.settings.precision == "int8" and checkpoint.quantization is None:
        raise BadInput("is not quantized", where=str(step.source.path), remedy="run `rescompress quantize` first")
    chosen_options = for_target(export_options(step.settings), checkpoint, chosen)
    checkpoint = as_exported(checkpoint, chosen_options)
    path = context.folder / chosen.name / "model.onnx"
    proto, metrics, of_file = file_for(context, step.source, checkpoint, chosen_options, path, common)
    half = HalfCheck.of(of_file.float16) if of_file.float16 else None
    details = _Draft(**of_file.given())
    details.lint = lint_findings(proto, chosen, half)
    details.target, details.alias = chosen.name, chosen.alias
    details.device, details.runtime = chosen.device.title, chosen.runtime
    details.notes = [*of_file.notes, *alias_notes(chosen), *profile_notes(checkpoint, chosen)]
    files = [("onnx", path)]
    if checkpoint.host is not None:
        found = in_host(context, checkpoint, chosen_options, path, common, of_file, files, metrics)
        details.host, details.notes = found.host, [*details.notes, *found.notes[len(of_file.notes) :]]
    made = _Made(checkpoint, chosen_options, path, metrics, files, details)
    (_build_and_measure if chosen.builds_here else _prepare_and_predict)(context, step, made)
    if step.require_engine and details.engine is None:
        where = f"--target {chosen.alias or chosen.name}"
        raise ToolMissing(str(details.engine_status), where=where, remedy="build it on the device: `deploy`")
    for note in details.notes:
        context.reporter.note(note)
    return Outcome(made.metrics, made.files, details)


def for_target(options: ExportOptions, checkpoint: Checkpoint, chosen: Target) -> ExportOptions:
    """Return the options with precision ``auto`` resolved: INT8 for a quantized network, else the target's best float.

    A strongly typed TensorRT takes types from the file, so what is not INT8 there is written as float16.

    Raises:
        TargetError: The target lacks the precision.
    """
    if options.precision != "auto":
        chosen.check_precision(base_precision(options.precision))
        return options
    if checkpoint.quantization is not None:
        chosen.check_precision("int8")
        typed = chosen.profile == "tensorrt" and chosen.strongly_typed and chosen.device.best_float == "fp16"
        half = typed and options.opset >= FP16_SCALE_OPSET and checkpoint.quantization.profile == "tensorrt"
        return dataclasses.replace(options, precision="int8+fp16" if half else "int8")
    return dataclasses.replace(options, precision=chosen.device.best_float)


def _dense_file(context: Context, kind: str) -> Path | None:
    result = context.done.stage("dense")
    artifact = result.output(kind) if result else None
    return context.folder / artifact.path if artifact else None


def profile_notes(checkpoint: Checkpoint, chosen: Target) -> list[str]:
    """Return what it costs that a network is quantized for another runtime than the target's; nothing where it is not."""
    trained = checkpoint.quantization.profile if checkpoint.quantization else None
    if trained is None or trained == chosen.profile:
        return []
    return [
        f"the network is quantized for the {trained} profile, {chosen.name} wants `quantize --profile {chosen.profile}`: "
        + load_backend(chosen.runtime).COST_OF_PROFILE.get(trained, _NEUTRAL_COST)
    ]


def _build_and_measure(context: Context, step: ForTarget, made: _Made) -> None:
    """Build what the runtime makes of the file, measure it in turns with the dense network and float32, evaluate it."""
    chosen, common = step.target, step.common
    checkpoint, options, path, details = made.checkpoint, made.options, made.path, made.details
    backend = load_backend(chosen.runtime)
    precision = chosen.check_precision(base_precision(str(details.precision)))
    fixed = options.batch if isinstance(options.batch, int) else None  # what was asked for dynamic is delivered dynamic
    batch = fixed or 1  # of the measurement, whose runner fixes it
    available = backend.available()
    if not available:
        details.engine, details.engine_status = None, f"not built: {available.reason}"
        return
    built = backend.build(path, path.parent, target=chosen, precision=precision, batch=fixed)
    details.engine = built.path.relative_to(context.folder).as_posix() if built.path else None
    details.engine_status, details.build, details.runtime_version = built.status, built.details, available.version
    loaded = engine_files(built.path)
    made.files += [("engine", f) for f in loaded]
    if loaded:
        made.metrics["engine_bytes"] = counted(sum(f.stat().st_size for f in loaded), "bytes")
    if not backend.RUNS_HERE:
        return
    runs = [Candidate(path, chosen.runtime, checkpoint.spec.input_shape, batch, common.threads, str(details.precision))]
    prefixes = [""]
    dense_path = _dense_file(context, "onnx")
    if dense_path is not None and batch == 1:
        runs.append(dataclasses.replace(runs[0], path=dense_path, precision="fp32"))
        prefixes.append("dense_")
    float_path = _float_twin(checkpoint, options, path)
    if float_path is not None:
        runs.append(dataclasses.replace(runs[0], path=float_path, precision="fp32"))
        prefixes.append("fp32_")
    context.reporter.progress(f"measure {chosen.name}", 0, 1)
    found = dict(zip(prefixes, measure_processes(runs), strict=True))
    for prefix, measured in found.items():
        made.metrics |= {prefix + key: value for key, value in measured.metrics.items()}
    own, dense, twin = found[""], found.get("dense_"), found.get("fp32_")
    details.latency_runs = list(own.process_medians_ms)
    if own.process_p99_ms:
        details.p99_ms_runs = list(own.process_p99_ms)
    if own.runtime_options:
        details.runtime_options = own.runtime_options
    if dense is not None:
        details.dense_latency_runs = list(dense.process_medians_ms)
        if dense.runtime_options:
            details.dense_runtime_options = dense.runtime_options
    if twin is not None:
        details.fp32_latency_runs = list(twin.process_medians_ms)
        if twin.runtime_options:
            details.fp32_runtime_options = twin.runtime_options
    details.notes += options_note(chosen.runtime, details.runtime_options)
    if float_path is not None:
        float_path.unlink()
        if min(details.latency_runs) > max(details.fp32_latency_runs):
            details.notes.append(
                f"INT8 is slower than float32 with {chosen.runtime} on this machine: {made.metrics['p50_ms'].value:.2f} ms "
                f"against {made.metrics['fp32_p50_ms'].value:.2f} ms"
            )
    if common.data is not None and scores_classes(checkpoint.spec):
        runner = backend.runner(path, threads=common.threads)
        stage = TARGET_PREFIX + chosen.name
        answers = evaluate_runner(context, runner, dataset(common, checkpoint.spec).val, common, checkpoint.spec)
        made.metrics |= answers.metrics
        made.files.append(("outcomes", outcomes_file(context, stage, answers)))


def _prepare_and_predict(context: Context, step: ForTarget, made: _Made) -> None:
    """Leave what the board needs beside the ONNX file, and predict its latency there."""
    chosen, checkpoint, options, path, details = step.target, made.checkpoint, made.options, made.path, made.details
    precision = chosen.check_precision(base_precision(options.precision))
    batch = options.batch if isinstance(options.batch, int) else 1
    shapes = InputShapes("input", checkpoint.spec.input_shape) if options.batch == "dynamic" else None
    for file in write_bundle(path, checkpoint.spec, chosen, precision, shapes=shapes):
        made.files.append(("script" if file.suffix in (".sh", ".py") else "report", file))
    details.validity_gate = gate = validity_gate(path)
    if gate["status"] == "failed":
        details.notes.append(f"TensorRT for RTX {gate['runtime_version']} does not take the file: {gate['reason']}")
    predicted = predict(walk(checkpoint.spec), chosen.device, precision=precision, batch=batch)
    made.metrics["p50_ms"] = predicted.metric()
    dense_path = _dense_file(context, "checkpoint")
    if dense_path is not None:
        dense = load_checkpoint(dense_path)
        before = predict(
            walk(dense.spec), chosen.device, precision=chosen.check_precision(chosen.device.best_float), batch=batch
        )
        made.metrics["dense_p50_ms"] = before.metric()
    details.engine = None
    details.engine_status = "not built here: engines belong to the board they are built on; run build.sh there"
    details.power_mode, details.tensorrt = predicted.power_mode, chosen.tensorrt_version
    details.layers = [{"name": k.name, "ms": k.ms} for k in predicted.kernels]
    details.layers_provenance = "predicted"
    details.notes += [*predicted.notes, *map(str, advice_for(chosen, [precision]))]


def _float_twin(checkpoint: Checkpoint, options: ExportOptions, path: Path) -> Path | None:
    """Write the same network in float32 beside an INT8 file, to see what INT8 buys; None for a float network."""
    if checkpoint.quantization is None:
        return None
    twin = path.with_name("float32-twin.onnx")
    twin_options = dataclasses.replace(options, precision="fp32")
    write_onnx(onnx_of(dataclasses.replace(checkpoint, quantization=None), twin_options), twin)
    return twin


def engine_files(engine: Path | None) -> list[Path]:
    """Return an engine and what belongs to it (OpenVINO keeps weights in a file of their own)."""
    if engine is None:
        return []
    return [engine, *([engine.with_suffix(".bin")] if engine.suffix == ".xml" else [])]
