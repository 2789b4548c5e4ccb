"""Accuracy of a file: a checkpoint in torch, or an ONNX file in a runtime."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import cast

from compress.checkpoints.base import Checkpoint
from compress.data import Inputs, Split, load_dataset
from compress.evaluate import Evaluation, TorchRunner, evaluate
from compress.fidelity import Fidelity, Outputs, fidelity
from compress.importers.reference import reference as reference_trunk
from compress.preprocessing import Statement
from edge_targets.backends import load_backend
from export.half import check_half, has_float16
from export.load import load_onnx
from export.metadata import read_metadata
from export.parity import OrtRunner
from rescompress.core.errors import BadInput, CheckpointError, ModelFileError, nearest
from rescompress.core.runner import Runner
from rescompress.runs.reporter import Reporter
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Opening
from rescompress.runs.stages import network_of
from rescompress.runs.stages.export import agreement_of
from rescompress.runs.stages.shared import onnx_inputs, prepare


def evaluate_file(
    opening: Opening,
    settings: Settings,
    *,
    split: str,
    runtime: str,
    reporter: Reporter,
    reference: Path | None = None,
) -> Evaluation | Fidelity:
    """Return the accuracy of a checkpoint or an ONNX file; of one without class scores its fidelity.

    Args:
        opening: The file.
        settings: Data and device.
        split: ``val`` or ``train``.
        runtime: ``auto``, ``torch`` or a file of `edge_targets.backends`.
        reporter: Where progress goes.
        reference: The dense network that outputs are compared with where there are no class scores; else its host's trunk.

    Raises:
        BadInput: The file, the data or the combination of file and runtime is wrong.
        ToolMissing: The runtime is not installed.
    """
    if split not in ("train", "val"):
        raise BadInput(f"unknown split '{split}'", where="--split", remedy=nearest(split, ["train", "val"]))
    if settings.data is None:
        raise BadInput("this needs images", where="--data", remedy="give --data")
    prepare(settings)
    runner, inputs, checkpoint = _open(opening, settings, runtime, reporter)
    if inputs.outputs and reference is not None:
        raise BadInput(
            "the network scores classes: it is compared with labels", where="--reference", remedy="leave --reference out"
        )
    if (
        not inputs.outputs
        and reference is None
        and (checkpoint is None or checkpoint.host is None or not checkpoint.host.files)
    ):
        raise BadInput(
            "the network has no class scores: its outputs are compared with those of the dense network",
            where=str(opening.path),
            remedy="name that with --reference",
        )
    data = load_dataset(settings.data, inputs, seed=settings.seed, labels=settings.labels, skip_corrupt=settings.skip_corrupt)
    for note in data.notes:
        reporter.note(note)
    half = _float16_notes(opening.path, runner.runtime, data.val, settings.eval_batch(inputs.shape))
    for note in half:
        reporter.note(note)
    progress = functools.partial(reporter.progress, f"evaluate ({runner.runtime})")
    images = data.train if split == "train" else data.val
    batch = settings.eval_batch(inputs.shape)
    if not inputs.outputs:
        compared = _fidelity(opening, runner, checkpoint, images, batch, settings, reporter, reference)
        for note in compared.notes:
            reporter.note(note)
        return dataclasses.replace(compared, notes=(*half, *compared.notes))
    with runner:
        found = evaluate(runner, images, batch_size=batch, outputs=inputs.outputs, progress=progress)
    for note in found.notes:
        reporter.note(note)
    return dataclasses.replace(found, notes=(*half, *found.notes))


def _fidelity(
    opening: Opening,
    runner: Runner,
    checkpoint: Checkpoint | None,
    images: Split,
    batch: int,
    settings: Settings,
    reporter: Reporter,
    reference: Path | None,
) -> Fidelity:
    """Return how near a network without class scores is to the dense one, and how often its host still says the same.

    Raises:
        BadInput: It is open what it is to be compared with.
    """
    if reference is not None:
        dense = opening.of(reference).load(reporter.note)
    else:
        assert checkpoint is not None
        assert checkpoint.host is not None
        dense = reference_trunk(checkpoint.host)
    if not hasattr(runner, "outputs"):
        raise BadInput(
            f"{runner.runtime} shows the first output alone", where="--runtime", remedy="compare in torch or onnxruntime"
        )
    names = [o.name for o in dense.network.outputs]
    torch_dense = TorchRunner(network_of(dense), settings.torch_device())
    progress = functools.partial(reporter.progress, f"compare ({runner.runtime})")
    found = fidelity(cast("Outputs", runner), torch_dense, images, names, batch_size=batch, progress=progress)
    if checkpoint is None or checkpoint.host is None or not checkpoint.host.files:
        return found
    try:
        same = agreement_of(checkpoint, [x.numpy() for x, _ in images.batches(batch)])
    except (ModelFileError, CheckpointError) as e:
        return dataclasses.replace(found, notes=(*found.notes, f"the host's own outputs were not compared: {e.what}"))
    return dataclasses.replace(found, metrics=found.metrics | same)


def _open(opening: Opening, settings: Settings, runtime: str, reporter: Reporter) -> tuple[Runner, Inputs, Checkpoint | None]:
    if opening.path.suffix == ".onnx" and not (runtime in ("auto", "torch") and _is_foreign(opening.path)):
        if runtime == "torch":
            raise BadInput("torch does not run ONNX files", where="--runtime", remedy="use onnxruntime or openvino")
        name = "onnxruntime" if runtime == "auto" else runtime
        inputs = _restated(onnx_inputs(opening.path), opening)
        if not inputs.outputs and name == "onnxruntime":
            return OrtRunner(load_onnx(opening.path), threads=settings.threads or 1), inputs, None
        return load_backend(name).runner(opening.path, threads=settings.threads), inputs, None
    if runtime not in ("auto", "torch"):
        raise BadInput(f"{runtime} runs ONNX files, not checkpoints", where="--runtime", remedy="`rescompress export` it first")
    checkpoint = opening.load(reporter.note)
    return TorchRunner(network_of(checkpoint), settings.torch_device()), Inputs.of(checkpoint.spec), checkpoint


def _is_foreign(path: Path) -> bool:
    """Whether an ONNX file is none that rescompress wrote: it is read as a checkpoint then."""
    return read_metadata(load_onnx(path, weights=False)) is None


def _restated(inputs: Inputs, opening: Opening) -> Inputs:
    """Return the inputs of an ONNX file with what the user states about it.

    Raises:
        BadInput: It is about what such a file has settled.
    """
    if opening.input_shape not in (None, inputs.shape):
        shape = "x".join(map(str, inputs.shape))
        raise BadInput(f"the file reads inputs of {shape}", where="--input", remedy="export the checkpoint again with --input")
    if opening.arch_options:
        raise BadInput("an ONNX file leaves none of this open", where="--arch-option", remedy="give it to `rescompress export`")
    if opening.preprocess is None:
        return inputs
    found = Statement.parse(opening.preprocess).over(inputs.preprocessing, inputs.shape)
    return dataclasses.replace(inputs, preprocessing=found)


HALF_IMAGES = 64
"""Images on which float16 files are searched for values beyond its range."""


def _float16_notes(path: Path, runtime: str, split: Split, batch: int) -> list[str]:
    """Return what a figure of a float16 file does not say where a CPU computed it; nothing for other files."""
    if path.suffix != ".onnx" or not has_float16(model := load_onnx(path)):
        return []
    notes = [f"{runtime} computes this float16 file in float32 on a CPU: a device that computes in float16 may differ"]
    some = split.take(HALF_IMAGES, 0)
    found = check_half(model, [x.numpy() for x, _ in some.batches(batch)], f"{len(some)} of the images")
    return notes if found.fits else [*notes, f"there it overflows: {found.words()}"]
