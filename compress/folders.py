"""Folders of pictures: which splits, which pictures, and the class that folders or a label file give each.

One reading serves both splits, so that classes are numbered once over the two.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress import label_files
from compress.files import IMAGE_SUFFIXES, OTHER_IMAGES, Entry, folders_in, list_folder, shown, suffix_of, walk
from compress.label_files import Label, LabelFile
from rescompress.core.errors import DataError

_TRAIN = frozenset({"train", "training", "trn"})
_EVALUATION = (
    frozenset({"val"}),
    frozenset({"valid"}),
    frozenset({"validation", "validate"}),
    frozenset({"dev", "development", "eval", "evaluation"}),
    frozenset({"test", "testing", "tst"}),
)
"""Names of evaluation splits; where there are several, the first is used: choices were made on it, if on any."""
UNLABELLED = "unlabelled"
"""The one class of pictures whose labels nobody asks for."""
_SUFFIXES = re.compile(r"(set|split|data|dataset|images|imgs|img|folder|dir)$")
_LABELS = re.compile(r"labels?|annotations?", re.IGNORECASE)
FORMS = (
    "a folder with train/ and val/ (or test/) class folders, a folder of class folders, a flat folder with labels.csv, "
    "an .npz with x (N,H,W,C uint8) and y, or builtin:digits"
)


@dataclass(frozen=True)
class Samples:
    """Files and class names of one split, before they meet a checkpoint.

    Attributes:
        paths: The pictures.
        names: The class of each.
        root: Their folder.
        listed: Whether a label file names the classes, not folders.
        without: Folders that could be classes but hold nothing, or pictures that are not read: each with their kinds.
        nested: Names that stand below several class folders again; then it is open which of the two are the classes.
        notes: What the reader of a report should know.
        numbered: Where the data set numbers its classes and the network has them so: their names by number. `names` are the
            numbers as texts then.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    root: Path
    listed: bool = False
    without: tuple[tuple[str, str], ...] = ()
    nested: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    numbered: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Splits:
    """What a folder holds.

    Attributes:
        val: The evaluation split, or everything where there is one split only.
        train: The training split, or None.
        notes: What the reader of a report should know.
    """

    val: Samples
    train: Samples | None = None
    notes: tuple[str, ...] = ()


def pictures_alone(root: Path) -> Splits:
    """Return the splits of a folder for a network to which labels mean nothing: all pictures, wherever they lie.

    Folders such as train/ and val/ are splits as ever; what else stands in the folder says nothing.

    Raises:
        DataError: There are no pictures.
    """
    ranks = {name: rank for name in folders_in(root) if (rank := rank_of(name)) is not None and _has_images(root / name)}
    held = min((rank for rank in ranks.values() if rank), default=None)
    if held is not None and 0 in ranks.values():
        parts = [[n for n, r in ranks.items() if r == rank] for rank in (held, 0)]
        val, train = (_unlabelled(root, [root / name for name in part]) for part in parts)
        return Splits(val, train)
    return Splits(_unlabelled(root, [root]))


