"""Labelled images: folders, ``.npz`` files and the built-in digits, preprocessed as the spec says.

Images are decoded once, resized to the network's input and kept as uint8 in memory while they fit the budget; larger
sets are decoded batch by batch on a few threads. Either way a split is read through `Split.batches`.

Shape suffixes: N batch, H height, W width, C channels.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from compress.data import sources
from compress.files import contents_of, shown
from compress.folders import Samples
from compress.memory import sparse_array
from compress.pixels import Pixels, Reduce, decode, dimensions, normalise, picture
from rescompress.core.errors import DataError, nearest
from rescompress.core.graph import Network
from rescompress.core.outcomes import samples_digest
from rescompress.core.showing import Showing
from rescompress.core.spec import ModelSpec, Preprocessing

MEMORY_BUDGET_BYTES = 4 << 30
DIGITS = "builtin:digits"


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


class EncodedStore(ABC):
    """Images that are decoded when they are read; a source says where the encoded ones are.

    Attributes:
        size: Channels, height, width of the network's input.
        preprocessing: How an image is brought to it.
    """

    size: tuple[int, int, int]
    preprocessing: Preprocessing

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def encoded(self, i: int) -> Path | bytes | Image.Image:
        """Return the file of an image, or what it holds, or the image where it is decoded already."""

    @abstractmethod
    def name(self, i: int) -> str:
        """Return what to call an image in an error."""

    def picture(self, i: int, reduce: Reduce | None = None) -> Image.Image:
        """Return an image as RGB or grey, whole; `reduce` as in `compress.pixels.picture`."""
        return picture(self.encoded(i), self.size[0], where=self.name(i), reduce=reduce)

    def dimensions(self, i: int) -> tuple[int, int]:
        """Return height and width of an image; its header is read."""
        return dimensions(self.encoded(i), where=self.name(i))

    def contents(self) -> list[str]:
        """Return a hash of what each image's file holds."""
        return list(_each(lambda i: _hash(self.encoded(i)), range(len(self))))

    def read(self, index_N: NDArray[np.int64]) -> Pixels:
        """Return the images (N, H, W, C) uint8."""
        found = _each(lambda i: decode(self.encoded(i), self.size, self.preprocessing, where=self.name(i)), index_N.tolist())
        return np.stack(list(found))


@dataclasses.dataclass(frozen=True)
class FileStore(EncodedStore):
    """Images in files of their own."""

    paths: tuple[Path, ...]
    size: tuple[int, int, int]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        """How many there are."""
        return len(self.paths)

    def encoded(self, i: int) -> Path:
        """Return the file."""
        return self.paths[i]

    def name(self, i: int) -> str:
        """Return its path."""
        return str(self.paths[i])

    def contents(self) -> list[str]:
        """Return a hash of each file."""
        return contents_of(map(str, self.paths))


def _hash(encoded: Path | bytes | Image.Image) -> str:
    if isinstance(encoded, Path):
        return contents_of([str(encoded)])[0]
    if isinstance(encoded, bytes):
        return hashlib.sha256(encoded).hexdigest()
    return hashlib.sha256(f"{encoded.mode} {encoded.size} ".encode() + encoded.tobytes()).hexdigest()


_Result = TypeVar("_Result")


@functools.cache
def _pool(_: int) -> ThreadPoolExecutor:
    """Return the threads that decode in this process, by its number: a child has no thread of its parent's."""
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")


def _each(do: Callable[[int], _Result], index: Sequence[int]) -> Iterator[_Result]:
    """Yield what `do` makes of each number, in order; on a few threads, but in a process that reads ahead on one."""
    if len(index) < 2 or torch.utils.data.get_worker_info() is not None:
        return map(do, index)
    return _pool(os.getpid()).map(do, index)


def pictures_below(store: Store) -> tuple[Store, NDArray[np.int64] | None]:
    """Return the store that decodes, or the innermost one, and which of its images `store` has; None for all."""
    index: NDArray[np.int64] | None = None
    while isinstance(store, _View | CachedStore):
        if isinstance(store, CachedStore):
            store = store.files
        else:
            index = store.index if index is None else store.index[index]
            store = store.store
    return store, index


