"""The stage that writes the ONNX file, recounts it and proves it equal to the torch network."""

from __future__ import annotations

import dataclasses
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch

from compress.checkpoints.base import Checkpoint
from compress.evaluate import TorchRunner
from compress.quantize import integer_model
from edge_targets.fp8 import refusal
from export.half import HalfCheck, check_half, has_float16
from export.integers import in_integers
from export.parity import MAX_MEAN_ERROR, MIN_AGREEMENT, Floats, OrtRunner, Parity, compare_outputs
from export.recount import recount
from export.session import has_float16_scales
from export.to_onnx import ExportOptions, Precision
from rescompress.core.artifact import atomic_path
from rescompress.core.details import ExportDetails, FileDetails
from rescompress.core.layers import total_macs, total_params, walk
from rescompress.core.metric import Metric, counted
from rescompress.core.settings import ExportSettings
from rescompress.runs import code
from rescompress.runs.fingerprint import key_of
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Context, Outcome, Source
from rescompress.runs.stages.shared import (
    dataset,
    evaluate_runner,
    network_of,
    onnx_of,
    outcomes_file,
    prepare,
    scores_classes,
    write_onnx,
)

if TYPE_CHECKING:  # a step loads its work when it runs, so that the work may know the step by its type alone
    from rescompress.runs.steps import Export

PARITY_IMAGES = 1000


def exported(context: Context, step: Export) -> Outcome:
    """The ONNX file, recounted, checked and compared with the torch network."""
    common = step.common
    prepare(common)
    chosen = export_options(step.settings)
    checkpoint = as_exported(step.source.load(context), chosen)
    path = context.folder / "model.onnx"
    proto, metrics, details = file_for(context, step.source, checkpoint, chosen, path, common)
    for note in details.notes:
        context.reporter.note(note)
    files = [("onnx", path)]
    if common.data is not None and scores_classes(checkpoint.spec):
        found = evaluate_runner(context, OrtRunner(proto), dataset(common, checkpoint.spec).val, common, checkpoint.spec)
        metrics |= found.metrics
        files.append(("outcomes", outcomes_file(context, "export", found)))
    return Outcome(metrics, files, ExportDetails(**details.given()))


def export_options(settings: ExportSettings) -> ExportOptions:
    """Return the file that is asked for; its opset is that of most runtimes where none is named.

    Raises:
        TargetError: No file of ours is in FP8.
    """
    if settings.precision == "fp8":
        raise refusal()
    usual = ExportOptions(settings.batch, precision=settings.precision)
    return usual if settings.opset is None else dataclasses.replace(usual, opset=settings.opset)


def as_exported(checkpoint: Checkpoint, options: ExportOptions) -> Checkpoint:
    """Return the network that a file of these options holds: without quantizers where it is asked for in floating point."""
    return checkpoint if "int8" in precision_of(checkpoint, options) else dataclasses.replace(checkpoint, quantization=None)


def file_for(
    context: Context, source: Source, checkpoint: Checkpoint, options: ExportOptions, path: Path, common: Settings
) -> tuple[onnx.ModelProto, dict[str, Metric], FileDetails]:
    """Return an ONNX file that lies at `path` now, with its row and details; one that is there already is not made again.

    A file is known by the network, the options, and the images that it was compared on. Whichever stage asks first writes,
    recounts and compares it; another stage of the run gets a link to the same file, and what was found about it.

    Args:
        context: Has the stages before this one.
        source: Where the network is from.
        checkpoint: The network, as it is exported.
        options: What kind of file.
        path: Where the file is to lie.
        common: The images.
    """
    network = source.identity
    if source.stage is not None and (made := context.done.stage(source.stage)) is not None:
        network = {"sha256": made.checkpoint_sha256}
    resolved = dataclasses.replace(options, precision=precision_of(checkpoint, options))
    parts = {"network": network, "options": dataclasses.asdict(resolved), "common": common.identity, "code": code.of()}
    key = key_of({"what": "onnx", "version": version("rescompress"), **parts})
    for stage in context.done.stages:
        known, onnx_file = stage.details_as(FileDetails), stage.output("onnx")
        if known is None or known.file_key != key or onnx_file is None or not onnx_file.intact(context.folder):
            continue
        here = context.folder / onnx_file.path
        if here != path:
            with atomic_path(path) as temporary:
                shutil.copyfile(here, temporary)
        metrics = {name: stage.metrics[name] for name in ("macs", "params", "size_bytes")}
        found = {name: value for name, value in known.given().items() if name in FileDetails.model_fields}
        return onnx.load(path), metrics, FileDetails(**found | {"notes": list(known.file_notes)})
    proto, metrics, details = write_export(checkpoint, resolved, path, common, key)
    return proto, metrics, details