def _unlabelled(root: Path, folders: Sequence[Path]) -> Samples:
    found = [e for folder in folders for e in walk(folder) if e.is_image]
    _check_regular(found)
    if not found:
        raise DataError("holds no images", where=shown(root), remedy=f"give a folder of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return Samples(tuple(Path(e.path) for e in found), (UNLABELLED,) * len(found), root)


def rank_of(name: str) -> int | None:
    """Return 0 for a name of the training split, 1 and more for names of evaluation splits in their order, else None."""
    plain = re.sub(r"[^a-z0-9]", "", name.casefold())
    for word in (plain, _SUFFIXES.sub("", plain)):
        if word in _TRAIN:
            return 0
        for rank, words in enumerate(_EVALUATION, start=1):
            if word in words:
                return rank
    return None


def read_splits(root: Path, above: Path | None = None) -> Splits:
    """Return the splits of a folder.

    Args:
        root: The folder.
        above: The one that holds it alone, and may hold its label files.

    Raises:
        DataError: There are no pictures with labels, or it is open which folders are splits or classes.
    """
    names = folders_in(root)
    others = [n for n in names if rank_of(n) is None and _has_images(root / n)]
    splits = [n for n in names if rank_of(n) is not None and not (others and _is_flat(root / n))]
    tables = label_files.candidates(root) or (label_files.candidates(above) if above is not None else [])
    if tables and splits and all(_is_flat(root / n) for n in splits):
        table = label_files.read(tables[0], root) if above is None else _read_below(tables[0], root, [above, root])
        return _by_table(table, root, splits, _more_tables(tables))
    if not splits and above is None:
        inside = _splits_inside(root, others)
        if inside is not None:
            return read_splits(inside, root)
    if not splits and not tables:
        parted = _by_two_tables(root)
        if parted is not None:
            return parted
    if not splits:
        others = names
    train = [n for n in splits if rank_of(n) == 0]
    held = sorted((n for n in splits if rank_of(n)), key=lambda n: rank_of(n) or 0)
    for several in (train, [n for n in held if rank_of(n) == rank_of(held[0])]):
        if len(several) > 1:
            raise DataError(
                f"holds {_list(several, '/')}, which mean the same", where=shown(root), remedy="leave one of them, or rename it"
            )
    if train and held:
        notes = []
        left = [n for n in held[1:] if _has_images(root / n)] + others
        if left:
            notes.append(f"{shown(root)}: {_list([held[0]], '/')} is evaluated on; not read: {_list(left, '/')}")
        if tables:
            notes.append(f"not read beside {_list([train[0]], '/')}: {_list([t.name for t in tables])}")
        places = [root] if above is None else [root, above]
        found = [scan(root / n, _table_for(n, root, places), places) for n in (held[0], train[0])]
        return Splits(found[0], found[1], tuple(notes))
    if not train and not held:
        whole, read = _scanned(root)
        return _parted(read, whole) if read is not None and any(row.part for row in read.labels) else Splits(whole)
    only = (train or held)[0]
    if others:
        known = "train" if held else "val"
        raise DataError(
            f"holds {_list([only], '/')}, and {_list(others, '/')} is no name of the other split that is known",
            where=shown(root),
            remedy=f"rename it to {known}, or give --data {shown(root / only)} to split that folder",
        )
    return Splits(scan(root / only, _table_for(only, root, [root]), [root]))


def _table_for(split: str, root: Path, places: Sequence[Path]) -> Path | None:
    """Return the label file of a flat folder train/, such as train.csv, train_labels.csv or labels/train.csv.

    Args:
        split: The folder's name.
        root: Where it stands.
        places: Where label files of its splits may stand.
    """
    if not _is_flat(root / split):
        return None
    found = [t for place in places for t in _tables_of_splits(place) if _rank_of_table(t) == rank_of(split)]
    return found[0] if len(found) == 1 else None


def _tables_of_splits(place: Path) -> list[Path]:
    """Return the tables that are named after a split, in a folder and in its folders called labels or annotations."""
    folders = [place, *(place / n for n in folders_in(place) if _LABELS.fullmatch(n))]
    return [t for folder in folders for t in label_files.other_tables(folder) if _rank_of_table(t) is not None]


def _rank_of_table(table: Path) -> int | None:
    return rank_of(_LABELS.sub("", table.stem))


def _by_two_tables(root: Path) -> Splits | None:
    """Return the splits that tables such as train.csv and val.csv name, or None where there are no two that name pictures."""
    tables = _tables_of_splits(root)
    read: dict[int, list[LabelFile]] = {}
    for table in tables if {0} < {_rank_of_table(t) for t in tables} else ():
        if not table.is_file() or _names_none(table, root):
            continue
        try:
            found = label_files.read(table, root)
        except DataError as e:
            if "columns" not in e.what and "no label" not in e.what:  # as the test.csv of a competition
                raise
        else:
            read.setdefault(_rank_of_table(table) or 0, []).append(found)
    held = sorted(rank for rank in read if rank)
    if 0 not in read or not held or len(read[0]) > 1 or len(read[held[0]]) > 1:
        return None
    train, val = read[0][0], read[held[0]][0]
    notes = [f"splits are read from {_list([train.path.name, val.path.name])}", *train.notes, *val.notes]
    unused = [t.name for t in tables if t not in (train.path, val.path)]
    if unused:
        notes.append(f"not read: {_list(unused)}")
    both = {os.path.normpath(row.path) for row in train.labels} & {os.path.normpath(row.path) for row in val.labels}
    if both:
        notes.append(f"{len(both)} pictures stand in both, such as {shown(os.path.basename(min(both)))}")
    named = {os.path.normpath(row.path) for found in (train, val) for row in found.labels}
    left = sum(e.is_image and os.path.normpath(e.path) not in named for e in walk(root))
    if left:
        notes.append(f"{left} images that neither names are left out")
    return Splits(_of_rows(val.labels, root), _of_rows(train.labels, root), tuple(notes))


def _splits_inside(root: Path, holding: Sequence[str]) -> Path | None:
    """Return the only folder with pictures, such as images/, where it holds both splits and nothing else does."""
    if len(holding) != 1 or any(suffix_of(e.name) in IMAGE_SUFFIXES for e in list_folder(root)):
        return None
    ranks = {rank_of(n) for n in folders_in(root / holding[0]) if _has_images(root / holding[0] / n)}
    return root / holding[0] if 0 in ranks and any(ranks - {None}) else None


def files_elsewhere(root: Path) -> list[str]:
    """Return the pictures outside a folder that its label files name; what is wrong with these is no matter here."""
    try:
        found = read_splits(root)
    except DataError:
        return []
    start = os.path.join(root, "")
    paths = [str(p) for part in (found.train, found.val) if part is not None and part.listed for p in part.paths]
    return sorted({p for p in paths if ".." in p or not p.startswith(start)})


def scan(root: Path, table: Path | None = None, bases: Sequence[Path] = ()) -> Samples:
    """Return the pictures of one split and their classes.

    Args:
        root: Its folder.
        table: A label file for it that stands elsewhere.
        bases: What the names in that table may be relative to, if not to `root`.

    Raises:
        DataError: There are none, or it is open which folders are the classes.
    """
    if table is not None:
        read = _read_below(table, root, [root, *bases])
        return _listed(read, root, False, (f"{shown(root)}: labels are read from {shown(table.name)}",))
    return _scanned(root)[0]


def _read_below(table: Path, inside: Path, bases: Sequence[Path]) -> LabelFile:
    """Return a label file whose names are relative to the first of some folders that fits.

    Args:
        table: The file.
        inside: Where all of its pictures are.
        bases: The folders.

    Raises:
        DataError: None fits; what is wrong with the first.
    """
    first: DataError | None = None
    for base in bases:
        try:
            found = label_files.read(table, base)
        except DataError as e:
            first = first or e
            continue
        if all(Path(row.path).is_relative_to(inside) for row in found.labels):
            return found
    raise first or DataError(
        f"names pictures outside of {shown(inside.name)}/", where=shown(table), remedy="take these lines out"
    )


def _scanned(root: Path) -> tuple[Samples, LabelFile | None]:
    found, without, unread = _class_folders(root)
    tables = label_files.candidates(root)
    notes: list[str] = []
    if tables:
        read = _read_beside(tables, root, bool(found))
        if isinstance(read, str):
            notes.append(read)
        elif not (found and len(read.labels) == len(found) and label_files.folders_name_the_same(read, root)):
            return _listed(read, root, bool(found), _more_tables(tables)), read
    if not found:
        table = _only_table(root)
        return _listed(table, root, False, (f"labels are read from {shown(table.path.name)}",)), table
    if not tables:
        aside = [t for t in label_files.other_tables(root) if t.is_file() and not _names_none(t, root)]
        if aside:
            notes.append(
                f"not read, though pictures are named there: {_list([t.name for t in aside])}; labels.csv would be read"
            )
    loose = sum(suffix_of(e.name) in IMAGE_SUFFIXES for e in list_folder(root))
    if loose:
        notes.append(f"{shown(root)}: {loose} pictures beside the class folders are left out")
    if unread:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(unread.items()))
        notes.append(f"{shown(root)}: pictures of a kind that is not read are left out: {kinds}")
    paths, names = zip(*found, strict=True)
    return Samples(paths, names, root, False, tuple(without), _nested(paths, names, root), tuple(notes)), None