def picture_of(store: Store, i: int, reduce: Reduce | None = None) -> Image.Image:
    """Return an image, whole where the store has it so, else at the input's size.

    Args:
        store: From `pictures_below`.
        i: Its number there.
        reduce: As in `compress.pixels.picture`.
    """
    if isinstance(store, EncodedStore):
        return store.picture(i, reduce)
    pixels = store.read(np.array([i]))[0]
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    if reduce is not None:
        reduce(image)
    return image


def sizes_of(store: EncodedStore, index_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return height and width of images (N, 2); their headers are read."""
    return np.array(list(_each(store.dimensions, index_N.tolist())), dtype=np.int64).reshape(-1, 2)


class CachedStore:
    """Images that are decoded on first reading and then kept."""

    def __init__(self, files: EncodedStore) -> None:
        channels, height, width = files.size
        self.files = files
        self.pixels = sparse_array((len(files), height, width, channels))
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


@dataclasses.dataclass(frozen=True, repr=False)
class Split(Showing):
    """Images with labels.

    Attributes:
        store: The images.
        labels: The output of the network that is right for each image.
        classes: Name of each output.
        preprocessing: How pixels become inputs.
        known_by: Hash of the samples, their labels and their order, or what finds it when it is asked for.
        flips: Whether a mirrored image means the same (not so for digits).
    """

    store: Store
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    known_by: str | Callable[[], str]
    flips: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def shows(self) -> Mapping[str, str]:
        """Return how many images of how many classes there are."""
        return {"images": str(len(self)), "classes": _named(self.classes)}

    @functools.cached_property
    def identity(self) -> str:
        """Hash of what the samples hold, their labels and their order; files are read for it."""
        return self.known_by if isinstance(self.known_by, str) else self.known_by()

    @functools.cached_property
    def size(self) -> tuple[int, int, int]:
        """Height, width and channels of its images."""
        store, _ = pictures_below(self.store)
        if isinstance(store, EncodedStore):
            channels, height, width = store.size
            return height, width, channels
        height, width, channels = self.store.read(np.arange(1)).shape[1:]
        return height, width, channels

    @property
    def samples_sha256(self) -> str:
        """Identity of the split for pairing outcomes."""
        return self.identity

    def name(self, i: int) -> str:
        """Return what to call a sample: its file, or its number."""
        store: object = self.store
        while isinstance(store, _View):
            i, store = int(store.index[i]), store.store
        files = store.files if isinstance(store, CachedStore) else store
        return shown(files.name(i)) if isinstance(files, EncodedStore) else f"image {i}"

    def subset(self, index_N: NDArray[np.int64]) -> Split:
        """Return the split of the samples `index_N`, in that order."""
        order = hashlib.sha256(np.ascontiguousarray(index_N).tobytes()).hexdigest()
        return dataclasses.replace(
            self,
            store=_View(self.store, index_N),
            labels=self.labels[index_N],
            known_by=lambda: samples_digest([self.identity, order]),
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
        parts = [index[start : start + batch_size] for start in range(0, len(index), batch_size)]
        if len(parts) < 2:
            for part in parts:
                x, y = self.pixels(part)
                yield normalise(x, self.preprocessing), y
            return
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as ahead:  # the next batch, while this one is computed with
            coming = ahead.submit(self.pixels, parts[0])
            for following in [*parts[1:], None]:
                x, y = coming.result()
                if following is not None:
                    coming = ahead.submit(self.pixels, following)
                yield normalise(x, self.preprocessing), y

    def again(self, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Return the `batches` as something that can be gone through several times; nothing is kept between."""
        return _Again(self, batch_size)

    def tensor(self) -> Tensor:
        """Return all images preprocessed, (N, C, H, W) float32; for calibration sets."""
        return torch.cat([x for x, _ in self.batches(256)])


@dataclasses.dataclass(frozen=True)
class _Again:
    split: Split
    batch_size: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.split.batches(self.batch_size)


@dataclasses.dataclass(frozen=True)
class _View:
    store: Store
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index_N: NDArray[np.int64]) -> Pixels:
        return self.store.read(self.index[index_N])


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset(Showing):
    """A training and an evaluation split.

    Attributes:
        train: For calibration, fine-tuning and every choice of settings.
        val: For the figures that are reported; never for a choice.
        notes: What the reader of a report should know, such as a split that was drawn from one folder.
    """

    train: Split
    val: Split
    notes: tuple[str, ...] = ()

    def shows(self) -> Mapping[str, str]:
        """Return how many images its splits have."""
        return {
            "train": f"{len(self.train)} images",
            "val": f"{len(self.val)} images",
            "classes": _named(self.val.classes),
            **({"notes": "; ".join(self.notes)} if self.notes else {}),
        }


