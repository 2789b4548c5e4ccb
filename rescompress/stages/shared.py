"""What the stages share: opening checkpoints and data, evaluating, and the row every stage ends with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch

from compress.checkpoints import save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import Dataset, Inputs, Split, load_dataset
from compress.evaluate import Evaluation, TorchRunner, evaluate
from compress.quantize import fake_quant_model
from compress.resnet import ResNet, build_model
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.artifact import atomic_path, write_text
from rescompress.core.details import Details
from rescompress.core.errors import BadInput
from rescompress.core.layers import total_macs, total_params, walk
from rescompress.core.metric import Metric, counted
from rescompress.core.runner import Runner
from rescompress.core.spec import ModelSpec
from rescompress.settings import Settings
from rescompress.stage import Context, Outcome


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
    source: str, identity: str | None, inputs: Inputs, seed: int, labels: tuple[tuple[str, str], ...] | None
) -> Dataset:
    return load_dataset(source, inputs, seed=seed, labels=dict(labels) if labels else None)


def dataset(common: Settings, spec: ModelSpec) -> Dataset:
    """Return the data set; the stages of one process share the decoded images."""
    if common.data is None:
        raise BadInput("this needs images", where="--data", remedy="give --data")
    labels = tuple(sorted((common.labels or {}).items())) or None
    data = _load_dataset(common.data, common.data_identity, Inputs.of(spec), common.seed, labels)
    if not common.hold_out:
        return data
    seen, held = data.train.part(common.hold_out, common.seed)
    return dataclasses.replace(data, train=seen, val=held)


def evaluate_runner(context: Context, runner: Runner, split: Split, common: Settings, spec: ModelSpec) -> Evaluation:
    """Return the accuracy of anything that runs; progress is told."""
    progress = functools.partial(context.reporter.progress, f"evaluate ({runner.runtime})")
    with runner:
        outputs = spec.head.num_classes if spec.head else None
        return evaluate(runner, split, batch_size=common.eval_batch(spec.input_shape), outputs=outputs, progress=progress)


def evaluate_model(context: Context, model: ResNet, split: Split, common: Settings, spec: ModelSpec) -> Evaluation:
    """Return the accuracy of a torch network; progress is told."""
    return evaluate_runner(context, TorchRunner(model, common.torch_device()), split, common, spec)


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
) -> Outcome:
    """Save and evaluate a stage's checkpoint and return its row: accuracy, MACs, parameters, size as an ONNX file."""
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
    if common.data is not None:
        data = dataset(common, checkpoint.spec)
        found = evaluate_model(context, network_of(checkpoint), data.val, common, checkpoint.spec)
        metrics |= found.metrics
        written.append(("outcomes", outcomes_file(context, stage, found)))
        notes = (*data.notes, *found.notes)
        details = details.with_data_notes(list(notes))
        for note in notes if stage == "dense" else ():
            context.reporter.note(note)
    return Outcome(metrics, written, details, transient=transient)
