"""What the Python face offers beyond the functions of the siblings: the chain in a few lines, on what one has at hand.

Where images are wanted, a `Split`, a whole `Dataset` (its training images), a tensor (N, C, H, W) or batches may be given;
where a network is wanted, a `Checkpoint` or what pruning returned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from compress import evaluate as evaluation
from compress import prune as pruning
from compress.checkpoints import save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import Dataset, Inputs, Split
from compress.data import load_dataset as read_dataset
from compress.data.fitting import check_fits
from compress.data.sources import is_name
from compress.evaluate import Evaluation, TorchRunner
from compress.prune import Budget, PruneResult
from compress.prune.groups import Scope
from compress.quantize import best_of, finish_qat, on_grid, prepare_qat, ptq
from compress.resnet import ResNet, tensors_of
from compress.resnet import build_model as float_model
from compress.teacher import match_teacher
from compress.train import train
from edge_targets.catalog import load_target
from export.to_onnx import ExportOptions
from rescompress.core.choices import Calibration
from rescompress.core.described import wrong_value
from rescompress.core.errors import BadInput, CheckpointError, ConfigError, shown
from rescompress.core.graph import Network
from rescompress.core.layers import total_macs, total_params, walk
from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.metric import Metric, counted
from rescompress.core.quantizers import Profile
from rescompress.core.runner import Runner
from rescompress.core.settings import ExportSettings, PruneSettings, QuantizeSettings, TrainSettings
from rescompress.core.spec import ModelSpec
from rescompress.runs.config import load_config
from rescompress.runs.pipeline import folder_of, run_stages
from rescompress.runs.plan import Builder, run_plan
from rescompress.runs.reporter import Reporter, Silent
from rescompress.runs.settings import Settings
from rescompress.runs.stage import Opening
from rescompress.runs.stages.network import latency_cost
from rescompress.runs.stages.shared import network_of, onnx_of, write_onnx
from rescompress.show.figures.tables import rows_of, to_markdown, to_rich

if TYPE_CHECKING:
    from edge_targets.latency import LatencyPrediction
    from export.lint import Finding

Images = Split | Dataset | Tensor | Iterable[Tensor | Sequence[Tensor]]
Net = Checkpoint | PruneResult

CALIBRATION_IMAGES = 512
"""Taken of a split where images serve pruning or calibration, as the commands do."""


@contextlib.contextmanager
def _told(model: type[BaseModel]) -> Iterator[None]:
    """Name the argument of which no setting can be made.

    Args:
        model: The settings that are made inside.

    Raises:
        ConfigError: There is one.
    """
    try:
        yield
    except ValidationError as e:
        where, what = wrong_value(model, e)
        raise ConfigError(what, where=where or None) from e


def load_dataset(
    source: Any,
    network: Net | ModelSpec | Network | Inputs,
    *,
    seed: int = 0,
    labels: Mapping[str, str] | None = None,
    skip_corrupt: bool = False,
) -> Dataset:
    """Return the data set at `source`, ready for a network.

    Args:
        source: One of the forms of the command line's ``--data``, or an object of your own (`compress.data.sources.objects`).
        network: Gives the input size, the preprocessing, and the labels that class folders are matched to by name.
        seed: Draws the split where `source` has only one.
        labels: Label of the checkpoint for each class folder, for a subset or other names.
        skip_corrupt: Whether images that cannot be read are left out, with a note.

    Raises:
        DataError: Nothing is there, it holds no images, or its classes do not fit the checkpoint.
    """
    inputs = _checkpoint(network).spec if isinstance(network, Checkpoint | PruneResult) else network
    return read_dataset(source, inputs, seed=seed, labels=labels, skip_corrupt=skip_corrupt)


def build_model(network: Net | ModelSpec | Network, state_dict: Mapping[str, Tensor] | None = None) -> ResNet:
    """Return the torch network in eval mode: of an INT8 checkpoint the one that computes in INT8.

    Args:
        network: A checkpoint, or a spec alone.
        state_dict: With a spec: its tensors, torch's default initialisation without.

    Raises:
        BadInput: Tensors beside a checkpoint, which has its own.
        RuntimeError: A tensor is missing, too many, or of another shape.
    """
    if isinstance(network, ModelSpec | Network):
        return float_model(network, state_dict)
    if state_dict is not None:
        raise BadInput("a checkpoint has tensors of its own", where="state_dict", remedy="give the checkpoint alone")
    return network_of(_checkpoint(network))


def prune(
    network: Net,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    budget: Budget | None = None,
    images: Images | None = None,
    calibration_x: Tensor | None = None,
    target: str | None = None,
    method: str = "reconstruct",
    scope: Scope = "inner",
    align: int | None = None,
    drop_blocks: bool | None = None,
    repair: bool = True,
    seed: int = 0,
) -> PruneResult:
    """Return a network with channels removed, to one budget.

    Args:
        network: A float network; not changed.
        ratio: Fraction of the channels of every group that goes.
        macs: Fraction of the MACs that may stay.
        params: Fraction of the parameters that may stay.
        latency: Fraction of the latency on `target` that may stay.
        budget: In place of the four.
        images: To choose channels and to make up for those that go; 512 of a split. No labels are read.
        calibration_x: In place of `images`: preprocessed (N, C, H, W), all of them.
        target: An edge target: what the widths are multiples for, and what a latency budget is about.
        method: One of `compress.prune.method_names()`; those that choose by weights alone need no images.
        scope: ``inner`` channels of blocks only, or ``all``: residual streams too.
        align: Widths are multiples of this; by default as `target` wants it, else 8.
        drop_blocks: Whether whole blocks may go; by default where the budget is latency.
        repair: Whether the method makes up for what it removed.
        seed: Of everything random.

    Raises:
        BadInput: Not one budget, the method is unknown or lacks images, the images were read for another network, or the
            network is quantized.
        BudgetError: No allowed network meets the budget; the message names the smallest reachable.
        TargetError: The target is unknown, or has no latency model where latency is the budget.
    """
    known = [load_target(target)] if target is not None else []
    wanted = {"ratio": ratio, "macs": macs, "params": params, "latency": latency}
    stated = [budget] if budget is not None else []
    stated += [Budget.model_validate({"kind": kind, "value": value}) for kind, value in wanted.items() if value is not None]
    if len(stated) != 1:
        raise BadInput(f"{len(stated)} budgets", where="prune", remedy="give one of ratio, macs, params, latency and budget")
    chosen = calibration_x if calibration_x is not None else _tensor(network, images, seed) if images is not None else None
    with _told(PruneSettings):
        settings = PruneSettings(method=method, scope=scope, align=align or "auto", drop_blocks=drop_blocks, repair=repair)
    return pruning.prune(
        _checkpoint(network),
        settings.model_copy(update={stated[0].kind: stated[0].value}),
        calibration_x=chosen,
        multiple=max([t.align() for t in known] or [8]),
        seed=seed,
        cost=latency_cost(known) if stated[0].kind == "latency" else None,
    )


def finetune(
    network: Net,
    images: Split | Dataset,
    *,
    teacher: Net | None = None,
    epochs: float | None = None,
    settings: TrainSettings | None = None,
) -> Checkpoint:
    """Return a float network trained on labelled images, distilled from a teacher where there is one.

    Args:
        network: A float network; not changed.
        images: Training images; of a data set its training split.
        teacher: A network of the same classes, such as the dense one.
        epochs: Of the settings.
        settings: How to train; those of ``rescompress finetune`` by default.

    Raises:
        CheckpointError: The network is quantized: `qat` trains it from its float network.
        BadInput: The training diverged, settings make no sense, the images were read for another network, or the teacher has
            other classes.
    """
    checkpoint = _checkpoint(network)
    if checkpoint.quantization is not None:
        raise CheckpointError("already quantized", remedy="train the float network, or call qat on it")
    chosen = settings or TrainSettings()
    chosen = chosen.model_copy(update={"epochs": epochs}) if epochs is not None else chosen
    model = float_model(checkpoint.spec, checkpoint.state_dict)
    _train(model, checkpoint, _split(network, images, labels=True), chosen, teacher)
    return dataclasses.replace(checkpoint, state_dict=tensors_of(model))


def quantize(
    network: Net,
    images: Images,
    *,
    profile: Profile = "tensorrt",
    calibration: Calibration = "nncf",
    percentile: float = 99.99,
    bias_correction: bool = True,
    keep_float: Iterable[str] = (),
    seed: int = 0,
) -> Checkpoint:
    """Return the network calibrated to INT8, its biases at multiples of the step that integer kernels add in.

    Args:
        network: A float network.
        images: To calibrate on; 512 of a split. No labels are read.
        profile: The runtime whose placement of quantizers to use: ``tensorrt``, ``openvino`` or ``onnxruntime``.
        calibration: How ranges are chosen (`compress.quantize.ptq`).
        percentile: In percent, for ``percentile``.
        bias_correction: Whether to correct biases.
        keep_float: Convolution and linear layers to leave in floating point.
        seed: Draws the images of a split.

    Raises:
        CheckpointError: Already quantized, or a weight that is not finite.
        DataError: Too few images, or an activation that is not finite or zero everywhere.
        ConfigError: A layer of `keep_float` that is not there, or an unknown calibration.
        BadInput: The images were read for another network.
    """
    with _told(QuantizeSettings):
        settings = QuantizeSettings(calibration=calibration, percentile=percentile, bias_correction=bias_correction)
    return on_grid(
        ptq(
            _checkpoint(network),
            _batches(network, images, seed),
            settings,
            profile=profile,
            keep_float=frozenset(keep_float),
        )
    )


def qat(
    network: Net,
    images: Split | Dataset,
    *,
    teacher: Net | None = None,
    epochs: float = 1.0,
    lr: float = 0.001,
    profile: Profile = "tensorrt",
    calibration: Calibration = "nncf",
    hold_out: float = 0.1,
    seed: int = 0,
) -> Checkpoint:
    """Return the network calibrated and then trained with the rounding in place; the better of both on images held out.

    Args:
        network: A float network.
        images: Labelled training images; of a data set its training split.
        teacher: What to distil from; the float network itself by default.
        epochs: Of training.
        lr: Peak learning rate.
        profile: As for `quantize`.
        calibration: As for `quantize`.
        hold_out: Fraction of the images that the two are compared on, never trained on.
        seed: Of everything random.

    Raises:
        CheckpointError: Already quantized, or a weight that is not finite.
        BadInput: The training diverged.
    """
    split = _split(network, images, labels=True)
    start = quantize(network, split, profile=profile, calibration=calibration, seed=seed)
    seen, held = split.part(hold_out, seed)
    model = prepare_qat(start)
    settings = TrainSettings(epochs=epochs, lr=lr, distill=1.0, freeze_bn_after=0.0, seed=seed, features=0.0)
    _train(model, start, seen, settings, teacher if teacher is not None else network)
    return on_grid(best_of([finish_qat(model, start), start], held.again(250)))


def evaluate(what: Net | Runner | str | Path, images: Split | Dataset, *, batch_size: int = 250) -> Evaluation:
    """Return top-1, top-5 and which samples were right.

    Args:
        what: A network, anything that runs batches (`rescompress.core.runner.Runner`), or the path of a checkpoint or an ONNX
            file, which onnxruntime runs.
        images: Labelled; of a data set its evaluation split.
        batch_size: Images per call.

    Raises:
        DataError: The split is empty, or the output is not finite or no row of scores for each image.
        BadInput: The images were read for a network that is shown other pixels or has other classes.
    """
    split = images.val if isinstance(images, Dataset) else images
    inputs: Inputs | None = None
    if isinstance(what, str | Path):
        what, inputs = _opened(Path(what))
    if isinstance(what, Checkpoint | PruneResult):
        checkpoint = _checkpoint(what)
        what, inputs = TorchRunner(network_of(checkpoint)), Inputs.of(checkpoint.spec)
    if inputs is not None:
        check_fits(split, inputs, labels=True)
    with what:
        return evaluation.evaluate(what, split, batch_size=batch_size, outputs=inputs.outputs or None if inputs else None)


def sensitivity(
    network: Net, images: Images | None = None, *, method: str = "reconstruct", scope: Scope = "inner", seed: int = 0
) -> pruning.Curves:
    """Return what removing channels of each group would cost, without removing any.

    Args:
        network: A float network.
        images: As for `prune`.
        method: Whose errors these are.
        scope: ``inner`` or ``all``.
        seed: Of everything random.

    Raises:
        BadInput: The method is unknown or lacks images, or the network is quantized.
    """
    chosen = _tensor(network, images, seed) if images is not None else None
    return pruning.measure(_checkpoint(network), method=method, scope=scope, calibration_x=chosen, seed=seed)


@dataclass(frozen=True, repr=False)
class Comparison:
    """Networks beside each other, as the table of a run has its stages.

    Attributes:
        manifest: One stage for each network.
    """

    manifest: Manifest

    def __repr__(self) -> str:
        """Return the names."""
        return f"Comparison({', '.join(s.stage for s in self.manifest.stages)})"[:200]

    def __str__(self) -> str:
        """Return the table as Markdown."""
        return to_markdown(rows_of(self.manifest))

    def __rich__(self) -> Any:
        """Return the table for a terminal."""
        return to_rich(rows_of(self.manifest))

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        from io import StringIO

        from rich.console import Console

        console = Console(file=StringIO(), record=True, width=120)
        console.print(self)
        return console.export_html(inline_styles=True, code_format='<pre style="line-height:1.2">{code}</pre>')


def compare(*networks: Net, data: Split | Dataset | None = None, names: Sequence[str] | None = None) -> Comparison:
    """Return networks beside each other: accuracy, MACs, parameters, size as an ONNX file; the first is what others are to.

    Args:
        networks: In order; the first counts as the dense one.
        data: Labelled images; of a data set its evaluation split. Without them there is no accuracy.
        names: What to call them; ``dense`` and then what was done by default.

    Raises:
        BadInput: No network, or not a name for each.
    """
    if not networks:
        raise BadInput("nothing to compare", where="networks", remedy="give one network or more")
    chosen = list(names) if names is not None else _names(networks)
    if len(chosen) != len(networks) or len(set(chosen)) != len(chosen):
        raise BadInput(f"{len(set(chosen))} different names for {len(networks)} networks", where="names", remedy="one for each")
    rows = [_row(name, _checkpoint(network), data) for name, network in zip(chosen, networks, strict=True)]
    return Comparison(Manifest(stages=tuple(rows)))


def export(
    network: Net, folder: str | Path, *, target: str = "cpu", batch: int = 1, precision: str = "auto", data: str | None = None
) -> Manifest:
    """Write what a target needs into a folder, as ``rescompress export`` does, and return what was found about it.

    The ONNX file is compared with torch, linted for the target, and built and measured where the target is this machine.

    Args:
        network: Float or quantized.
        folder: Gets ``<target>/model.onnx`` and what belongs to it, and the network as ``network.safetensors``.
        target: An edge target.
        batch: Images per call.
        precision: What it should run in; the fastest that the file and the target allow by default.
        data: Where images for accuracy are, as for ``--data``.

    Raises:
        RescompressError: What is wrong, where, and what to do.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    file = place / "network.safetensors"
    save_checkpoint(_checkpoint(network), file)
    settings = ExportSettings.model_validate({"batch": batch, "precision": precision})
    opening = Opening(file, None, None, (), False)
    stage = Builder(opening, Settings(data)).target(target, opening, settings)
    return run_stages([stage], place, {}, reporter=Silent(), workspace=True).manifest


