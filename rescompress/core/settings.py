"""The settings of the engines: one object each, from the YAML of a run to the function that works.

A field is the one place of a setting. Its name is the key in a config; its type and bounds are what may be given; its line
under ``Attributes`` is its help. From these come the sections of `rescompress.runs.config.RunConfig`, the options of the
command line (`rescompress.cli.from_settings`), the tables of docs/run.md and the starter config
(`rescompress.core.described`). The stages hash all fields into their keys. What was given rather than left at its default
stands in ``model_fields_set``.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import ConfigDict, Field, model_validator

from rescompress.core.choices import Augment, Calibration, Mode, Precision, ProfileOrAuto, Scope, TrainPrecision, beginning
from rescompress.core.described import LEAST_TIME_S, LONGEST_TIME_S, Flag, counts, duration, listed_or_counted
from rescompress.core.plugins import listed
from rescompress.core.spec import Frozen

# far beyond what anybody runs; a slip such as 1e300 would train, or fill memory, without end
MOST_EPOCHS = 10_000
MOST_IMAGES = 2**31
MOST_RATE = 1e3
MOST_TARGETS = 100

BudgetKind = Literal["ratio", "macs", "params", "latency"]
Batch = Literal["dynamic"] | Annotated[int, Field(ge=1, le=65_536)]
Align = Literal["auto"] | Annotated[int, Field(ge=1, le=65_536)]

_methods = beginning(lambda: listed("compress.prune.methods"))
Method = Annotated[str, Flag(short="-m", usual="reconstruct; magnitude without data", completes=_methods, metavar="METHOD")]


class Section(Frozen):
    """What people write: its numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)


Teacher = Annotated[str | None, Flag(file=True, usual="none")]
TrainBatch = Annotated[int, Flag("--train-batch", panel="Computation")]
Workers = Annotated[Annotated[int, Field(ge=0, le=4096)] | Literal["auto"], Flag(metavar="N|auto", panel="Computation")]
PHOTO_SIDE = 64
"""Inputs of this many pixels a side and more are photographs to ``augment: auto``."""
LR_BATCH = 128
"""Images per step that `lr` is for where it is scaled with the batch."""


