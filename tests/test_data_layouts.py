"""Which samples and labels a data set holds: layouts of folders and label files against torchvision and the csv module."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compress.data import CachedStore, Dataset, Inputs, Split, _View, load_dataset, match_classes
from compress.evaluate import evaluate
from rescompress.core.errors import BadInput, DataError
from rescompress.core.labels import parse_labels
from rescompress.core.outcomes import samples_digest
from rescompress.core.spec import Preprocessing
from rescompress.runs.config import load_config
from rescompress.runs.fingerprint import data_identity

RAW = Preprocessing(name="raw", mean=(0.5, 0.25, 0.125), std=(0.5, 0.25, 2.0), resize=None)


def inputs(outputs: int = 2, labels: tuple[str, ...] | None = None) -> Inputs:
    return Inputs((3, 4, 4), outputs, RAW, labels)


def paint(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P6 4 4 255\n" + bytes([value % 256, value // 256 % 256, 7]) * 16)
    return path


def class_folders(root: Path, classes: Sequence[str], count: int = 2) -> Path:
    for number, name in enumerate(classes):
        for i in range(count):
            paint(root / name / f"{i}.ppm", 10 * number + i)
    return root


def answers(*splits: Split, repeats: bool = False) -> dict[str, int]:
    """The output that each file is said to be; a training list may name a file again."""
    found = {}
    for split in splits:
        index, store = np.arange(len(split)), split.store
        while isinstance(store, _View):
            index, store = store.index[index], store.store
        assert isinstance(store, CachedStore)
        for i, y in zip(index, split.labels, strict=True):
            path = os.path.normpath(store.files.paths[int(i)])
            assert repeats or path not in found, "no file counts twice"
            found[path] = int(y)
    return found


def attempt(root: Path, given: Inputs) -> tuple[Dataset | None, DataError | None]:
    """The data set, or why it is refused: with a place and a remedy."""
    try:
        return load_dataset(str(root), given), None
    except DataError as e:
        error = e
    assert error.where is not None
    assert error.remedy is not None
    return None, error


def of_torchvision(split: Path, classes: Sequence[str]) -> dict[str, int]:
    """What torchvision's ImageFolder says of a split, its classes numbered over both."""
    datasets = pytest.importorskip("torchvision.datasets")

    class Numbered(datasets.ImageFolder):  # type: ignore[misc, name-defined]
        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            return list(classes), {c: i for i, c in enumerate(classes) if (Path(directory) / c).is_dir()}

    return {os.path.normpath(p): y for p, y in Numbered(str(split), allow_empty=True).samples}


NAMES = ["cat", "dog", "Bird", "n01", "9", "10", "ähre", "k\udce4tz", "a b", "yes", "test", "trains"]
TRAINS = ["train", "Train", "TRAINING", "training_set", "train_images", "trainset"]
EVALUATIONS = ["val", "Val", "valid", "validation_set", "Dev", "eval", "test", "Testing", "test_set"]
CHANGES = ["none", "renamed", "case", "missing", "new", "empty", "only gif"]


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    classes = draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=5, unique=True))
    return {
        "classes": classes,
        "splits": draw(st.sampled_from([None, *((t, e) for t in TRAINS for e in EVALUATIONS)])),
        "change": draw(st.sampled_from(CHANGES)),
        "changed": draw(st.sampled_from(classes)),
        "link": draw(st.sampled_from([None, "class", "inside", "split"])),
        "litter": draw(st.booleans()),
        "sibling": draw(st.sampled_from([None, None, "holdout", "docs"])),
        "known": draw(st.booleans()),
    }


def build(root: Path, layout: dict[str, Any]) -> None:
    away, shown = root.parent / "away", root
    for split in layout["splits"] or ("",):
        class_folders(shown / split, layout["classes"])
    held = shown / (layout["splits"] or ("", ""))[1]
    one = held / layout["changed"]
    match layout["change"]:
        case "renamed":
            one.rename(held / "zzz")
        case "case":
            one.rename(held / layout["changed"].swapcase())
        case "missing":
            for path in one.iterdir():
                path.unlink()
            one.rmdir()
        case "new":
            class_folders(held, ["aaa"])
        case "empty":
            for path in one.iterdir():
                path.unlink()
        case "only gif":
            for path in one.iterdir():
                path.rename(path.with_suffix(".gif"))
    if layout["link"] is not None:
        inside = sorted(p for p in held.iterdir() if any(p.iterdir())) if held.is_dir() else []
        moved = {"class": inside[0] if inside else held, "split": held, "inside": None}[layout["link"]]
        if moved is None and inside:
            paint(away / "0.ppm", 99)
            (inside[0] / "more").symlink_to(away, target_is_directory=True)
        elif moved not in (None, shown):
            moved.rename(away)
            moved.symlink_to(away, target_is_directory=True)
    if layout["litter"]:
        paint(shown / "__MACOSX" / "x.ppm")
        paint(shown / ".cache" / "x.ppm")
    if layout["sibling"] == "docs":
        (shown / "docs").mkdir()
        (shown / "docs" / "read.md").write_text("")
    elif layout["sibling"]:
        class_folders(shown / layout["sibling"], layout["classes"])


