"""The one training loop: fine-tuning, distillation and quantization-aware training.

It runs on Accelerate, so the same code trains in one process, under ``accelerate launch`` or under ``torchrun``. Every
random choice of a step is drawn from (seed, step, process), so a run that was killed and resumed from its last saved step
ends with the same bits as one that was not, whatever the number of processes that read images.

Shape suffixes: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.averaging import RunningMean
from compress.data import Split
from compress.data.augment import shifted
from compress.data.loader import PHOTOS, Batches, cache_for, remove_caches, workers_for
from compress.device import torch_device
from compress.losses import class_weights, distillation_loss, feature_loss, label_loss, paired_outputs, shared_features
from compress.memory import kept_memory
from compress.pixels import normalise
from compress.processes import Together
from compress.prune.sparsity import has_pattern
from compress.resnet import FrozenBatchNorm
from compress.teacher import same_arithmetic
from rescompress.core.artifact import atomic_path, open_regular
from rescompress.core.errors import BadInput, DataError
from rescompress.core.settings import LR_BATCH, TrainSettings, usual_rate
from rescompress.core.spec import Preprocessing

if TYPE_CHECKING:
    from accelerate import Accelerator

_READ_EVERY = 20
"""Steps on a GPU between two looks at the losses, each of which waits for it."""
_FASTER_AS_CHANNELS_LAST = ("bf16", "fp16", "tf32")
_TRIED_LR = (0.1, 0.3, 1.0, 3.0, 10.0)
"""What ``lr: auto`` tries, times the usual rate."""
_TRIED_STEPS = (20, 500)
"""Fewest and most steps of each trial; in between, a twentieth of the training."""
_TRIED_HOLD_OUT = 0.1
"""Part of the training images that the trials are judged by, where none is held out anyway."""
_JUDGES = 2000
"""Most images that a trial is judged by."""
_SCORED_TOGETHER = 250


@dataclass(frozen=True)
class TrainState:
    """Where a training stands.

    Attributes:
        step: Steps done.
        steps: Steps in all.
        loss: Running mean over the last steps.
        accuracy: Running mean of the training accuracy, 0..1, under augmentation.
        lr: Learning rate of the step.
        waiting: Part of the time in which the device had nothing to do because images were not there yet, 0..1.
        waited_s: That time in seconds.
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    lr: float
    waiting: float = 0.0
    waited_s: float = 0.0


