"""`TrainSettings`: how a network is trained.

One object: a config's section ``finetune``, the options of the command `finetune`, the table in docs/training.md, and what
the training loop takes.

Nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from rescompress.core.choices import Augment, TrainPrecision
from rescompress.core.spec import Frozen

PHOTO_SIDE = 64
"""Inputs of this many pixels a side and more are photographs to ``augment: auto``."""
LR_BATCH = 128
"""Images per step that `lr` is for where it is scaled with the batch."""


class TrainSettings(Frozen):
    """Training of a network. Where ``null`` stands for the preset's, `preset` says which value that is.

    Attributes:
        epochs: Passes over the training split.
        teacher: ``dense`` (the network before pruning), a checkpoint file (relative to the config file), or null for
            labels alone. A stage opens it; `compress.train.train` takes the network itself.
        lr: Peak learning rate of SGD with Nesterov momentum; warmed up linearly, then a cosine to zero (Loshchilov &
            Hutter 2017, arXiv:1608.03983). ``auto`` tries a few on training images that are held out.
        batch_size: Images per step over all processes.
        distill: Weight of the distillation loss; the labels' cross-entropy has the rest. Only with a teacher.
        temperature: Of the distillation's softmax (Hinton et al. 2015, arXiv:1503.02531, section 2).
        features: Weight of the distance between the outputs of the blocks and the teacher's, beside the other losses.
            Only with a teacher.
        precision: Of convolutions and linear layers; weights and the optimizer stay float32. ``bf16`` and ``fp16`` (with
            a scaled loss) are autocast, ``tf32`` lets a GPU round float32 operands. Not for quantization-aware training,
            whose rounding must be the one that runs.
        augment: ``none``, the images as evaluation sees them; ``cifar``, those shifted by up to an eighth of each side and
            mirrored; ``photo``, a random part of the whole picture, mirrored; ``photo+``, that with TrivialAugment,
            erasing, mixing and averaged weights, for long trainings. ``auto`` is ``cifar`` below 64 pixels, else ``photo``.
            Nothing is mirrored where the data says that a mirrored image means something else.
        min_area: Least part of a picture's area that ``photo`` cuts out.
        mixup: Alpha of the Beta distribution that two images are mixed by (Zhang et al. 2018, arXiv:1710.09412); 0: not.
        cutmix: Likewise for a rectangle of one image in another (Yun et al. 2019, arXiv:1905.04899); with `mixup`, each
            step has one of the two.
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

    model_config = ConfigDict(allow_inf_nan=False)

    epochs: float = Field(2.0, gt=0.0)
    teacher: str | None = Field("dense")
    lr: Annotated[float, Field(gt=0.0)] | Literal["auto"] = 0.02
    batch_size: int = Field(128, ge=2)
    distill: float = Field(0.9, ge=0.0, le=1.0)
    temperature: float = Field(4.0, gt=0.0)
    features: float = Field(0.0, ge=0.0)
    precision: TrainPrecision = "fp32"
    augment: Augment = "auto"
    min_area: float = Field(0.25, gt=0.0, le=1.0)
    mixup: float | None = Field(None, ge=0.0)
    cutmix: float | None = Field(None, ge=0.0)
    label_smoothing: float | None = Field(None, ge=0.0, lt=1.0)
    ema: float | None = Field(None, ge=0.0, lt=1.0)
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    weight_decay: float = Field(5e-4, ge=0.0)
    warmup: float = Field(0.05, ge=0.0, lt=1.0)
    scale_lr: bool = False
    accumulate: int = Field(1, ge=1)
    clip: float | None = Field(None, gt=0.0)
    sampling: Literal["shuffle", "balanced"] = Field("shuffle")
    class_weights: Literal["none", "balanced"] = "none"
    hold_out: float = Field(0.0, ge=0.0, le=0.5)
    patience: int = Field(0, ge=0)
    freeze_bn_after: float = Field(1.0, ge=0.0, le=1.0)
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    cache_gib: float = Field(4.0, ge=0.0)
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

    def preset(self, side: int) -> TrainSettings:
        """Return the settings with everything that is left to the preset filled in.

        Args:
            side: Of the network's input, the shorter one.
        """
        augment = self.augment if self.augment != "auto" else ("photo" if side >= PHOTO_SIDE else "cifar")
        strong = augment == "photo+"
        usual = {
            "mixup": 0.2 if strong else 0.0,
            "cutmix": 1.0 if strong else 0.0,
            "label_smoothing": 0.1 if strong else 0.0,
            "ema": 0.999 if strong else 0.0,
        }
        return self.model_copy(update={"augment": augment} | {k: v for k, v in usual.items() if getattr(self, k) is None})
