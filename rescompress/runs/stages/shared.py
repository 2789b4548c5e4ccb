"""What the stages share: opening checkpoints and data, evaluating, and the row every stage ends with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from onnx import ModelProto, TensorProto

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import Dataset, Inputs, Split, load_dataset
from compress.evaluate import Evaluation, TorchRunner, evaluate
from compress.fidelity import Fidelity, Outputs, fidelity
from compress.importers.reference import reference
from compress.processes import ALONE, Together
from compress.quantize import fake_quant_model
from compress.resnet import ResNet, build_model
from export.load import load_onnx
from export.metadata import read_metadata
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.artifact import atomic_path, write_text
from rescompress.core.details import Details
from rescompress.core.errors import BadInput, ModelFileError
from rescompress.core.graph import Network
from rescompress.core.layers import total_macs, total_params, walk
from rescompress.core.metric import Metric, counted
from rescompress.core.recipe import network_of as graph_of
from rescompress.core.runner import Runner
from rescompress.core.spec import ModelSpec
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Context, Outcome


def network_of(checkpoint: Checkpoint) -> ResNet:
    """Return the torch network of a checkpoint: fake-quantized if it is quantized, in eval mode."""
    if checkpoint.quantization is not None:
        return fake_quant_model(checkpoint)
    return build_model(checkpoint.spec, checkpoint.state_dict)


def onnx_of(checkpoint: Checkpoint, options: ExportOptions) -> onnx.ModelProto:
    """Return a checkpoint as an ONNX model."""
    tensors = {k: v.numpy() for k, v in checkpoint.state_dict.items()}
    return to_onnx(checkpoint.spec, tensors, checkpoint.quantization, options)


def write_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Check the model and write it, whole or not at all."""
    onnx.checker.check_model(model, full_check=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def prepare(common: Settings) -> None:
    """Make sure that the device is there, and give torch the threads that the user wants it to have."""
    common.torch_device()
    if common.threads is not None:
        torch.set_num_threads(common.threads)


@functools.lru_cache(maxsize=2)
def _load_dataset(
    source: str,
    identity: str | None,
    inputs: Inputs,
    seed: int,
    labels: tuple[tuple[str, str], ...] | None,
    skip_corrupt: bool,
) -> Dataset:
    return load_dataset(source, inputs, seed=seed, labels=dict(labels) if labels else None, skip_corrupt=skip_corrupt)


def dataset(common: Settings, spec: ModelSpec | Network) -> Dataset:
    """Return the data set; the stages of one process share the decoded images."""
    if common.data is None:
        raise BadInput("this needs images", where="--data", remedy="give --data")
    labels = tuple(sorted((common.labels or {}).items())) or None
    data = _load_dataset(common.data, common.data_identity, Inputs.of(spec), common.seed, labels, common.skip_corrupt)
    if not common.hold_out:
        return data
    seen, held = data.train.part(common.hold_out, common.seed)
    return dataclasses.replace(data, train=seen, val=held)


def scores_classes(spec: ModelSpec | Network) -> bool:
    """Whether a network can be measured against labels; else its outputs are compared with the dense network's."""
    return spec.num_classes is not None


def reference_of(context: Context, checkpoint: Checkpoint) -> Checkpoint:
    """Return the dense network that the outputs of one without class scores are compared with.

    That is the trunk of its host as it came; without a host the stage ``dense``, and without that the network itself.

    Raises:
        CheckpointError: The host is gone or was changed.
    """
    if checkpoint.host is not None and checkpoint.host.files:
        return reference(checkpoint.host)
    dense = context.done.stage("dense")
    if dense is not None and dense.output("checkpoint") is not None:
        with context.held("dense", "checkpoint") as path:
            return load_checkpoint(path)
    return checkpoint


def measure_fidelity(
    context: Context,
    runner: Outputs,
    checkpoint: Checkpoint,
    split: Split,
    common: Settings,
    sharing: Together = ALONE,
) -> Fidelity:
    """Return how near anything that runs a checkpoint is to the dense network; progress is told."""
    progress = functools.partial(context.reporter.progress, f"compare ({runner.runtime})")
    dense = TorchRunner(network_of(reference_of(context, checkpoint)), common.torch_device())
    names = [o.name for o in checkpoint.network.outputs]
    size = common.eval_batch(checkpoint.spec.input_shape)
    return fidelity(runner, dense, split, names, batch_size=size, progress=progress, sharing=sharing)


def need_classes(spec: ModelSpec | Network) -> None:
    """Refuse a network without class scores where labels are asked for.

    Raises:
        BadInput: It has none; the message names what it has.
    """
    if not scores_classes(spec):
        network = graph_of(spec)
        made = ", ".join(f"{o.name} ({'x'.join(map(str, network.by_name[o.tensor].out_shape))})" for o in network.outputs)
        raise BadInput(
            f"the network has no class scores that labels could be compared with: it makes {made}",
            remedy="all but `search` works without labels",
        )


def evaluate_runner(
    context: Context,
    runner: Runner,
    split: Split,
    common: Settings,
    spec: ModelSpec | Network,
    sharing: Together = ALONE,
) -> Evaluation:
    """Return the accuracy of anything that runs; progress is told."""
    progress = functools.partial(context.reporter.progress, f"evaluate ({runner.runtime})")
    with runner:
        size = common.eval_batch(spec.input_shape)
        return evaluate(runner, split, batch_size=size, outputs=spec.num_classes, progress=progress, sharing=sharing)


def evaluate_model(
    context: Context, model: ResNet, split: Split, common: Settings, spec: ModelSpec | Network, sharing: Together = ALONE
) -> Evaluation:
    """Return the accuracy of a torch network; progress is told."""
    return evaluate_runner(context, TorchRunner(model, common.torch_device()), split, common, spec, sharing)


def outcomes_file(context: Context, stage: str, found: Evaluation) -> Path:
    """Write which samples were right, and return the file."""
    path = context.folder / f"{stage.replace(':', '-')}.outcomes.json"
    write_text(path, found.outcomes.model_dump_json(indent=1) + "\n")
    return path


def finish(
    context: Context,
    stage: str,
    checkpoint: Checkpoint,
    common: Settings,
    details: Details,
    *,
    files: Sequence[tuple[str, Path]] = (),
    transient: Sequence[Path] = (),
    sharing: Together = ALONE,
) -> Outcome:
    """Save and evaluate a stage's checkpoint and return its row: accuracy or fidelity, MACs, parameters, size as an ONNX file.

    Args:
        context: Of the stage.
        stage: Its name.
        checkpoint: What it made; in every process that of the main one.
        common: Settings of the run.
        details: JSON values.
        files: Kind and path of other files that were written.
        transient: Files that are no longer needed.
        sharing: The processes that evaluate together; the main one writes.
    """
    found: Evaluation | Fidelity | None = None
    data_notes: tuple[str, ...] = ()
    whole = scores_classes(checkpoint.spec)

    def measured(split: Split, sharing: Together = ALONE) -> Evaluation | Fidelity:
        model = network_of(checkpoint)
        if whole:
            return evaluate_model(context, model, split, common, checkpoint.spec, sharing)
        return measure_fidelity(context, TorchRunner(model, common.torch_device()), checkpoint, split, common, sharing)

    # Before anything is written: what cannot be evaluated does not take the place of an earlier result.
    if common.data is not None and (context.main or sharing.world > 1):
        data = dataset(common, checkpoint.spec)
        found, data_notes = measured(data.val, sharing), data.notes
    if not context.main:
        return Outcome()
    path = context.folder / f"{stage}.safetensors"
    save_checkpoint(checkpoint, path)
    written = [("checkpoint", path), *files]
    layers = walk(checkpoint.spec)
    size = len(onnx_of(checkpoint, ExportOptions()).SerializeToString())
    metrics: dict[str, Metric] = {
        "macs": counted(total_macs(layers), "macs"),
        "params": counted(total_params(layers), "params"),
        "size_bytes": counted(size, "bytes"),
    }
    if found is not None:
        metrics |= found.metrics
        if isinstance(found, Evaluation):
            written.append(("outcomes", outcomes_file(context, stage, found)))
        else:
            details = details.with_fidelity(found.outputs)
        notes = (*data_notes, *found.notes)
        details = details.with_data_notes(list(notes))
        told = {note for other in context.done.stages if other.stage != stage for note in other.details.data_notes}
        for note in notes:
            if note not in told:
                context.reporter.note(note)
    return Outcome(metrics, written, details, transient=transient)


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