def lint(file: str | Path, target: str) -> list[Finding]:
    """Return what lint finds in an ONNX file for a target, errors first.

    Args:
        file: The ONNX file.
        target: An edge target.

    Raises:
        ModelFileError: The file cannot be read.
        TargetError: The target is unknown.
    """
    from export.lint import lint as find
    from export.load import load_onnx
    from rescompress.runs.file_check import facts_of

    return find(load_onnx(Path(file)), facts_of(load_target(target)))


def export_onnx(
    network: Net,
    path: str | Path,
    *,
    target: str | None = None,
    batch: int | Literal["dynamic"] = 1,
    opset: int | None = None,
) -> Path:
    """Write a network as ONNX and return the path; INT8 with its Q/DQ if it is quantized.

    Args:
        network: Float or quantized.
        path: The file.
        target: An edge target, whose opset is taken.
        batch: Images per call, or ``dynamic``.
        opset: Takes precedence over the target's.

    Raises:
        BadInput: An option makes no sense, or the target is unknown.
        EnvironmentFailed: The file cannot be written.
    """
    chosen = opset or (load_target(target).opset if target else ExportOptions().opset)
    write_onnx(onnx_of(_checkpoint(network), ExportOptions(batch=batch, opset=chosen)), Path(path))
    return Path(path)


