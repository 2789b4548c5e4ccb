"""The one training loop: fine-tuning, distillation and quantization-aware training.

It runs on Accelerate, so the same code trains in one process, under ``accelerate launch`` or under ``torchrun``. Every
random choice of a step is drawn from (seed, step, process), so a run that was killed and resumed from its last saved step
ends with the same bits as one that was not.

Shape suffixes: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.data import Split
from compress.device import torch_device
from compress.pixels import normalise
from compress.prune.sparsity import has_pattern
from compress.resnet import ResNet
from compress.teacher import same_arithmetic
from rescompress.core.artifact import atomic_path, open_regular
from rescompress.core.errors import BadInput, DataError
from rescompress.core.spec import Preprocessing

if TYPE_CHECKING:
    from accelerate import Accelerator

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: Passes over the split.
        lr: Peak learning rate of SGD with Nesterov momentum; warmed up linearly, then a cosine to zero (Loshchilov &
            Hutter 2017, arXiv:1608.03983).
        batch_size: Images per step over all processes.
        momentum: Of SGD.
        weight_decay: Of weights of convolutions and linear layers; BatchNorm, biases and scales have none.
        warmup: Fraction of the steps over which the learning rate rises.
        distill: Weight of the distillation loss; the labels' cross-entropy has the rest. Only with a teacher.
        temperature: Of the distillation's softmax (Hinton et al. 2015, arXiv:1503.02531, section 2).
        augment: ``auto``: random crops from a zero-padded image (padding is an eighth of the side), and mirroring where
            the data allows it. ``none``: the images as they are.
        freeze_bn_after: Fraction of the steps after which BatchNorm uses and keeps its running statistics.
        seed: Of order, augmentation and dropout.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``, as `compress.device.torch_device` reads them. Processes
            that were launched together take one GPU each instead, where there are any and it is not ``cpu``.
        features: Weight of the distance between the outputs of the blocks and the teacher's (`feature_loss`), beside the
            other losses. Only with a teacher.
        precision: ``fp32``, or ``bf16``: convolutions and linear layers compute in bfloat16 (autocast), weights and the
            optimizer stay float32. Faster where the processor has bfloat16 units; not for quantization-aware training,
            whose rounding must be the one that runs.
    """

    epochs: float
    lr: float = 0.02
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    distill: float = 0.9
    temperature: float = 4.0
    augment: Literal["auto", "none"] = "auto"
    freeze_bn_after: float = 1.0
    seed: int = 0
    device: str = "auto"
    features: float = 0.0
    precision: Precision = "fp32"


@dataclass(frozen=True)
class TrainState:
    """Where a training stands.

    Attributes:
        step: Steps done.
        steps: Steps in all.
        loss: Running mean over the last steps.
        accuracy: Running mean of the training accuracy, 0..1, under augmentation.
        lr: Learning rate of the step.
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    lr: float


@dataclass
class TrainLog:
    """What happened, one entry per epoch: ``epoch``, ``loss``, ``accuracy``, ``lr``; JSON values.

    Attributes:
        epochs: By epoch.
        resumed_at: The step that it went on from.
        threads: The numbers of threads that the steps before that were computed with.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    resumed_at: int = 0
    threads: list[int] = field(default_factory=list)