def write_export(
    checkpoint: Checkpoint, options: ExportOptions, path: Path, common: Settings, key: str
) -> tuple[onnx.ModelProto, dict[str, Metric], FileDetails]:
    """Write the ONNX file, recount it, compare it with torch; return it with its row and details."""
    proto = onnx_of(checkpoint, options)
    write_onnx(proto, path)
    parity, in_sums, images = check_parity(proto, checkpoint, common)
    layers = walk(checkpoint.spec)
    recounted = recount(proto).macs
    if recounted != total_macs(layers):
        raise AssertionError(f"the ONNX file has {recounted} MACs, the spec {total_macs(layers)}")
    metrics = {
        "macs": counted(recounted, "macs"),
        "params": counted(total_params(layers), "params"),
        "size_bytes": counted(path.stat().st_size, "bytes"),
    }
    few = noise_images(checkpoint)  # its graphs run unoptimised, one image at a time where the batch is fixed
    half = check_half(proto, *parity_images(checkpoint, common, few)) if has_float16(proto) else None
    notes = [] if half is None else half_notes(half)
    same = parity if in_sums is None else in_sums
    if not same.exact or parity.relative > MAX_MEAN_ERROR:
        worst = same if not same.exact else parity
        notes.append(
            f"the file and the torch network agree on {100 * worst.top1_agreement:.2f} % of {images}, with a mean logit "
            f"difference of {100 * worst.relative:.2f} % of the range; 99.9 % and 0.39 % are expected"
        )
    details = FileDetails(
        parity=parity.document() | {"images": images, "exact": same.exact},
        parity_in_integers=None if in_sums is None else in_sums.document(),
        float16=None if half is None else half.document(),
        notes=notes,
        file_notes=list(notes),
        file_key=key,
        opset=options.opset,
        batch=options.batch,
        precision=precision_of(checkpoint, options),
        profile=checkpoint.quantization.profile if checkpoint.quantization else None,
        arch=checkpoint.spec.arch,
        input_shape=list(checkpoint.spec.input_shape),
    )
    return proto, metrics, details


def precision_of(checkpoint: Checkpoint, options: ExportOptions) -> Precision:
    """Return what an exported file computes in."""
    if options.precision != "auto":
        return options.precision
    return "int8" if checkpoint.quantization is not None else "fp32"


def half_notes(check: HalfCheck) -> list[str]:
    """Return what the user must know of a file that is float16 on the device and was run in float32 here."""
    if not check.fits:
        return [f"the file overflows on a device that computes in float16: {check.words()}"]
    if check.top1_agreement < MIN_AGREEMENT:
        return [f"rounding to float16 changes the class of {100 * (1 - check.top1_agreement):.2f} % of {check.images}"]
    return []


def noise_images(checkpoint: Checkpoint) -> int:
    """Return how many images of noise a network is compared on."""
    return 32 if checkpoint.spec.input_shape[1] > 64 else 256


def parity_images(checkpoint: Checkpoint, common: Settings, most: int = PARITY_IMAGES) -> tuple[list[Floats], str]:
    """Return at most so many images that a file and the torch network are compared on, and which they are, in words."""
    if common.data is not None:
        split = dataset(common, checkpoint.spec).val.take(most, common.seed)
        batches = [x.numpy() for x, _ in split.batches(common.eval_batch(checkpoint.spec.input_shape))]
        return batches, f"{len(split)} images of the evaluation split"
    count = noise_images(checkpoint)
    generator = torch.Generator().manual_seed(common.seed)
    noise = torch.randn(count, *checkpoint.spec.input_shape, generator=generator)
    batches = [x.numpy() for x in torch.split(noise, common.eval_batch(checkpoint.spec.input_shape))]
    return batches, f"{count} images of random noise (no data was given)"


def check_parity(proto: onnx.ModelProto, checkpoint: Checkpoint, common: Settings) -> tuple[Parity, Parity | None, str]:
    """Return how far onnxruntime on the file is from torch, and on which images that was seen.

    The first is of the file as onnxruntime runs it, against fake quantization; float sums in different orders count in it.
    The second, of INT8 files, is of both in exact sums of integers: whether it is the same network.
    """
    batches, images = parity_images(checkpoint, common)
    in_sums = None
    int8 = checkpoint.quantization is not None and any(n.op_type == "QuantizeLinear" for n in proto.graph.node)
    if int8 and not has_float16_scales(proto):
        whole = OrtRunner(in_integers(proto), optimize=False)
        in_sums = compare_outputs(TorchRunner(integer_model(checkpoint)), whole, batches)
    return compare_outputs(TorchRunner(network_of(checkpoint)), OrtRunner(proto), batches), in_sums, images