def predict_latency(
    network: Net, target: str, *, precision: str = "auto", batch: int = 1, power_mode: str | None = None
) -> LatencyPrediction:
    """Return the predicted latency of a network on a device, with its band.

    Args:
        network: The network.
        target: An edge target with a latency model.
        precision: ``fp32``, ``fp16``, ``int8``, or the fastest of the target.
        batch: Images per call.
        power_mode: Of the device.

    Raises:
        TargetError: The target is unknown or has no latency model.
    """
    from edge_targets.latency import predict

    chosen = load_target(target)
    return predict(
        walk(_checkpoint(network).spec),
        chosen.device,
        precision=chosen.check_precision(precision),
        batch=batch,
        power_mode=power_mode,
    )


def run(
    config: str | Path, folder: str | Path | None = None, *, overrides: tuple[str, ...] = (), reporter: Reporter | None = None
) -> Manifest:
    """Run a config's stages, or what is left of them, and return the manifest.

    Args:
        config: A YAML file.
        folder: Where the results go; ``rescompress-out/<name of the config>`` by default.
        overrides: Assignments such as ``prune.macs=0.3``.
        reporter: Where progress goes.

    Raises:
        RescompressError: What is wrong, where, and what to do.
    """
    loaded = load_config(Path(config), overrides)
    stages = run_plan(loaded, Settings(loaded.data, loaded.labels, loaded.seed, skip_corrupt=loaded.skip_corrupt))
    place = Path(folder) if folder is not None else folder_of(Path(config), Path("rescompress-out"))
    settings = loaded.model_dump(mode="json")
    reads = [] if is_name(loaded.data) else [Path(loaded.data)]
    return run_stages(stages, place, settings, reporter=reporter or Silent(), config_file=Path(config), reads=reads).manifest


