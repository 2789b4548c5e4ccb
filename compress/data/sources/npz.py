"""Arrays in an ``.npz`` file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.files import content_of, shown
from compress.folders import rank_of
from rescompress.core.errors import DataError
from rescompress.core.outcomes import samples_digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compress.data.splits import Dataset, Inputs, Reading, Split

FORM = "an .npz with x (N,H,W,C uint8) and y"
ANY_CHANNELS = False


def claims(source: Any) -> bool:
    """Whether it is such a file."""
    return isinstance(source, str) and source.lower().endswith(".npz") and Path(source).is_file()


def identity(source: str) -> str:
    """Return the hash of the file."""
    return content_of(source)


def load(source: str, how: Reading) -> Dataset:
    """Return the splits of an archive.

    Raises:
        DataError: It is damaged, or its arrays do not fit together or to the network.
    """
    import numpy as np

    from compress.data.splits import Dataset, Numbering, absent_notes, halves

    path, inputs = Path(source), how.inputs
    try:
        with np.load(path, allow_pickle=False) as archive:
            parts = _parts_of(archive.files)
            wanted = {key for part in parts.values() for key in part} | ({"classes"} & set(archive.files))
            arrays = {k: archive[k] for k in wanted}
    except Exception as e:  # numpy, zipfile and zlib raise a dozen kinds for damaged archives
        raise DataError(f"is no readable .npz: {e}", where=shown(path), remedy="write it with numpy.savez(x=..., y=...)") from e
    classes = tuple(str(c) for c in arrays["classes"].flat) if "classes" in arrays else None
    if classes is not None and arrays["classes"].ndim != 1:
        raise DataError("classes is no list of names", where=shown(path), remedy="save one name per class")
    if classes is not None and len(set(classes)) < len(classes):
        twice = next(c for c in classes if classes.count(c) > 1)
        raise DataError(f"classes holds '{shown(twice)}' twice", where=shown(path), remedy="give each class a name of its own")
    splits = {r: array_split(arrays[x], arrays[y], classes, inputs, shown(path)) for r, (x, y) in parts.items()}
    if 0 not in splits or len(splits) < 2:
        if len(splits) != 1:
            raise DataError("has no arrays x and y", where=shown(path), remedy="write it with numpy.savez(x=..., y=...)")
        return halves(next(iter(splits.values())), how.seed, str(path))
    held = min(r for r in splits if r)
    used = [key for r in (0, held) for key in parts[r]]
    left = sorted(key for r, keys in parts.items() if r not in (0, held) for key in keys)
    notes = (f"{shown(path)}: {', '.join(used)} are read; {', '.join(left)} are not",) if left else ()
    both = [*splits[0].labels.tolist(), *splits[held].labels.tolist()]
    numbering = Numbering({}, splits[0].classes, frozenset(both))
    named = {f"{shown(path)}: {parts[r][0]}": splits[r] for r in (0, held)}
    return Dataset(splits[0], splits[held], (*notes, *absent_notes(named, numbering)))


def _parts_of(keys: Sequence[str]) -> dict[int, tuple[str, str]]:
    """Return the images and labels of each split in an archive, by `rank_of` its name; of one without a name, by -1."""
    named = {rank: (f"x_{k[2:]}", f"y_{k[2:]}") for k in keys if k.startswith("x_") and (rank := rank_of(k[2:])) is not None}
    whole = {-1: ("x", "y")} if {"x", "y"} <= set(keys) else {}
    named = {rank: pair for rank, pair in named.items() if set(pair) <= set(keys)}
    return named if 0 in named and len(named) > 1 else whole or named


def array_split(
    x: NDArray[np.generic], y: NDArray[np.generic], classes: tuple[str, ...] | None, inputs: Inputs, where: str
) -> Split:
    """Return images in memory as a split.

    Args:
        x: Images (N, H, W) or (N, H, W, C), uint8.
        y: Labels.
        classes: Their names, or None.
        inputs: The network's.
        where: For errors.

    Raises:
        DataError: They do not fit together or to the network.
    """
    import numpy as np
    from PIL import Image

    from compress.data.splits import MemoryStore, Split, match_classes
    from compress.pixels import fit

    channels = inputs.shape[0]
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.dtype != np.uint8 or x.shape[3] not in (1, 3):
        raise DataError(f"x is {x.dtype} of shape {x.shape}", where=where, remedy="x is uint8 of shape (N, H, W, C), C 1 or 3")
    if x.size == 0:
        what = "holds no images" if len(x) == 0 else f"holds images of {x.shape[1]} x {x.shape[2]} pixels"
        raise DataError(what, where=where, remedy="x is uint8 of shape (N, H, W, C)")
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"y is {y.dtype} of shape {y.shape}", where=where, remedy=f"y is {len(x)} whole numbers")
    if not inputs.outputs:  # labels mean nothing to it
        y, classes = np.zeros(len(x), dtype=np.int64), None
    wanted = len(classes) if classes is not None else inputs.classes or 1
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
