"""Labelled images: folders, ``.npz`` files and the built-in digits, preprocessed as the spec says.

Images are decoded once, resized to the network's input and kept as uint8 in memory while they fit the budget; larger
sets are decoded batch by batch on a few threads. Either way a split is read through `Split.batches`.

Shape suffixes: N batch, H height, W width, C channels.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from compress.pixels import Pixels, decode, fit, normalise
from rescompress.core.errors import DataError, nearest
from rescompress.core.outcomes import samples_digest
from rescompress.core.spec import ModelSpec, Preprocessing

_SPLITS = frozenset({"train", "val", "valid", "validation", "test"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
MEMORY_BUDGET_BYTES = 4 << 30
DIGITS = "builtin:digits"
_NPZ_KEYS = frozenset({"x", "y", "x_train", "y_train", "x_val", "y_val", "classes"})
_FORMS = (
    "a folder with train/ and val/ (or test/) class folders, a folder of class folders, a flat folder with labels.csv, "
    f"an .npz with x (N,H,W,C uint8) and y, or {DIGITS}"
)


class Store(Protocol):
    """Images by number, already at the network's input size, in RGB (or grey) channel order."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, index_N: NDArray[np.int64]) -> Pixels:
        """Return the images (N, H, W, C) uint8."""
        ...


@dataclasses.dataclass(frozen=True)
class MemoryStore:
    """Decoded images."""

    x_NHWC: Pixels

    def __len__(self) -> int:
        return len(self.x_NHWC)

    def read(self, index_N: NDArray[np.int64]) -> Pixels:
        """Return the images (N, H, W, C) uint8."""
        return self.x_NHWC[index_N]


@dataclasses.dataclass(frozen=True)
class FileStore:
    """Images that are decoded when they are read."""

    paths: tuple[Path, ...]
    size: tuple[int, int, int]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index_N: NDArray[np.int64]) -> Pixels:
        """Return the images (N, H, W, C) uint8."""
        with ThreadPoolExecutor(2) as pool:
            images = pool.map(lambda i: decode(self.paths[i], self.size, self.preprocessing), index_N.tolist())
            return np.stack(list(images))