def _checkpoint(network: Net) -> Checkpoint:
    """Return the checkpoint of a network.

    Raises:
        BadInput: It is none of ours, such as a torch module or the path of a file.
    """
    if not isinstance(network, Checkpoint | PruneResult):
        named = isinstance(network, str | Path)
        raise BadInput(
            f"is {shown(str(network)) if named else f'of class {type(network).__name__}'}, no checkpoint",
            where="network",
            remedy="rc.load(path) reads a file" if named else "rc.from_module(module, example) makes one of a torch module",
        )
    return network.checkpoint if isinstance(network, PruneResult) else network


def _split(network: Net, images: Split | Dataset, *, labels: bool = False) -> Split:
    """Return the images of a split, or those to train on, that were read for such a network; `labels` are to fit, too."""
    split = images.train if isinstance(images, Dataset) else images
    check_fits(split, Inputs.of(_checkpoint(network).spec), labels=labels)
    return split


def _tensor(network: Net, images: Images, seed: int) -> Tensor:
    """Return images as one tensor, of a split as many as the commands take."""
    if isinstance(images, Tensor):
        return images
    if isinstance(images, Split | Dataset):
        return _split(network, images).take(CALIBRATION_IMAGES, seed).tensor()
    return torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in images])


def _batches(network: Net, images: Images, seed: int) -> list[Tensor]:
    """Return images in batches, of a split as many as the commands take."""
    if isinstance(images, Tensor):
        return [images[start : start + 64] for start in range(0, len(images), 64)]
    if isinstance(images, Split | Dataset):
        return [x for x, _ in _split(network, images).take(CALIBRATION_IMAGES, seed).batches(64)]
    return [batch if isinstance(batch, Tensor) else batch[0] for batch in images]


