"""The files of a data set: one walk for the loader and for the identity, and what a file holds as a hash.

Nothing heavy is imported here, so a finished run is known again without torch.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from rescompress.core.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
OTHER_IMAGES = frozenset(
    {".gif", ".jfif", ".jpe", ".pbm", ".pnm", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".tga", ".svg", ".dcm", ".ico"}
)
"""Suffixes of pictures that are not read; a data set that holds some is told so."""
_LITTER = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__"})
_APPLE_DOUBLE = b"\x00\x05\x16\x07"


class Entry(NamedTuple):
    """A file below a folder.

    Attributes:
        path: As it was walked to, through links; bytes that are no UTF-8 are escaped as Python does.
        regular: False for a pipe, a device, and a link to nothing.
    """

    path: str
    regular: bool = True

    @property
    def suffix(self) -> str:
        """In lower case, with the dot."""
        return suffix_of(self.path)

    @property
    def is_image(self) -> bool:
        """Whether its name says that it is a picture that can be read."""
        return self.suffix in IMAGE_SUFFIXES and not _is_apple_double(self.path)


def suffix_of(path: str) -> str:
    """Return the suffix of a file's name in lower case, with the dot."""
    name = path[path.rfind(os.sep) + 1 :]
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def shown(name: str | os.PathLike[str]) -> str:
    r"""Return a name as text that any file or terminal takes: bytes that are no UTF-8 as ``\xe4``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_litter(name: str) -> bool:
    """Whether a folder of this name was left by a system, not by whoever made the data set."""
    return name.startswith(".") or name.lower() in _LITTER


def walk(root: str | os.PathLike[str]) -> Iterator[Entry]:
    """Yield the files below `root`, through links to folders too, in the order of their names.

    A link that leads back to a folder above itself is not entered again.

    Raises:
        DataError: A folder cannot be read.
    """
    yield from _walk(os.fspath(root), ())


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    entries = list_folder(folder)
    here = os.stat(folder)
    chain = (*above, (here.st_dev, here.st_ino))
    for entry in entries:
        if _is_dir(entry):
            inside = entry.stat()
            if (inside.st_dev, inside.st_ino) not in chain:
                yield from _walk(entry.path, chain)
        else:
            yield Entry(entry.path, _is_file(entry))


def list_folder(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return what stands in a folder, by name.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda e: e.name)
    except OSError as e:
        raise _unreadable(folder, e) from e


def _unreadable(path: str | os.PathLike[str], error: OSError) -> DataError:
    remedy = "change its access rights, or take it out"
    return DataError(f"cannot be read: {error.strerror}", where=shown(path), remedy=remedy)


def folders_in(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of the folders in a folder, through links too, without what systems leave behind."""
    return [e.name for e in list_folder(folder) if _is_dir(e) and not is_litter(e.name)]


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_apple_double(path: str) -> bool:
    """Whether this is what macOS puts beside a file on foreign disks: ``._photo.jpg`` holds no picture."""
    if not os.path.basename(path).startswith("._"):
        return False
    try:
        with open(path, "rb") as f:
            return f.read(4) == _APPLE_DOUBLE
    except OSError:
        return False


SETTLED_NS = 2 * 10**9
"""A file that was written more recently may change again within one tick of the file system's clock."""
WHOLE_BYTES = 2**20
"""Files below are read in one piece."""
_known: dict[tuple[str, int, int, int, int, int], str] = {}


def content_of(path: str) -> str:
    """Return the SHA-256 of a file's content; a file that did not change since is not read twice by one process.

    Raises:
        DataError: It cannot be read.
    """
    try:
        s = os.stat(path)
        key = (path, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        if key in _known:
            return _known[key]
        with open(path, "rb", buffering=0) as f:
            content = hashlib.sha256(f.read()) if s.st_size < WHOLE_BYTES else hashlib.file_digest(f, "sha256")
        if time.time_ns() - max(s.st_mtime_ns, s.st_ctime_ns) > SETTLED_NS:
            _known[key] = content.hexdigest()
        return content.hexdigest()
    except OSError as e:
        raise DataError(
            f"cannot be read: {e.strerror}", where=shown(path), remedy="change its access rights, or take it out"
        ) from e


def contents_of(paths: Iterable[str]) -> list[str]:
    """Return `content_of` of each file, read by a few threads."""
    every = list(paths)
    pieces = [every[i : i + 512] for i in range(0, len(every), 512)]
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        return [content for piece in pool.map(lambda piece: list(map(content_of, piece)), pieces) for content in piece]
