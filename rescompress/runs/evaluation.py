"""Accuracy of a file: a checkpoint in torch, or an ONNX file in a runtime."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from onnx import ModelProto, TensorProto

from compress.data import Inputs, Split, load_dataset
from compress.evaluate import Evaluation, TorchRunner, evaluate
from compress.preprocessing import Statement
from edge_targets.backends import load_backend
from export.half import check_half, has_float16
from export.load import load_onnx
from export.to_onnx import read_metadata
from rescompress.core.errors import BadInput, ModelFileError, nearest
from rescompress.core.runner import Runner
from rescompress.runs.reporter import Reporter
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Opening
from rescompress.runs.stages import network_of
from rescompress.runs.stages.shared import need_classes, prepare


def evaluate_file(opening: Opening, settings: Settings, *, split: str, runtime: str, reporter: Reporter) -> Evaluation:
    """Return the accuracy of a checkpoint or an ONNX file.

    Args:
        opening: The file.
        settings: Data and device.
        split: ``val`` or ``train``.
        runtime: ``auto``, ``torch`` or a file of `edge_targets.backends`.
        reporter: Where progress goes.

    Raises:
        BadInput: The file, the data or the combination of file and runtime is wrong.
        ToolMissing: The runtime is not installed.
    """
    if split not in ("train", "val"):
        raise BadInput(f"unknown split '{split}'", where="--split", remedy=nearest(split, ["train", "val"]))
    if settings.data is None:
        raise BadInput("this needs images", where="--data", remedy="give --data")
    prepare(settings)
    runner, inputs = _open(opening, settings, runtime, reporter)
    data = load_dataset(settings.data, inputs, seed=settings.seed, labels=settings.labels, skip_corrupt=settings.skip_corrupt)
    for note in data.notes:
        reporter.note(note)
    half = _float16_notes(opening.path, runner.runtime, data.val, settings.eval_batch(inputs.shape))
    for note in half:
        reporter.note(note)
    progress = functools.partial(reporter.progress, f"evaluate ({runner.runtime})")
    images = data.train if split == "train" else data.val
    with runner:
        batch = settings.eval_batch(inputs.shape)
        found = evaluate(runner, images, batch_size=batch, outputs=inputs.outputs, progress=progress)
    for note in found.notes:
        reporter.note(note)
    return dataclasses.replace(found, notes=(*half, *found.notes))


def _open(opening: Opening, settings: Settings, runtime: str, reporter: Reporter) -> tuple[Runner, Inputs]:
    if opening.path.suffix == ".onnx" and not (runtime in ("auto", "torch") and _is_foreign(opening.path)):
        if runtime == "torch":
            raise BadInput("torch does not run ONNX files", where="--runtime", remedy="use onnxruntime or openvino")
        name = "onnxruntime" if runtime == "auto" else runtime
        inputs = _restated(onnx_inputs(opening.path), opening)
        return load_backend(name).runner(opening.path, threads=settings.threads), inputs
    if runtime not in ("auto", "torch"):
        raise BadInput(f"{runtime} runs ONNX files, not checkpoints", where="--runtime", remedy="`rescompress export` it first")
    checkpoint = opening.load(reporter.note)
    need_classes(checkpoint.spec)
    return TorchRunner(network_of(checkpoint), settings.torch_device()), Inputs.of(checkpoint.spec)


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


def onnx_inputs(path: Path) -> Inputs:
    """Return how data is read for an ONNX file, from the spec that rescompress stores in it.

    Raises:
        ModelFileError: It is no ONNX file, malformed, not one of ours, or reads something else than the spec says.
    """
    model = load_onnx(path, weights=False)
    found = read_metadata(model)
    if found is None:
        raise ModelFileError(
            "does not say how its images are preprocessed", where=str(path), remedy="evaluate files that rescompress exported"
        )
    _check_input(model, found.spec.input_shape, str(path))
    return Inputs.of(found.spec)


_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


def _check_input(model: ModelProto, shape: tuple[int, int, int], path: str) -> None:
    """Refuse a file that was changed since it was exported so that preprocessed images no longer are what it reads."""
    stored = {i.name for i in model.graph.initializer}
    read = [i for i in model.graph.input if i.name not in stored]
    remedy = "evaluate the file as it was exported"
    if len(read) != 1:
        names = ", ".join(f"'{i.name}'" for i in read)
        raise ModelFileError(f"reads {len(read)} inputs{f' ({names})' if read else ''}, not one", where=path, remedy=remedy)
    tensor = read[0].type.tensor_type
    if tensor.elem_type not in _FLOATS:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        raise ModelFileError(f"input '{read[0].name}' is {kind}: preprocessed images are floats", where=path, remedy=remedy)
    sizes = [d.dim_value for d in tensor.shape.dim]  # 0 where the file leaves it open
    if len(sizes) != 4 or any(d not in (0, want) for d, want in zip(sizes[1:], shape, strict=True)):
        raise ModelFileError(
            f"input '{read[0].name}' is {'x'.join(str(d or '?') for d in sizes)}, "
            f"its metadata say images of {'x'.join(map(str, shape))}",
            where=path,
            remedy=remedy,
        )