@dataclass
class TrainLog:
    """What happened; JSON values.

    Attributes:
        epochs: By epoch: ``epoch``, ``loss``, ``accuracy``, ``lr``, and of the images held out ``held_out_top1`` and
            ``held_out_loss``. Loss and accuracy are of the images that the first process trained on.
        resumed_at: The step that it went on from.
        threads: The numbers of threads that the steps before that were computed with.
        lr: Peak learning rate.
        best_epoch: The epoch whose state was kept, where images were held out.
        waited_s: Seconds in which the device waited for images.
        seconds: Of all steps.
        workers: Processes that read images.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    resumed_at: int = 0
    threads: list[int] = field(default_factory=list)
    lr: float = 0.0
    best_epoch: float | None = None
    waited_s: float = 0.0
    seconds: float = 0.0
    workers: int = 0

    @property
    def waiting(self) -> float:
        """Part of the time in which the device waited for images, 0..1."""
        return self.waited_s / self.seconds if self.seconds else 0.0


Progress = Callable[[TrainState], None]
Note = Callable[[str], None]


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
        model: The network; logits (N, K). One without class scores learns the outputs of the teacher, and no labels.
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
    if len(split) < 2:
        raise DataError(f"{len(split)} image cannot train a network", where="--data", remedy="give more training images")
    accelerator = _accelerator(settings.device or "auto")
    share = Together(accelerator.process_index, accelerator.num_processes)
    main = share.rank == 0
    settings = settings.preset(min(split.size[:2]), normalised=_normalised(model))
    seed = settings.seed or 0
    held = None
    if settings.hold_out:
        split, held = hold_out(split, settings.hold_out, seed)
    batch_size = min(settings.batch_size, len(split)) // share.world * share.world
    if batch_size < 2 * share.world:  # normalisation needs two
        raise BadInput(
            f"a batch of {min(settings.batch_size, len(split))} is too small for {share.world} processes",
            remedy="use a larger batch, more images or fewer processes",
        )
    per_epoch = len(split) // batch_size
    steps = max(1, round(settings.epochs * per_epoch))
    watched = shared_features(model, teacher) if settings.features else ()
    ends = paired_outputs(model, teacher)
    start_from = " ".join(_digest(network) for network in (model, teacher) if network is not None)
    trained = " ".join(name for name, p in model.named_parameters() if p.requires_grad)
    height, width, channels = split.size
    pixels = f"{split.preprocessing.model_dump_json()} {split.flips} {(1, channels, height, width)}"
    own = teacher_preprocessing if teacher is not None else None
    if own is not None and same_arithmetic(own, split.preprocessing):
        own = None
    with contextlib.ExitStack() as cleaning:
        kept_in = resume_file
        if kept_in is None:
            kept_in = Path(cleaning.enter_context(tempfile.TemporaryDirectory(prefix="rescompress-"))) / "training.pt"
        workers = workers_for(settings, split, share, batch_size // share.world)
        cache = cache_for(split, settings, workers, kept_in)
        its = resume_file is None or int(os.environ.get("LOCAL_RANK") or 0) == 0  # one of those that share the folder
        if its:
            remove_caches(kept_in, cache)
        if cache is not None:
            if its:
                cache.create()
                cleaning.callback(cache.remove)
            accelerator.wait_for_everyone()
        said = settings.model_dump(exclude={"workers", "device", "teacher", "cache_gib"}) | {"seed": seed}
        fingerprint = f"{sorted(said.items())} {split.identity} {held.identity if held else ''} {pixels} {share.world} "
        fingerprint += (
            f"{batch_size} {accelerator.device.type} {cache is not None and settings.augment in PHOTOS} {start_from} "
        )
        if own is not None:
            fingerprint += f"{own.model_dump_json()} "
        fingerprint += hashlib.sha256(trained.encode()).hexdigest()
        known = _saved(resume_file, fingerprint, note if main else None)
        if teacher is not None:
            teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
        lr = (
            float(known["lr"])
            if known
            else _peak(model, split, held, settings, batch_size, teacher, own, note if main else None)
        )
        settings = settings.model_copy(update={"lr": lr})
        batches = Batches(split, settings, batch_size, share, cache)
        loop = _Loop(model, settings, accelerator, teacher, own, batches, steps, watched, ends, share)
        if known:
            loop.restore(known, note if main else None)
        log = loop.log
        log.resumed_at, log.lr, log.workers = loop.done, lr, workers

        def save() -> None:
            if resume_file is not None:
                _write_state(resume_file, loop.state() | {"fingerprint": fingerprint, "lr": lr})

        with (
            kept_memory(),  # before the processes that read images are forked: they keep theirs, too
            batches.stream(loop.done, steps, workers, pin=accelerator.device.type == "cuda") as images,
            _rounding(settings, accelerator.device),
        ):
            saved_at = time.monotonic()
            while loop.done < steps and not loop.enough:
                loop.step(images)
                if held is not None and loop.at_end_of_epoch:
                    loop.score(held)
                if main and progress is not None:
                    progress(loop.where())
                if main and resume_file is not None and time.monotonic() - saved_at > save_every_s and loop.done < steps:
                    save()
                    saved_at = time.monotonic()
        loop.finish()
        accelerator.wait_for_everyone()
    model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return log


class _Loop:
    """A training between two steps: everything that changes in it."""

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        accelerator: Accelerator,
        teacher: nn.Module | None,
        own: Preprocessing | None,
        batches: Batches,
        steps: int,
        watched: Sequence[str],
        ends: Sequence[tuple[str, str]],
        share: Together,
    ) -> None:
        """Move the network to the device and lay out the optimizer."""
        self._settings, self._accelerator, self._share = settings, accelerator, share
        self._batches, self._steps, self._watched, self._ends = batches, steps, watched, ends
        self._own, self._teacher, self._model = own, teacher, model
        self._preprocessing, self._flips = batches.preprocessing, batches.flips
        device = accelerator.device
        self._masks = [(p, p.detach() != 0) for p in model.parameters() if has_pattern(p.detach())]
        self._optimizer = _optimizer(model, settings)
        self._wrapped, self._prepared = accelerator.prepare(model, self._optimizer)
        on = settings.channels_last == "yes" or (
            settings.channels_last == "auto"
            and settings.precision in (_FASTER_AS_CHANNELS_LAST if device.type == "cuda" else ("bf16",))
        )
        self._layout = torch.channels_last if on else torch.contiguous_format
        for network in (model, *([teacher] if teacher is not None else [])):
            network.to(memory_format=self._layout)
        if settings.compile and not watched and not ends:
            self._wrapped = torch.compile(self._wrapped)
            self._teacher = torch.compile(teacher) if teacher is not None else None  # type: ignore[assignment]
        self._wrapped.train()
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self._mean = RunningMean(model, settings.ema) if settings.ema else None
        self._weights_K: Tensor | None = None
        if settings.class_weights == "balanced":
            self._weights_K = class_weights(batches.labels, batches.classes).to(device)
        self._mix = _mixers(settings, batches.classes)
        self.log = TrainLog()
        self.done = 0
        self.enough = False
        self._meter = _Meter()
        self._sums = np.zeros(3)
        self._unread: list[tuple[Tensor, Tensor, int]] = []
        self._lr = 0.0
        self._best: tuple[tuple[float, float], dict[str, Tensor]] | None = None
        self._since_best = 0
        self._busy: torch.cuda.Event | None = None

    @property
    def at_end_of_epoch(self) -> bool:
        """Whether an epoch, or the training, is complete."""
        return self.done % self._batches.per_epoch == 0 or self.done == self._steps

    def where(self) -> TrainState:
        """Return what is shown."""
        return TrainState(
            self.done, self._steps, self._meter.loss, self._meter.accuracy, self._lr, self.log.waiting, self.log.waited_s
        )

    def step(self, images: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Do one step.

        Args:
            images: Gives pixels and labels of each step.

        Raises:
            BadInput: The training diverged.
        """
        settings, device, step = self._settings, self._accelerator.device, self.done
        began = time.perf_counter()
        idle = self._idle()
        x, y = next(images)
        waited = (time.perf_counter() - began) * (idle + self._idle()) / 2  # where it fell idle meanwhile, half of the time
        self._lr = _peak_of(settings) * _schedule(step, self._steps, settings.warmup)
        for group in self._prepared.param_groups:
            group["lr"] = self._lr * group.get("lr_scale", 1.0)
        if step >= settings.freeze_bn_after * self._steps:
            freeze_batch_norm(self._model)
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        x, target = arranged(x, y, settings, step, self._share, flips=self._flips, mix=self._mix)
        parts = max(1, min(settings.accumulate, len(y) // 2))  # normalisation needs two images
        losses, right = [], []
        for part in torch.arange(len(y)).tensor_split(parts):
            here = slice(int(part[0]), int(part[-1]) + 1)
            inputs = normalise(x[here], self._preprocessing, self._layout)
            seen = inputs if self._own is None else normalise(x[here], self._own, self._layout)
            syncs = contextlib.nullcontext() if here.stop == len(y) else self._accelerator.no_sync(self._wrapped)
            with syncs:
                loss, correct = _step(
                    self._wrapped,
                    self._teacher,
                    inputs,
                    target[here],
                    settings,
                    self._watched,
                    seen,
                    self._weights_K,
                    self._ends,
                )
                if parts > 1:
                    loss = loss * (len(part) / len(y))
                self._accelerator.backward(self._scaler.scale(loss))
            losses.append(loss.detach())
            right.append(correct)
        if settings.clip is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_([p for p in self._model.parameters() if p.grad is not None], settings.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        with torch.no_grad():
            for weight, mask in self._masks:
                weight.mul_(mask.to(weight.device))
        self._optimizer.zero_grad()
        if self._mean is not None:
            self._mean.update()
        one = len(losses) == 1
        self._unread.append((losses[0] if one else sum(losses), right[0] if one else sum(right), len(y)))  # type: ignore[arg-type]
        self.done += 1
        if device.type == "cuda":
            self._busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._busy.record()
        if _reads_each_step(device) or self.at_end_of_epoch or len(self._unread) == _READ_EVERY:
            self._read()
        if self.at_end_of_epoch:
            mean = self._sums / self._sums[2]
            epoch = self.done / self._batches.per_epoch
            answers = {} if self._ends else {"accuracy": float(mean[1])}
            self.log.epochs.append({"epoch": epoch, "loss": float(mean[0]), **answers, "lr": self._lr})
            self._sums = np.zeros(3)
        self.log.waited_s += waited
        self.log.seconds += time.perf_counter() - began

    def _idle(self) -> bool:
        """Whether the device has done all that it was given."""
        return self._busy is None or bool(self._busy.query())  # type: ignore[no-untyped-call]

    def _read(self) -> None:
        """Take in the losses of the last steps, which waits for the device.

        Raises:
            BadInput: The training diverged.
        """
        if not self._unread:
            return
        if len(self._unread) == 1:
            values = [(self._unread[0][0].item(), int(self._unread[0][1]))]
        else:
            both = torch.stack([torch.stack([loss.float(), correct.float()]) for loss, correct, _ in self._unread]).tolist()
            values = [(loss, int(correct)) for loss, correct in both]
        first = self.done - len(values)
        for number, ((value, correct), (_, _, images)) in enumerate(zip(values, self._unread, strict=True), start=first + 1):
            if not math.isfinite(value):
                raise BadInput(f"training diverged in step {number}: the loss is {value}", remedy="lower --lr")
            self._meter.add(value, correct / images)
            self._sums += np.array([value, correct / images, 1.0])
        self._unread = []

    def score(self, held: Split) -> None:
        """Evaluate the network on images held out, and keep its state if it is the best so far."""
        if self._mean is not None:
            self._mean.swap()
        if self._share.world > 1:  # every process normalises by the batches that it saw; the first one's statistics are kept
            from accelerate.utils import broadcast

            for value in self._model.buffers():
                broadcast(value)
        top1, loss = _score(self._model, held, self._accelerator, self._share, self._teacher, self._own, self._ends)
        self.log.epochs[-1] |= {"held_out_loss": loss} if self._ends else {"held_out_top1": top1, "held_out_loss": loss}
        if self._best is None or (top1, -loss) > self._best[0]:
            state = {k: v.detach().cpu().clone() for k, v in self._model.state_dict().items()}
            self._best, self._since_best = ((top1, -loss), state), 0
            self.log.best_epoch = self.log.epochs[-1]["epoch"]
        else:
            self._since_best += 1
            self.enough = bool(self._settings.patience) and self._since_best >= self._settings.patience
        if self._mean is not None:
            self._mean.swap()
        self._wrapped.train()
        if self.done >= self._settings.freeze_bn_after * self._steps:
            freeze_batch_norm(self._model)

    def finish(self) -> None:
        """Leave in the network what the training came to.

        Raises:
            BadInput: The last step made weights that are no numbers, which no loss has shown.
        """
        if self._best is not None:
            self._model.load_state_dict(self._best[1])
        elif self._mean is not None:
            self._mean.swap()
        if not all(bool(torch.isfinite(v).all()) for v in self._model.state_dict().values()):
            raise BadInput("training diverged in its last step: weights are not finite", remedy="lower --lr")

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` takes."""
        self._read()
        return {
            "step": self.done,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "mean": self._mean.state() if self._mean is not None else None,
            "best": self._best,
            "since_best": self._since_best,
            "best_epoch": self.log.best_epoch,
            "epochs": self.log.epochs,
            "epoch_sums": self._sums.tolist(),
            "times": [self.log.waited_s, self.log.seconds],
            "threads": sorted({*self.log.threads, torch.get_num_threads()}),
        }

    def restore(self, state: Mapping[str, Any], note: Note | None) -> None:
        """Take up a saved state.

        Args:
            state: From `state`.
            note: Called where the bits cannot be those of a training that was not interrupted.
        """
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._mean is not None:
            self._mean.load(state["mean"])
        self._best = state["best"]
        self._since_best = state["since_best"]
        self.log.best_epoch = state["best_epoch"]
        self.log.epochs = list(state["epochs"])
        self._sums = np.array(state["epoch_sums"])
        self.log.waited_s, self.log.seconds = state["times"]
        self.log.threads = sorted(int(n) for n in state["threads"])
        self.done = int(state["step"])
        self.enough = bool(self._settings.patience) and self._since_best >= self._settings.patience
        now = torch.get_num_threads()
        if note is not None and any(n != now for n in self.log.threads):
            before = " and ".join(map(str, self.log.threads))
            note(f"training goes on with {now} threads after {before}: the sums, and so the bits, are those of neither")


def _reads_each_step(device: torch.device) -> bool:
    """Whether looking at a loss waits for nothing."""
    return device.type == "cpu"


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Return the images to train on and those to choose by: of each class its part, and of a single image none.

    Raises:
        DataError: No class has an image to spare, or too few are left to train on.
    """
    rng = np.random.default_rng([seed, 0x401D])
    kept = []
    for label in np.unique(split.labels):
        mine = rng.permutation(np.flatnonzero(split.labels == label))
        kept.append(mine[: min(len(mine) - 1, max(int(len(mine) >= 4), round(fraction * len(mine))))])
    chosen = np.sort(np.concatenate(kept))
    if not len(chosen):
        raise DataError("no class has an image to spare", where="hold_out", remedy="give more images, or no hold_out")
    rest = np.setdiff1d(np.arange(len(split)), chosen)
    if len(rest) < 2:
        raise DataError(f"{len(rest)} image is left to train on", where="hold_out", remedy="give more training images")
    return split.subset(rest), split.subset(chosen)


@torch.no_grad()
def _score(
    model: nn.Module,
    held: Split,
    accelerator: Accelerator,
    share: Together,
    teacher: nn.Module | None = None,
    own: Preprocessing | None = None,
    ends: Sequence[tuple[str, str]] = (),
) -> tuple[float, float]:
    """Return top-1 and mean cross-entropy on images, which the processes share out; without classes 0 and the distance."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    mine = np.arange(share.rank, len(held), share.world)
    for part in [mine[i : i + _SCORED_TOGETHER] for i in range(0, len(mine), _SCORED_TOGETHER)] if ends else []:
        pixels = held.pixels(part)[0].to(accelerator.device)
        inputs = normalise(pixels, held.preprocessing)
        found, wanted = _Watch([a for a, _ in ends]), _Watch([b for _, b in ends])
        assert teacher is not None
        model(inputs, found)
        teacher(inputs if own is None else normalise(pixels, own), wanted)
        sums[1] += float(feature_loss(found.seen, {a: wanted.seen[b] for a, b in ends})) * len(part)
    for x, y in [] if ends else held.batches(_SCORED_TOGETHER, indices=mine):
        logits = model(x.to(accelerator.device)).float().cpu()
        sums += torch.tensor([float(_right(logits, y)), float(label_loss(logits, y)) * len(y)], dtype=torch.float64)
    if share.world > 1:
        sums = accelerator.reduce(sums.float().to(accelerator.device), "sum").double().cpu()
    top1, loss = (float(v) / len(held) for v in sums)
    return top1, loss if math.isfinite(loss) else math.inf


def _normalised(model: nn.Module) -> bool:
    """Return whether some layer normalises by what it sees; a frozen BatchNorm does not."""
    return any(isinstance(m, nn.BatchNorm2d | nn.GroupNorm) and not isinstance(m, FrozenBatchNorm) for m in model.modules())


def _peak_of(settings: TrainSettings) -> float:
    assert isinstance(settings.lr, float)
    return settings.lr


def _peak(
    model: nn.Module,
    split: Split,
    held: Split | None,
    settings: TrainSettings,
    batch_size: int,
    teacher: nn.Module | None,
    own: Preprocessing | None,
    note: Note | None,
) -> float:
    """Return the peak learning rate: as asked for, or the one whose short training has the lowest loss on images held out.

    Raises:
        BadInput: Every one that was tried diverged.
    """
    factor = batch_size / LR_BATCH if settings.scale_lr else 1.0
    if settings.lr != "auto":
        return _peak_of(settings) * factor
    if int(os.environ.get("WORLD_SIZE") or "1") > 1:
        raise BadInput(
            "auto finds a learning rate in one process",
            where="lr",
            remedy="find it there for a part of the epochs, then give it",
        )
    usual = usual_rate(_normalised(model)) * (batch_size / LR_BATCH)
    if held is None:
        split, held = hold_out(split, _TRIED_HOLD_OUT, settings.seed or 0)
    held = held.take(_JUDGES, settings.seed or 0)
    per_epoch = max(1, len(split) // batch_size)
    steps = max(1, min(max(round(settings.epochs * per_epoch) // 20, _TRIED_STEPS[0]), _TRIED_STEPS[1]))
    found: dict[float, float] = {}
    for rate in (usual * times for times in _TRIED_LR):
        trial = settings.model_copy(
            update={"lr": rate, "scale_lr": False, "epochs": steps / per_epoch, "hold_out": 0.0, "patience": 0, "ema": 0.0}
        )
        student = copy.deepcopy(model)
        try:
            train(student, split, trial, teacher=teacher, teacher_preprocessing=own)
        except BadInput:
            continue
        student = student.to(_accelerator(settings.device or "auto").device)
        accelerator = _accelerator(settings.device or "auto")
        share = Together(accelerator.process_index, accelerator.num_processes)
        found[rate] = _score(student, held, accelerator, share, teacher, own, paired_outputs(student, teacher))[1]
    best = min(found, key=lambda rate: found[rate], default=None)
    if best is None or not math.isfinite(found[best]):
        raise BadInput("training diverged at every learning rate that was tried", where="lr", remedy="check the checkpoint")
    if note is not None:
        tried = ", ".join(f"{rate:.2g}: {loss:.3f}" for rate, loss in found.items())
        note(f"learning rate {best:.2g}, of {steps} steps each on training images (loss on {len(held)} others: {tried})")
    return best


@contextlib.contextmanager
def _rounding(settings: TrainSettings, device: torch.device) -> Iterator[None]:
    """Let a GPU round float32 operands to TF32 inside, unless float32 was asked for."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.precision != "fp32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _mixers(settings: TrainSettings, classes: int) -> list[Any]:
    """Return what mixes images of a batch, torchvision's."""
    if not settings.mixup and not settings.cutmix:
        return []
    from torchvision.transforms import v2

    found: list[Any] = [v2.MixUp(alpha=settings.mixup, num_classes=classes)] if settings.mixup else []
    return [*found, v2.CutMix(alpha=settings.cutmix, num_classes=classes)] if settings.cutmix else found


def arranged(
    x: Tensor, y: Tensor, settings: TrainSettings, step: int, share: Together, *, flips: bool, mix: Sequence[Any] = ()
) -> tuple[Tensor, Tensor]:
    """Return a batch as the networks see it before normalisation: moved, mirrored or mixed, as a function of (seed, step).

    Args:
        x: Pixels (N, C, H, W).
        y: Labels (N,).
        settings: What is done.
        step: Of the training.
        share: Which process.
        flips: Whether a mirrored image means the same.
        mix: Mixes images and labels; one is drawn for each step.
    """
    torch.manual_seed(((settings.seed or 0) * 1_000_003 + step) * 64 + share.rank)  # also draws the dropout of this step
    if settings.augment == "cifar":
        x = shifted(x, flip=flips)
    if mix:
        chosen = mix[int(torch.randint(len(mix), ())) if len(mix) > 1 else 0]
        x, y = chosen(x.float(), y)
    return x, y


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


class _Watch:
    """Keeps the named tensors of a forward pass."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self.seen: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor) -> None:
        if name in self._names:
            self.seen[name] = value


def _right(logits: Tensor, y: Tensor) -> Tensor:
    """Return the number of right answers; a mixed image shows the class that it has most of."""
    predicted = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
    return (predicted == (y if y.ndim == 1 else y.argmax(1))).sum()


def _step(
    model: nn.Module,
    teacher: nn.Module | None,
    x: Tensor,
    y: Tensor,
    settings: TrainSettings,
    watched: Sequence[str] = (),
    seen: Tensor | None = None,
    weights_K: Tensor | None = None,
    ends: Sequence[tuple[str, str]] = (),
) -> tuple[Tensor, Tensor]:
    """Return the loss and the right answers of one batch; `seen` is what the teacher gets, `x` unless given.

    With `ends`, pairs of tensors of student and teacher, the loss is the distance of those, and nothing is right or wrong.
    """
    seen = x if seen is None else seen
    mine, wanted = (_Watch((*watched, *(pair[side] for pair in ends))) for side in (0, 1))
    if ends:
        assert teacher is not None
        with _autocast(x, settings):
            model(x, mine)
            with torch.no_grad():
                teacher(seen, wanted)
        loss = feature_loss(mine.seen, {a: wanted.seen[b] for a, b in ends})
        if watched:
            loss = loss + settings.features * feature_loss(mine.seen, {name: wanted.seen[name] for name in watched})
        return loss, torch.zeros((), dtype=torch.int64, device=x.device)
    with _autocast(x, settings):
        logits = (model(x, mine) if watched else model(x)).float()
    correct = _right(logits.detach(), y)
    smoothing = settings.label_smoothing or 0.0
    if teacher is None:
        return label_loss(logits, y, smoothing=smoothing, weights_K=weights_K), correct
    with torch.no_grad(), _autocast(x, settings):
        target = (teacher(seen, wanted) if watched else teacher(seen)).float()
    soft = distillation_loss(logits, target, settings.temperature)
    loss = settings.distill * soft
    if settings.distill < 1.0:
        loss = loss + (1.0 - settings.distill) * label_loss(logits, y, smoothing=smoothing, weights_K=weights_K)
    if watched:
        loss = loss + settings.features * feature_loss(mine.seen, wanted.seen)
    return loss, correct


def _autocast(x: Tensor, settings: TrainSettings) -> torch.autocast:
    kind = torch.float16 if settings.precision == "fp16" else torch.bfloat16
    return torch.autocast(x.device.type, kind, enabled=settings.precision in ("bf16", "fp16"))


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
    momentum = settings.momentum
    return torch.optim.SGD([g for g in groups if g["params"]], lr=_peak_of(settings), momentum=momentum, nesterov=momentum > 0)


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


_STATE = b"rescompress training state 3\n"
"""How a saved state begins; its SHA-256 follows, then what torch writes."""


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with atomic_path(path, follow=False) as temporary, temporary.open("wb") as f:
        f.write(_STATE + hashlib.sha256(buffer.getbuffer()).digest())
        f.write(buffer.getbuffer())


_WHOLE = frozenset(
    {"fingerprint", "lr", "step", "model", "optimizer", "scaler", "mean", "best", "since_best", "best_epoch", "epochs"}
    | {"epoch_sums", "times", "threads"}
)


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
    if not isinstance(state, dict) or not state.keys() >= _WHOLE:
        raise ValueError("it holds no state")
    return state


def _saved(path: Path | None, fingerprint: str, note: Note | None) -> dict[str, Any] | None:
    """Return the saved state, or None where there is none that fits."""
    if path is None or not os.path.lexists(path):
        return None
    try:
        state = _read_state(path)
        if state["fingerprint"] != fingerprint:
            raise ValueError(f"saved at step {state['step']} of a training with other settings, images or weights")
        return state
    except (ValueError, OSError) as e:
        if note is not None:
            note(f"the saved state {path} is not taken up ({e}): training starts again")
        return None