def has_pictures(folder: Path) -> bool:
    """Whether a folder, or one that is linked into it, holds pictures that torchvision reads."""
    return any(name.endswith(".ppm") for _, _, names in os.walk(folder, followlinks=True) for name in names)


def check_layout(layout: dict[str, Any]) -> None:
    """Either every file has the output that torchvision gives it, or something is refused or noted by name."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "set"
        build(root, layout)
        names = tuple(sorted(layout["classes"]))
        other = {layout["changed"]: layout["changed"].swapcase()} if layout["change"] == "case" else {}
        spelled = tuple(other.get(n, n) for n in names)  # in the evaluation split
        given = inputs(len(names), names if layout["known"] else None)
        changed = layout["change"] != "none" and (layout["change"], layout["changed"]) != ("case", layout["changed"].swapcase())
        plain = not changed and layout["sibling"] != "holdout"
        data, error = attempt(root, given)
        if data is None:
            assert not plain, f"{layout} is refused: {error}"
            return
        splits = layout["splits"]
        if splits:
            found = {s: answers(part) for s, part in zip(splits, (data.train, data.val), strict=True)}
            right = {s: of_torchvision(root / s, n) for s, n in zip(splits, (names, spelled), strict=True)}
            assert found == right, layout
        else:
            here = sorted(p.name for p in root.iterdir() if not p.name.startswith((".", "__")) and has_pictures(p))
            here = list(names) if layout["change"] == "empty" else here  # an empty folder is a class all the same
            here = list(spelled) if other and layout["known"] else here
            assert answers(data.train, data.val) == of_torchvision(root, here), layout
            return
        notes = " ".join(data.notes)
        if layout["change"] in ("missing", "empty"):
            assert "no images of" in notes or layout["link"] == "inside", layout
        assert not (other and changed) or "regard to their spelling" in notes, layout
        noted = layout["change"] in ("missing", "empty", "case") or (layout["change"] == "only gif" and "gif" in notes)
        assert not changed or noted, f"{layout} is taken"
        if not layout["known"] and [int(n) if n.isdecimal() else None for n in names] != list(range(len(names))):
            assert "alphabet" in notes
        if layout["sibling"] == "holdout":
            assert "holdout" in notes


BESIDE_AN_EMPTY_CLASS: dict[str, Any] = {
    "classes": ["cat", "dog"], "splits": None, "change": "empty", "changed": "cat", "link": None, "litter": False,
    "sibling": "holdout", "known": False,
}  # fmt: skip
"""As many folders with images as outputs, and one of them is a split."""


@example(BESIDE_AN_EMPTY_CLASS)
@settings(max_examples=15, deadline=None)
@given(layouts())
def test_folders_against_torchvision(layout: dict[str, Any]) -> None:
    check_layout(layout)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(layouts())
def test_many_folders_against_torchvision(layout: dict[str, Any]) -> None:
    check_layout(layout)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "name": draw(st.sampled_from(["labels.csv", "Labels.csv", "labels.tsv", "annotations.csv", "label.csv", "mine.csv"])),
        "delimiter": draw(st.sampled_from([",", ";", "\t", "|"])),
        "header": draw(st.sampled_from([None, "plain", "other words"])),
        "columns": draw(st.permutations(["file", "label"])),
        "index": draw(st.booleans()),
        "split": draw(st.sampled_from([None, None, "is_valid", "split"])),
        "end": draw(st.sampled_from(["\n", "\r\n"])),
        "encoding": draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])),
        "files": draw(st.sampled_from(["flat", "sub", "parts", "backslash", "no suffix", "absolute", "upper"])),
        "labels": draw(st.sampled_from(["names", "numbers", "floats", "from one", "zeros", "quoted"])),
        "classes": draw(st.sampled_from([3, 3, 12])),  # of twelve, the order of numbers is not that of their text
        "trouble": draw(st.sampled_from([None, None, None, "empty", "twice", "torn", "missing", "short"])),
    }


def check_table(dialect: dict[str, Any]) -> None:
    """Either every file has the label that the csv module reads, or something is refused or noted by name."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "set"
        classes = ["cat", "dog", "b;i,r\td"] if dialect["labels"] == "quoted" else ["cat", "dog", "bird"]
        classes += [f"kind {chr(121 - i)}" for i in range(dialect["classes"] - 3)]
        rows, truth, n = [], {}, len(classes)
        for i in range(4 * n if n == 3 else 2 * n):
            name, number = f"im{i}.ppm", i % n
            sub = {"sub": "images", "backslash": "images", "parts": f"part_{i % 2}"}.get(dialect["files"], "")
            path = paint(root / sub / name, i)
            written = {
                "sub": f"images/{name}",
                "backslash": f"images\\{name}",
                "no suffix": f"im{i}",
                "absolute": str(path),
                "upper": name.upper(),
            }.get(dialect["files"], name)
            label = {
                "names": classes[number],
                "quoted": classes[number],
                "floats": f"{number}.0",
                "from one": str(number + 1),
                "zeros": f"{number:02}",
            }.get(dialect["labels"], str(number))
            rows.append({"file": written, "label": label, "index": str(i), "part": i % 4 == 0 and (n == 3 or i < n)})
            truth[str(path)] = sorted(classes).index(classes[number]) if label == classes[number] else number
        trouble = dialect["trouble"]
        if trouble == "empty":
            rows[5]["label"] = ""
        elif trouble == "twice":
            rows.append({**rows[3], "index": str(len(rows))})
        elif trouble == "torn":
            rows.append({**rows[3], "label": rows[4]["label"], "index": str(len(rows))})
        elif trouble == "missing":
            rows[5]["file"] = "nowhere.ppm"
        columns = [*(["index"] if dialect["index"] else []), *dialect["columns"]]
        words = {"file": "filename", "label": "label", "index": ""}
        if dialect["header"] == "other words":
            words = {"file": "image_id", "label": "category", "index": "index"}
        has_split = dialect["split"] is not None and dialect["header"] is not None
        if has_split:
            columns.append("part")
            words["part"] = dialect["split"]
            spelt = ("True", "False") if dialect["split"] == "is_valid" else ("test", "train")
        text = io.StringIO()
        writer = csv.writer(text, delimiter=dialect["delimiter"], lineterminator=dialect["end"])
        if dialect["header"]:
            writer.writerow([words[c] for c in columns])
        for row in rows:
            writer.writerow([(spelt[0] if row[c] else spelt[1]) if c == "part" else row[c] for c in columns])
        if trouble == "short":
            text.write(f"im0.ppm{dialect['end']}")
        (root / dialect["name"]).write_bytes(text.getvalue().encode(dialect["encoding"]))
        with (root / dialect["name"]).open(newline="", encoding=dialect["encoding"]) as f:
            read = list(csv.reader(f, delimiter=dialect["delimiter"]))[bool(dialect["header"]) :]
        at = columns.index("label")
        by_csv = [r[at] for r in read[: len(rows)]]
        assert by_csv == [row["label"] for row in rows], "the csv module reads what was meant"
        data, error = attempt(root, inputs(n))
        if data is None:
            own_name = dialect["name"] == "mine.csv" and dialect["files"] in ("sub", "parts", "backslash")
            assert trouble in ("empty", "torn", "missing", "short") or own_name, f"{dialect} is refused: {error}"
            assert re.search(r"mine\.csv" if own_name else r"line|im3|column", str(error)), error
            return
        assert trouble in (None, "twice"), f"{dialect} is taken"
        assert answers(data.train, data.val, repeats=has_split) == truth, dialect
        assert trouble != "twice" or has_split or any("counts once" in note for note in data.notes)
        if has_split:
            held = [row["file"] for row in rows[: len(truth)] if row["part"]]
            assert len(data.val) == len(held)
            assert n > 3 or set(data.val.labels.tolist()) == {0, 1, 2}