class CachedStore:
    """Images that are decoded on first reading and then kept."""

    def __init__(self, files: FileStore) -> None:
        channels, height, width = files.size
        self.files = files
        self.pixels = np.empty((len(files), height, width, channels), dtype=np.uint8)
        self.filled = np.zeros(len(files), dtype=bool)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index_N: NDArray[np.int64]) -> Pixels:
        """Return the images (N, H, W, C) uint8."""
        missing = np.unique(index_N[~self.filled[index_N]])
        if len(missing):
            self.pixels[missing] = self.files.read(missing)
            self.filled[missing] = True
        return self.pixels[index_N]


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with labels.

    Attributes:
        store: The images.
        labels: The output of the network that is right for each image.
        classes: Name of each output.
        preprocessing: How pixels become inputs.
        identity: Hash of the samples, their labels and their order.
        flips: Whether a mirrored image means the same (not so for digits).
    """

    store: Store
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    identity: str
    flips: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def samples_sha256(self) -> str:
        """Identity of the split for pairing outcomes."""
        return self.identity

    def subset(self, index_N: NDArray[np.int64]) -> Split:
        """Return the split of the samples `index_N`, in that order."""
        order = hashlib.sha256(np.ascontiguousarray(index_N).tobytes()).hexdigest()
        return dataclasses.replace(
            self, store=_View(self.store, index_N), labels=self.labels[index_N], identity=samples_digest([self.identity, order])
        )

    def take(self, n: int, seed: int) -> Split:
        """Return `n` samples (all, if there are fewer) chosen by `seed`, spread over the classes in proportion.

        Any first part of them is as mixed: files stand in the order of their classes, and readers may look at the first alone.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        ranks = np.zeros(len(self))
        for label in np.unique(self.labels):
            mine = order[self.labels[order] == label]
            ranks[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
        return self.subset(order[np.argsort(ranks[order], kind="stable")][:n])

    def part(self, fraction: float, seed: int) -> tuple[Split, Split]:
        """Return (1 - fraction) of the samples and the rest, drawn by `seed`."""
        order = np.random.default_rng(seed).permutation(len(self))
        held = math.ceil(fraction * len(self))
        return self.subset(np.sort(order[held:])), self.subset(np.sort(order[:held]))

    def pixels(self, index_N: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return raw pixels (N, C, H, W) uint8 and labels (N,)."""
        x_NHWC = self.store.read(index_N)
        return torch.from_numpy(x_NHWC).permute(0, 3, 1, 2), torch.from_numpy(self.labels[index_N])

    def batches(self, batch_size: int, *, indices: NDArray[np.int64] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield preprocessed images (N, C, H, W) float32 and labels (N,), in order.

        Args:
            batch_size: Images per batch; the last one may be smaller.
            indices: The samples to read, in this order; all of them by default.
        """
        index = np.arange(len(self)) if indices is None else indices
        for start in range(0, len(index), batch_size):
            x, y = self.pixels(index[start : start + batch_size])
            yield normalise(x, self.preprocessing), y

    def tensor(self) -> Tensor:
        """Return all images preprocessed, (N, C, H, W) float32; for calibration sets."""
        return torch.cat([x for x, _ in self.batches(256)])


@dataclasses.dataclass(frozen=True)
class _View:
    store: Store
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index_N: NDArray[np.int64]) -> Pixels:
        return self.store.read(self.index[index_N])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and an evaluation split.

    Attributes:
        train: For calibration, fine-tuning and every choice of settings.
        val: For the figures that are reported; never for a choice.
        notes: What the reader of a report should know, such as a split that was drawn from one folder.
    """

    train: Split
    val: Split
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What of a network decides how its data is read; equal for a network and its pruned versions.

    Attributes:
        shape: Channels, height, width.
        outputs: Of the classifier; 0 without one.
        preprocessing: How pixels become inputs.
        labels: Name of each output, where the checkpoint has them.
    """

    shape: tuple[int, int, int]
    outputs: int
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None

    @classmethod
    def of(cls, spec: ModelSpec) -> Inputs:
        """Return what `spec` says."""
        return cls(spec.input_shape, spec.head.num_classes if spec.head else 0, spec.preprocessing, spec.labels)

    @property
    def classes(self) -> int:
        """Number of classes; a single output tells two apart."""
        return 2 if self.outputs == 1 else self.outputs


@dataclasses.dataclass(frozen=True)
class _Samples:
    """Files and class names before they meet a checkpoint."""

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    root: Path
    listed: bool = False
    """Whether a label file names the classes, not folders."""


def load_dataset(
    source: str,
    spec: ModelSpec | Inputs,
    *,
    seed: int = 0,
    labels: Mapping[str, str] | None = None,
) -> Dataset:
    """Return the data set at `source`, ready for the network of `spec`.

    Args:
        source: One of the forms of the command line's ``--data``.
        spec: Gives the input size, the preprocessing, and the labels that class folders are matched to by name.
        seed: Draws the split where `source` has only one.
        labels: Label of the checkpoint for each class folder, for a subset or other names.

    Raises:
        DataError: Nothing is there, it holds no images, or its classes do not fit the checkpoint.
    """
    inputs = Inputs.of(spec) if isinstance(spec, ModelSpec) else spec
    if source == DIGITS:
        return _digits(inputs)
    if source.startswith("builtin:"):
        raise DataError(f"unknown built-in data '{source}'", where="--data", remedy=nearest(source, [DIGITS]))
    if inputs.shape[0] not in (1, 3):
        raise DataError(
            f"images have 1 or 3 channels, the network reads {inputs.shape[0]}",
            where=source,
            remedy="in Python, build a Split from a Store of your own",
        )
    path = Path(source)
    if not path.exists():
        raise DataError("no such file or folder", where=source, remedy=f"data is {_FORMS}")
    if path.is_file():
        if path.suffix != ".npz":
            raise DataError("is no data set", where=source, remedy=f"data is {_FORMS}")
        return _npz(path, inputs, seed)
    train_dir, val_dir = _split_dir(path, "train"), _split_dir(path, "val", "valid", "validation", "test")
    if train_dir is not None and val_dir is not None:
        found = _scan(val_dir)
        train = _split(_scan(train_dir), inputs, labels)
        return Dataset(train, _split(found, inputs, labels), _order_notes(found, inputs, labels))
    found = _scan(train_dir or val_dir or path)
    halves = _halves(_split(found, inputs, labels), seed, source)
    return dataclasses.replace(halves, notes=(*halves.notes, *_order_notes(found, inputs, labels)))


def _split_dir(path: Path, *names: str) -> Path | None:
    """Return the folder of a split; one that is a class beside other classes, such as trains beside cars, is none."""
    folders = [p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    is_class_folder = {n: set(folders) - _SPLITS and not _has_classes(path / n) for n in names if n in folders}
    return next((path / name for name, is_class in is_class_folder.items() if not is_class), None)


def _has_classes(folder: Path) -> bool:
    return any(p.is_dir() or p.name in ("labels.csv", "labels.json") for p in folder.iterdir())


def _order_notes(found: _Samples, inputs: Inputs, labels: Mapping[str, str] | None) -> tuple[str, ...]:
    """Return a note where folders are numbers and do not count in the order of the numbers."""
    names = sorted(set(found.names))
    if found.listed or labels is not None or inputs.labels is not None or not all(n.isdecimal() for n in names):
        return ()
    misplaced = next((n for n, m in zip(names, sorted(names, key=int), strict=True) if n != m), None)
    if misplaced is None:
        return ()
    return (
        f"class folders count in alphabetical order, as torchvision's ImageFolder has it: {misplaced} is output "
        f"{names.index(misplaced)}; --labels says it otherwise",
    )


def _halves(whole: Split, seed: int, source: str) -> Dataset:
    if len(whole) < 2:
        raise DataError("holds a single image", where=source, remedy="give at least two, one to calibrate, one to evaluate")
    train, val = whole.part(0.5, seed)
    note = f"{source} has one split: {len(train)} images (seed {seed}) calibrate or train, the other {len(val)} evaluate"
    return Dataset(train, val, (note,))


def _scan(root: Path) -> _Samples:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [(p, f.name) for f in folders for p in sorted(f.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
    listed = not found
    if listed:
        found = _labelled_files(root)
    if not found:
        loose = sum(p.suffix.lower() in IMAGE_SUFFIXES for p in root.iterdir())
        what = f"holds {loose} images without labels" if loose else "holds no images"
        raise DataError(what, where=str(root), remedy=f"data is {_FORMS}")
    paths, names = zip(*found, strict=True)
    return _Samples(paths, names, root, listed)


def _labelled_files(root: Path) -> list[tuple[Path, str]]:
    """Return the files of a flat folder that a ``labels.csv`` (file,label) or ``labels.json`` names."""
    pairs: list[tuple[str, str]] = []
    try:
        if (table := root / "labels.csv").is_file():
            with table.open(newline="", encoding="utf-8") as f:
                rows = [row for row in csv.reader(f) if len(row) >= 2]
            pairs = [(row[0], row[1].strip()) for row in rows if (root / row[0]).suffix.lower() in IMAGE_SUFFIXES]
        elif (table := root / "labels.json").is_file():
            document = json.loads(table.read_text(encoding="utf-8"))
            pairs = [(str(k), str(v)) for k, v in dict(document).items()]
    except (OSError, ValueError, TypeError, csv.Error) as e:
        raise DataError(f"cannot be read: {e}", where=str(root), remedy="write lines of the form file.jpg,label") from e
    missing = [name for name, _ in pairs if not (root / name).is_file()]
    if missing:
        raise DataError(
            f"names {len(missing)} files that are not there, such as {missing[0]}",
            where=str(root / "labels.csv"),
            remedy="mend the names, or add the files",
        )
    return [(root / name, label) for name, label in pairs]


def _split(found: _Samples, inputs: Inputs, labels: Mapping[str, str] | None) -> Split:
    index, classes = match_classes(sorted(set(found.names)), inputs, labels, str(found.root), listed=found.listed)
    keep = [i for i, name in enumerate(found.names) if name in index]
    paths = tuple(found.paths[i] for i in keep)
    y_N = np.array([index[found.names[i]] for i in keep], dtype=np.int64)
    identity = samples_digest(
        [f"{p.relative_to(found.root).as_posix()}={y}:{p.stat().st_size}" for p, y in zip(paths, y_N, strict=True)]
    )
    channels, height, width = inputs.shape
    files = FileStore(paths, inputs.shape, inputs.preprocessing)
    small = len(paths) * channels * height * width <= MEMORY_BUDGET_BYTES
    store: Store = CachedStore(files) if small else files
    return Split(store, y_N, classes, inputs.preprocessing, identity)


def match_classes(
    folders: Sequence[str], inputs: Inputs, labels: Mapping[str, str] | None, where: str, *, listed: bool = False
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the output number of each class folder, and the name of each output.

    Args:
        folders: Names of the class folders, sorted.
        inputs: The network's; its labels are matched by name, without them folders count in sorted order.
        labels: Label for each folder; folders it does not name are left out.
        where: For the error.
        listed: The names stand in a label file. Where the checkpoint has no labels, numbers are outputs then.

    Raises:
        DataError: Folders do not fit the outputs.
    """
    if not inputs.outputs:
        raise DataError(
            "the checkpoint has no classifier head, so labels mean nothing to it", where=where, remedy="use one with a head"
        )
    wanted = inputs.classes
    known = inputs.labels
    if labels is not None:
        names = known or tuple(str(i) for i in range(wanted))
        unknown = [v for v in labels.values() if v not in names]
        absent = [k for k in labels if k not in folders]
        if unknown:
            raise DataError(f"the checkpoint has no label '{unknown[0]}'", where="--labels", remedy=nearest(unknown[0], names))
        if absent:
            raise DataError(f"no class folder is called '{absent[0]}'", where=where, remedy=nearest(absent[0], folders))
        return {k: names.index(v) for k, v in labels.items()}, names
    if known is not None:
        strangers = [f for f in folders if f not in known]
        if strangers:
            raise DataError(
                f"class folder '{strangers[0]}' is no label of the checkpoint",
                where=where,
                remedy=nearest(strangers[0], known) + " map other names with --labels",
            )
        return {f: known.index(f) for f in folders}, known
    if listed and all(f.isdecimal() for f in folders):
        if max(int(f) for f in folders) < wanted:
            return {f: int(f) for f in folders}, tuple(str(i) for i in range(wanted))
        folders = sorted(folders, key=int)
    if len(folders) != wanted:
        raise DataError(
            f"has {len(folders)} classes, the network has {wanted}",
            where=where,
            remedy="use the data the network was trained for, or map a subset with --labels",
        )
    return {f: i for i, f in enumerate(folders)}, tuple(folders)


def _npz(path: Path, inputs: Inputs, seed: int) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {k: archive[k] for k in archive.files if k in _NPZ_KEYS}
    except Exception as e:  # numpy, zipfile and zlib raise a dozen kinds for damaged archives
        raise DataError(f"is no readable .npz: {e}", where=str(path), remedy="write it with numpy.savez(x=..., y=...)") from e
    classes = tuple(str(c) for c in arrays["classes"].flat) if "classes" in arrays else None
    if classes is not None and arrays["classes"].ndim != 1:
        raise DataError("classes is no list of names", where=str(path), remedy="save one name per class")
    if {"x_train", "y_train", "x_val", "y_val"} <= arrays.keys():
        return Dataset(
            _array_split(arrays["x_train"], arrays["y_train"], classes, inputs, str(path)),
            _array_split(arrays["x_val"], arrays["y_val"], classes, inputs, str(path)),
        )
    if not {"x", "y"} <= arrays.keys():
        raise DataError("has no arrays x and y", where=str(path), remedy="write it with numpy.savez(x=..., y=...)")
    return _halves(_array_split(arrays["x"], arrays["y"], classes, inputs, str(path)), seed, str(path))


def _array_split(
    x: NDArray[np.generic], y: NDArray[np.generic], classes: tuple[str, ...] | None, inputs: Inputs, where: str
) -> Split:
    channels = inputs.shape[0]
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.dtype != np.uint8 or x.shape[3] not in (1, 3):
        raise DataError(f"x is {x.dtype} of shape {x.shape}", where=where, remedy="x is uint8 of shape (N, H, W, C), C 1 or 3")
    if len(x) == 0:
        raise DataError("holds no images", where=where, remedy="x is uint8 of shape (N, H, W, C)")
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"y is {y.dtype} of shape {y.shape}", where=where, remedy=f"y is {len(x)} whole numbers")
    wanted = len(classes) if classes is not None else inputs.classes
    if y.min() < 0 or int(y.max()) >= wanted:
        whose = "the file names" if classes is not None else "the network has"
        raise DataError(
            f"labels run from {y.min()} to {y.max()}, {whose} {wanted} classes",
            where=where,
            remedy="give labels from 0",
        )
    mode = "RGB" if channels == 3 else "L"
    images = (Image.fromarray(im.squeeze(2) if im.shape[2] == 1 else im).convert(mode) for im in x)
    pixels = np.stack([fit(image, inputs.shape, inputs.preprocessing, where=where) for image in images])
    y_N = y.astype(np.int64)
    names = inputs.labels or tuple(str(i) for i in range(wanted))
    if classes is not None:
        output, names = match_classes(classes, inputs, None, where)
        y_N = np.array([output[name] for name in classes], dtype=np.int64)[y_N]
    identity = samples_digest([hashlib.sha256(pixels.tobytes()).hexdigest(), hashlib.sha256(y_N.tobytes()).hexdigest()])
    return Split(MemoryStore(pixels), y_N, names, inputs.preprocessing, identity)


def _digits(inputs: Inputs) -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels), 80 % to train and 20 % to evaluate."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    if inputs.outputs != 10:
        raise DataError(
            "are ten digits, the network has another number of classes", where=DIGITS, remedy="give your own --data"
        )
    grey = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    whole = _array_split(grey, np.asarray(bunch.target), None, inputs, DIGITS)
    whole = dataclasses.replace(whole, flips=False)
    train, val = whole.part(0.2, 0)
    return Dataset(train, val)
