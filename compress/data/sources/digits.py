"""scikit-learn's 1,797 handwritten digits."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rescompress.core.errors import DataError

if TYPE_CHECKING:
    from compress.data.splits import Dataset, Reading

NAME = "builtin:digits"
FORM = NAME
ANY_CHANNELS = True


def claims(source: Any) -> bool:
    """Whether it is their name."""
    return bool(source == NAME) if isinstance(source, str) else False


def identity(source: str) -> str:
    """Return their name: they never change."""
    return source


def load(source: str, how: Reading) -> Dataset:
    """Return the digits (8x8, 17 grey levels), 80 % to train and 20 % to evaluate.

    Raises:
        DataError: The network has other classes.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    from compress.data.sources.npz import array_split
    from compress.data.splits import Dataset

    bunch = load_digits()
    if how.inputs.shape[0] not in (1, 3):
        raise DataError(
            f"are grey pictures, the network reads {how.inputs.shape[0]} channels", where=NAME, remedy="give your own --data"
        )
    if how.inputs.outputs not in (0, 10):
        raise DataError("are ten digits, the network has another number of classes", where=NAME, remedy="give your own --data")
    grey = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    whole = array_split(grey, np.asarray(bunch.target), None, how.inputs, NAME)
    train, val = dataclasses.replace(whole, flips=False).part(0.2, 0)
    return Dataset(train, val)