def _class_folders(root: Path) -> tuple[list[tuple[Path, str]], list[tuple[str, str]], Counter[str]]:
    """Return pictures with their folders; folders without any, with what they hold; and other pictures by their kind."""
    found: list[tuple[Path, str]] = []
    without: list[tuple[str, str]] = []
    unread: Counter[str] = Counter()
    for name in folders_in(root):
        entries = list(walk(root / name))
        images = [e for e in entries if e.is_image]
        _check_regular(images)
        found += [(Path(e.path), name) for e in images]
        others = Counter(e.suffix for e in entries if e.suffix in OTHER_IMAGES)
        unread += others
        if not images and (others or not entries):
            without.append((name, ", ".join(f"{n} {kind}" for kind, n in sorted(others.items()))))
    return found, without, unread


def _check_regular(images: Iterable[Entry]) -> None:
    broken = next((e for e in images if not e.regular), None)
    if broken is not None:
        what = (
            "is a link to nothing" if os.path.islink(broken.path) and not os.path.exists(broken.path) else "is no regular file"
        )
        raise DataError(what, where=shown(broken.path), remedy="remove it, or put the picture there")


def _read_beside(tables: Sequence[Path], root: Path, folders: bool) -> LabelFile | str:
    """Return the label file, or a note where it names none of the pictures and class folders say the classes."""
    try:
        return label_files.read(tables[0], root)
    except DataError as e:
        name = shown(tables[0].name)
        if folders and e.what.startswith("names ") and _names_none(tables[0], root):
            return f"{name} names none of the pictures and is not read; the folders are the classes"
        if folders and tables[0].name not in ("labels.csv", "labels.json"):
            return f"{name} is not read as labels ({e.what}); the folders are the classes"
        raise