Progress = Callable[[TrainState], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Processes:
    """The processes that train together.

    Attributes:
        rank: Number of this one.
        world: How many there are.
    """

    rank: int
    world: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0


def train(
    model: nn.Module,
    split: Split,
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    teacher_preprocessing: Preprocessing | None = None,
    progress: Progress | None = None,
    resume_file: Path | None = None,
    save_every_s: float = 30.0,
    note: Note | None = None,
) -> TrainLog:
    """Train `model` in place; it is left in eval mode on the CPU. Weights with the 2:4 pattern keep their zeros.

    Args:
        model: The network; logits (N, K).
        split: Training images.
        settings: How to train.
        teacher: A network whose softened output is learnt, besides the labels.
        teacher_preprocessing: How the teacher wants its images prepared; as the split's where None.
        progress: Called after each step, in the main process only.
        resume_file: Where the state is saved every `save_every_s` seconds, and taken up from if it is there, intact, and was
            made with the same settings and data, from the same weights and with the same teacher.
        save_every_s: Seconds between two savings.
        note: Called, in the main process only, where a saved state is damaged, so that training starts again, or was
            computed with another number of threads, so that the bits are those of neither.

    Raises:
        BadInput: The training diverged, settings make no sense, or the device is not there.
        DataError: The split is too small.
    """
    if settings.epochs <= 0 or settings.lr <= 0:
        raise BadInput("epochs and learning rate are above 0", remedy="give --epochs and --lr above 0")
    if len(split) < 2:
        raise DataError(f"{len(split)} image cannot train a network", where="--data", remedy="give more training images")
    accelerator = _accelerator(settings.device)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    batch_size = min(settings.batch_size, len(split)) // processes.world * processes.world
    if not batch_size:
        raise BadInput(
            f"a batch of {settings.batch_size} is too small for {processes.world} processes", remedy="use a larger batch"
        )
    per_epoch = len(split) // batch_size
    steps = max(1, round(settings.epochs * per_epoch))
    watched = shared_features(model, teacher) if settings.features else ()
    masks = [(p, p.detach() != 0) for p in model.parameters() if has_pattern(p.detach())]
    optimizer = _optimizer(model, settings)
    start_from = " ".join(_digest(network) for network in (model, teacher) if network is not None)
    trained = " ".join(name for name, p in model.named_parameters() if p.requires_grad)
    pixels = f"{split.preprocessing.model_dump_json()} {split.flips} {tuple(split.pixels(np.arange(1))[0].shape)}"
    fingerprint = f"{sorted(asdict(settings).items())} {split.identity} {pixels} {processes.world} {batch_size} {start_from} "
    own = teacher_preprocessing if teacher is not None else None
    if own is not None and same_arithmetic(own, split.preprocessing):
        own = None
    if own is not None:
        fingerprint += f"{own.model_dump_json()} "
    fingerprint += hashlib.sha256(trained.encode()).hexdigest()
    log = TrainLog()
    start, epoch_sums = _restore(resume_file, fingerprint, model, optimizer, log, note if processes.is_main else None)
    log.resumed_at = start
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if teacher is not None:
        teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
    layout = torch.channels_last if settings.precision == "bf16" else torch.contiguous_format  # bfloat16 kernels like it
    for network in (model, *([teacher] if teacher is not None else [])):
        network.to(memory_format=layout)
    wrapped.train()
    meter = _Meter()
    saved_at = time.monotonic()
    for step in range(start, steps):
        epoch, within = divmod(step, per_epoch)
        lr = settings.lr * _schedule(step, steps, settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if step >= settings.freeze_bn_after * steps:
            freeze_batch_norm(model)
        x, y, seen = _batch(split, settings, epoch, within, step, batch_size, processes, own)
        x, y = x.to(accelerator.device).contiguous(memory_format=layout), y.to(accelerator.device)
        seen = x if own is None else seen.to(accelerator.device).contiguous(memory_format=layout)
        loss, correct = _step(wrapped, teacher, x, y, settings, watched, seen)
        value = loss.item()
        if not math.isfinite(value):
            raise BadInput(f"training diverged in step {step + 1}: the loss is {value}", remedy="lower --lr")
        accelerator.backward(loss)
        optimizer.step()
        with torch.no_grad():
            for weight, mask in masks:
                weight.mul_(mask.to(weight.device))
        optimizer.zero_grad()
        meter.add(value, correct / len(y))
        epoch_sums += np.array([value, correct / len(y), 1.0])
        if (step + 1) % per_epoch == 0 or step + 1 == steps:
            mean = epoch_sums / epoch_sums[2]
            log.epochs.append({"epoch": (step + 1) / per_epoch, "loss": float(mean[0]), "accuracy": float(mean[1]), "lr": lr})
            epoch_sums = np.zeros(3)
        if processes.is_main:
            if progress is not None:
                progress(TrainState(step + 1, steps, meter.loss, meter.accuracy, lr))
            if resume_file is not None and time.monotonic() - saved_at > save_every_s and step + 1 < steps:
                _save(resume_file, fingerprint, step + 1, model, optimizer, log, epoch_sums)
                saved_at = time.monotonic()
    accelerator.wait_for_everyone()
    model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return log


def _accelerator(device: str) -> Accelerator:
    """Return what runs the steps, on the device that evaluation would take, too.

    Raises:
        BadInput: The device is not there.
    """
    from accelerate import Accelerator

    found = torch_device(device)
    if found.startswith("cuda:") and int(os.environ.get("WORLD_SIZE") or "1") < 2:
        torch.cuda.set_device(found)  # Accelerate cannot be told a number; alone it takes the current CUDA device
    return Accelerator(cpu=found == "cpu")


def _digest(model: nn.Module) -> str:
    """Return a hash of all weights and statistics, with their names and shapes."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def freeze_batch_norm(model: nn.Module) -> None:
    """Let every BatchNorm use its running statistics and leave them as they are."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def distillation_loss(student_NK: Tensor, teacher_NK: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch (Hinton et al. 2015, eq. 1-4).

    A network with one output is read as the two-class network with logits (0, z).
    """
    if student_NK.shape[1] == 1:
        student_NK, teacher_NK = F.pad(student_NK, (1, 0)), F.pad(teacher_NK, (1, 0))
    log_p = F.log_softmax(student_NK / temperature, 1)
    log_q = F.log_softmax(teacher_NK / temperature, 1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def label_loss(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Return the mean cross-entropy; binary where the network has one output."""
    if logits_NK.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits_NK[:, 0], y_N.float())
    return F.cross_entropy(logits_NK, y_N)


def shared_features(student: nn.Module, teacher: nn.Module | None) -> tuple[str, ...]:
    """Return the blocks' outputs that student and teacher both have, in the same shape.

    Args:
        student: A `ResNet`.
        teacher: Likewise.

    Raises:
        BadInput: There is no teacher, or they share none.
    """
    outputs = [_block_outputs(m) for m in (student, teacher) if isinstance(m, ResNet)]
    shared = tuple(name for name, shape in outputs[0].items() if outputs[1].get(name) == shape) if len(outputs) == 2 else ()
    if not shared:
        raise BadInput(
            "student and teacher have no block output of the same shape in common",
            where="features",
            remedy="distil the outputs alone, or prune with --scope inner",
        )
    return shared


def _block_outputs(model: ResNet) -> dict[str, tuple[int, ...]]:
    last = {layer.block: layer for layer in model.layers if layer.block is not None}
    return {layer.name: tuple(layer.out_shape) for layer in last.values()}


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over tensors of the squared distance, relative to the teacher's energy.

    The hint loss of Romero et al. 2015 (arXiv:1412.6550, equation 3) without a regressor.

    Args:
        student: Tensors by name.
        teacher: The same names and shapes.
    """
    shares = [
        (student[name].float() - t.float()).square().sum() / t.float().square().sum().clamp_min(1e-12)
        for name, t in teacher.items()
    ]
    return torch.stack(shares).mean()


class _Watch:
    """Keeps the named tensors of a forward pass."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self.seen: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor) -> None:
        if name in self._names:
            self.seen[name] = value


def _step(
    model: nn.Module,
    teacher: nn.Module | None,
    x: Tensor,
    y: Tensor,
    settings: TrainSettings,
    watched: Sequence[str] = (),
    seen: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Return the loss and the right answers of one batch; `seen` is what the teacher gets, `x` unless given."""
    seen = x if seen is None else seen
    mine, wanted = _Watch(watched), _Watch(watched)
    with _autocast(x, settings):
        logits = (model(x, mine) if watched else model(x)).float()
    predicted = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
    correct = int((predicted == y).sum())
    if teacher is None:
        return label_loss(logits, y), correct
    with torch.no_grad(), _autocast(x, settings):
        target = (teacher(seen, wanted) if watched else teacher(seen)).float()
    soft = distillation_loss(logits, target, settings.temperature)
    loss = settings.distill * soft
    if settings.distill < 1.0:
        loss = loss + (1.0 - settings.distill) * label_loss(logits, y)
    if watched:
        loss = loss + settings.features * feature_loss(mine.seen, wanted.seen)
    return loss, correct


def _autocast(x: Tensor, settings: TrainSettings) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def _batch(
    split: Split,
    settings: TrainSettings,
    epoch: int,
    within: int,
    step: int,
    batch_size: int,
    processes: Processes,
    own: Preprocessing | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, labels and the teacher's inputs of this process's share of a step: a function of (seed, step, process).

    The teacher sees the very pictures that the network sees, prepared by `own` where that is given.
    """
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(split))
    mine = order[within * batch_size : (within + 1) * batch_size][processes.rank :: processes.world]
    x, y = split.pixels(mine)
    torch.manual_seed((settings.seed * 1_000_003 + step) * 64 + processes.rank)  # also draws the dropout of this step
    if settings.augment == "auto":
        x = augment(x, flip=split.flips)
    inputs = normalise(x, split.preprocessing)
    return inputs, y, inputs if own is None else normalise(x, own)


def augment(x_NCHW: Tensor, *, flip: bool) -> Tensor:
    """Return randomly shifted (up to an eighth of each side, zeros move in) and perhaps mirrored images.

    Args:
        x_NCHW: Pixels.
        flip: Whether half of the images are mirrored.
    """
    n, _, h, w = x_NCHW.shape
    pad_h, pad_w = max(1, h // 8), max(1, w // 8)
    padded = F.pad(x_NCHW, (pad_w, pad_w, pad_h, pad_h))
    top = torch.randint(0, 2 * pad_h + 1, (n, 1)) + torch.arange(h)
    left = torch.randint(0, 2 * pad_w + 1, (n, 1)) + torch.arange(w)
    if flip:
        mirrored = torch.rand(n, 1) < 0.5
        left = torch.where(mirrored, left.flip(1), left)
    n_index = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[n_index, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)


def _schedule(step: int, steps: int, warmup: float) -> float:
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim > 1]
    vectors = [p for p in trainable if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=settings.lr, momentum=settings.momentum, nesterov=True)


class _Meter:
    """Exponential means of loss and accuracy, bias-corrected."""

    def __init__(self) -> None:
        self._sums = np.zeros(3)

    def add(self, loss: float, accuracy: float) -> None:
        self._sums = 0.98 * self._sums + 0.02 * np.array([loss, accuracy, 1.0])

    @property
    def loss(self) -> float:
        return float(self._sums[0] / self._sums[2])

    @property
    def accuracy(self) -> float:
        return float(self._sums[1] / self._sums[2])


_STATE = b"rescompress training state 2\n"
"""How a saved state begins; its SHA-256 follows, then what torch writes."""


def _save(
    path: Path, fingerprint: str, step: int, model: nn.Module, optimizer: Any, log: TrainLog, epoch_sums: np.ndarray[Any, Any]
) -> None:
    state = {
        "fingerprint": fingerprint,
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epochs": log.epochs,
        "epoch_sums": epoch_sums.tolist(),
        "threads": sorted({*log.threads, torch.get_num_threads()}),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_path(path, follow=False) as temporary, temporary.open("wb") as f:
        f.write(_STATE + hashlib.sha256(buffer.getbuffer()).digest())
        f.write(buffer.getbuffer())


def _read_state(path: Path) -> dict[str, Any]:
    """Return a saved state.

    Raises:
        ValueError: It is not, byte by byte, what was saved.
        OSError: It cannot be read.
    """
    with open_regular(path) as f:
        begin, digest, content = f.read(len(_STATE)), f.read(hashlib.sha256().digest_size), f.read()
    if begin != _STATE or hashlib.sha256(content).digest() != digest:
        raise ValueError("it is damaged, or of another version")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as e:  # whatever torch makes of bytes that somebody else signed
        raise ValueError(f"it holds no state: {e}") from e
    if not isinstance(state, dict) or not {"fingerprint", "step", "model", "optimizer", "epochs", "epoch_sums"} <= state.keys():
        raise ValueError("it holds no state")
    return state


def _restore(
    path: Path | None, fingerprint: str, model: nn.Module, optimizer: torch.optim.Optimizer, log: TrainLog, note: Note | None
) -> tuple[int, np.ndarray[Any, Any]]:
    """Take up the saved state; return the steps it has done and the sums of its epoch, zeros if there is none that fits."""
    if path is None or not os.path.lexists(path):
        return 0, np.zeros(3)
    try:
        state = _read_state(path)
    except (ValueError, OSError) as e:
        if note is not None:
            note(f"the saved state {path} is not taken up ({e}): training starts again")
        return 0, np.zeros(3)
    if state["fingerprint"] != fingerprint:
        return 0, np.zeros(3)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    log.epochs = list(state["epochs"])
    log.threads = sorted(int(n) for n in state.get("threads", ()))
    now = torch.get_num_threads()
    if note is not None and any(n != now for n in log.threads):
        before = " and ".join(map(str, log.threads))
        note(f"training goes on with {now} threads after {before}: the sums, and so the bits, are those of neither")
    return int(state["step"]), np.array(state["epoch_sums"])
