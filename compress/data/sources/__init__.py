"""Where labelled images come from: each file here is one kind of source, found by its name.

A source is a module with what `Source` names. Third parties add theirs through the entry-point group of this package's name.
Nothing heavy is imported before images are loaded: a finished run is known again by its data's identity alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from compress.files import shown
from rescompress.core import plugins
from rescompress.core.errors import DataError, nearest

if TYPE_CHECKING:
    from compress.data.splits import Dataset, Reading

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:")
PACKAGE = "compress.data.sources"


class Source(Protocol):
    """One kind of source.

    Attributes:
        FORM: What it reads, a phrase for help and errors.
        ANY_CHANNELS: Whether its images may have another number of channels than 1 and 3.
    """

    FORM: str
    ANY_CHANNELS: bool

    def claims(self, source: Any) -> bool:
        """Whether this is one of its kind; at most one kind claims a source."""

    def identity(self, source: Any) -> str:
        """Return a hash that changes when the data does."""

    def load(self, source: Any, how: Reading) -> Dataset:
        """Return the data set."""


def is_name(source: str) -> bool:
    """Whether a source is a name such as ``builtin:digits`` or ``hf:cifar10``, no path."""
    return _SCHEME.match(source) is not None


def forms() -> str:
    """Return what can be read, for an error."""
    return "; ".join(_plugin(name).FORM for name in plugins.names(PACKAGE))


def _plugin(name: str) -> Source:
    return cast(Source, plugins.load(PACKAGE, name, what="source of images", offers=Source))


def find(source: Any) -> Source:
    """Return the kind of a source.

    Args:
        source: One of the forms of ``--data``, or an object.

    Raises:
        DataError: There is no such thing, or it is of no known kind.
    """
    for name in plugins.names(PACKAGE):
        found = _plugin(name)
        if found.claims(source):
            return found
    if not isinstance(source, str):
        raise DataError(f"a {type(source).__name__} is no data set", remedy=f"data is {forms()}")
    if source.startswith("builtin:"):
        raise DataError(f"unknown built-in data '{source}'", where="--data", remedy=nearest(source, ["builtin:digits"]))
    path = Path(source)
    if not path.exists():
        raise DataError("no such file or folder", where=source, remedy=f"data is {forms()}")
    what = "is no data set" if path.is_file() else "is a pipe or a device, no data set"
    raise DataError(what, where=shown(source), remedy=f"data is {forms()}")
