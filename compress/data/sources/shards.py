"""Tar shards in the layout of WebDataset: ``key.jpg`` beside ``key.cls``, ``key.json`` or ``key.txt``, many to a file.

Nothing is unpacked: where each picture stands in its shard is noted once, and its bytes are read from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.files import IMAGE_SUFFIXES, contents_of, list_folder, shown, suffix_of
from compress.folders import Samples, rank_of
from rescompress.core.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.data.splits import Dataset, EncodedStore, Reading

FORM = "tar shards (a folder of train-*.tar and val-*.tar, one .tar, or train-{000..009}.tar)"
ANY_CHANNELS = False
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NUMBERED = re.compile(r"(.*?)(\d+)$")
_LABELS = (".cls", ".json", ".txt")
_KEYS = ("cls", "label", "class", "target", "class_name", "category")
_MOST_SHARDS = 1_000_000
_MOST_LABEL_BYTES = 1 << 20


class _At(NamedTuple):
    """Where a picture stands: the number of its shard, offset and size."""

    shard: int
    begin: int
    size: int


def claims(source: Any) -> bool:
    """Whether it is a shard, a range of shards, or a folder with shards and no pictures."""
    if not isinstance(source, str):
        return False
    if source.lower().endswith(".tar"):
        return bool(_RANGE.search(source)) or Path(source).is_file()
    if not Path(source).is_dir():
        return False
    with contextlib.suppress(DataError):
        entries = list_folder(source)
        return any(_is_shard(e.name) for e in entries) and not any(e.is_dir() and not e.name.startswith(".") for e in entries)
    return False


def identity(source: str) -> str:
    """Return a hash of the names and the content of all shards."""
    paths = [path for group in _shards(source).values() for path in group]
    parts = zip(map(os.path.basename, paths), contents_of(paths), strict=True)
    return hashlib.sha256("\n".join(f"{os.fsencode(name)!r} {content}" for name, content in parts).encode()).hexdigest()


def load(source: str, how: Reading) -> Dataset:
    """Return the splits of the shards: ``train`` and ``val`` by their names, or halves.

    Raises:
        DataError: A shard is missing, damaged, or holds no labelled pictures.
    """
    import numpy as np

    from compress.data.splits import assemble
    from compress.data.stores import SliceStore

    groups = _shards(source)
    ranks = {rank_of(re.sub(r"[-_.]*\d*$", "", name)): name for name in groups}
    held = sorted(rank for rank in ranks if rank)
    notes = []
    if 0 in ranks and held:
        used = [ranks[0], ranks[held[0]]]
        left = sorted(set(groups) - set(used))
        if left:
            notes.append(f"{shown(source)}: {used[1]} is evaluated on; not read: {', '.join(map(shown, left))}")
    elif len(groups) == 1:
        used = [next(iter(groups))]
    else:
        names = ", ".join(map(shown, sorted(groups)))
        remedy = "call them train-000.tar ... and val-000.tar ..., or give one kind of them"
        raise DataError(f"holds shards of several names ({names})", where=shown(source), remedy=remedy)
    places: dict[Path, tuple[list[str], list[_At]]] = {}
    parts = []
    for name in used:
        root = Path(groups[name][0]).parent / name
        samples, at, left_out = _read(groups[name], root)
        places[root] = groups[name], at
        notes += left_out
        parts.append(samples)

    def make(found: Samples, keep: Sequence[int]) -> EncodedStore:
        shards, at = places[found.root]
        chosen = np.array([at[i] for i in keep], dtype=np.int64).reshape(-1, 3)
        return SliceStore(tuple(shards), chosen, how.inputs.shape, how.inputs.preprocessing)

    return assemble(parts[0] if len(parts) == 2 else None, parts[-1], source, how, make, notes)


def _is_shard(name: str) -> bool:
    return name.lower().endswith(".tar") and not name.startswith(".")


def _shards(source: str) -> dict[str, list[str]]:
    """Return the shards by the part of their names before the number, in order.

    Raises:
        DataError: One is missing.
    """
    span = _RANGE.search(source)
    if span is not None:
        low, high = int(span[1]), int(span[2])
        if not 0 <= high - low < _MOST_SHARDS:
            raise DataError(f"{span[0]} is no range of shards", where=shown(source), remedy="write it like {000..009}")
        every = [f"{source[: span.start()]}{n:0{len(span[1])}d}{source[span.end() :]}" for n in range(low, high + 1)]
    elif Path(source).is_file():
        every = [source]
    else:
        every = [e.path for e in list_folder(source) if _is_shard(e.name)]
    groups: dict[str, list[str]] = {}
    numbers: dict[str, dict[int, str]] = {}
    for path in every:
        stem = os.path.basename(path)[: -len(".tar")]
        found = _NUMBERED.fullmatch(stem)
        name = found[1].rstrip("-_.") or "shards" if found else stem
        groups.setdefault(name, []).append(path)
        if found:
            numbers.setdefault(name, {})[int(found[2])] = found[2]
    missing = [path for path in every if not Path(path).is_file()]
    if span is None and not Path(source).is_file():
        for name, known in numbers.items():
            gaps = sorted(set(range(min(min(known), 1), max(known) + 1)) - set(known))
            width = len(next(iter(known.values())))
            missing += [f"{name} {n:0{width}d}" for n in gaps]
    if missing:
        some = ", ".join(shown(os.path.basename(m)) for m in missing[:5]) + (
            f" and {len(missing) - 5} more" if missing[5:] else ""
        )
        raise DataError(
            f"{len(missing)} shards are missing: {some}", where=shown(source), remedy="add them, or name those that are there"
        )
    return groups


def _read(paths: list[str], root: Path) -> tuple[Samples, list[_At], list[str]]:
    """Return the samples of some shards, where each stands, and notes."""
    names: list[str] = []
    keys: list[Path] = []
    at: list[_At] = []
    without = 0
    for number, path in enumerate(paths):
        for key, picture, label in _samples(path):
            if label is None:
                without += 1
                continue
            names.append(label)
            keys.append(Path(path) / key)
            at.append(_At(number, *picture))
    if not at:
        what = f"hold {without} pictures, none with a label" if without else "hold no pictures"
        raise DataError(what, where=shown(root), remedy="write key.jpg beside key.cls (or key.json with a label)")
    notes = [f"{shown(root)}: {without} pictures without a label are left out"] if without else []
    return Samples(tuple(keys), tuple(names), root, listed=True), at, notes


def _samples(path: str) -> Iterator[tuple[str, tuple[int, int], str | None]]:
    """Yield key, place and label of each picture of a shard; members of one key stand together."""
    remedy = "write it again; shards are plain tar, not compressed"
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as shard:
            key, picture = "", None
            labels: dict[str, str | None] = {}
            for member in shard:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise DataError(f"ends within '{shown(member.name)[:200]}'", where=shown(path), remedy=remedy)
                folder, _, base = member.name.rpartition("/")
                stem, dot, rest = base.partition(".")
                here, suffix = f"{folder}/{stem}", (dot + rest).lower()
                if here != key:
                    if picture is not None:
                        yield key, picture, _first(labels)
                    key, picture, labels = here, None, {}
                if suffix_of("x" + suffix) in IMAGE_SUFFIXES:
                    if picture is not None:
                        raise DataError(f"'{shown(key)[:200]}' has two pictures", where=shown(path), remedy="give each a key")
                    picture = member.offset_data, member.size
                elif suffix in _LABELS and member.size <= _MOST_LABEL_BYTES:
                    content = shard.extractfile(member)
                    where = f"{shown(path)}: {shown(member.name)[:200]}"
                    labels[suffix] = _label(content.read() if content else b"", suffix, where)
            if picture is not None:
                yield key, picture, _first(labels)
    except (tarfile.TarError, OSError, EOFError) as e:
        raise DataError(f"is no readable shard: {e}", where=shown(path), remedy=remedy) from e


def _first(labels: dict[str, str | None]) -> str | None:
    """Return the label of the form that is the surest: a caption may stand beside a class."""
    return next((labels[suffix] for suffix in _LABELS if labels.get(suffix) is not None), None)


def _label(content: bytes, suffix: str, where: str) -> str | None:
    try:
        text = content.decode()
        found = json.loads(text) if suffix == ".json" else text.strip()
    except ValueError as e:
        raise DataError(f"is no label: {e}", where=where, remedy="write a number, a name, or JSON with a label") from e
    if isinstance(found, dict):
        found = next((found[key] for key in _KEYS if key in found), None)
    if found is None or isinstance(found, bool) or not isinstance(found, str | int) or not str(found).strip():
        return None
    return str(found)
