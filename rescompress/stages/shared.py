"""What the stages share: opening checkpoints and data, evaluating, and the row every stage ends with."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import Dataset, Inputs, Split, load_dataset
from compress.evaluate import Evaluation, TorchRunner, evaluate
from compress.quantize import fake_quant_model
from compress.resnet import ResNet, build_model
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.artifact import atomic_path, write_text
from rescompress.core.errors import BadInput
from rescompress.core.layers import total_macs, total_params, walk
from rescompress.core.metric import Metric, counted
from rescompress.core.runner import Runner
from rescompress.core.spec import ModelSpec
from rescompress.stage import Context, Opening, Outcome


@dataclass(frozen=True)
class Source:
    """A checkpoint: the file of an earlier stage, or any file.

    Attributes:
        stage: The stage that wrote it, or None.
        opening: The file and what is stated about it, where no stage wrote it.
    """

    stage: str | None = None
    opening: Opening | None = None

    @property
    def path(self) -> Path | None:
        """The file, where no stage wrote it."""
        return self.opening.path if self.opening else None

    def load(self, context: Context) -> Checkpoint:
        """Return the checkpoint."""
        if self.stage is not None:
            return load_checkpoint(context.file(self.stage, "checkpoint"))
        assert self.opening is not None
        checkpoint = self.opening.load()
        warnings = checkpoint.provenance.get("warnings")
        for text in warnings if context.main and isinstance(warnings, list) else ():
            context.reporter.note(f"{self.opening.path.name}: {text}")
        return checkpoint


@dataclass(frozen=True)
class Common:
    """What most stages share.

    Attributes:
        data: As in ``--data``, or None.
        labels: Label of the checkpoint for each class folder.
        seed: Of everything random.
        device: Where torch computes.
        threads: CPU threads of torch and the runtimes, None for all.
        batch_size: Images per call when evaluating; chosen by image size when None.
        data_identity: Hash of the data's content; images that were read are kept for it alone.
    """

    data: str | None = None
    labels: Mapping[str, str] | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    batch_size: int | None = None
    data_identity: str | None = None

    def torch_device(self) -> str:
        """Return the torch device, ``auto`` resolved.

        Raises:
            BadInput: It is not there.
        """
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        kind, _, number = self.device.partition(":")
        count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind, 0)
        if number not in ("", *map(str, range(count))) or not count:
            raise BadInput(f"torch finds no device '{self.device}' here", where="--device", remedy="use auto or cpu")
        return self.device

    def eval_batch(self, input_shape: tuple[int, int, int]) -> int:
        """Return images per call: small images go in larger batches."""
        _, height, width = input_shape
        return self.batch_size or max(1, min(256, 4_000_000 // (height * width)))


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


def prepare(common: Common) -> None:
    """Make sure that the device is there, and give torch the threads that the user wants it to have."""
    common.torch_device()
    if common.threads is not None:
        torch.set_num_threads(common.threads)


@functools.lru_cache(maxsize=2)
def _load_dataset(
    source: str, identity: str | None, inputs: Inputs, seed: int, labels: tuple[tuple[str, str], ...] | None
) -> Dataset:
    return load_dataset(source, inputs, seed=seed, labels=dict(labels) if labels else None)


def dataset(common: Common, spec: ModelSpec) -> Dataset:
    """Return the data set; the stages of one process share the decoded images."""
    if common.data is None:
        raise BadInput("this needs images", where="--data", remedy="give --data")
    labels = tuple(sorted((common.labels or {}).items())) or None
    return _load_dataset(common.data, common.data_identity, Inputs.of(spec), common.seed, labels)


def evaluate_runner(context: Context, runner: Runner, split: Split, common: Common, spec: ModelSpec) -> Evaluation:
    """Return the accuracy of anything that runs; progress is told."""
    progress = functools.partial(context.reporter.progress, f"evaluate ({runner.runtime})")
    with runner:
        return evaluate(runner, split, batch_size=common.eval_batch(spec.input_shape), progress=progress)


def evaluate_model(context: Context, model: ResNet, split: Split, common: Common, spec: ModelSpec) -> Evaluation:
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
    common: Common,
    details: dict[str, Any],
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
        details = details | {"data_notes": list(data.notes)}
        for note in data.notes if stage == "dense" else ():
            context.reporter.note(note)
    return Outcome(metrics, written, details, transient=transient)