def _named(classes: Sequence[str], most: int = 3) -> str:
    """Return how many classes there are, and the names of the first."""
    names = ", ".join(classes[:most]) + (", ..." if len(classes) > most else "")
    return f"{len(classes)} ({names})" if classes else "none"


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
    def of(cls, spec: ModelSpec | Network) -> Inputs:
        """Return what `spec` says."""
        return cls(spec.input_shape, spec.num_classes or 0, spec.preprocessing, spec.labels)

    @property
    def classes(self) -> int:
        """Number of classes; a single output tells two apart."""
        return 2 if self.outputs == 1 else self.outputs


def load_dataset(
    source: Any,
    spec: ModelSpec | Network | Inputs,
    *,
    seed: int = 0,
    labels: Mapping[str, str] | None = None,
    skip_corrupt: bool = False,
) -> Dataset:
    """Return the data set at `source`, ready for the network of `spec`.

    Args:
        source: One of the forms of the command line's ``--data``, or an object of your own (`compress.data.sources.objects`).
        spec: Gives the input size, the preprocessing, and the labels that class folders are matched to by name.
        seed: Draws the split where `source` has only one.
        labels: Label of the checkpoint for each class folder, for a subset or other names.
        skip_corrupt: Whether images that cannot be read are left out, with a note; each is decoded once to know.

    Raises:
        DataError: Nothing is there, it holds no images, or its classes do not fit the checkpoint.
    """
    inputs = Inputs.of(spec) if isinstance(spec, ModelSpec | Network) else spec
    how = Reading(inputs, seed, dict(labels) if labels is not None else None, skip_corrupt)
    plugin = sources.find(source)
    if inputs.shape[0] not in (1, 3) and not plugin.ANY_CHANNELS:
        raise DataError(
            f"images have 1 or 3 channels, the network reads {inputs.shape[0]}",
            where=str(source),
            remedy="in Python, build a Split from a Store of your own",
        )
    return plugin.load(source, how)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a data set is read.

    Attributes:
        inputs: The network's.
        seed: Draws the split where there is only one.
        labels: As in `match_classes`.
        skip_corrupt: Whether images that cannot be read are left out.
    """

    inputs: Inputs
    seed: int = 0
    labels: Mapping[str, str] | None = None
    skip_corrupt: bool = False


MakeStore = Callable[[Samples, Sequence[int]], "EncodedStore"]
"""Makes the store of those samples of a split that are used."""


def assemble(
    train: Samples | None, val: Samples, source: str, how: Reading, make: MakeStore, notes: Sequence[str] = ()
) -> Dataset:
    """Return the data set of what a source found.

    Args:
        train: The training split, or None where there is one split only.
        val: The evaluation split, or everything.
        source: What it was called.
        how: How it is read.
        make: Makes the stores.
        notes: What the reader of a report should know.

    Raises:
        DataError: The classes do not fit the checkpoint.
    """
    parts = [val] if train is None else [train, val]
    told = [*notes, *(note for part in parts for note in part.notes)]
    try:
        numbering = number(parts, how.inputs, how.labels)
    except DataError as e:
        raise DataError(e.what, where=e.where, remedy="; ".join([e.remedy or "", *told])) from e
    splits = []
    for part in parts:
        split, left = _split(part, how, make, numbering)
        splits.append(split)
        told += left
    told += numbering.notes
    told += absent_notes({shown(p.root): s for p, s in zip(parts, splits, strict=True)}, numbering)
    if train is not None:
        return Dataset(splits[0], splits[1], tuple(told))
    both = halves(splits[0], how.seed, source)
    return dataclasses.replace(both, notes=(*both.notes, *told))


def halves(whole: Split, seed: int, source: str) -> Dataset:
    """Return a data set whose splits are halves of `whole`, drawn by `seed`.

    Raises:
        DataError: It is a single image.
    """
    if len(whole) < 2:
        raise DataError("holds a single image", where=source, remedy="give at least two, one to calibrate, one to evaluate")
    train, val = whole.part(0.5, seed)
    note = f"{shown(source)} has one split: {len(train)} images (seed {seed}) calibrate or train, the other {len(val)} evaluate"
    return Dataset(train, val, (note,))


def _split(found: Samples, how: Reading, make: MakeStore, numbering: Numbering) -> tuple[Split, list[str]]:
    """Return the split of some samples, and notes on those that are left out as they cannot be read."""
    outputs = numbering.outputs
    keep = [i for i, name in enumerate(found.names) if name in outputs]
    files = make(found, keep)
    notes = []
    if how.skip_corrupt and (bad := damaged(files)):
        some = "; ".join(f"{shown(files.name(i))}: {what}" for i, what in list(bad.items())[:5])
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        notes.append(f"{shown(found.root)}: {len(bad)} of {len(keep)} images cannot be read and are left out: {some}{more}")
        keep = [k for i, k in enumerate(keep) if i not in bad]
        if not keep:
            raise DataError("holds no image that can be read", where=shown(found.root), remedy="replace the files")
        files = make(found, keep)
    y_N = np.array([outputs[found.names[i]] for i in keep], dtype=np.int64)

    def known_by() -> str:
        return samples_digest([f"{content}={y}" for content, y in zip(files.contents(), y_N, strict=True)])

    channels, height, width = how.inputs.shape
    small = len(keep) * channels * height * width <= MEMORY_BUDGET_BYTES
    store: Store = CachedStore(files) if small else files
    return Split(store, y_N, numbering.classes, how.inputs.preprocessing, known_by), notes


def damaged(store: EncodedStore) -> dict[int, str]:
    """Return which images cannot be read, and why; each is decoded whole."""

    def wrong(i: int) -> str | None:
        try:
            store.picture(i)
        except DataError as e:
            return e.what
        return None

    return {i: what for i, what in enumerate(_each(wrong, range(len(store)))) if what is not None}


@dataclasses.dataclass(frozen=True)
class Numbering:
    """Which class is which output, once for all splits of a data set.

    Attributes:
        outputs: Output of each class that is used.
        classes: Name of each output.
        expected: Outputs that the data set could have images of.
        notes: What the reader of a report should know.
    """

    outputs: Mapping[str, int]
    classes: tuple[str, ...]
    expected: frozenset[int]
    notes: tuple[str, ...] = ()


def number(parts: Sequence[Samples], inputs: Inputs, labels: Mapping[str, str] | None) -> Numbering:
    """Return the numbers of the classes over both splits of a data set, so that a class has one number in both.

    Args:
        parts: The training and the evaluation split, or the only one.
        inputs: The network's.
        labels: As in `match_classes`.

    Raises:
        DataError: The classes do not fit the outputs, or the splits name them differently.
    """
    if inputs.outputs and any(part.numbered is not None for part in parts):
        return _numbered(parts, inputs)
    names = [set(part.names) for part in parts]
    union = sorted(set().union(*names))
    if not inputs.outputs:  # labels mean nothing to it: they only spread the images that are taken
        return Numbering({name: i for i, name in enumerate(union)}, tuple(map(shown, union)), frozenset())
    where = shown(parts[0].root if len(parts) == 1 else parts[0].root.parent)
    listed = all(part.listed for part in parts)
    free = labels is None and inputs.labels is None
    by_alphabet = free and not (listed and _numbers(union) is not None)
    if labels is None:
        _refuse_nested(parts, union, inputs)
    notes: list[str] = []
    spelled: dict[str, str] = {}
    if by_alphabet:
        spelled = _one_spelling(names, inputs.classes)
        names = [{spelled.get(name, name) for name in part} for part in names]
        union = sorted(set().union(*names))
        notes += _spelling_notes(spelled)
        _refuse_other_names(parts, names)
        bare = sorted({name for part in parts for name, _ in part.without} - set(union))
        if bare and len(union) < inputs.classes == len(union) + len(bare):
            union = sorted([*union, *bare])
    for part in parts:
        for name, what in part.without:
            if what and name in (labels if labels is not None else {*union, *(inputs.labels or ())}):
                raise DataError(
                    f"class folder '{shown(name)}' holds no picture of a kind that is read, but {what}",
                    where=shown(part.root),
                    remedy="convert them to PNG or JPEG",
                )
    if free and listed:
        _refuse_marks(union, where)
    outputs, classes = match_classes(union, inputs, labels, where, listed=listed)
    if labels is None:
        _refuse_two_folders(parts, outputs)
    if labels is None and inputs.labels is not None:
        notes += _spelling_notes({name: classes[outputs[name]] for name in union})
    outputs |= {name: outputs[counts] for name, counts in spelled.items()}
    if by_alphabet:
        notes += _order_notes(union, outputs, listed=listed)
    elif free and listed:
        notes += _number_notes(union, outputs)
    expected = outputs.values() if labels is not None else range(len(classes))
    return Numbering(outputs, classes, frozenset(expected), tuple(notes))


def by_number(
    numbers: Sequence[int], names: Sequence[str], how: Reading, where: str
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return what `Samples` calls the classes of a data set that numbers them, and its `numbered`.

    Its numbers are the network's outputs, as a training on it has them, unless the network names its classes in another order,
    or the user does.

    Args:
        numbers: Of the class of each picture.
        names: The class of each number.
        how: How the data set is read.
        where: For the error.

    Raises:
        DataError: A picture has no class, or one whose name two classes have.
    """
    strange = next((n for n in numbers if not 0 <= n < len(names)), None)
    if strange is not None:
        raise DataError(
            f"has a picture of class {strange}, its classes are 0 to {len(names) - 1}",
            where=where,
            remedy="leave out what has no label",
        )
    known = how.inputs.labels
    if how.labels is None and (known is None or [*map(folded, known)] == [*map(folded, names)]):
        return tuple(str(n) for n in numbers), tuple(names)
    shared = _shared_names(names)
    twice = next((names[n] for n in set(numbers) if names[n] in shared), None)
    if twice is not None:
        raise DataError(f"several classes are called '{shown(twice)}'", where=where, remedy="give each class a name of its own")
    return tuple(names[n] for n in numbers), None


