"""Data sets: every form of --data, how classes meet the checkpoint, and what happens to bad input."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data import DIGITS, Inputs, Split, decode, load_dataset, normalise
from rescompress.core.errors import DataError
from rescompress.core.spec import Preprocessing

RAW = Preprocessing(name="raw", mean=(0.5, 0.25, 0.125), std=(0.5, 0.25, 2.0), resize=None)


def inputs(outputs: int = 2, side: int = 8, labels: tuple[str, ...] | None = None) -> Inputs:
    return Inputs((3, side, side), outputs, RAW, labels)


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("val", 4)):
        for label, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
            for i in range(count):
                paint(tmp_path / split / label / f"{i}.png", colour)
    return tmp_path


def test_train_and_val_folders(folder: Path) -> None:
    data = load_dataset(str(folder), inputs())
    assert (len(data.train), len(data.val), data.notes) == (12, 8, ())
    x, y = next(data.val.batches(100))
    red = y == 0
    assert data.val.classes == ("cat", "dog")
    assert torch.allclose(x[red, 0], torch.ones(1))
    assert torch.allclose(x[~red, 0], -torch.ones(1))


def test_normalise_against_numpy_both_channel_orders() -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 5), dtype=np.uint8)
    for order in ("rgb", "bgr"):
        p = RAW.model_copy(update={"channel_order": order, "scale": 1 / 127.5})
        channels = x if order == "rgb" else x[:, ::-1]
        expected = (channels / 127.5 - np.array(p.mean)[:, None, None]) / np.array(p.std)[:, None, None]
        np.testing.assert_allclose(normalise(torch.from_numpy(x), p).numpy(), expected, atol=1e-6)


def test_one_folder_is_split_by_seed_and_says_so(tmp_path: Path) -> None:
    for i in range(10):
        paint(tmp_path / "a" / f"{i}.png", (i, 0, 0))
        paint(tmp_path / "b" / f"{i}.png", (0, i, 0))
    first, again, other = (load_dataset(str(tmp_path), inputs(), seed=s) for s in (1, 1, 2))
    assert "one split" in first.notes[0]
    assert first.train.identity == again.train.identity != other.train.identity
    seen = torch.cat([first.train.tensor(), first.val.tensor()])
    assert len(seen) == 20
    assert len(torch.unique(seen, dim=0)) == 19  # (0, 0, 0) occurs in both classes: nothing is lost or repeated


def test_flat_folder_with_label_file(tmp_path: Path) -> None:
    for i in range(4):
        paint(tmp_path / f"{i}.png", (0, 0, 0))
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,{'xy'[i % 2]}\n" for i in range(4)))
    data = load_dataset(str(tmp_path), inputs())
    assert sorted([*data.train.labels, *data.val.labels]) == [0, 0, 1, 1]
    (tmp_path / "labels.csv").write_text("gone.png,x\n")
    with pytest.raises(DataError, match=r"gone\.png"):
        load_dataset(str(tmp_path), inputs())


def test_npz_forms(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    y = np.arange(10) % 2
    np.savez(tmp_path / "one.npz", x=x, y=y)
    np.savez(tmp_path / "two.npz", x_train=x[:6], y_train=y[:6], x_val=x[6:], y_val=y[6:])
    assert len(load_dataset(str(tmp_path / "one.npz"), inputs()).train) == 5
    two = load_dataset(str(tmp_path / "two.npz"), inputs())
    np.testing.assert_array_equal(two.val.store.read(np.arange(4)), x[6:])


def test_digits_have_1437_and_360_images_that_do_not_overlap() -> None:
    data = load_dataset(DIGITS, inputs(10, 16))
    assert (len(data.train), len(data.val)) == (1437, 360)
    assert not data.train.flips
    train = {r.tobytes() for r in data.train.store.read(np.arange(1437))}
    assert sum(r.tobytes() in train for r in data.val.store.read(np.arange(360))) <= 2  # scikit-learn's own near duplicates


def test_classes_are_matched_by_name(folder: Path) -> None:
    data = load_dataset(str(folder), inputs(3, labels=("dog", "bird", "cat")))
    assert set(data.val.labels.tolist()) == {0, 2}
    subset = load_dataset(str(folder), inputs(3, labels=("dog", "bird", "wolf")), labels={"dog": "wolf"})
    assert set(subset.val.labels.tolist()) == {2}
    assert len(subset.val) == 4


@pytest.mark.parametrize(
    ("outputs", "labels", "mapping", "message"),
    [
        (10, None, None, "2 classes, the network has 10"),
        (2, ("cat", "bird"), None, "'dog' is no label"),
        (2, ("cat", "dog"), {"dog": "dgo"}, "no label 'dgo'"),
        (2, ("cat", "dog"), {"dg": "dog"}, "no class folder is called 'dg'"),
        (0, None, None, "no classifier head"),
    ],
)
def test_classes_that_do_not_fit(
    folder: Path, outputs: int, labels: tuple[str, ...] | None, mapping: dict[str, str] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(str(folder), inputs(outputs, labels=labels), labels=mapping)


@pytest.mark.parametrize("source", ["missing", "empty", "text.txt", "bad.npz", "nothing.npz", "float.npz", "builtin:digit"])
def test_bad_sources_are_named(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.txt").write_text("no data")
    Path("bad.npz").write_bytes(b"PK\x03\x04 broken")
    np.savez("nothing.npz", z=np.zeros(3))
    np.savez("float.npz", x=np.zeros((4, 8, 8, 3)), y=np.zeros(4, int))
    with pytest.raises(DataError) as caught:
        load_dataset(source, inputs())
    assert caught.value.exit_code == 5
    assert caught.value.remedy or caught.value.where


def test_a_damaged_image_is_named(folder: Path) -> None:
    broken = folder / "val" / "cat" / "0.png"
    broken.write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError) as caught:
        load_dataset(str(folder), inputs()).val.tensor()
    assert caught.value.where == str(broken)


def test_resize_keeps_the_aspect_and_cuts_the_centre(tmp_path: Path) -> None:
    image = np.zeros((10, 40, 3), np.uint8)
    image[:, 15:25] = 200
    Image.fromarray(image).save(tmp_path / "wide.png")
    pixels = decode(tmp_path / "wide.png", (3, 10, 10), RAW.model_copy(update={"resize": 10}))
    assert pixels.shape == (10, 10, 3)
    assert (pixels == 200).all()


def test_take_is_stratified_and_identity_tells_splits_apart(folder: Path) -> None:
    train = load_dataset(str(folder), inputs()).train
    some = train.take(4, 0)
    assert sorted(some.labels.tolist()) == [0, 0, 1, 1]
    assert len({train.identity, some.identity, train.take(4, 1).identity, train.take(6, 0).identity}) == 4
    assert isinstance(some, Split)
    assert dataclasses.replace(some).identity == some.identity