def _train(model: ResNet, checkpoint: Checkpoint, split: Split, settings: TrainSettings, teacher: Net | None) -> None:
    """Train a network in place; without a teacher the labels alone say what is right."""
    mentor = _checkpoint(teacher) if teacher is not None else None
    if mentor is not None:
        mentor, notes = match_teacher(mentor, checkpoint.spec, split.classes)
        for note in notes:
            warnings.warn(note, stacklevel=3)
    else:
        settings = settings.model_copy(update={"features": 0.0, "distill": 0.0})
    train(
        model,
        split,
        settings,
        teacher=network_of(mentor) if mentor is not None else None,
        teacher_preprocessing=mentor.spec.preprocessing if mentor is not None else None,
    )


def _opened(path: Path) -> tuple[Checkpoint | Runner, Inputs | None]:
    """Return a file as a network, or as what runs it, and what it says of its data."""
    from compress.checkpoints import load_checkpoint
    from edge_targets.backends import load_backend
    from export.load import load_onnx
    from export.metadata import read_metadata

    if path.suffix.lower() != ".onnx":
        return load_checkpoint(path), None
    own = read_metadata(load_onnx(path, weights=False))
    return load_backend("onnxruntime").runner(path), Inputs.of(own.spec) if own is not None else None


def _names(networks: Sequence[Net]) -> list[str]:
    """Return ``dense`` for the first and what was done for the others, numbered where it would stand twice."""
    words = ["dense"]
    for network in networks[1:]:
        pruned = isinstance(network, PruneResult)
        words.append("pruned" if pruned else "INT8" if _checkpoint(network).quantization is not None else "float32")
    return [w if words.count(w) == 1 else f"{w} {words[: i + 1].count(w)}" for i, w in enumerate(words)]


def _row(name: str, checkpoint: Checkpoint, data: Split | Dataset | None) -> StageResult:
    """Return a network's figures as a stage has them."""
    layers = walk(checkpoint.spec)
    metrics: dict[str, Metric] = evaluate(checkpoint, data).metrics if data is not None else {}
    size = len(onnx_of(checkpoint, ExportOptions()).SerializeToString())
    metrics = metrics | {
        "macs": counted(total_macs(layers), "macs"),
        "params": counted(total_params(layers), "params"),
        "size_bytes": counted(size, "bytes"),
    }
    return StageResult(stage=name, kind="", of=name, status="done", metrics=metrics)