def _numbered(parts: Sequence[Samples], inputs: Inputs) -> Numbering:
    """Return the numbers that the data set itself has for its classes.

    Raises:
        DataError: The splits differ in them, or they are not as many as the network's outputs.
    """
    where = shown(parts[0].root if len(parts) == 1 else parts[0].root.parent)
    classes = next(part.numbered for part in parts if part.numbered is not None)
    outputs = {str(i): i for i in range(len(classes))}
    for part in parts:  # one without names has the same numbers
        if part.numbered not in (None, classes) or not outputs.keys() >= set(part.names):
            raise DataError(
                "the splits number their classes differently",
                where=where,
                remedy="give both the same classes in the same order",
            )
    if len(classes) != inputs.classes:
        raise DataError(
            f"has {len(classes)} classes, the network has {inputs.classes}",
            where=where,
            remedy=f"use the data the network was trained for, or map a subset with --labels; found: {_some(classes)}",
        )
    return Numbering(outputs, inputs.labels or tuple(map(shown, classes)), frozenset(outputs.values()))


def _spelling_notes(spelled: Mapping[str, str]) -> list[str]:
    """Return a note on names that were taken for others of another spelling."""
    other = sorted(f"'{shown(name)}' is {shown(counts)}" for name, counts in spelled.items() if name != counts)
    return [f"class names are matched without regard to their spelling: {', '.join(other[:5])}"] if other else []


