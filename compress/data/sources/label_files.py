"""A label file by its own name, wherever its pictures are: ``--data pictures/my_split.csv``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import label_files
from compress.files import content_of, contents_of, suffix_of
from compress.folders import splits_of_table, without_repeats

if TYPE_CHECKING:
    from compress.data.splits import Dataset, Reading

FORM = "a .csv, .tsv or .json of files and labels"
ANY_CHANNELS = False


def claims(source: Any) -> bool:
    """Whether it is such a file."""
    return isinstance(source, str) and suffix_of(source) in (".csv", ".tsv", ".json") and Path(source).is_file()


def identity(source: str) -> str:
    """Return a hash of the table and of the pictures that it names.

    Raises:
        DataError: It cannot be read.
    """
    rows = label_files.read(Path(source), Path(source).parent).labels
    found = [content_of(source), *contents_of(row.path for row in rows)]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def load(source: str, how: Reading) -> Dataset:
    """Return the splits that the table states, or halves.

    Raises:
        DataError: It names no pictures, or its labels do not fit the network.
    """
    from compress.data.sources.folders import in_files
    from compress.data.splits import assemble

    found = splits_of_table(Path(source))
    return assemble(found.train, without_repeats(found.val), source, how, in_files(how), found.notes)