class PruneSettings(Section):
    """Structured pruning; at most one budget, half of the MACs by default.

    Attributes:
        method: See ``rescompress methods``.
        ratio: Fraction of the channels of every group to remove.
        macs: Fraction of the dense MACs that may remain.
        params: Fraction of the dense parameters that may remain.
        latency: Fraction of the dense predicted latency, on the first target with a prediction, that may remain.
        scope: ``inner`` (inside blocks) or ``all`` (the residual stream, too).
        align: Widths are multiples of this; ``auto`` takes the targets' multiple, 8 without one, and less for small groups.
        calib: Images to calibrate with, from the training split.
        drop_blocks: Whether whole blocks may go; by default where the budget is latency.
        iterations: Steps in which the budget is reached, each followed by its share of the fine-tuning.
        recalibrate: Whether BatchNorm statistics are measured again at the end; by default where nothing was repaired.
        repair: Whether the method makes up for what it removed; long fine-tuning may end higher without.
        sparsity: ``2:4`` also makes two of every four input channels of a weight zero, for sparse tensor cores.
        plan: A plan file to follow instead of searching; what it states is not to be given again.
    """

    method: Method = "reconstruct"
    ratio: float | None = Field(None, gt=0.0, lt=1.0)
    macs: float | None = Field(None, gt=0.0, le=1.0)
    params: float | None = Field(None, gt=0.0, le=1.0)
    latency: float | None = Field(None, gt=0.0, le=1.0)
    scope: Scope = "inner"
    align: Annotated[Align, Flag(metavar="N|auto")] = "auto"
    calib: int = Field(512, ge=1, le=MOST_IMAGES)
    drop_blocks: Annotated[bool | None, Flag(off="--keep-blocks", usual="by budget")] = None
    iterations: int = Field(1, ge=1, le=100)
    recalibrate: Annotated[bool | None, Flag(usual="if nothing is repaired")] = None
    repair: bool = True
    sparsity: Literal["2:4"] | None = None
    plan: Annotated[str | None, Flag("--plan-in", file=True)] = None

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [name for name in get_args(BudgetKind) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are budgets, give one of them")
        said = (*get_args(BudgetKind), "method", "scope", "align", "drop_blocks", "iterations")
        again = sorted(self.model_fields_set.intersection(said), key=said.index)
        if self.plan is not None and again:
            raise ValueError(f"a plan says what goes: leave out {' and '.join(again)}")
        return self

    @property
    def budget(self) -> tuple[BudgetKind, float]:
        """Kind and value of the budget."""
        for name in get_args(BudgetKind):
            value = getattr(self, name)
            if value is not None:
                return name, float(value)
        return "macs", 0.5

    @property
    def may_drop(self) -> bool:
        """Whether whole blocks may go: as said, else where the budget is latency."""
        return self.drop_blocks if self.drop_blocks is not None else self.budget[0] == "latency"

    def step(self, number: int) -> PruneSettings:
        """Return the settings of one of the iterations: what is left shrinks by the same factor in each.

        Args:
            number: From 1 to `iterations`.
        """
        kind, value = self.budget
        if number == self.iterations:
            return self
        share = number / self.iterations
        some = 1.0 - (1.0 - value) ** share if kind == "ratio" else value**share
        return self.model_copy(update={kind: some, "sparsity": None})


def usual_rate(normalised: bool) -> float:
    """Return the peak learning rate of a training that names none.

    Without BatchNorm nothing undoes a step that makes a layer's outputs larger: such networks end at chance at the rate that is
    usual with it, and learn at a tenth.
    """
    return 0.02 if normalised else 0.002


class TrainSettings(Section):
    """Training of a network, by SGD with Nesterov momentum.

    The learning rate is warmed up linearly, then a cosine to zero (Loshchilov & Hutter 2017, arXiv:1608.03983); distillation is
    that of Hinton et al. 2015 (arXiv:1503.02531, section 2); images are mixed as in Zhang et al. 2018 (arXiv:1710.09412) and
    Yun et al. 2019 (arXiv:1905.04899). Where ``null`` stands for the preset's, `preset` says which value that is.

    Attributes:
        epochs: Passes over the training split.
        teacher: Checkpoint file to distil from; in a run also ``dense``, the network before pruning; null for labels alone.
        lr: Peak learning rate; 0.02 by default, a tenth of it for a network without normalisation layers, which the former
            throws to chance. ``auto`` tries a few on training images that are held out.
        batch_size: Images per training step, over all processes.
        distill: Weight of the distillation loss; the labels' cross-entropy has the rest. Only with a teacher.
        temperature: Of the distillation's softmax.
        features: Weight of the distance between the outputs of the blocks and the teacher's, beside the other losses.
            Only with a teacher.
        precision: Of convolutions and linear layers; ``bf16`` is faster on processors with bfloat16 units (AMX, Ampere),
            ``fp16`` scales the loss, ``tf32`` rounds operands on a GPU alone.
        augment: ``none``, the images as evaluation sees them; ``cifar``, those shifted by up to an eighth of each side and
            mirrored; ``photo``, a random part of the whole picture, mirrored; ``photo+``, that with TrivialAugment,
            erasing, mixing and averaged weights, for long trainings. ``auto`` is ``cifar`` below 64 pixels, else ``photo``.
            Nothing is mirrored where the data says that a mirrored image means something else.
        min_area: Least part of a picture's area that ``photo`` cuts out.
        mixup: Alpha of the Beta distribution that two images are mixed by; 0: not.
        cutmix: Likewise for a rectangle of one image in another; with `mixup`, each step has one of the two.
        label_smoothing: Part of each label that is spread over all classes.
        ema: Decay per step of a running mean of the weights, which the result has; 0: none. It is shorter at the start.
        momentum: Of SGD.
        weight_decay: Of weights of convolutions and linear layers; BatchNorm, biases and scales have none.
        warmup: Fraction of the steps over which the learning rate rises.
        scale_lr: Whether `lr` is for 128 images and grows with the batch.
        accumulate: Parts that a step is computed in, one after the other, for less memory. BatchNorm sees the parts.
        clip: Largest norm of all gradients together; longer ones are shortened.
        sampling: ``shuffle``, each image once an epoch; ``balanced``, each class equally often.
        class_weights: ``balanced``: errors count by how rare their class is.
        hold_out: Part of the training images that is not trained on, but evaluated after each epoch: the state that is
            best there is kept.
        patience: Epochs without a better state after which training stops; with `hold_out`. 0: never.
        freeze_bn_after: Fraction of the steps after which BatchNorm uses and keeps its running statistics.
        workers: Processes that read images; 0 reads them between the steps, ``auto`` goes by the images' size and the
            cores. The result does not depend on it.
        cache_gib: Decoded images are kept in a file below the run's folder, shared by all processes, while they fit.
        channels_last: Order in memory; ``auto`` where it is faster.
        compile: Whether `torch.compile` translates the network first: worth it in long trainings on a GPU.
        seed: Of order, augmentation and dropout; the run's by default.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; the command's by default. Processes that were launched
            together take one GPU each instead, where there are any and it is not ``cpu``.
    """

    epochs: Annotated[float, Flag(short="-e")] = Field(2.0, gt=0.0, le=MOST_EPOCHS)
    teacher: Teacher = "dense"
    lr: Annotated[
        Annotated[float, Field(gt=0.0, le=MOST_RATE)] | Literal["auto"] | None,
        Flag(metavar="RATE|auto", parse=str, usual="by network: 0.02, 0.002 without BatchNorm"),
    ] = None
    batch_size: TrainBatch = Field(128, ge=2, le=MOST_IMAGES)
    distill: float = Field(0.9, ge=0.0, le=1.0)
    temperature: float = Field(4.0, gt=0.0, le=1e6)
    features: float = Field(0.0, ge=0.0, le=1e6)
    precision: TrainPrecision = "fp32"
    augment: Augment = "auto"
    min_area: float = Field(0.25, gt=0.0, le=1.0)
    mixup: Annotated[float | None, Flag(usual="by preset")] = Field(None, ge=0.0, le=100.0)
    cutmix: Annotated[float | None, Flag(usual="by preset")] = Field(None, ge=0.0, le=100.0)
    label_smoothing: Annotated[float | None, Flag(usual="by preset")] = Field(None, ge=0.0, lt=1.0)
    ema: Annotated[float | None, Flag(usual="by preset")] = Field(None, ge=0.0, lt=1.0)
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    weight_decay: float = Field(5e-4, ge=0.0, le=1e3)
    warmup: float = Field(0.05, ge=0.0, lt=1.0)
    scale_lr: bool = False
    accumulate: int = Field(1, ge=1, le=64)
    clip: float | None = Field(None, gt=0.0, le=1e6)
    sampling: Literal["shuffle", "balanced"] = Field("shuffle")
    class_weights: Literal["none", "balanced"] = "none"
    hold_out: float = Field(0.0, ge=0.0, le=0.5)
    patience: int = Field(0, ge=0, le=MOST_EPOCHS)
    freeze_bn_after: float = Field(1.0, ge=0.0, le=1.0)
    workers: Workers = "auto"
    cache_gib: float = Field(4.0, ge=0.0, le=1e6)
    channels_last: Literal["auto", "yes", "no"] = "auto"
    compile: bool = False
    seed: int | None = Field(None, ge=0, lt=2**32)
    device: str | None = Field(None, pattern=r"^(auto|(cpu|cuda|mps)(:\d+)?)$")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.patience and not self.hold_out:
            raise ValueError("patience needs images to look at: give hold_out, too")
        if self.batch_size < 2 * self.accumulate:
            raise ValueError(f"a batch of {self.batch_size} cannot be computed in {self.accumulate} parts of two images")
        return self

    def preset(self, side: int, *, normalised: bool) -> TrainSettings:
        """Return the settings with everything that is left to preset and network filled in.

        Args:
            side: Of the network's input, the shorter one.
            normalised: Whether the network has normalisation layers.
        """
        augment = self.augment if self.augment != "auto" else ("photo" if side >= PHOTO_SIDE else "cifar")
        strong = augment == "photo+"
        usual = {
            "mixup": 0.2 if strong else 0.0,
            "cutmix": 1.0 if strong else 0.0,
            "label_smoothing": 0.1 if strong else 0.0,
            "ema": 0.999 if strong else 0.0,
            "lr": usual_rate(normalised),
        }
        return self.model_copy(update={"augment": augment} | {k: v for k, v in usual.items() if getattr(self, k) is None})


class QuantizeSettings(Section):
    """INT8 quantization.

    Attributes:
        mode: ``ptq`` (calibration only) or ``qat`` (calibration, then training).
        epochs: Passes over the training split for ``qat``.
        profile: Quantizer placement; ``auto`` takes the first target's, or ``tensorrt`` where any target runs TensorRT.
        calib: Images to calibrate with, from the training split.
        calibration: How activation ranges are estimated; ``auto`` takes what is nearest to the float network on training
            images.
        percentile: For ``percentile``, in percent.
        bias_correction: Whether biases make good what rounding does to each channel's mean.
        keep_float: Layers to leave in floating point: names, how many of the most sensitive, or ``auto``.
        max_divergence: Accuracy budget of ``keep_float: auto``: how far the predictions may be from the float network's,
            in nats.
        max_slowdown: Latency budget of ``keep_float: auto``: the predicted latency on the first target, at most so many
            times that of the all-INT8 network.
        learnable_scales: Whether ``qat`` trains the scales too.
        freeze_bn_after: Part of the steps of ``qat`` after which BatchNorm keeps its statistics. 0 trains the very network
            that will run; statistics of augmented batches are noise in a short training (decision 36).
        hold_out: Part of the training images that ``qat`` does not see and that choose between it and ``ptq``; 0 keeps
            what was trained.
        lr: Peak learning rate of ``qat``.
        batch_size: Images per step of ``qat``.
        augment: Of ``qat``, as for ``finetune``; with ``photo+`` nothing is mixed or averaged.
        workers: Processes that read images, as for ``finetune``.
        teacher: Checkpoint file to distil from; in a run also ``dense``, the network before pruning; null for labels alone.
    """

    mode: Mode = "qat"
    epochs: Annotated[float, Flag(short="-e")] = Field(1.0, gt=0.0, le=MOST_EPOCHS)
    profile: ProfileOrAuto = "auto"
    calib: int = Field(512, ge=2, le=MOST_IMAGES)
    calibration: Calibration = "auto"
    percentile: float = Field(99.99, gt=50.0, le=100.0)
    bias_correction: bool = True
    keep_float: Annotated[
        Annotated[int, Field(ge=0, strict=True)] | Literal["auto"] | tuple[str, ...],
        Flag(metavar="NAMES|N|auto", parse=listed_or_counted),
    ] = ()
    max_divergence: float | None = Field(None, gt=0.0)
    max_slowdown: float | None = Field(None, ge=1.0)
    learnable_scales: bool = False
    freeze_bn_after: float = Field(0.0, ge=0.0, le=1.0)
    hold_out: float = Field(0.02, ge=0.0, le=0.5)
    lr: float = Field(0.002, gt=0.0, le=MOST_RATE)
    batch_size: TrainBatch = Field(128, ge=2, le=MOST_IMAGES)
    augment: Augment = "auto"
    workers: Workers = "auto"
    teacher: Teacher = "dense"

    @model_validator(mode="after")
    def _budget_of_auto(self) -> Self:
        if self.keep_float != "auto" and (self.max_divergence is not None or self.max_slowdown is not None):
            raise ValueError("max_divergence and max_slowdown are budgets of keep_float: auto")
        return self


class SensitivitySettings(Section):
    """What removing channels, or rounding to INT8, would cost each part of a network.

    Attributes:
        method: See ``rescompress methods``.
        scope: ``inner`` (inside blocks) or ``all`` (the residual stream, too).
        calib: Images to calibrate with, from the training split.
        int8: Whether to measure what INT8 costs each layer alone, too; takes images.
    """

    method: Method = "reconstruct"
    scope: Scope = "inner"
    calib: int = Field(512, ge=1, le=MOST_IMAGES)
    int8: bool = False


class ExportSettings(Section):
    """The file that is exported.

    Attributes:
        batch: Images per call of the exported network; ``dynamic`` leaves it open.
        opset: ONNX operator set.
        precision: What the file computes in; ``auto`` is what suits network and target. No FP8: see docs/targets.md.
    """

    batch: Annotated[Batch, Flag(metavar="N|dynamic")] = 1
    opset: Annotated[int | None, Flag(usual="what the target reads")] = None
    precision: Precision = "auto"


class DeploySettings(Section):
    """What is built and measured on a board.

    Attributes:
        batches: Batches to time; the first is the latency that counts. More than one needs a file with a dynamic batch.
        limit: Images of --data to run on the board.
        runs: Processes that time the first batch, one after the other; gates compare their medians and want 5.
        seconds: Seconds of samples per measurement.
        workspace: Scratch memory of the builder in MiB.
        dla: Use this deep-learning accelerator.
        allow_fallback: Measure engines, too, whose layers do not run as asked; say so.
        sparsity: Use 2:4 sparse kernels where the weights allow it.
        builds: Engines built and timed per precision, each without the timings of the one before; the middle one is kept.
        soak: Run so many seconds (30m): first minute against last.
        cold_start: Also time new processes, and frames after a second of idleness.
        streams: Also time runs while this many streams run at once.
        end_to_end: Also time runs with their copies to and from the GPU.
        photo: Also time the way from this image file to the classes; may be repeated.
    """

    batches: Annotated[
        Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)], Flag(usual="1", parse=counts)
    ] = (1,)
    limit: Annotated[int | None, Flag(usual="all")] = Field(None, ge=1)
    runs: int = Field(1, ge=1)
    seconds: int = Field(10, ge=1)
    workspace: int = Field(1024, ge=16)
    dla: int | None = Field(None, ge=0, le=1)
    allow_fallback: bool = False
    sparsity: bool = False
    builds: int = Field(1, ge=1, le=9)
    soak: Annotated[int | None, Flag(metavar="TIME", parse=duration)] = Field(None, ge=LEAST_TIME_S, le=LONGEST_TIME_S)
    cold_start: bool = False
    streams: int = Field(1, ge=1, le=16)
    end_to_end: bool = False
    photo: Annotated[tuple[str, ...], Flag(metavar="FILE", file=True)] = ()

    @property
    def more(self) -> bool:
        """Whether anything is to be measured beside the latency, of the engine that is kept."""
        return bool(self.soak or self.cold_start or self.streams > 1 or self.end_to_end or self.photo)
