"""Folders of pictures: class folders, or a label file beside the pictures."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.files import IMAGE_SUFFIXES, contents_of, suffix_of, walk
from compress.folders import FORMS, files_elsewhere, pictures_alone, read_splits, without_repeats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.data.splits import Dataset, EncodedStore, Reading
    from compress.folders import Samples

FORM = FORMS
ANY_CHANNELS = False
LARGEST_TABLE = 64 * 2**20
"""Bytes; beyond it lie archives beside a data set, not labels. Images are read whatever their size."""


def claims(source: Any) -> bool:
    """Whether it is a folder that holds no shards."""
    from compress.data.sources import shards

    return isinstance(source, str) and Path(source).is_dir() and not shards.claims(source)


def identity(source: str) -> str:
    """Return a hash of the names and the content of all files.

    Links are followed, as where images are loaded, and what a label file names elsewhere belongs to it.

    Raises:
        DataError: A part of it cannot be read.
    """
    files = [(e.path.removeprefix(source).lstrip(os.sep), e.path) for e in walk(source) if e.regular]
    if any(suffix_of(name) not in IMAGE_SUFFIXES for name, _ in files):
        files += [(path, path) for path in files_elsewhere(Path(source))]
    by_content = {path for _, path in files if suffix_of(path) in IMAGE_SUFFIXES or Path(path).stat().st_size <= LARGEST_TABLE}
    contents = dict(zip(by_content, contents_of(by_content), strict=True))
    digest = hashlib.sha256()
    for name, path in files:
        known = contents.get(path) or str(Path(path).stat().st_size)
        digest.update(os.fsencode(name) + b"\0" + known.encode() + b"\n")
    return digest.hexdigest()


def load(source: str, how: Reading) -> Dataset:
    """Return the splits of a folder.

    Raises:
        DataError: It holds no pictures with labels, or the classes do not fit the network.
    """
    from compress.data.splits import assemble

    found = read_splits(Path(source)) if how.inputs.outputs else pictures_alone(Path(source))
    return assemble(found.train, without_repeats(found.val), source, how, in_files(how), found.notes)


def in_files(how: Reading) -> Any:
    """Return what makes a store of files."""
    from compress.data.splits import FileStore

    def make(found: Samples, keep: Sequence[int]) -> EncodedStore:
        return FileStore(tuple(found.paths[i] for i in keep), how.inputs.shape, how.inputs.preprocessing)

    return make