@settings(max_examples=25, deadline=None)
@given(tables())
def test_label_files_against_the_csv_module(dialect: dict[str, Any]) -> None:
    check_table(dialect)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(tables())
def test_many_label_files_against_the_csv_module(dialect: dict[str, Any]) -> None:
    check_table(dialect)


def of_files(root: Path, rows: Sequence[tuple[str, str]], name: str = "labels.csv") -> Path:
    """A flat folder with a label file."""
    for number, (file, _) in enumerate(rows):
        paint(root / file, number)
    (root / name).write_text("".join(f"{file},{label}\n" for file, label in rows))
    return root


@pytest.mark.parametrize(
    ("train", "held"), [*zip(TRAINS, EVALUATIONS, strict=False), ("train", "dev"), ("Training", "Testing")]
)
def test_split_names_are_known_in_other_spellings(tmp_path: Path, train: str, held: str) -> None:
    class_folders(tmp_path / train, ["cat", "dog"], 3)
    class_folders(tmp_path / held, ["cat", "dog"], 2)
    data = load_dataset(str(tmp_path), inputs())
    assert (len(data.train), len(data.val)) == (6, 4)


def test_of_several_evaluation_splits_one_is_used_and_named(tmp_path: Path) -> None:
    for split, count in (("train", 1), ("test", 2), ("val", 3), ("extra", 4)):
        class_folders(tmp_path / split, ["cat", "dog"], count)
    data = load_dataset(str(tmp_path), inputs())
    assert len(data.val) == 6
    assert any("val/ is evaluated on; not read: test/ and extra/" in note for note in data.notes)
    class_folders(tmp_path / "Val", ["cat", "dog"])
    with pytest.raises(DataError, match="Val/ and val/, which mean the same"):
        load_dataset(str(tmp_path), inputs())


def test_training_is_not_halved_beside_a_folder_that_may_be_the_evaluation(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ["cat", "dog"])
    (tmp_path / "docs").mkdir()
    assert len(load_dataset(str(tmp_path), inputs()).val) == 2, "a folder without pictures is no split"
    class_folders(tmp_path / "heldback", ["cat", "dog"])
    with pytest.raises(DataError, match="heldback/ is no name of the other split"):
        load_dataset(str(tmp_path), inputs())


@pytest.mark.parametrize("split", [None, "train"])
def test_part_folders_are_no_classes(tmp_path: Path, split: str | None) -> None:
    """What was 46.67 %: two sources, each with both classes, under a network of two outputs."""
    for part in ("source_a", "source_b"):
        class_folders(tmp_path / (split or "") / part, ["cat", "dog"])
    if split:
        class_folders(tmp_path / "val", ["cat", "dog"])
    with pytest.raises(
        DataError, match="folders of classes inside folders of classes: source_a, source_b over cat, dog"
    ) as caught:
        load_dataset(str(tmp_path), inputs())
    assert "--labels" in str(caught.value.remedy)
    if split is None:
        said = load_dataset(str(tmp_path), inputs(), labels={"source_a": "0", "source_b": "1"})
        assert set(said.val.labels.tolist()) <= {0, 1}