def _refuse_other_names(parts: Sequence[Samples], names: Sequence[set[str]]) -> None:
    """Refuse splits that each have a class of their own: where only the alphabet counts, every class behind it would shift."""
    if len(parts) < 2:
        return
    own = [sorted(names[0] - names[1]), sorted(names[1] - names[0])]
    if own[0] and own[1]:
        places = [p.root.name for p in parts] if parts[0].root != parts[1].root else ["training", "evaluation"]
        only = "; ".join(f"only in {shown(p)}: {_some(o)}" for p, o in zip(places, own, strict=True))
        raise DataError(
            f"the splits name their classes differently ({only})",
            where=shown(parts[0].root.parent),
            remedy="give a class the same name in both, or say with --labels which output each is",
        )


_MARKS = frozenset({"nan", "null", "none", "na", "n/a", "inf", "-inf", "undefined", "missing", "unknown", "?", "-"})
"""What tools write where a number is missing."""


def _refuse_marks(names: Sequence[str], where: str) -> None:
    """Refuse marks of missing labels among numbers: they are no class."""
    marks = [name for name in names if name.strip().lower() in _MARKS]
    rest = [name for name in names if name not in marks]
    if marks and rest and _numbers(rest) is not None:
        raise DataError(
            f"labels are numbers and '{shown(marks[0])}', which is not a number",
            where=where,
            remedy="take the lines without a label out, or say with --labels which output each label is",
        )


