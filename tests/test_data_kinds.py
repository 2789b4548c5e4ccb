"""Kinds of sources: each reads the same pictures as a folder does, and says what is wrong with it."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import sys
import tarfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress.data import Dataset, Inputs, load_dataset
from compress.data.sources import PACKAGE
from rescompress.core import plugins
from rescompress.core.errors import BadInput, DataError, ToolMissing
from rescompress.core.spec import Preprocessing
from rescompress.runs.fingerprint import data_identity
from rescompress.runs.settings import Settings

HALF = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=None)
INPUTS = Inputs((3, 8, 8), 2, HALF, ("cat", "dog"))
PARTS = {"train": 6, "val": 3}


def encoded(seed: int, form: str = "png") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def pictures(part: str) -> list[tuple[str, str, bytes]]:
    """Return name, class and content of each picture of a split, in the order of a folder."""
    start = 0 if part == "train" else 100
    return [(f"{i:03}", name, encoded(start + 10 * k + i)) for k, name in enumerate(("cat", "dog")) for i in range(PARTS[part])]


def as_folder(root: Path) -> str:
    for part in PARTS:
        for name, label, content in pictures(part):
            (root / part / label).mkdir(parents=True, exist_ok=True)
            (root / part / label / f"{name}.png").write_bytes(content)
    return str(root)


def add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    shard.addfile(info, io.BytesIO(content))


def as_shards(root: Path, suffix: str = "cls", per_shard: int = 4) -> str:
    root.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        every = pictures(part)
        for number, start in enumerate(range(0, len(every), per_shard)):
            with tarfile.open(root / f"{part}-{number:03}.tar", "w") as shard:
                for name, label, content in every[start : start + per_shard]:
                    text = json.dumps({"label": label}) if suffix == "json" else label + "\n"
                    add(shard, f"{label}/{name}.{suffix}", text.encode())
                    add(shard, f"{label}/{name}.png", content)
    return str(root)


def as_table(root: Path) -> str:
    as_folder(root / "files")
    lines = [f"files/{part}/{label}/{name}.png,{label},{part}" for part in PARTS for name, label, _ in pictures(part)]
    (root / "mine.csv").write_text("file,label,split\n" + "\n".join(lines) + "\n")
    return str(root / "mine.csv")


class Items:
    """What torch's data sets look like."""

    def __init__(self, part: str, form: Callable[[bytes], Any]) -> None:
        self.rows = pictures(part)
        self.form = form
        self.classes = ("cat", "dog")
        self.targets = [self.classes.index(label) for _, label, _ in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.form(self.rows[i][2]), self.targets[i]


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def as_object(_: Path, form: Callable[[bytes], Any] = opened) -> dict[str, Items]:
    return {part: Items(part, form) for part in PARTS}


class ClassLabel:
    names = ("cat", "dog")


def hub(monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
    """Put a stand-in for the library ``datasets`` in its place: what of it is called, over the same pictures."""

    class Column:  # the class of a column, called Image there
        def __init__(self, decode: bool = True) -> None:
            self.decode = decode

    Column.__name__ = "Image"

    class Rows:
        def __init__(self, part: str) -> None:
            self.rows, self._fingerprint = pictures(part), f"print of {part}"
            self.features = {"image": Column(), "label": ClassLabel()}

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, at: Any) -> Any:
            if at == "label":
                return [ClassLabel.names.index(label) for _, label, _ in self.rows]
            return {"image": {"bytes": self.rows[at][2], "path": None}}

        def select_columns(self, columns: list[str]) -> Rows:
            assert columns == ["image"]
            return self

        def cast_column(self, column: str, kind: Column) -> Rows:
            assert (column, kind.decode) == ("image", False)
            return self

    def load(name: str, config: str | None) -> dict[str, Rows]:
        if fails:
            raise ConnectionError(fails)
        assert (name, config) == ("somebody/pets", "small")
        return {"train": Rows("train"), "validation": Rows("val"), "test": Rows("val")}

    module = types.ModuleType("datasets")
    module.load_dataset, module.Image = load, Column  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def same(found: Dataset, wanted: Dataset) -> None:
    for name in PARTS:
        a, b = getattr(found, name), getattr(wanted, name)
        assert a.labels.tolist() == b.labels.tolist()
        assert a.classes == b.classes
        every = np.arange(len(a))
        assert np.array_equal(a.store.read(every), b.store.read(every))
        assert a.identity == b.identity, "the same pictures are paired whatever they came from"


def test_there_is_a_file_for_each_kind() -> None:
    ours = {"digits", "folders", "huggingface", "label_files", "npz", "objects", "shards"}
    assert ours <= set(plugins.names(PACKAGE))


@pytest.mark.parametrize(
    "make", [as_shards, lambda root: as_shards(root, "json"), lambda root: as_shards(root, "txt"), as_table]
)
def test_the_same_pictures_from_other_sources_are_the_same_data(tmp_path: Path, make: Callable[[Path], str]) -> None:
    wanted = load_dataset(as_folder(tmp_path / "folder"), INPUTS)
    source = make(tmp_path / "other")
    same(load_dataset(source, INPUTS), wanted)
    known = data_identity(source)
    assert data_identity(source) == known
    changed = next(p for p in sorted((tmp_path / "other").rglob("*")) if p.suffix in (".tar", ".png"))
    changed.write_bytes(changed.read_bytes() + b"\0" * 10)
    assert data_identity(source) != known


def test_one_shard_and_a_range_of_shards(tmp_path: Path) -> None:
    folder = as_shards(tmp_path)
    whole = load_dataset(f"{folder}/train-{{000..002}}.tar", INPUTS)
    assert len(whole.train) + len(whole.val) == 12
    assert any("one split" in note for note in whole.notes)
    assert len(load_dataset(f"{folder}/val-000.tar", INPUTS).val) == 2


@pytest.mark.parametrize("form", [opened, bytes, lambda c: np.asarray(opened(c))])
def test_an_object_of_the_users_own(tmp_path: Path, form: Callable[[bytes], Any]) -> None:
    wanted = load_dataset(as_folder(tmp_path), INPUTS)
    found = load_dataset(as_object(tmp_path, form), INPUTS)
    for name in PARTS:
        a, b = getattr(found, name), getattr(wanted, name)
        assert a.labels.tolist() == b.labels.tolist()
        assert np.array_equal(a.store.read(np.arange(len(a))), b.store.read(np.arange(len(a))))
    pair = load_dataset((Items("train", form), Items("val", form)), INPUTS)
    assert pair.val.identity == found.val.identity
    one = load_dataset(Items("train", form), INPUTS)
    assert len(one.train) == len(one.val) == 6


NUMBERED = ("zebra", "ant", "mole")
"""Classes in an order of their own, as FashionMNIST and ImageNet have theirs."""


class Numbered:
    def __init__(self, targets: list[Any], classes: Any = NUMBERED) -> None:
        self.targets, self.classes = targets, classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return np.full((8, 8, 3), i, np.uint8), self.targets[i]


def three(labels: tuple[str, ...] | None) -> Inputs:
    return Inputs(INPUTS.shape, 3, INPUTS.preprocessing, labels)


@pytest.mark.parametrize(
    ("labels", "mapped", "wanted"),
    [
        (None, None, [0, 1, 2, 0, 1, 2]),
        (NUMBERED, None, [0, 1, 2, 0, 1, 2]),
        (("Zebra", "Ant", "Mole"), None, [0, 1, 2, 0, 1, 2]),
        (("ant", "mole", "zebra"), None, [2, 0, 1, 2, 0, 1]),
        (None, {"zebra": "2", "ant": "1", "mole": "0"}, [2, 1, 0, 2, 1, 0]),
    ],
)
def test_numbers_of_a_data_set_are_the_outputs_unless_names_say_otherwise(
    labels: tuple[str, ...] | None, mapped: dict[str, str] | None, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch trains on them: the number is the output, whatever the alphabet says."""
    mine = {part: Numbered([0, 1, 2, 0, 1, 2]) for part in PARTS}
    found = load_dataset(mine, three(labels), labels=mapped)
    assert found.val.labels.tolist() == wanted
    assert found.val.classes == (labels or (("0", "1", "2") if mapped else NUMBERED))
    hub(monkeypatch)
    monkeypatch.setattr(ClassLabel, "names", ("dog", "cat"))
    pets = load_dataset("hf:somebody/pets:small", dataclasses.replace(INPUTS, labels=None))
    assert pets.val.classes == ("dog", "cat")
    assert pets.val.labels.tolist() == [1 if label == "cat" else 0 for _, label, _ in pictures("val")]


def test_numbers_of_a_data_set_that_do_not_fit() -> None:
    good = Numbered([0, 1, 2])
    for train, words in (
        (Numbered([0, 1, 2], ("ant", "zebra", "mole")), "number their classes differently"),
        (Numbered([0, 1, 3]), "class 3, its classes are 0 to 2"),
        (Numbered([0, 1, -1]), "class -1"),
        (Numbered([0, 1.5, 2]), "a label is 1.5"),
        (Numbered([0, "1", 2]), "a label is '1'"),
    ):
        with pytest.raises(DataError, match=words):
            load_dataset({"train": train, "val": good}, three(None))
    with pytest.raises(DataError, match="has 3 classes, the network has 2"):
        load_dataset(good, dataclasses.replace(INPUTS, labels=None))
    bare = Numbered([2, 1, 0])
    del bare.classes
    assert load_dataset({"train": bare, "val": good}, three(None)).train.labels.tolist() == [2, 1, 0]


def test_targets_that_the_items_contradict_are_refused() -> None:
    class Shifted(Numbered):
        def __getitem__(self, i: int) -> tuple[Any, Any]:
            return super().__getitem__(i)[0], (self.targets[i] + 1) % 3

    with pytest.raises(DataError, match="item 0 has the label 1, its targets say 0"):
        load_dataset(Shifted([0, 1, 2]), three(None))


def test_a_name_of_two_outputs_is_refused_where_it_decides() -> None:
    """ImageNet has two cranes."""
    cranes = ("crane", "ant", "crane")
    same = load_dataset({"val": Numbered([0, 1, 2, 2], cranes)}, three(cranes))
    assert sorted(same.train.labels.tolist() + same.val.labels.tolist()) == [0, 1, 2, 2]
    with pytest.raises(DataError, match="several classes are called 'crane'"):
        load_dataset(Numbered([0, 1, 2], cranes), three(("ant", "crane", "heron")))
    with pytest.raises(DataError, match="'crane' is the label of outputs 0 and 2"):
        load_dataset(Numbered([0, 1, 2], ("ant", "crane", "mole")), three(cranes))
    with pytest.raises(DataError, match="'crane' is the label of outputs 0 and 2"):
        load_dataset(Numbered([0, 1], ("ant", "bird")), three(cranes), labels={"ant": "ant", "bird": "crane"})


def test_the_hub_is_read_through_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch)
    found = load_dataset("hf:somebody/pets:small", INPUTS)
    same(found, load_dataset(as_folder(tmp_path), INPUTS))
    assert "hf:somebody/pets:small: validation is evaluated on; not read: test" in found.notes
    assert data_identity("hf:somebody/pets:small") == data_identity("hf:somebody/pets:small")


def test_names_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rescompress.cli.options import Common

    hub(monkeypatch)
    assert Common().settings("hf:somebody/pets:small").data == "hf:somebody/pets:small"
    assert Common().settings("photos").data == str(Path("photos").resolve())


def test_a_name_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, fails="Couldn't reach 'somebody/pets' on the Hub\nmore")
    for call in (lambda: load_dataset("hf:somebody/pets", INPUTS), lambda: data_identity("hf:somebody/pets")):
        with pytest.raises(BadInput, match=r"hf:somebody/pets: cannot be loaded: Couldn't reach 'somebody/pets' on the Hub \("):
            call()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ToolMissing, match=r"rescompress\[hf\]"):
        load_dataset("hf:somebody/pets", INPUTS)
    hub(monkeypatch)
    with pytest.raises(DataError, match="names no data set"):
        load_dataset("hf:", INPUTS)


def broken_shard(root: Path, what: str) -> None:
    shard = root / "train-001.tar"
    if what == "missing":
        shard.unlink()
    elif what == "truncated":
        shard.write_bytes(shard.read_bytes()[:1800])
    elif what == "no tar":
        shard.write_bytes(b"\x1f\x8b" + b"x" * 3000)
    elif what == "another name":
        shard.rename(root / "mine-001.tar")
        (root / "val-000.tar").rename(root / "yours-000.tar")
        (root / "val-001.tar").unlink()
    elif what == "no labels":
        for path in root.glob("val-*.tar"):
            path.unlink()
        with tarfile.open(root / "val-000.tar", "w") as f:
            add(f, "a.png", encoded(1))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", "1 shards are missing: train 001"),
        ("truncated", "train-001.tar"),
        ("no tar", "train-001.tar: is no readable shard"),
        ("another name", "several names|missing"),
        ("no labels", "1 pictures, none with a label"),
    ],
)
def test_broken_shards_are_named(tmp_path: Path, what: str, said: str) -> None:
    source = as_shards(tmp_path)
    broken_shard(tmp_path, what)
    with pytest.raises(DataError, match=said):
        load_dataset(source, INPUTS)


def test_a_range_with_a_shard_missing(tmp_path: Path) -> None:
    as_shards(tmp_path)
    with pytest.raises(DataError, match=r"2 shards are missing: train-003\.tar, train-004\.tar"):
        load_dataset(f"{tmp_path}/train-{{000..004}}.tar", INPUTS)


def test_a_shard_that_shrinks_is_told_when_it_is_read(tmp_path: Path) -> None:
    data = load_dataset(as_shards(tmp_path), INPUTS)
    (tmp_path / "train-000.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-000\.tar: is shorter than it was"):
        data.train.store.read(np.arange(2))


def test_objects_that_are_none(tmp_path: Path) -> None:
    mine = Items("val", opened)
    mine.targets = mine.targets[:-1]
    with pytest.raises(DataError, match="5 targets for 6 images"):
        load_dataset(mine, INPUTS)
    with pytest.raises(DataError, match="mapping of train and val"):
        load_dataset({"training": mine}, INPUTS)
    for nothing in (3, 2.5, iter([1])):
        with pytest.raises(DataError, match="no data set"):
            load_dataset(nothing, INPUTS)
    floats = Items("val", lambda content: np.zeros((3, 8, 8), np.float32))
    with pytest.raises(DataError, match=r"Items>/val\[\d\]: is float32 of shape \(3, 8, 8\), no image"):
        load_dataset({"val": floats}, INPUTS).train.store.read(np.arange(3))


@pytest.mark.parametrize("make", [as_folder, as_shards, as_object])
def test_stores_cross_processes(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    form = {"form": bytes} if make is as_object else {}
    store = load_dataset(make(tmp_path, **form), INPUTS).train.store.files  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.read(np.arange(3)), store.read(np.arange(3)))


def test_corrupt_images_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    root = Path(as_folder(tmp_path))
    whole = load_dataset(str(root), INPUTS)
    bad = [root / "train" / "cat" / "001.png", root / "train" / "dog" / "004.png", root / "val" / "cat" / "000.png"]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(bad[1].read_bytes()[:100])
    bad[2].write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"001\.png: is damaged.*--skip-corrupt"):
        load_dataset(str(root), INPUTS).train.tensor()
    data = load_dataset(str(root), INPUTS, skip_corrupt=True)
    assert (len(data.train), len(data.val)) == (10, 5)
    notes = "\n".join(data.notes)
    assert "train: 2 of 12 images cannot be read and are left out" in notes
    assert "val: 1 of 6 images cannot be read and are left out" in notes
    assert all(path.name in notes for path in bad)
    keep = [i for i in range(12) if i not in (1, 10)]
    assert np.array_equal(data.train.store.read(np.arange(10)), whole.train.store.read(np.array(keep)))
    assert data.train.labels.tolist() == whole.train.labels[keep].tolist()
    assert data.val.identity != whole.val.identity
    plain, skipping = Settings(str(root)), Settings(str(root), skip_corrupt=True)
    assert plain.identity != skipping.identity
    assert "skip_corrupt" not in plain.identity, "keys of runs without it are what they were"
    for path in (root / "val" / "cat").iterdir():
        path.write_bytes(b"")
    for path in (root / "val" / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no image that can be read"):
        load_dataset(str(root), INPUTS, skip_corrupt=True)


@pytest.mark.parametrize("mode", ["CMYK", "P", "RGBA", "LA", "I;16", "1"])
def test_odd_images_train_as_they_are_evaluated(tmp_path: Path, mode: str) -> None:
    """What is cut out of a picture for training are the colours that evaluation sees."""
    from compress.data.augment import PhotoTransform, draw
    from compress.data.splits import FileStore

    if mode == "I;16":
        image = Image.fromarray(np.full((20, 20), 40_000, np.uint16))
    else:
        image = Image.new("RGB", (20, 20), (200, 100, 50)).convert(mode, dither=Image.Dither.NONE)
    path = tmp_path / ("odd.jpg" if mode == "CMYK" else "odd.png")
    image.save(path)
    store = FileStore((path,), (3, 8, 8), HALF)
    expected = store.read(np.arange(1))[0]
    transform = PhotoTransform("photo", (8, 8), min_area=0.5, flip=True)
    drawn = draw(transform, lambda reduce: store.picture(0, reduce), 3)
    assert drawn.shape == (8, 8, 3)
    assert np.abs(drawn.astype(int) - expected).max() <= 2


def test_the_orientation_of_a_camera_is_not_applied(tmp_path: Path) -> None:
    """As in torchvision's ImageFolder, whose networks were trained so."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (30, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    from compress.data.splits import FileStore

    store = FileStore((tmp_path / "turned.png",), (3, 8, 8), HALF)
    assert store.picture(0).size == (20, 30)
    assert store.dimensions(0) == (30, 20)


def test_no_image_is_opened_to_know_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = as_folder(tmp_path)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("an image was opened"))
    assert len(load_dataset(source, INPUTS).train) == 12


@pytest.mark.slow
def test_fifty_thousand_files_are_scanned_in_seconds(tmp_path: Path) -> None:
    content = encoded(0)
    for part, many in (("train", 4_800), ("val", 200)):
        for k in range(10):
            folder = tmp_path / part / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(many):
                (folder / f"{i}.png").write_bytes(content)
    ten = dataclasses.replace(INPUTS, outputs=10, labels=None)
    began = time.perf_counter()
    data = load_dataset(str(tmp_path), ten)
    assert time.perf_counter() - began < 5.0
    assert len(data.train) == 48_000


def test_data_is_known_again_without_torch(tmp_path: Path) -> None:
    import subprocess

    sources = [as_shards(tmp_path / "shards"), as_folder(tmp_path / "folder"), as_table(tmp_path / "table")]
    code = "import sys; from rescompress.runs.fingerprint import data_identity\n"
    code += "for source in sys.argv[1:]: data_identity(source)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *sources], check=True, cwd=Path(__file__).parents[1])
