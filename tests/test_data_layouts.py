"""Which samples and labels a data set holds: layouts of folders and label files against torchvision and the csv module."""

from __future__ import annotations

import csv
import io
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data import CachedStore, Dataset, Inputs, Split, _View, load_dataset
from rescompress.core.errors import DataError
from rescompress.core.spec import Preprocessing

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


def answers(*splits: Split) -> dict[str, int]:
    """The output that each file is said to be."""
    found = {}
    for split in splits:
        index, store = np.arange(len(split)), split.store
        while isinstance(store, _View):
            index, store = store.index[index], store.store
        assert isinstance(store, CachedStore)
        for i, y in zip(index, split.labels, strict=True):
            path = os.path.normpath(store.files.paths[int(i)])
            assert path not in found, "no file counts twice"
            found[path] = int(y)
    return found


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


def check_layout(layout: dict[str, Any]) -> None:
    """Either every file has the output that torchvision gives it, or something is refused or noted by name."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "set"
        build(root, layout)
        names = tuple(sorted(layout["classes"]))
        given = inputs(len(names), names if layout["known"] else None)
        changed = layout["change"] != "none" and (layout["change"], layout["changed"]) != ("case", layout["changed"].swapcase())
        plain = not changed and layout["sibling"] != "holdout"
        try:
            data = load_dataset(str(root), given)
        except DataError as e:
            assert not plain, f"{layout} is refused: {e}"
            assert e.where is not None
            assert e.remedy is not None
            return
        splits = layout["splits"]
        if splits:
            found = {s: answers(part) for s, part in zip(splits, (data.train, data.val), strict=True)}
            right = {s: of_torchvision(root / s, names) for s in splits}
            assert found == right, layout
        else:
            here = sorted(p.name for p in root.iterdir() if not p.name.startswith((".", "__")) and any(p.glob("*.ppm")))
            assert answers(data.train, data.val) == of_torchvision(root, here), layout
            return
        notes = " ".join(data.notes)
        if layout["change"] in ("missing", "empty"):
            assert "no images of" in notes, layout
        assert not changed or layout["change"] in ("missing", "empty"), f"{layout} is taken"
        if not layout["known"] and [int(n) if n.isdecimal() else None for n in names] != list(range(len(names))):
            assert "alphabet" in notes
        if layout["sibling"] == "holdout":
            assert "holdout" in notes


@settings(max_examples=30, deadline=None)
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
        "trouble": draw(st.sampled_from([None, None, None, "empty", "twice", "torn", "missing", "short"])),
    }


def check_table(dialect: dict[str, Any]) -> None:
    """Either every file has the label that the csv module reads, or something is refused or noted by name."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "set"
        classes = ["cat", "dog", "b;i,r\td"] if dialect["labels"] == "quoted" else ["cat", "dog", "bird"]
        rows, truth = [], {}
        for i in range(12):
            name, number = f"im{i}.ppm", i % 3
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
            rows.append({"file": written, "label": label, "index": str(i), "part": i % 4 == 0})
            truth[str(path)] = sorted(classes).index(classes[number]) if label == classes[number] else number
        trouble = dialect["trouble"]
        if trouble == "empty":
            rows[5]["label"] = ""
        elif trouble == "twice":
            rows.append(rows[3])
        elif trouble == "torn":
            rows.append({**rows[3], "label": rows[4]["label"]})
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
        by_csv = [r[at] for r in read if len(r) > at]
        assert by_csv == [row["label"] for row in rows], "the csv module reads what was meant"
        try:
            data = load_dataset(str(root), inputs(3))
        except DataError as e:
            assert trouble in ("empty", "torn", "missing", "short"), f"{dialect} is refused: {e}"
            assert re.search(r"line|im3", str(e)), e
            return
        assert trouble in (None, "twice"), f"{dialect} is taken"
        assert answers(data.train, data.val) == truth, dialect
        assert trouble != "twice" or any("counts once" in note for note in data.notes)
        if has_split:
            assert len(data.val) == 3
            assert set(data.val.labels.tolist()) == {0, 1, 2}


@settings(max_examples=40, deadline=None)
@given(tables())
def test_label_files_against_the_csv_module(dialect: dict[str, Any]) -> None:
    check_table(dialect)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(tables())
def test_many_label_files_against_the_csv_module(dialect: dict[str, Any]) -> None:
    check_table(dialect)


def loaded(root: Path, outputs: int = 2, **more: Any) -> Dataset:
    return load_dataset(str(root), inputs(outputs, more.pop("names", None)), **more)