def _refuse_two_folders(parts: Sequence[Samples], outputs: Mapping[str, int]) -> None:
    """Refuse two folders of one split that differ in spelling alone and would be one output."""
    for part in parts:
        if part.listed:
            continue
        first: dict[int, str] = {}
        for name in sorted({name for name in part.names if name in outputs}):
            other = first.setdefault(outputs[name], name)
            if other != name:
                raise DataError(
                    f"class folders '{shown(other)}' and '{shown(name)}' differ in spelling alone, and would be one output",
                    where=shown(part.root),
                    remedy="put their images into one folder, or say with --labels which output each is",
                )


def _refuse_nested(parts: Sequence[Samples], union: Sequence[str], inputs: Inputs) -> None:
    for part in parts:
        if inputs.labels is None and not part.listed:
            _refuse_split_among_classes(part)
        if not part.nested:
            continue
        tops, inside = sorted(set(part.names)), set(part.nested)
        if inputs.labels is not None:
            open_which = not set(union) <= set(inputs.labels) and inside <= set(inputs.labels)
        else:
            open_which = len(union) != inputs.classes or len(inside) == inputs.classes
        if open_which:
            raise DataError(
                f"holds folders of classes inside folders of classes: {_some(tops)} over {_some(part.nested)}",
                where=shown(part.root),
                remedy="put the images of a class into one folder, give --data one of the folders, or say with --labels "
                "which output each outer folder is",
            )


def _refuse_split_among_classes(part: Samples) -> None:
    """Refuse a folder that holds the classes again beside an empty one: it would be taken for the class that is missing."""
    empty, tops, depth = {name for name, _ in part.without}, set(part.names), len(part.root.parts)
    inside: dict[str, set[str]] = {}
    for path, name in zip(part.paths, part.names, strict=True):
        below = path.parts[depth + 1 :]
        inside.setdefault(name, set()).add(below[0] if len(below) > 1 else "")
    for name, found in sorted(inside.items()):
        if len(found) > 1 and found & empty and found <= empty | tops:
            raise DataError(
                f"folder '{shown(name)}' holds the classes once more ({_some(sorted(found))}), and "
                f"{_some(sorted(found & empty))} beside it is empty",
                where=shown(part.root),
                remedy="give --data one of the folders, or say with --labels which output each outer folder is",
            )