def _names_none(table: Path, root: Path) -> bool:
    """Whether no picture's name stands anywhere in a table."""
    try:
        text = label_files.text_of(table)
    except (DataError, ValueError):
        text = table.read_bytes().decode("utf-8", "surrogateescape")
    return not any(os.path.basename(e.path) in text for e in walk(root) if e.is_image)


def _only_table(root: Path) -> LabelFile:
    """Return the labels of a flat folder whose label file has a name of its own."""
    loose = [e.name for e in list_folder(root) if suffix_of(e.name) in IMAGE_SUFFIXES]
    tables = label_files.other_tables(root)
    readable = []
    for table in tables if loose or folders_in(root) else ():
        try:
            readable.append(label_files.read(table, root))
        except DataError as e:
            if len(tables) == 1 and "names no pictures" not in e.what:
                raise
    if len(readable) == 1:
        return readable[0]
    other = sorted({suffix_of(e.name) for e in list_folder(root)} & OTHER_IMAGES)
    what = f"holds {len(loose)} images without labels" if loose else "holds no images"
    if other and not loose:
        what += f" of a kind that is read, but {', '.join(other)}"
    if len(readable) > 1:
        raise DataError(
            f"{what}; {_list([f.path.name for f in readable])} may each hold them",
            where=shown(root),
            remedy="call one of them labels.csv",
        )
    if tables:
        what += f"; {_list([t.name for t in tables])} names none of them"
    raise DataError(what, where=shown(root), remedy=f"data is {FORMS}")


def _more_tables(tables: Sequence[Path]) -> tuple[str, ...]:
    return (f"not read beside {shown(tables[0].name)}: {_list([t.name for t in tables[1:]])}",) if tables[1:] else ()


def _listed(read: LabelFile, root: Path, folders: bool, notes: tuple[str, ...] = ()) -> Samples:
    notes = (*read.notes, *notes)
    if folders:
        notes = (*notes, f"{shown(read.path.name)} says the classes, not the folders beside it")
    named = {os.path.normpath(row.path) for row in read.labels}
    left = sum(e.is_image and os.path.normpath(e.path) not in named for e in walk(root))
    if left:
        notes = (*notes, f"{shown(read.path.name)} does not name {left} of the images beside it, which are left out")
    return _of_rows(read.labels, root, notes)


def _of_rows(rows: Sequence[Label], root: Path, notes: tuple[str, ...] = ()) -> Samples:
    return Samples(tuple(Path(r.path) for r in rows), tuple(r.label for r in rows), root, True, notes=notes)


def without_repeats(found: Samples) -> Samples:
    """Return the samples of an evaluation with each file once: a file that is listed again is no further evidence."""
    if not found.listed:
        return found
    first = {os.path.normpath(p): i for i, p in reversed(list(enumerate(found.paths)))}
    keep = sorted(first.values())
    if len(keep) == len(found.paths):
        return found
    note = f"{shown(found.root)}: {len(found.paths) - len(keep)} lines name a file that was named before; each file counts once"
    return dataclasses.replace(
        found,
        paths=tuple(found.paths[i] for i in keep),
        names=tuple(found.names[i] for i in keep),
        notes=(*found.notes, note),
    )


