"""Data sets of the Hugging Face hub or on disk, through the library ``datasets``: ``--data hf:NAME`` or ``hf:NAME:CONFIG``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.folders import Samples, rank_of
from rescompress.core.errors import DataError, ToolMissing, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.data.splits import Dataset, EncodedStore, Reading

FORM = "hf:NAME, a Hugging Face data set"
ANY_CHANNELS = False
_PREFIX = "hf:"


def claims(source: Any) -> bool:
    """Whether it begins with ``hf:``."""
    return isinstance(source, str) and source.startswith(_PREFIX)


def identity(source: str) -> str:
    """Return a hash of what the library knows of the data."""
    splits = _open(source)
    facts = [f"{name} {len(rows)} {getattr(rows, '_fingerprint', '')}" for name, rows in sorted(splits.items())]
    return hashlib.sha256("\n".join([source, *facts]).encode()).hexdigest()


def load(source: str, how: Reading) -> Dataset:
    """Return the splits of a data set; it stays on the disk, memory-mapped.

    Raises:
        DataError: It cannot be loaded, or has no column of images and one of labels.
        ToolMissing: The library is not installed.
    """
    import numpy as np

    from compress.data.splits import assemble
    from compress.data.stores import ItemStore

    splits = _open(source)
    ranks = {rank_of(name): name for name in sorted(splits, reverse=True)}
    held = sorted(rank for rank in ranks if rank)
    names = [ranks[0], ranks[held[0]]] if 0 in ranks and held else list(splits)[:1]
    left = sorted(set(splits) - set(names))
    notes = [f"{source}: {names[-1]} is evaluated on; not read: {', '.join(left)}"] if left else []
    parts, rows_of = [], {}
    for name in names:
        rows = splits[name]
        image, label = _columns(rows.features, source)
        root = Path(source) / name
        rows_of[root] = _Encoded(rows, image)
        texts, numbered = _labels(rows, label, source, how)
        paths = tuple(root / str(i) for i in range(len(rows)))
        parts.append(Samples(paths, texts, root, listed=True, numbered=numbered))

    def make(found: Samples, keep: Sequence[int]) -> EncodedStore:
        called = f"{source}, {found.root.name}"
        return ItemStore(
            rows_of[found.root], np.array(keep, dtype=np.int64), called, how.inputs.shape, how.inputs.preprocessing
        )

    return assemble(parts[0] if len(parts) == 2 else None, parts[-1], source, how, make, notes)


class _Encoded:
    """The encoded images of a split."""

    def __init__(self, rows: Any, column: str) -> None:
        from datasets import Image

        self._rows = rows.select_columns([column]).cast_column(column, Image(decode=False))
        self._column = column

    def __getitem__(self, i: int) -> bytes:
        found = self._rows[i][self._column]
        content = found["bytes"]
        return content if content is not None else Path(found["path"]).read_bytes()


def _open(source: str) -> dict[str, Any]:
    """Return the splits by name.

    Raises:
        DataError: The data set cannot be loaded.
        ToolMissing: The library is not installed.
    """
    try:
        import datasets
    except ImportError as e:
        raise ToolMissing("needs the library datasets", where=source, remedy="pip install 'rescompress[hf]'") from e
    name, _, config = source.removeprefix(_PREFIX).partition(":")
    if not name:
        raise DataError("names no data set", where=source, remedy="write hf:NAME, such as hf:uoft-cs/cifar10")
    try:
        found = datasets.load_dataset(name, config or None)
    except Exception as e:  # the hub's, the file system's and the library's own kinds
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise DataError(
            f"cannot be loaded: {reason[:300]}",
            where=source,
            remedy="check the name and the connection; a data set that was downloaded before is read without one",
        ) from e
    return dict(found) if hasattr(found, "keys") else {"all": found}


def _columns(features: Any, source: str) -> tuple[str, str]:
    """Return the columns of images and labels.

    Raises:
        DataError: Which they are is open.
    """
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    labels = labels or [name for name in kinds if name.lower() in ("label", "labels", "class", "target")]
    if len(images) != 1 or len(labels) != 1:
        shown = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise DataError(
            f"has not one column of images and one of labels: {shown}", where=source, remedy="choose a data set that has"
        )
    return images[0], labels[0]


def _labels(rows: Any, column: str, source: str, how: Reading) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the label of each row as text, and the names of the classes where their numbers are the outputs."""
    from compress.data.splits import by_number

    numbers = rows[column][:] if not isinstance(rows[column], list) else rows[column]
    names = getattr(rows.features[column], "names", None)
    if names is None:
        return tuple(str(n) for n in numbers), None
    if any(not 0 <= n < len(names) for n in numbers):
        raise DataError("has rows without a label", where=source, remedy=nearest(source, ["a split with labels"]))
    return by_number(numbers, names, how, source)