def _order_notes(names: Sequence[str], outputs: Mapping[str, int], *, listed: bool) -> list[str]:
    """Return a note that says which output each class is, where nothing but the order of the names does."""
    numbers = _numbers(names)
    if numbers is not None and all(numbers[name] == outputs[name] for name in names):
        return []
    ordered = sorted(names, key=lambda n: outputs[n])
    if numbers is not None and not listed:
        by_number = sorted(names, key=numbers.__getitem__)
        misplaced = next((n for n, m in zip(ordered, by_number, strict=True) if n != m), None)
        if misplaced is not None:
            return [
                f"class folders count in alphabetical order, as torchvision's ImageFolder has it: {misplaced} is output "
                f"{outputs[misplaced]}; --labels says it otherwise"
            ]
    shortened = ordered if len(ordered) <= 12 else [*ordered[:3], *ordered[-2:]]
    said = ", ".join(f"{outputs[n]} {shown(n)}" for n in shortened)
    whose = "labels" if listed else "class folders"
    return [f"the checkpoint does not name its outputs, so {whose} count by the alphabet: {said}; --labels says it otherwise"]


def _number_notes(names: Sequence[str], outputs: Mapping[str, int]) -> list[str]:
    """Return a note where numbers in a label file are not the outputs themselves."""
    numbers = _numbers(names)
    assert numbers is not None
    moved = next((n for n in sorted(names, key=numbers.__getitem__) if numbers[n] != outputs[n]), None)
    if moved is None:
        return []
    return [f"the label file's numbers count in their order: '{moved}' is output {outputs[moved]}; --labels says it otherwise"]


def absent_notes(splits: Mapping[str, Split], numbering: Numbering) -> list[str]:
    """Return notes on classes that a split holds no image of, about which its accuracy says nothing."""
    found: dict[frozenset[int], list[str]] = {}
    for name, split in splits.items():
        found.setdefault(numbering.expected - set(split.labels.tolist()), []).append(name)
    return [
        f"{' and '.join(names)}: no images of {_some([numbering.classes[i] for i in sorted(absent)])} "
        f"({len(absent)} of {len(numbering.expected)} classes)"
        for absent, names in found.items()
        if absent
    ]


def _some(names: Sequence[str]) -> str:
    texts = [shown(n) for n in names[:5]]
    return ", ".join(texts) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


_NUMBER = re.compile(r"[-+]?(?P<whole>\d+)(?P<rest>[.,]\d*)?([eE][-+]?\d{1,2})?")


def _numbers(names: Sequence[str]) -> dict[str, Decimal] | None:
    """Return the number that each name is, such as 3 for 3, 03, 3.0, 3,0 and 3e0, or None where one is something else."""
    found = {}
    for name in names:
        match = _NUMBER.fullmatch(name)
        if match is None or len(match["whole"]) > 18:
            return None
        rest = match["rest"] or ""
        if rest.startswith(",") and len(rest) in (1, 4):  # 1,000 may be a thousand
            return None
        found[name] = Decimal(name.replace(",", "."))
    return found


def _plainly(number: Decimal) -> str:
    return str(int(number)) if number == int(number) else f"{number:f}"


