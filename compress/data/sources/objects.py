"""An object of the user's own, in Python: anything with images and labels by number, as torch's data sets are.

``load_dataset(mine, spec)`` takes one such object, a pair of them (to train on, to evaluate on), or a mapping with ``train``
and ``val``. An item is ``(image, label)``; an image is a Pillow image, the content of an image file, or a uint8 array
(H, W) or (H, W, C), before any transform. Labels are read from ``targets`` where the object has them, so that no image is
decoded for them; classes are named by ``classes``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.folders import Samples
from rescompress.core.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.data.splits import Dataset, EncodedStore, Reading

FORM = "in Python, an object with images and labels by number"
ANY_CHANNELS = False


def claims(source: Any) -> bool:
    """Whether it is no text."""
    return not isinstance(source, str) and (isinstance(source, Mapping) or hasattr(source, "__getitem__"))


def identity(source: Any) -> str:
    """Return a hash of its type: objects are for Python, where no stage is known again."""
    return hashlib.sha256(repr(type(source)).encode()).hexdigest()


def load(source: Any, how: Reading) -> Dataset:
    """Return the splits of an object.

    Raises:
        DataError: It has no images and labels by number.
    """
    import numpy as np

    from compress.data.splits import assemble
    from compress.data.stores import ItemStore

    names = ("train", "val")
    if isinstance(source, Mapping):
        if set(source) - set(names) or "val" not in source:
            raise DataError("is no mapping of train and val", remedy="give {'train': ..., 'val': ...}")
        objects = {name: source[name] for name in names if name in source}
    elif isinstance(source, tuple) and len(source) == 2 and all(hasattr(part, "__getitem__") for part in source):
        objects = dict(zip(names, source, strict=True))
    else:
        objects = {"val": source}
    parts, items = {}, {}
    for name, one in objects.items():
        root = Path(f"<{type(one).__name__}>") / name
        paths = tuple(root / str(i) for i in range(_length(one)))
        texts, numbered = _labels(one, how, str(root))
        parts[name] = Samples(paths, texts, root, listed=True, numbered=numbered)
        items[root] = _Images(one)

    def make(found: Samples, keep: Sequence[int]) -> EncodedStore:
        index = np.array(keep, dtype=np.int64)
        return ItemStore(items[found.root], index, str(found.root), how.inputs.shape, how.inputs.preprocessing)

    return assemble(parts.get("train"), parts["val"], str(parts["val"].root.parent), how, make)


class _Images:
    def __init__(self, items: Any) -> None:
        self._items = items

    def __getitem__(self, i: int) -> Any:
        return self._items[i][0]


def _length(one: Any) -> int:
    try:
        found = len(one)
    except TypeError as e:
        raise DataError(f"a {type(one).__name__} has no length", remedy="give an object with __len__ and __getitem__") from e
    if not found:
        raise DataError(f"a {type(one).__name__} without images", remedy="give an object with images")
    return found


def _labels(one: Any, how: Reading, where: str) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the name of each item's class, or its number as text; and the names of all where their numbers are the outputs."""
    from compress.data.splits import by_number

    targets = getattr(one, "targets", None)
    try:
        numbers = list(targets) if targets is not None else [one[i][1] for i in range(len(one))]
    except Exception as e:  # whatever code of others raises
        raise DataError(f"labels cannot be read: {type(e).__name__}: {e}", remedy="items are (image, label)") from e
    if len(numbers) != len(one):
        raise DataError(f"has {len(numbers)} targets for {len(one)} images", remedy="give one target for each image")
    if targets is not None:
        _check_targets(one, numbers)
    names = getattr(one, "classes", None)
    if numbers and all(isinstance(number, str) for number in numbers):
        return tuple(numbers), None
    whole = []
    for number in numbers:
        try:
            n = int(number)
            exact = not isinstance(number, str) and n == number
        except (TypeError, ValueError, OverflowError) as e:
            raise DataError(f"a label is {number!r}", remedy="labels are whole numbers or names") from e
        if not exact:
            raise DataError(f"a label is {number!r}", remedy="labels are whole numbers or names, not both")
        whole.append(n)
    if names is None:
        return tuple(map(str, whole)), None
    return by_number(whole, [str(name) for name in names], how, where)


def _check_targets(one: Any, numbers: Sequence[Any]) -> None:
    """Refuse an object whose items have other labels than its ``targets``, as a transform of labels makes them.

    Raises:
        DataError: One of the first, middle and last item has.
    """
    for i in sorted({0, len(numbers) // 2, len(numbers) - 1}):
        try:
            item = one[i][1]
            same = bool(item == numbers[i])
        except Exception as e:  # whatever code of others raises
            raise DataError(f"item {i} cannot be read: {type(e).__name__}: {e}", remedy="items are (image, label)") from e
        if not same:
            raise DataError(
                f"item {i} has the label {item}, its targets say {numbers[i]}",
                where=type(one).__name__,
                remedy="give items whose labels are the targets, or an object without targets",
            )
