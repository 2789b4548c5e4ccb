"""Label files: which class each picture has, as spreadsheets, competitions and other tools write it.

What is there decides how a table is read: the column whose cells are pictures holds the files. What can be read in more than
one way is refused, with the file and the line.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.files import IMAGE_SUFFIXES, OTHER_IMAGES, folders_in, list_folder, shown, suffix_of, walk
from rescompress.core.errors import DataError

_KINDS = (".csv", ".tsv", ".json", ".txt")
_STEMS = ("labels", "label", "annotations", "annotation")
_DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|", ".txt": "\t,; "}
_FILE_WORDS = frozenset(
    {"file", "filename", "filenames", "filepath", "path", "image", "images", "imagename", "imagepath", "imageid", "imagefile"}
    | {"img", "imgname", "imgpath", "id", "fname", "name"}
)
_LABEL_WORDS = frozenset(
    {"label", "labels", "class", "classes", "classname", "classid", "category", "categories", "target", "targets", "y", "tag"}
)
_SPLIT_WORDS = frozenset({"isvalid", "split", "splits", "subset", "set", "partition"})
_PART = re.compile(
    r"(train|trn|training|val|valid|validation|dev|eval|test|tst|testing)([ _-]?(set|split|data))?", re.IGNORECASE
)
_NUMBER_WORDS = re.compile(r"(label|class|category|target)(id|idx|index|num|number|nr|code)")
_SAMPLE = 200
"""Rows that decide which column is which."""
_WRITE = "write lines of the form file.jpg,label"
_WRITE_JSON = 'write {"file.jpg": "label", ...} or [{"file": "file.jpg", "label": "label"}, ...]'


@dataclass(frozen=True)
class Label:
    """What a label file says of one picture.

    Attributes:
        path: The picture.
        label: Its class as written.
        line: Where that stands; of JSON, the number of the entry.
        part: The word of a column that tells training from evaluation, if there is one.
    """

    path: str
    label: str
    line: int
    part: str | None = None


@dataclass(frozen=True)
class LabelFile:
    """A label file that was read.

    Attributes:
        path: The file.
        labels: One per picture.
        notes: What the reader of a report should know about how it was read.
    """

    path: Path
    labels: tuple[Label, ...]
    notes: tuple[str, ...] = ()


def candidates(root: Path) -> list[Path]:
    """Return the label files that stand in a folder; the one to read is the first.

    ``labels.csv`` comes first, then ``labels.json``, then other spellings of these names.
    """
    files = [root / e.name for e in list_folder(root) if suffix_of(e.name) in _KINDS]
    named = [f for f in files if _plain(f.stem) in _STEMS and not (f.suffix.lower() == ".txt" and _plain(f.stem) == "labels")]
    exact = ["labels.csv", "labels.json"]
    return sorted(named, key=lambda f: (exact.index(f.name) if f.name in exact else 2, _STEMS.index(_plain(f.stem)), f.name))


def other_tables(root: Path) -> list[Path]:
    """Return the files of a folder that may hold labels under a name of their own."""
    return [root / e.name for e in list_folder(root) if suffix_of(e.name) in _KINDS and not e.name.startswith(".")]


def read(path: Path, root: Path) -> LabelFile:
    """Return what a label file says; names in it are relative to `root`.

    Raises:
        DataError: It cannot be read, or in more than one way, or names a picture that is not there.
    """
    if not path.is_file():
        raise DataError("is no regular file", where=shown(path), remedy="give a file of labels")
    finder = _Finder(root)
    try:
        text = text_of(path)
        found = _json(text, path, finder) if path.suffix.lower() == ".json" else _table(text, path, finder)
    except (OSError, ValueError, RecursionError, csv.Error) as e:
        raise DataError(f"cannot be read: {str(e) or type(e).__name__}", where=shown(path), remedy=_WRITE) from e
    if not found.labels:
        raise DataError("names no pictures", where=shown(path), remedy=_WRITE)
    _check_one_label_each(found)
    return found


def once(found: Sequence[Label]) -> list[Label]:
    """Return the labels without a second line for the same picture."""
    return list({os.path.normpath(row.path): row for row in reversed(found)}.values())[::-1]


def _check_one_label_each(found: LabelFile) -> None:
    seen: dict[str, Label] = {}
    for row in found.labels:
        first = seen.setdefault(os.path.normpath(row.path), row)
        if first.label != row.label or first.part != row.part:
            what = f"'{first.label}' and '{row.label}'" if first.label != row.label else f"'{first.part}' and '{row.part}'"
            raise DataError(
                f"lines {first.line} and {row.line} give {shown(os.path.basename(row.path))} two labels: {what}",
                where=shown(found.path),
                remedy="remove one of the lines",
            )


@dataclass
class _Finder:
    """Finds the picture that a cell of a table means."""

    root: Path
    ignored: set[str] = field(default_factory=set)

    @cached_property
    def exact(self) -> dict[str, str]:
        """Path of each picture by its name below the root."""
        start = len(os.path.join(self.root, ""))
        found = {e.path[start:]: e.path for e in walk(self.root) if e.suffix in IMAGE_SUFFIXES or e.suffix in OTHER_IMAGES}
        return {name.replace(os.sep, "/"): path for name, path in found.items()}

    @cached_property
    def loose(self) -> dict[str, list[str]]:
        """Paths by name without regard to case, folder or suffix."""
        found: dict[str, list[str]] = {}
        for name, path in self.exact.items():
            whole, base = name.casefold(), name.rpartition("/")[2].casefold()
            for key in {whole, base, os.path.splitext(whole)[0], os.path.splitext(base)[0]}:
                found.setdefault(key, []).append(path)
        return found

    def literally(self, cell: str) -> str | None:
        """Return the picture of exactly this name."""
        for name in (cell, cell.replace("\\", "/")):
            if name in self.exact:
                return self.exact[name]
            if name.startswith("./") and name[2:] in self.exact:
                return self.exact[name[2:]]
            path = os.path.join(self.root, name)
            if ("/" in name or os.sep in name) and suffix_of(name) in IMAGE_SUFFIXES and os.path.isfile(path):
                return path
        return None

    def find(self, cell: str) -> list[str]:
        """Return the pictures that a cell may mean: of this name, else of this name without regard to case or suffix."""
        name = self.literally(cell)
        return [name] if name else self.loose.get(cell.replace("\\", "/").removeprefix("./").casefold(), [])


def text_of(path: Path) -> str:
    """Return what a file of text says, in the encodings that spreadsheets write.

    Raises:
        DataError: It is neither UTF-8 nor UTF-16.
    """
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16")
    wide = _unmarked_utf16(content)
    if wide is not None:
        return content.decode(wide)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[: e.start].count(b"\n") + 1
        raise DataError(f"line {line} is no UTF-8", where=shown(path), remedy="save the file as UTF-8") from e


def _unmarked_utf16(content: bytes) -> str | None:
    """Return which UTF-16 a text without a mark is: its Latin letters have a zero in every second byte, and only there."""
    start = content[:4096]
    low, high = start[::2].count(0), start[1::2].count(0)
    if len(content) % 2 or 4 * max(low, high) < len(start) or min(low, high):
        return None
    return "utf-16-le" if high else "utf-16-be"


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.casefold())


def _rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield number and cells of the lines that are not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=delimiter == " ")
    for row in reader:
        cells = [cell.strip() for cell in row]
        if any(cells):
            yield reader.line_num, cells


def _table(text: str, path: Path, finder: _Finder) -> LabelFile:
    best, delimiter = -1, ","
    for candidate in _DELIMITERS.get(path.suffix.lower(), ","):
        score = sum(
            len(cells) > 1 and any(map(finder.find, cells)) for _, cells in itertools.islice(_rows(text, candidate), _SAMPLE)
        )
        if score > best:
            best, delimiter = score, candidate
    text = re.sub(r"\Asep=[^\r\n]?(?=\r?\n)", "", text)  # a hint to spreadsheets
    rows = [r for r in _rows(text, delimiter) if not r[1][0].startswith("#") or any(map(finder.find, r[1]))]
    if not rows:
        return LabelFile(path, ())
    file_at, label_at, part_at, header, notes = _columns(rows, path, finder)
    found: list[Label] = []
    missing: list[tuple[int, str]] = []
    unread: list[str] = []
    for line, cells in rows[1:] if header else rows:
        if len(cells) <= max(file_at, label_at):
            raise DataError(f"line {line} has {len(cells)} columns", where=shown(path), remedy=_WRITE)
        picture = _one(finder, cells[file_at], line, path)
        if picture is None:
            missing.append((line, cells[file_at]))
        elif suffix_of(picture) not in IMAGE_SUFFIXES:
            unread.append(picture)
        elif not cells[label_at]:
            raise DataError(f"line {line} has no label", where=shown(path), remedy="write the label, or take the line out")
        else:
            part = cells[part_at] if part_at is not None and part_at < len(cells) else None
            found.append(Label(picture, cells[label_at], line, part))
    _refuse_missing(missing, path)
    return LabelFile(path, tuple(found), (*notes, *_unread_notes(unread, path)))


def _one(finder: _Finder, cell: str, line: int, path: Path) -> str | None:
    found = finder.find(cell)
    if len(found) > 1:
        names = ", ".join(shown(os.path.relpath(p, finder.root)) for p in found[:3])
        raise DataError(
            f"line {line}: '{cell[:100]}' may be each of {names}",
            where=shown(path),
            remedy="write the whole path of the picture",
        )
    return found[0] if found else None


def _refuse_missing(missing: Sequence[tuple[int, str]], path: Path) -> None:
    if missing:
        line, name = missing[0]
        raise DataError(
            f"names {len(missing)} files that are not there, such as {name[:200]!r} in line {line}".replace("'", ""),
            where=shown(path),
            remedy="correct the names, or add the files",
        )


def _unread_notes(unread: Sequence[str], path: Path) -> tuple[str, ...]:
    if not unread:
        return ()
    kinds = ", ".join(sorted({suffix_of(p) for p in unread}))
    return (f"{shown(path.name)}: {len(unread)} pictures of a kind that is not read ({kinds}) are left out",)


def _columns(
    rows: Sequence[tuple[int, list[str]]], path: Path, finder: _Finder
) -> tuple[int, int, int | None, bool, tuple[str, ...]]:
    """Return the columns of files, labels and splits, whether the first line names them, and notes.

    Raises:
        DataError: More than one column may hold the labels.
    """
    every, rows = rows, rows[:_SAMPLE]
    first = rows[0][1]
    width = max(len(cells) for _, cells in rows)
    body = [cells for _, cells in rows[1:]]
    columns = [[cells[i] for cells in body if i < len(cells)] for i in range(width)]
    exact = [sum(finder.literally(c) is not None for c in cells) for cells in columns]
    loose = [sum(bool(finder.find(c)) for c in cells) for cells in columns]
    files_at = [i for i in range(width) if exact[i]] or [i for i in range(width) if loose[i]]
    words = [_plain(cell) for cell in first]
    if len(first) == width - 1 and any(i and words[i - 1] in _FILE_WORDS for i in files_at):
        first, words = ["", *first], ["", *words]  # pandas writes no name over its index
    if not any(map(any, (exact, loose))):
        files_at = [i for i, cell in enumerate(first) if finder.find(cell)]
    named = [i for i in files_at if i < len(words) and words[i] in _FILE_WORDS]
    file_at = named[0] if named else max(files_at, key=lambda i: (exact[i], loose[i], -i), default=0)
    header = _is_header(first, words, file_at, columns, finder)
    others = [i for i in range(width) if i != file_at]
    part_at = None
    notes: tuple[str, ...] = ()
    if header:
        part_at = next((i for i in others if i < len(words) and words[i] in _SPLIT_WORDS), None)
    if part_at is None and len(others) > 1:
        whole = [cells for _, cells in every[header:]]
        part_at = next((i for i in others if _says_parts([cells[i] for cells in whole if i < len(cells)])), None)
    others = [i for i in others if i != part_at]
    if header:
        by_name = [i for i in others if i < len(words) and words[i] in _LABEL_WORDS]
        unnamed = [i for i in others if i >= len(words)]
        if len(by_name) == 1:
            notes = (f"{shown(path.name)}: column {unnamed[0] + 1} has no name and is not read",) if unnamed else ()
            for i in others:
                if i < len(words) and _NUMBER_WORDS.fullmatch(words[i]) and i != by_name[0]:
                    notes += _other_order(columns[by_name[0]], columns[i], f"{shown(path.name)}: column '{shown(first[i])}'")
            return file_at, by_name[0], part_at, header, notes
        if len(by_name) > 1:
            same = all(columns[i] == columns[by_name[0]] for i in by_name)
            if not same:
                names = " and ".join(f"'{first[i]}'" for i in by_name)
                raise DataError(f"columns {names} may both hold the labels", where=shown(path), remedy="keep one of them")
            return file_at, by_name[0], part_at, header, ()
    if not others:
        raise DataError(f"line {rows[0][0]} has {len(first)} columns", where=shown(path), remedy=_WRITE)
    if len(others) > 1:
        cells = columns[0] if header else [first[0], *columns[0]]
        if others[0] == 0 and _is_index(cells, words[0] if header else ""):
            others = others[1:]
    if len(others) > 1 and body and all(_adds_up([row[i] for i in others if i < len(row)]) for row in body):
        raise DataError(
            "has a column for each class", where=shown(path), remedy="write one column called label, with the name of the class"
        )
    label_at = file_at + 1 if file_at + 1 in others else others[0]
    notes = ()
    if len(others) > 1:
        if file_at + 1 not in others:
            raise DataError(
                f"has {width} columns, and none is called label",
                where=shown(path),
                remedy="call the column of the classes label",
            )
        which = f"'{first[label_at]}'" if header and label_at < len(first) else str(label_at + 1)
        notes = (f"{shown(path.name)}: column {which} is taken for the labels",)
    return file_at, label_at, part_at, header, notes


def _says_parts(cells: Sequence[str]) -> bool:
    """Whether a column of any name tells training from evaluation: every cell does, and both are there."""
    words = {cell.strip().casefold() for cell in cells}
    trains = {word for word in words if word.startswith("tr")}
    return all(map(_PART.fullmatch, words)) and bool(trains) and trains != words


def _other_order(labels: Sequence[str], numbers: Sequence[str], column: str) -> tuple[str, ...]:
    """Return a note where a column numbers the classes, and not in the order of their names."""
    pairs = sorted(set(zip(labels, numbers, strict=False)))
    try:
        values = [float(number) for _, number in pairs]
    except ValueError:
        return ()
    if len(pairs) != len({label for label, _ in pairs}) or values == sorted(values):
        return ()
    said = ", ".join(f"{label} {number}" for label, number in pairs[:4])
    return (f"{column} is not read, and numbers the classes in another order than their names have: {said}",)


def _adds_up(cells: Sequence[str]) -> bool:
    """Whether the cells of a line share out one whole among classes, as 0,1,0 and 0.0,0.25,0.75 do."""
    try:
        shares = [float(cell) for cell in cells]
    except ValueError:
        return False
    return len(shares) > 1 and all(0 <= share <= 1 for share in shares) and abs(sum(shares) - 1) < 0.01


def _is_header(
    first: Sequence[str], words: Sequence[str], file_at: int, columns: Sequence[Sequence[str]], finder: _Finder
) -> bool:
    """Whether the first line names the columns: it holds no picture, and looks like none."""
    cell = first[file_at] if file_at < len(first) else ""
    if finder.literally(cell) is not None or suffix_of(cell) in IMAGE_SUFFIXES or suffix_of(cell) in OTHER_IMAGES:
        return False
    if any(w in _FILE_WORDS or w in _LABEL_WORDS or w in _SPLIT_WORDS for w in words) and not finder.find(cell):
        return True
    if finder.find(cell):
        return False
    suffixed = sum(suffix_of(c) in IMAGE_SUFFIXES for c in columns[file_at])
    if 2 * suffixed > len(columns[file_at]):
        return True
    return not any(c in column for i, column in enumerate(columns) if i != file_at for c in first)


def _is_index(cells: Sequence[str], word: str) -> bool:
    """Whether a first column only counts the lines, under no name or one that says so."""
    if word not in ("", "index", "id", "idx", "unnamed0", "row", "nr", "no"):
        return False
    return len(set(cells)) == len(cells) and all(c.isascii() and c.isdecimal() for c in cells)


def _json(text: str, path: Path, finder: _Finder) -> LabelFile:
    def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if seen.setdefault(name, value) != value:
                raise DataError(f"gives '{name[:100]}' two labels", where=shown(path), remedy="remove one of them")
        return seen

    document = json.loads(text, object_pairs_hook=once_each)
    pairs: list[tuple[Any, Any, Any]] = []
    if isinstance(document, list):
        for entry in document:
            pairs.append(_entry(entry, path))
    elif isinstance(document, dict):
        pairs = [(k, v, None) for k, v in document.items()]
    else:
        raise DataError("is no mapping of file to label", where=shown(path), remedy=_WRITE_JSON)
    found: list[Label] = []
    missing: list[tuple[int, str]] = []
    unread: list[str] = []
    for number, (name, label, part) in enumerate(pairs, start=1):
        if isinstance(label, bool) or not isinstance(label, str | int | float):
            raise DataError(
                f"the label of '{str(name)[:100]}' is no text and no number",
                where=shown(path),
                remedy='write {"file.jpg": "label", ...}',
            )
        if not str(label).strip():
            raise DataError(f"'{str(name)[:100]}' has no label", where=shown(path), remedy="write the label, or take it out")
        picture = _one(finder, str(name).strip(), number, path)
        if picture is None:
            missing.append((number, str(name)))
        elif suffix_of(picture) not in IMAGE_SUFFIXES:
            unread.append(picture)
        else:
            found.append(Label(picture, str(label).strip(), number, None if part is None else str(part)))
    _refuse_missing(missing, path)
    return LabelFile(path, tuple(found), _unread_notes(unread, path))


def _entry(entry: object, path: Path) -> tuple[Any, Any, Any]:
    if isinstance(entry, dict):
        keys = {_plain(str(k)): v for k, v in entry.items()}
        file = [v for k, v in keys.items() if k in _FILE_WORDS]
        label = [v for k, v in keys.items() if k in _LABEL_WORDS]
        part = [v for k, v in keys.items() if k in _SPLIT_WORDS]
        if len(file) == len(label) == 1:
            return file[0], label[0], part[0] if part else None
    elif isinstance(entry, list) and len(entry) == 2:
        return entry[0], entry[1], None
    raise DataError(
        "is no mapping of file to label",
        where=shown(path),
        remedy='write {"file.jpg": "label", ...} or [{"file": ..., "label": ...}]',
    )


def folders_name_the_same(found: LabelFile, root: Path) -> bool:
    """Whether the label file only repeats what the class folders say."""
    folders = set(folders_in(root))
    names = (
        (Path(row.path).relative_to(root).parts[0], row.label) for row in found.labels if Path(row.path).is_relative_to(root)
    )
    return all(folder == label and folder in folders for folder, label in names)
