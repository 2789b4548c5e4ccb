"""Batches for training: which images each step has, and processes that read them ahead.

A batch is a function of (seed, step) and of which process of a distributed training asks, whatever the number of processes
that read: the order belongs to (seed, epoch), what happens to a sample to (seed, epoch, sample).

Shape suffixes: N batch, H height, W width, C channels.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import os
import platform
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data.augment import PhotoTransform, draw, seed_of
from compress.data.cache import PixelCache
from compress.data.splits import EncodedStore, Split, picture_of, pictures_below, sizes_of
from compress.pixels import Pixels
from compress.processes import ALONE, Together
from rescompress.core.errors import BadInput, EnvironmentFailed, RescompressError
from rescompress.core.settings import PHOTO_SIDE, TrainSettings
from rescompress.core.spec import Preprocessing

Indices = NDArray[np.int64]
PHOTOS = ("photo", "photo+")
"""Presets that change one picture each."""
_PREFETCH = 4
"""Batches that each reading process prepares ahead."""
_PROCESS_BYTES = 120 << 20
"""What a forked process that reads images needs for itself."""
_SURVEY = 256
"""Images whose sizes are looked at before those of all are."""


def epoch_order(labels: Indices, seed: int, epoch: int, sampling: Literal["shuffle", "balanced"] = "shuffle") -> Indices:
    """Return the order of the images in an epoch, as many as there are.

    Args:
        labels: Of all images.
        seed: Of the training.
        epoch: From 0.
        sampling: ``balanced`` repeats images of small classes and leaves out some of large ones, each class equally often
            (one more or less), and within a class no image again before all others.
    """
    rng = np.random.default_rng([seed, epoch])
    if sampling == "shuffle":
        return rng.permutation(len(labels))
    classes = rng.permutation(np.unique(labels))
    counts = np.full(len(classes), len(labels) // len(classes))
    counts[: len(labels) % len(classes)] += 1
    chosen = []
    for label, count in zip(classes, counts, strict=True):
        mine = np.flatnonzero(labels == label)
        rounds = [rng.permutation(mine) for _ in range(-(-int(count) // len(mine)))]
        chosen.append(np.concatenate(rounds)[:count] if rounds else mine[:0])
    return rng.permutation(np.concatenate(chosen))


class Batches:
    """The batches of a training, by step."""

    def __init__(
        self, split: Split, settings: TrainSettings, batch_size: int, share: Together = ALONE, cache: PixelCache | None = None
    ) -> None:
        """Take note of everything that a batch depends on.

        Args:
            split: The images.
            settings: With everything filled in (`TrainSettings.preset`).
            batch_size: Images per step over all processes.
            share: What this process takes.
            cache: Where decoded images are kept, or None.
        """
        self.labels = split.labels
        self.classes = len(split.classes)
        self.preprocessing = split.preprocessing
        self.flips = split.flips
        self._sampling, self._seed = settings.sampling, settings.seed or 0
        self._size, self._share = batch_size, share
        self.per_epoch = len(split) // batch_size
        self._epoch = -1
        self._order: Indices = np.empty(0, np.int64)
        self._reader = _Reader(split, settings, cache)

    def of(self, step: int) -> tuple[int, Indices]:
        """Return the epoch of a step, and the images that this process takes in it; the order is drawn once an epoch."""
        epoch, within = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = epoch_order(self.labels, self._seed, epoch, self._sampling), epoch
        batch = self._order[within * self._size : (within + 1) * self._size]
        return epoch, batch[self._share.rank :: self._share.world]

    def read(self, step: int) -> tuple[Tensor, Tensor]:
        """Return pixels (N, C, H, W) uint8 and labels (N,) of a step, read by this process.

        Raises:
            DataError: An image cannot be read.
        """
        return _checked(self._reader[self.of(step)])

    @contextlib.contextmanager
    def stream(self, start: int, stop: int, workers: int, *, pin: bool = False) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Yield what `read` would return for each step, read ahead by `workers` processes.

        Args:
            start: First step.
            stop: After the last one.
            workers: Processes; with 0 each step is read when it is asked for.
            pin: Whether the pixels lie in memory that a GPU copies from by itself.

        Raises:
            DataError: An image cannot be read.
            EnvironmentFailed: A process ended, as where memory is short.
        """
        steps = map(self.of, range(start, stop))
        if not workers:
            yield (_checked(self._reader[step]) for step in steps)
            return
        loader: Any = torch.utils.data.DataLoader(
            self._reader,  # type: ignore[arg-type]  # it has what is asked of a map-style one
            sampler=_Once(steps),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=_PREFETCH,
            pin_memory=pin,
            worker_init_fn=_start,
            multiprocessing_context="fork" if sys.platform == "linux" else None,  # shares the store and what it read
        )
        batches = iter(loader)
        try:
            yield self._watched(batches, workers)
        finally:
            shut = getattr(batches, "_shutdown_workers", None)  # or they stay until the iterator is collected
            if shut is not None:
                shut()

    def _watched(self, batches: Iterator[Any], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError as e:
                if "worker" not in str(e) and "shared memory" not in str(e):
                    raise
                raise EnvironmentFailed(
                    f"a process that reads images ended ({str(e).splitlines()[0][:200]})",
                    where=f"{workers} workers",
                    remedy="where memory is short, give fewer workers or smaller batches; the training goes on where it was",
                ) from e
            if batch is None:
                return
            yield _checked(batch)


class _Once:
    """A sampler that hands out what an iterator has."""

    def __init__(self, steps: Iterator[tuple[int, Indices]]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[tuple[int, Indices]]:
        return self._steps


class _Reader:
    """Reads the images of a step, in whichever process it lives; an error is returned, so that it crosses the border whole."""

    def __init__(self, split: Split, settings: TrainSettings, cache: PixelCache | None) -> None:
        self._store, self._index = pictures_below(split.store)
        self._own = split.store  # as evaluation reads it
        self._labels = split.labels
        self._seed = settings.seed or 0
        self._cache = cache
        self._photo: PhotoTransform | None = None
        if settings.augment in PHOTOS:
            height, width = split.size[:2]
            self._photo = PhotoTransform(settings.augment, (height, width), min_area=settings.min_area, flip=split.flips)

    def __getitem__(self, step: tuple[int, Indices]) -> tuple[Tensor, Tensor] | RescompressError:
        epoch, chosen = step
        try:
            if self._photo is not None:
                drawn = [self._drawn(self._photo, epoch, int(i)) for i in chosen]
                x_NHWC = np.stack(drawn)
            elif self._cache is not None:
                x_NHWC = np.stack([self._fitted(self._cache, int(i)) for i in chosen])
            else:
                x_NHWC = self._own.read(chosen)
        except RescompressError as e:
            return e
        return torch.from_numpy(x_NHWC).permute(0, 3, 1, 2), torch.from_numpy(self._labels[chosen])

    def _drawn(self, photo: PhotoTransform, epoch: int, i: int) -> Pixels:
        return draw(photo, lambda reduce: self._picture(i, reduce), seed_of(self._seed, epoch, i))

    def _picture(self, i: int, reduce: Any) -> Any:
        at = i if self._index is None else int(self._index[i])
        if self._cache is None:
            return picture_of(self._store, at, reduce)
        from PIL import Image

        pixels = self._cache.get(i)
        if pixels is None:
            image = picture_of(self._store, at)
            pixels = np.asarray(image, np.uint8)
            self._cache.put(i, pixels.reshape(*pixels.shape[:2], -1))
        else:
            image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        reduce(image)
        return image

    def _fitted(self, cache: PixelCache, i: int) -> Pixels:
        known = cache.get(i)
        if known is None:
            known = self._own.read(np.array([i]))[0]
            cache.put(i, known)
        return known


def _checked(batch: tuple[Tensor, Tensor] | RescompressError) -> tuple[Tensor, Tensor]:
    if isinstance(batch, RescompressError):
        raise batch
    return batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _start(_: int) -> None:
    """Let a reading process end with the one that it reads for, even where that is killed, and leave Ctrl-C to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _cache_file(state: Path, what: str) -> Path:
    """Return where a training keeps decoded images: beside its state, one file for each machine, which maps its own."""
    host = re.sub(r"[^\w-]", "", platform.node())[:40]
    return state.with_name(f"{state.stem}-pixels-{what}-{host}.u8")


def remove_caches(state: Path, but: PixelCache | None) -> None:
    """Delete what trainings with this state file kept on this machine, which were killed and do not go on, but one."""
    for path in state.parent.glob(_cache_file(Path(glob.escape(str(state))), "*").name):
        if but is None or path != but.path:
            path.unlink(missing_ok=True)


def cache_for(split: Split, settings: TrainSettings, workers: int, state: Path) -> PixelCache | None:
    """Return where decoded images are kept, or None where they are not: too many, or already in memory.

    What is kept depends on the settings and the data alone, apart from a disk that is full.

    Args:
        split: The images.
        settings: With everything filled in.
        workers: Processes that read.
        state: The file of the training's state; theirs is beside it.
    """
    store, index = pictures_below(split.store)
    if not settings.cache_gib or not isinstance(store, EncodedStore):
        return None
    photo = settings.augment in PHOTOS
    if not photo and not workers:
        return None  # the process keeps what it decoded itself
    budget = settings.cache_gib * 2**30
    height, width, channels = split.size
    if photo:
        chosen = np.arange(len(split)) if index is None else index
        some = sizes_of(store, chosen[:: max(1, len(chosen) // _SURVEY)])
        if float(some.prod(1).mean()) * channels * len(chosen) > 1.2 * budget:
            return None
        sides = sizes_of(store, chosen)
        shapes = np.concatenate([sides, np.full((len(sides), 1), channels)], 1)
    else:
        shapes = np.tile(np.array([[height, width, channels]]), (len(split), 1))
    form = "whole" if photo else f"{height}x{width}-{_fit_of(store.preprocessing)}"
    state.parent.mkdir(parents=True, exist_ok=True)
    cache = PixelCache(_cache_file(state, f"{split.identity[:16]}-{form}"), shapes)
    return cache if cache.size_bytes <= budget and cache.fits_disk() else None


def _fit_of(how: Preprocessing) -> str:
    """Return a hash of how pictures are brought to their size: what is kept for one way is not read for another."""
    said = f"{how.resize} {how.interpolation} {how.antialias}"
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def workers_for(settings: TrainSettings, split: Split, share: Together, batch_size: int) -> int:
    """Return how many processes read images.

    Args:
        settings: What was asked for.
        split: The images.
        share: The processes that train on this machine, each with reading processes of its own.
        batch_size: Images per step and process.

    Raises:
        BadInput: So many do not fit into memory.
    """
    height, width, channels = split.size
    if settings.workers == "auto":
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        few = min(height, width) < PHOTO_SIDE or not isinstance(pictures_below(split.store)[0], EncodedStore)
        return 0 if few else max(1, min(8, len(os.sched_getaffinity(0)) // local if hasattr(os, "sched_getaffinity") else 2))
    needed = settings.workers * (_PROCESS_BYTES + (_PREFETCH + 1) * batch_size * height * width * channels)
    free = _free_memory()
    if free is not None and needed > free:
        raise BadInput(
            f"{settings.workers} processes that read images need some {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free",
            where="workers",
            remedy=f"give at most {int(settings.workers * free / needed)}, or as many as there are cores ({os.cpu_count()})",
        )
    return settings.workers


def _free_memory() -> int | None:
    """Return the bytes that new processes may take, or None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(stat["inactive_file"])  # which is given up
        free = min(free, max(0, limit - used))
    return free