def _parted(read: LabelFile, found: Samples) -> Splits:
    by_rank: dict[int, list[Label]] = {}
    words: dict[int, str] = {}
    for row in read.labels:
        rank = _rank_of_word(row.part or "")
        if rank is None:
            raise DataError(
                f"line {row.line} says neither training nor evaluation: '{(row.part or '')[:40]}'",
                where=shown(read.path),
                remedy="write train or val, or true or false in a column is_valid",
            )
        by_rank.setdefault(rank, []).append(row)
        words.setdefault(rank, row.part or "")
    held = sorted(rank for rank in by_rank if rank)
    if 0 not in by_rank or not held:
        return Splits(found)
    notes = []
    if held[1:]:
        used, left = _list([words[held[0]]]), _list([words[r] for r in held[1:]])
        notes.append(f"{shown(read.path.name)}: {used} is evaluated on; not read: {left}")
    return Splits(
        dataclasses.replace(_of_rows(by_rank[held[0]], found.root), notes=found.notes),
        _of_rows(by_rank[0], found.root),
        tuple(notes),
    )


def _rank_of_word(word: str) -> int | None:
    plain = word.strip().casefold()
    if plain in ("true", "1", "1.0", "yes", "y", "t"):
        return 1
    if plain in ("false", "0", "0.0", "no", "n", "f"):
        return 0
    return rank_of(plain)


def _by_table(read: LabelFile, root: Path, splits: Sequence[str], notes: tuple[str, ...]) -> Splits:
    """Return the splits of flat folders such as train/ and val/ whose pictures one label file beside them names."""
    if any(row.part for row in read.labels):
        return _parted(read, _listed(read, root, False, notes))
    rows = []
    for row in read.labels:
        path = Path(row.path)
        top = path.relative_to(root).parts[0] if path.is_relative_to(root) else ""
        rows.append(dataclasses.replace(row, part=top if top in splits else None))
    outside = next((row for row in rows if row.part is None), None)
    if outside is not None:
        raise DataError(
            f"line {outside.line} names a picture outside of {_list(splits, '/')}",
            where=shown(read.path),
            remedy="move it there, or write a column split with train and val",
        )
    return _parted(dataclasses.replace(read, labels=tuple(rows)), _listed(read, root, False, notes))


def _nested(paths: Sequence[Path], names: Sequence[str], root: Path) -> tuple[str, ...]:
    """Return names of folders that stand below several class folders, where pictures lie there alone."""
    depth = len(root.parts)
    below: dict[str, set[str]] = {}
    for path, name in zip(paths, names, strict=True):
        parts = path.parts[depth + 1 :]
        if len(parts) < 2:
            return ()
        below.setdefault(name, set()).add(parts[0])
    if len(below) == 1:
        inside = next(iter(below.values()))
        return tuple(sorted(inside)) if len(inside) > 1 else ()
    often = Counter(n for inside in below.values() for n in inside)
    shared = sorted(n for n, count in often.items() if count > 1)
    return tuple(sorted(often)) if len(shared) > 1 else ()


def _has_images(folder: Path) -> bool:
    return any(e.is_image for e in walk(folder))


def _is_flat(folder: Path) -> bool:
    """Whether a folder looks like a class, not like a split: no label file, and pictures rather than folders."""
    if label_files.candidates(folder):
        return False
    folders = folders_in(folder)
    return not folders or (len(folders) == 1 and any(suffix_of(e.name) in IMAGE_SUFFIXES for e in list_folder(folder)))


def _list(names: Sequence[str], mark: str = "") -> str:
    texts = [f"{shown(n)}{mark}" for n in names]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def splits_of_table(table: Path) -> Splits:
    """Return the splits of a label file that was named itself; its pictures stand beside it, or where it says.

    Raises:
        DataError: It names no pictures.
    """
    read = label_files.read(table, table.parent)
    found = _of_rows(read.labels, table.parent, read.notes)
    return _parted(read, found) if any(row.part for row in read.labels) else Splits(found)