def test_folders_inside_classes_are_read(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        class_folders(tmp_path / name, ["images"])
    assert len(load_dataset(str(tmp_path), inputs()).val) == 2
    for name in ("cat", "dog"):
        class_folders(tmp_path / name, ["2021", "2022"])
    assert len(load_dataset(str(tmp_path), inputs(2, ("cat", "dog"))).val) == 6, "names that the checkpoint has are the classes"


def test_a_real_folder_beside_litter_is_named(tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", ["cat", "dog"])
    class_folders(tmp_path / "__MACOSX", ["cat"])
    with pytest.raises(DataError, match="inside folders of classes: photos over cat, dog"):
        load_dataset(str(tmp_path), inputs())


def test_label_files_beside_folders(tmp_path: Path) -> None:
    rows = [(f"images_part_{i % 2}/{i}.ppm", "cat" if i < 6 else "dog") for i in range(12)]
    of_files(tmp_path / "parts", rows)
    data = load_dataset(str(tmp_path / "parts"), inputs())
    assert answers(data.train, data.val) == {str(tmp_path / "parts" / f): int(c == "dog") for f, c in rows}
    assert any("labels.csv says the classes, not the folders" in note for note in data.notes)
    bare = of_files(tmp_path / "bare", rows)
    (bare / "labels.csv").write_text("".join(f"{Path(f).name},{c}\n" for f, c in rows))
    assert len(answers(*dataset_splits(load_dataset(str(bare), inputs())))) == 12
    names = class_folders(tmp_path / "names", ["n1", "n2"])
    (names / "labels.csv").write_text("n1,tench\nn2,shark\n")
    assert any("names none of the pictures and is not read" in note for note in load_dataset(str(names), inputs()).notes)
    own = class_folders(tmp_path / "own", ["a", "b"])
    (own / "mine.csv").write_text("a/0.ppm,x\n")
    assert any("pictures are named there: mine.csv" in note for note in load_dataset(str(own), inputs()).notes)


def test_tables_that_can_be_read_in_more_than_one_way_are_refused_or_noted(tmp_path: Path) -> None:
    root = of_files(tmp_path / "set", [("a.ppm", "cat"), ("b.ppm", "dog"), ("c.ppm", "cat")])
    for text, message in (
        ("filename,cat,dog\na.ppm,1,0\nb.ppm,0,1\nc.ppm,1,0\n", "a column for each class"),
        ("filename,cat,dog\na.ppm,1.0,0.0\nb.ppm,0.0,1.0\nc.ppm,1.0,0.0\n", "a column for each class"),
        ("filename,cat,dog\na.ppm,0.25,0.75\nb.ppm,0.5,0.5\nc.ppm,1,0\n", "a column for each class"),
        ("file,label,is_valid\na.ppm,cat,maybe\nb.ppm,dog,True\nc.ppm,cat,False\n", "line 2 says neither"),
        ("file,label,class\na.ppm,cat,dog\nb.ppm,dog,cat\nc.ppm,cat,dog\n", "'label' and 'class' may both"),
    ):
        (root / "labels.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            load_dataset(str(root), inputs())
    (root / "labels.csv").write_text("a.ppm,cat,0.9\nb.ppm,dog,0.8\n")
    notes = load_dataset(str(root), inputs()).notes
    assert any("column 2 is taken for the labels" in note for note in notes)
    assert any("does not name 1 of the images" in note for note in notes)
    paint(root / "more" / "a.ppm")
    paint(root / "less" / "a.ppm")
    (root / "a.ppm").unlink()
    with pytest.raises(DataError, match=r"line 1: 'a.ppm' may be each of less/a.ppm, more/a.ppm"):
        load_dataset(str(root), inputs())


def dataset_splits(data: Dataset) -> tuple[Split, Split]:
    return data.train, data.val


def test_one_label_file_beside_flat_splits(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 4)):
        for i in range(count):
            paint(tmp_path / split / f"{i}.ppm", i)
    (tmp_path / "labels.csv").write_text(
        "".join(f"{s}/{i}.ppm,{'ab'[i % 2]}\n" for s, n in (("train", 6), ("test", 4)) for i in range(n))
    )
    data = load_dataset(str(tmp_path), inputs())
    assert (len(data.train), len(data.val)) == (6, 4)
    (tmp_path / "labels.csv").unlink()
    for split, count in (("train", 6), ("test", 4)):
        (tmp_path / f"{split}_labels.csv").write_text("".join(f"{i}.ppm,{'ab'[i % 2]}\n" for i in range(count)))
    data = load_dataset(str(tmp_path), inputs())
    assert (len(data.train), data.val.labels.tolist()) == (6, [0, 1, 0, 1])


def rows_of(root: Path, count: int) -> str:
    """Paint pictures and return the lines of a label file: a, b, a, b."""
    for i in range(count):
        paint(root / f"{i}.ppm", i)
    return "file,label\n" + "".join(f"{i}.ppm,{'ab'[i % 2]}\n" for i in range(count))


@pytest.mark.parametrize(
    ("pictures", "table", "named"),
    [
        ("images/{s}{i}.ppm", "{s}.csv", "{s}{i}.ppm"),
        ("images/{s}{i}.ppm", "{s}.csv", "images/{s}{i}.ppm"),
        ("{s}{i}.ppm", "{s}.csv", "{s}{i}.ppm"),
        ("images/{s}{i}.ppm", "labels/{s}.csv", "{s}{i}.ppm"),
        ("images/{s}/{i}.ppm", "labels/{s}.csv", "{i}.ppm"),
        ("images/{s}/{i}.ppm", "labels/{s}.csv", "{s}/{i}.ppm"),
        ("images/{s}/{i}.ppm", "{s}_labels.csv", "images/{s}/{i}.ppm"),
        ("images/{s}/{i}.ppm", "images/{s}.csv", "{i}.ppm"),
        ("images/{s}/{i}.ppm", "labels.csv", "images/{s}/{i}.ppm"),
        ("images/{s}/{i}.ppm", "labels.csv", "{s}/{i}.ppm"),
        ("images/{s}/{i}.ppm", "images/labels.csv", "{s}/{i}.ppm"),
        ("{s}/{i}.ppm", "annotations/{s}.csv", "{i}.ppm"),
        ("{s}/{i}.ppm", "annotations/{s}.csv", "{s}/{i}.ppm"),
        ("{s}/{i}.ppm", "{s}.csv", "{s}/{i}.ppm"),
    ],
)
def test_two_tables_or_splits_in_one_folder_are_read(tmp_path: Path, pictures: str, table: str, named: str) -> None:
    right = {}
    lines: dict[Path, list[str]] = {}
    for number, (split, count) in enumerate((("train", 6), ("val", 4))):
        for i in range(count):
            picture = paint(tmp_path / pictures.format(s=split, i=i), 100 * number + i)
            right[str(picture)] = (i + number) % 2
            lines.setdefault(tmp_path / table.format(s=split), ["file,label"]).append(
                f"{named.format(s=split, i=i)},{'ab'[(i + number) % 2]}"
            )
    for path, rows in lines.items():
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("\n".join(rows) + "\n")
    data, error = attempt(tmp_path, inputs())
    assert data is not None, error
    assert (len(data.train), len(data.val)) == (6, 4)
    assert answers(data.train, data.val) == right


def test_class_folders_below_images_are_read(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        class_folders(tmp_path / "images" / split, ["cat", "dog"], count)
    (tmp_path / "docs").mkdir()
    data = load_dataset(str(tmp_path), inputs())
    assert (len(data.train), data.val.labels.tolist()) == (6, [0, 0, 1, 1])


def test_a_table_without_labels_is_no_split(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(rows_of(tmp_path, 6))
    (tmp_path / "test.csv").write_text("file\n0.ppm\n1.ppm\n")
    assert len(load_dataset(str(tmp_path), inputs()).val) == 3, "half of the training pictures"
    (tmp_path / "test.csv").write_text("file,label\n0.ppm,a\nmissing.ppm,b\n")
    with pytest.raises(DataError, match=r"missing\.ppm"):
        load_dataset(str(tmp_path), inputs())


@pytest.mark.parametrize("header", ["file,label,phase\n", "file,mode_of_use,label\n", ""])
def test_a_column_that_says_the_splits_counts_under_any_name(tmp_path: Path, header: str) -> None:
    """Also where the first hundreds of lines are of one split."""
    rows_of(tmp_path, 300)
    swapped = header.startswith("file,mode")
    rows = [(f"{i}.ppm", "ab"[i % 2], "Train" if i < 250 else "test") for i in range(300)]
    text = header + "".join(f"{f},{p if swapped else c},{c if swapped else p}\n" for f, c, p in rows)
    (tmp_path / "labels.csv").write_text(text)
    data = load_dataset(str(tmp_path), inputs())
    assert (len(data.train), len(data.val)) == (250, 50)
    assert data.val.labels.tolist() == [0, 1] * 25


@pytest.mark.parametrize("mark", ["nan", "NaN", "null", "None", "N/A", "inf"])
def test_a_mark_among_numbers_is_no_class(tmp_path: Path, mark: str) -> None:
    rows_of(tmp_path, 4)
    (tmp_path / "labels.csv").write_text(f"file,label\n0.ppm,0\n1.ppm,1\n2.ppm,{mark}\n3.ppm,1\n")
    with pytest.raises(DataError, match=f"'{mark}', which is not a number"):
        load_dataset(str(tmp_path), inputs(3))
    (tmp_path / "labels.csv").write_text(f"file,label\n0.ppm,cat\n1.ppm,dog\n2.ppm,{mark}\n3.ppm,dog\n")
    assert len(load_dataset(str(tmp_path), inputs(3)).val.classes) == 3


def test_a_column_that_numbers_the_classes_in_another_order_is_named(tmp_path: Path) -> None:
    rows_of(tmp_path, 4)
    for numbers, noted in (((0, 1), False), ((1, 0), True), ((7, 9), False)):
        lines = "".join(f"{i}.ppm,{'ab'[i % 2]},{numbers[i % 2]}\n" for i in range(4))
        (tmp_path / "labels.csv").write_text("file,label,label_id\n" + lines)
        data = load_dataset(str(tmp_path), inputs())
        assert any("'label_id' is not read, and numbers" in note for note in data.notes) == noted


def test_two_folders_of_one_split_are_no_spellings_of_one_class(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ["Cat", "cat", "dog"])
    class_folders(tmp_path / "val", ["cat", "dog"])
    with pytest.raises(DataError, match="'Cat' and 'cat' differ in spelling alone"):
        load_dataset(str(tmp_path), inputs(2, ("cat", "dog")))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-8-sig"])
def test_tables_in_the_encodings_of_spreadsheets(tmp_path: Path, encoding: str) -> None:
    text = rows_of(tmp_path, 4).replace(",a", ",Ähre").replace(",b", ",Baum")
    (tmp_path / "labels.csv").write_bytes(text.encode(encoding))
    data = load_dataset(str(tmp_path), inputs(2, ("Baum", "Ähre")))
    assert sorted([*data.train.labels.tolist(), *data.val.labels.tolist()]) == [0, 0, 1, 1]


def test_spellings_of_one_class_count_once_where_that_is_open_in_no_way(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ["Golden Retriever", "Truck", "cat"])
    class_folders(tmp_path / "val", ["golden_retriever", "truck", "cat"])
    right = [0, 0, 1, 1, 2, 2]
    for labels in (None, ("Golden Retriever", "Truck", "cat"), ("golden-retriever", "TRUCK", "Cat")):
        data = load_dataset(str(tmp_path), inputs(3, labels))
        assert data.train.labels.tolist() == right
        assert sorted(data.val.labels.tolist()) == right
        assert {p: y for p, y in answers(data.val).items() if "retriever" in p and y != 0} == {}
        assert any("regard to their spelling" in note for note in data.notes)
    with pytest.raises(DataError, match="is no label of the checkpoint"):
        load_dataset(str(tmp_path), inputs(4, ("golden-retriever", "TRUCK", "Truck_", "Cat")))
    rows = "0.ppm,Cat\n1.ppm,cat\n2.ppm,Dog\n3.ppm,Dog\n"
    (tmp_path / "flat").mkdir()
    rows_of(tmp_path / "flat", 4)
    (tmp_path / "flat" / "labels.csv").write_text(rows)
    assert len(load_dataset(str(tmp_path / "flat"), inputs(3)).val.classes) == 3, "three outputs: Cat and cat are two classes"
    with pytest.raises(DataError, match="place in the alphabet"):
        load_dataset(str(tmp_path / "flat"), inputs(2))
    (tmp_path / "flat" / "labels.csv").write_text(rows.replace("Dog", "Zebra").replace("Zebra", "zebra", 1))
    data = load_dataset(str(tmp_path / "flat"), inputs(2))
    assert {Path(p).name: y for p, y in answers(data.train, data.val).items()} == {
        "0.ppm": 0, "1.ppm": 0, "2.ppm": 1, "3.ppm": 1}  # fmt: skip


@pytest.mark.parametrize("known", [False, True])
def test_a_class_that_a_split_lacks_is_named(tmp_path: Path, known: bool) -> None:
    names = ["ant", "bird", "cat"]
    class_folders(tmp_path / "train", names)
    class_folders(tmp_path / "val", ["ant", "cat"])
    given = inputs(3, tuple(names) if known else None)
    for _ in range(2):
        data = load_dataset(str(tmp_path), given)
        assert data.val.labels.tolist() == [0, 0, 2, 2]
        assert any("no images of bird (1 of 3 classes)" in note for note in data.notes)
        (tmp_path / "val" / "bird").mkdir(exist_ok=True)
    paint(tmp_path / "val" / "bird" / "0.gif")
    with pytest.raises(DataError, match=r"'bird' holds no picture of a kind that is read, but 1 \.gif"):
        load_dataset(str(tmp_path), given)
    said = load_dataset(str(tmp_path), inputs(3), labels={"ant": "0", "cat": "2"})
    assert said.val.labels.tolist() == [0, 0, 2, 2]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path, ["cat", "dog"])
    real = os.scandir

    def scandir(folder: str) -> Any:
        if str(folder).endswith("dog"):
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    monkeypatch.setattr("compress.files.os.scandir", scandir)
    for call in (lambda: load_dataset(str(tmp_path), inputs()), lambda: data_identity(str(tmp_path))):
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            call()


def test_what_is_no_picture_is_refused_or_noted(tmp_path: Path) -> None:
    class_folders(tmp_path, ["cat", "dog"])
    paint(tmp_path / "cat" / "x.gif")
    assert any("left out: 1 .gif" in note for note in load_dataset(str(tmp_path), inputs()).notes)
    (tmp_path / "cat" / "._0.ppm").write_bytes(b"\x00\x05\x16\x07" + bytes(20))
    assert len(load_dataset(str(tmp_path), inputs()).val) == 2
    (tmp_path / "cat" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert len(load_dataset(str(tmp_path), inputs()).val) == 2 + 1, "through the link the other class once, itself never"
    (tmp_path / "cat" / "up").unlink()
    (tmp_path / "cat" / "gone.ppm").symlink_to(tmp_path / "nowhere.ppm")
    with pytest.raises(DataError, match="is a link to nothing"):
        load_dataset(str(tmp_path), inputs())
    (tmp_path / "cat" / "gone.ppm").unlink()
    os.mkfifo(tmp_path / "cat" / "pipe.ppm")
    with pytest.raises(DataError, match="is no regular file"):
        load_dataset(str(tmp_path), inputs())
    os.mkfifo(tmp_path / "pipe")
    for source in (str(tmp_path / "pipe"), "/dev/null"):
        with pytest.raises(DataError, match="pipe or a device"):
            load_dataset(source, inputs())
        with pytest.raises(BadInput, match="pipe or a device"):
            data_identity(source)


def test_data_behind_links_is_known_by_what_it_holds(tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        class_folders(tmp_path / version / "cat", ["a"])
        class_folders(tmp_path / version / "dog", ["b"])
    paint(tmp_path / "v2" / "dog" / "b" / "0.ppm", 99)
    root = tmp_path / "set"
    root.mkdir()
    seen = []
    for version in ("v1", "v2", "v1"):
        for name in ("cat", "dog"):
            (root / name).unlink(missing_ok=True)
            (root / name).symlink_to(tmp_path / version / name, target_is_directory=True)
        data = load_dataset(str(root), inputs())
        seen.append((data_identity(str(root)), samples_digest([data.train.identity, data.val.identity])))
    assert seen[0] == seen[2]
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]


def test_pictures_that_a_label_file_names_elsewhere_are_part_of_the_data(tmp_path: Path) -> None:
    root = of_files(tmp_path / "set", [("../away/0.ppm", "x"), ("1.ppm", "y"), ("2.ppm", "x"), ("3.ppm", "y")])
    (root / "labels.csv").write_text((root / "labels.csv").read_text().replace("1.ppm", str(root / "1.ppm")))
    known = data_identity(str(root)), load_dataset(str(root), inputs())
    assert len(known[1].val) == 2
    paint(tmp_path / "away" / "0.ppm", 55)
    assert data_identity(str(root)) != known[0]


@pytest.mark.parametrize("suffix", [".bmp", ".png", ".ppm", ".tif", ".jpg", ".webp"])
def test_images_of_one_size_are_told_apart(tmp_path: Path, suffix: str) -> None:
    class_folders(tmp_path, ["cat", "dog"])
    one, other = tmp_path / "cat" / f"x{suffix}", tmp_path / "dog" / f"x{suffix}"
    one.write_bytes(b"a" * 5000)
    other.write_bytes(b"b" * 5000)
    first = data_identity(str(tmp_path)), {load_dataset(str(tmp_path), inputs()).val.identity}
    one.write_bytes(b"b" * 5000)
    other.write_bytes(b"a" * 5000)
    data = load_dataset(str(tmp_path), inputs())
    assert data_identity(str(tmp_path)) != first[0]
    assert {data.val.identity, data.train.identity}.isdisjoint(first[1])


class Constant:
    """A network that always answers the first class."""

    runtime = "torch"

    def __call__(self, batch_NCHW: Any) -> Any:
        return np.eye(2, dtype=np.float32)[np.zeros(len(batch_NCHW), dtype=int)]


def test_copies_are_no_further_evidence(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", ["cat", "dog"])
    class_folders(tmp_path / "val", ["cat", "dog"], 4)
    once = evaluate(Constant(), load_dataset(str(tmp_path), inputs()).val)  # type: ignore[arg-type]
    assert (once.notes, once.outcomes.copies) == ((), ())
    for name in ("cat", "dog"):
        for i in range(4):
            for k in range(9):
                (tmp_path / "val" / name / f"{i}-{k}.ppm").write_bytes((tmp_path / "val" / name / f"{i}.ppm").read_bytes())
    many = evaluate(Constant(), load_dataset(str(tmp_path), inputs()).val)  # type: ignore[arg-type]
    assert (many.outcomes.n, len(many.outcomes.copies)) == (80, 72)
    assert many.metrics["top1"].std_error == once.metrics["top1"].std_error
    assert "72 of 80 images are copies" in many.notes[0]
    assert len(many.notes) == 1
    (tmp_path / "val" / "dog" / "x.ppm").write_bytes((tmp_path / "val" / "cat" / "0.ppm").read_bytes())
    torn = evaluate(Constant(), load_dataset(str(tmp_path), inputs()).val)  # type: ignore[arg-type]
    assert re.search(r"another label .*dog/x\.ppm: dog, and .*cat/0.*\.ppm: cat", torn.notes[1])


def test_names_that_are_no_utf8_are_read_and_written(tmp_path: Path) -> None:
    bad = os.fsdecode(b"k\xe4tzchen")
    class_folders(tmp_path, [bad, "dog"])
    paint(tmp_path / "dog" / os.fsdecode(b"h\xfcnd.ppm"), 77)
    data = load_dataset(str(tmp_path), inputs())
    found = evaluate(Constant(), data.val)  # type: ignore[arg-type]
    assert found.outcomes.classes is not None
    assert set(found.outcomes.classes) == {r"k\xe4tzchen", "dog"}
    for text in (found.outcomes.model_dump_json(), *data.notes):
        text.encode()
    known = data_identity(str(tmp_path))
    (tmp_path / bad).rename(tmp_path / os.fsdecode(b"k\xe5tzchen"))
    assert data_identity(str(tmp_path)) != known
    (tmp_path / os.fsdecode(b"k\xe5tzchen")).rename(tmp_path / bad)
    said = load_dataset(str(tmp_path), inputs(), labels={bad: "1", "dog": "0"})
    assert {said.val.classes[y] for y in said.val.labels} <= {"0", "1"}


def test_archives_hold_splits_and_names_once(tmp_path: Path) -> None:
    x = np.zeros((6, 4, 4, 3), np.uint8)
    y = np.arange(6) % 2
    np.savez(tmp_path / "keras.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2], x_valid=x[:4], y_valid=y[:4])
    data = load_dataset(str(tmp_path / "keras.npz"), inputs())
    assert (len(data.train), len(data.val)) == (6, 4)
    assert any("x_test, y_test are not" in note for note in data.notes)
    np.savez(tmp_path / "twice.npz", x=x, y=y, classes=["a", "a"])
    with pytest.raises(DataError, match="'a' twice"):
        load_dataset(str(tmp_path / "twice.npz"), inputs())


def test_labels_are_taken_as_they_are_written(tmp_path: Path) -> None:
    written = "yes: 0\nno: 1\n010: 2\n12:30: 3\nnull: 4\n1_0: 5\n2021-01-01: 6\n1.0: 7\n"
    right = {"yes": "0", "no": "1", "010": "2", "12:30": "3", "null": "4", "1_0": "5", "2021-01-01": "6", "1.0": "7"}
    (tmp_path / "labels.yaml").write_text(written)
    assert parse_labels(str(tmp_path / "labels.yaml")) == right
    below = "".join(f"  {line}\n" for line in written.splitlines())
    (tmp_path / "run.yaml").write_text(f"checkpoint: m.pt\ndata: d\nlabels:\n{below}")
    assert load_config(tmp_path / "run.yaml").labels == right
    assert load_config(tmp_path / "run.yaml", ("labels.010=9",)).labels == {**right, "010": "9"}
    (tmp_path / "labels.json").write_text(json.dumps({"cat": 0, "dog": 1}))
    assert parse_labels(str(tmp_path / "labels.json")) == {"cat": "0", "dog": "1"}
    long = {f"class {i}": str(i) for i in range(60)}
    assert parse_labels(",".join(f"{k}={v}" for k, v in long.items())) == long
    for text in ("cat: 0\ncat: 1\n", "cat: [0]\n", "- cat\n", "cat:\n", "a: &a [x]\nb: *a\n", "[" * 100_000):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(BadInput, match=r"mapping|line"):
            parse_labels(str(tmp_path / "bad.yaml"))
    with pytest.raises(BadInput, match="two labels"):
        parse_labels("cat=0,cat=1")


WRITTEN: list[Any] = [
    *(str, "{:02}".format, "{}.0".format, "{}.".format, "{},0".format, "{:.1e}".format, "{:+}".format, "{}E0".format),
    *(lambda i: str(i + 1), lambda i: str(i - 20), lambda i: str(i + 0.5), lambda i: f"{i / 4:.2f}"),
]


@pytest.mark.parametrize("written", WRITTEN)
def test_numbers_of_a_label_file_count_as_numbers(written: Any) -> None:
    """With more than ten classes, text sorts 10 in front of 2."""
    names = [written(i) for i in range(12)]
    outputs, classes = match_classes(sorted(names), inputs(12), None, "labels.csv", listed=True)
    assert [outputs[name] for name in names] == list(range(12))
    assert [float(c) for c in classes] == sorted(float(c) for c in classes)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 14), st.sampled_from(WRITTEN)), min_size=1, max_size=14), st.integers(2, 14))
def test_generated_numbers_against_numpy(cells: list[tuple[int, Any]], outputs: int) -> None:
    """Either every number is the output that numpy's unique or the number itself gives, or it is refused."""
    names = sorted({written(i) for i, written in cells})
    values = np.array([float(n.replace(",", ".")) for n in names])
    order, places = np.unique(values, return_inverse=True)
    own = bool((values >= 0).all() and (values < outputs).all() and (values == np.floor(values)).all())
    try:
        found, _ = match_classes(names, inputs(outputs), None, "labels.csv", listed=True)
    except DataError:
        assert not own
        assert len(order) != outputs or order[:2].tolist() == [-1, 0]
        return
    assert [found[name] for name in names] == (values.astype(int) if own else places).tolist()


def test_numbers_are_labels_of_the_same_value_and_marks_are_none() -> None:
    known = tuple(str(i) for i in range(12))
    outputs, _ = match_classes(["1.0", "10.0", "2.0"], inputs(12, known), None, "labels.csv", listed=True)
    assert outputs == {"1.0": 1, "10.0": 10, "2.0": 2}
    outputs, _ = match_classes(["03", "11"], inputs(12, known), None, "set")
    assert outputs == {"03": 3, "11": 11}
    for names in (["-1", "0", "1"], ["-1.0", "0.0"]):
        with pytest.raises(DataError, match="mark pictures without one"):
            match_classes(names, inputs(len(names)), None, "labels.csv", listed=True)
    with pytest.raises(DataError, match=r"'12\.0' is no label"):
        match_classes(["12.0"], inputs(12, known), None, "labels.csv", listed=True)