def folded(name: str) -> str:
    """Return a class name without what spellings of one name differ in: case, composed letters, spaces and underscores."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name).casefold()).strip()


def _one_spelling(names: Sequence[set[str]], classes: int) -> dict[str, str]:
    """Return, for class names that differ in their spelling alone, the one that counts: the training split's.

    Args:
        names: Of each split, the training split's first.
        classes: Of the network; only where that many are left, spellings within one split are taken for one class.

    Raises:
        DataError: The place in the alphabet depends on the spelling.
    """
    spellings: dict[str, list[str]] = {}
    for part in names:
        for name in sorted(part):
            known = spellings.setdefault(folded(name), [])
            known += [name] if name not in known else []
    several = {key: found for key, found in spellings.items() if len(found) > 1}
    if not several:
        return {}
    if any(len({folded(name) for name in part}) < len(part) for part in names):
        if len(set().union(*names)) == classes or len(spellings) != classes:
            return {}
        if sorted(spellings, key=lambda k: min(spellings[k])) != sorted(spellings, key=lambda k: max(spellings[k])):
            words = next(iter(several.values()))
            raise DataError(
                f"a class is spelled {_some(words)}, and its place in the alphabet depends on that",
                where="--data",
                remedy="write it in one way, or say with --labels which output each is",
            )
    return {name: found[0] for found in several.values() for name in found}


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
    what = "label" if listed else "class folder"
    if labels is not None:
        names = known or tuple(str(i) for i in range(wanted))
        unknown = [v for v in labels.values() if v not in names]
        absent = [k for k in labels if k not in folders]
        if unknown:
            raise DataError(f"the checkpoint has no label '{unknown[0]}'", where="--labels", remedy=nearest(unknown[0], names))
        _refuse_ambiguous(labels.values(), names, "--labels")
        if absent:
            raise DataError(f"no {what} is called '{shown(absent[0])}'", where=where, remedy=nearest(absent[0], folders))
        return {k: names.index(v) for k, v in labels.items()}, names
    if known is not None:
        _refuse_ambiguous(folders, known, where)
        found = _known_as(folders, known)
        strangers = [f for f in folders if f not in found]
        if strangers:
            raise DataError(
                f"{what} '{shown(strangers[0])}' is no label of the checkpoint",
                where=where,
                remedy=nearest(strangers[0], known) + "; map other names with --labels",
            )
        return found, known
    numbers = _numbers(folders) if listed else None
    if numbers is not None:
        return _count(numbers, wanted, where)
    if len(folders) != wanted:
        raise DataError(
            f"has {len(folders)} classes, the network has {wanted}",
            where=where,
            remedy=f"use the data the network was trained for, or map a subset with --labels; found: {_some(folders)}",
        )
    return {f: i for i, f in enumerate(folders)}, tuple(shown(f) for f in folders)


def _shared_names(names: Iterable[str]) -> frozenset[str]:
    """Return the names that stand more than once, in one pass: ImageNet's larger sets have 21,841 classes."""
    return frozenset(name for name, count in Counter(names).items() if count > 1)


def _refuse_ambiguous(names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Refuse a name that several outputs have, as two of ImageNet's classes are cranes: it is open which one is meant."""
    shared = _shared_names(known)
    for name in names:
        if name in shared:
            places = " and ".join(str(i) for i, label in enumerate(known) if label == name)
            raise DataError(
                f"'{shown(name)}' is the label of outputs {places}",
                where=where,
                remedy="give the checkpoint labels that differ, or leave the class out with --labels",
            )


def _known_as(names: Sequence[str], known: Sequence[str]) -> dict[str, int]:
    """Return the output of each name that is a label of the checkpoint, as it stands there, or else in one way only.

    A number is the label of the same value, such as 3.0 for 3; a text is the only label that differs in spelling alone.
    """
    found = {name: known.index(name) for name in names if name in known}
    values = _numbers([*names, *known])
    key: Callable[[str], Hashable] = folded if values is None else values.__getitem__
    same: dict[Hashable, list[int]] = {}
    for i, label in enumerate(known):
        same.setdefault(key(label), []).append(i)
    return found | {n: same[key(n)][0] for n in names if n not in found and len(same.get(key(n), [])) == 1}


def _count(numbers: Mapping[str, Decimal], wanted: int, where: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the output of each number in a label file: itself, or its place among them where they are as many as outputs.

    Raises:
        DataError: They do not fit the outputs, or it is open what -1 means.
    """
    order = sorted(set(numbers.values()))
    if order[0] >= 0 and order[-1] < wanted and all(n == int(n) for n in order):
        return {name: int(n) for name, n in numbers.items()}, tuple(str(i) for i in range(wanted))
    if order[:2] == [-1, 0]:
        raise DataError(
            "labels are -1 and 0 and more: -1 may be a class, or mark pictures without one",
            where=where,
            remedy="take these lines out, or give labels from 0",
        )
    if len(order) == wanted:
        return {name: order.index(n) for name, n in numbers.items()}, tuple(map(_plainly, order))
    raise DataError(
        f"labels run from {_plainly(order[0])} to {_plainly(order[-1])}, the network has {wanted} classes",
        where=where,
        remedy="give labels from 0",
    )
