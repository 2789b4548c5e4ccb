"""Labelled images: where they come from, how they become a network's input, and how training reads them.

Its names are looked up when they are used: what a data set is called and holds is known without torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.data.splits import DIGITS as DIGITS
    from compress.data.splits import CachedStore as CachedStore
    from compress.data.splits import Dataset as Dataset
    from compress.data.splits import EncodedStore as EncodedStore
    from compress.data.splits import FileStore as FileStore
    from compress.data.splits import Inputs as Inputs
    from compress.data.splits import MemoryStore as MemoryStore
    from compress.data.splits import Split as Split
    from compress.data.splits import Store as Store
    from compress.data.splits import load_dataset as load_dataset
    from compress.data.splits import match_classes as match_classes


def __getattr__(name: str) -> Any:
    if name.startswith("__") or importlib.util.find_spec(f"compress.data.{name}") is not None:
        raise AttributeError(name)  # Python imports what is a module of its own
    return getattr(importlib.import_module("compress.data.splits"), name)
