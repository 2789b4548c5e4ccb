"""Data sets: every form of --data, how classes meet the checkpoint, and what happens to bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data import DIGITS, Inputs, Split, load_dataset
from compress.pixels import decode, normalise
from edge_targets.infer import of_8_bits
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
    assert (len(data.train), len(data.val), len(data.notes)) == (12, 8, 1)
    assert "0 cat, 1 dog" in data.notes[0], "nothing but the alphabet says which output is which"
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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])  # mixed images are float already
def test_normalise_leaves_the_pixels_alone_and_has_the_bits_of_the_plain_formula(
    layout: torch.memory_format, kind: torch.dtype
) -> None:
    p = RAW.model_copy(update={"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "scale": 1 / 255})
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3).permute(0, 3, 1, 2).to(kind)
    before = x.clone()
    found = normalise(x, p, layout)
    gain = torch.tensor([p.scale / s for s in p.std])[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(p.mean, p.std, strict=True)])[:, None, None]
    assert torch.equal(found, torch.addcmul(shift, x.float(), gain))
    assert torch.equal(x, before)
    assert found.is_contiguous(memory_format=layout)


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


@pytest.mark.parametrize("shape", [(4, 0, 8, 3), (4, 8, 0), (4, 0, 0, 1)])
def test_images_of_no_pixels_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    """They would be scored as black ones."""
    np.savez(tmp_path / "x.npz", x=np.zeros(shape, np.uint8), y=np.arange(4) % 2)
    with pytest.raises(DataError, match=f"holds images of {shape[1]} x {shape[2]} pixels"):
        load_dataset(str(tmp_path / "x.npz"), inputs())


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
        (2, ("zebra", "yak"), None, "; map other names with --labels"),
        (2, ("cat", "dog"), {"dog": "dgo"}, "no label 'dgo'"),
        (2, ("cat", "dog"), {"dg": "dog"}, "no class folder is called 'dg'"),
    ],
)
def test_classes_that_do_not_fit(
    folder: Path, outputs: int, labels: tuple[str, ...] | None, mapping: dict[str, str] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(str(folder), inputs(outputs, labels=labels), labels=mapping)


def test_labels_mean_nothing_to_a_network_without_class_scores(folder: Path) -> None:
    data = load_dataset(str(folder), inputs(0))
    assert data.val.classes == ("unlabelled",)
    assert len(data.train) > 0


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


def numbered(tmp_path: Path, suffix: str) -> Path:
    """A flat folder of 24 images, two of each number from 0 to 11; the pixel is ten times the number."""
    rows = []
    for number in range(12):
        for i in range(2):
            paint(tmp_path / f"{number}-{i}.png", (10 * number,) * 3)
            rows.append((f"{number}-{i}.png", number))
    if suffix == "csv":
        (tmp_path / "labels.csv").write_text("".join(f"{name},{number}\n" for name, number in rows))
    else:
        (tmp_path / "labels.json").write_text(json.dumps({name: str(number) for name, number in rows}))
    return tmp_path


def number_seen(split: Split) -> list[int]:
    """What the pixels say each image's class is."""
    return (split.pixels(np.arange(len(split)))[0][:, 0, 0, 0] // 10).tolist()


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_numbers_in_a_label_file_are_outputs(tmp_path: Path, suffix: str) -> None:
    data = load_dataset(str(numbered(tmp_path, suffix)), inputs(12))
    for split in (data.train, data.val):
        assert split.labels.tolist() == number_seen(split)
    some = load_dataset(str(tmp_path), inputs(20))
    assert some.val.labels.tolist() == number_seen(some.val), "a set need not have all classes"
    (tmp_path / f"labels.{suffix}").unlink()
    names = sorted(p.name for p in tmp_path.glob("*.png"))
    (tmp_path / "labels.csv").write_text("".join(f"{name},{int(name.split('-')[0]) + 1}\n" for name in names))
    from_one = load_dataset(str(tmp_path), inputs(12))
    assert from_one.val.labels.tolist() == number_seen(from_one.val), "numbers from 1 count in their order"


def test_folders_that_are_numbers_count_as_letters_and_say_so(tmp_path: Path) -> None:
    for number in range(11):
        for i in range(2):
            paint(tmp_path / "wide" / str(number) / f"{i}.png", (0, 0, 0))
            paint(tmp_path / "even" / f"{number:02}" / f"{i}.png", (0, 0, 0))
    wide, even = (load_dataset(str(tmp_path / name), inputs(11)) for name in ("wide", "even"))
    assert wide.val.classes[:4] == ("0", "1", "10", "2")
    assert any("10 is output 2" in note for note in wide.notes)
    assert not any("output" in note for note in even.notes)


def test_classes_of_an_npz_are_matched_by_name(tmp_path: Path) -> None:
    x = np.repeat(np.arange(3, dtype=np.uint8) * 10, 4)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    own = ("c", "a", "b")  # 0 is the image of c in this file
    np.savez(tmp_path / "own.npz", x=x, y=np.repeat(np.arange(3), 4), classes=own)
    data = load_dataset(str(tmp_path / "own.npz"), inputs(3, labels=("a", "b", "c")))
    assert data.val.classes == ("a", "b", "c")
    assert [own[n] for n in number_seen(data.val)] == [data.val.classes[y] for y in data.val.labels]
    for classes, message in ((("a", "b", "x"), "'x' is no label"), (("a", "b"), "2 classes"), (np.array("abc"), "no list")):
        np.savez(tmp_path / "bad.npz", x=x, y=np.repeat(np.arange(3), 4), classes=classes)
        with pytest.raises(DataError, match=message):
            load_dataset(str(tmp_path / "bad.npz"), inputs(3, labels=("a", "b", "c")))


def test_sixteen_bits_are_not_cut_off(tmp_path: Path) -> None:
    for value in (0, 1000, 21000, 65535):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "deep.png")
        assert np.unique(decode(tmp_path / "deep.png", (3, 8, 8), RAW)).tolist() == [value >> 8]
    for kind, name in ((np.uint16, "shallow.png"), (np.uint16, "shallow.tif"), (np.int32, "wide.tif")):
        eight = np.arange(64).reshape(8, 8) * 4
        Image.fromarray(eight.astype(kind)).save(tmp_path / name)
        with pytest.raises(DataError, match="none above 252"):  # torchvision shows these values, scaled they are black
            decode(tmp_path / name, (3, 8, 8), RAW)
        with Image.open(tmp_path / name) as image, pytest.raises(ValueError, match="none above 252"):
            of_8_bits(image)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "black.png")
    assert decode(tmp_path / "black.png", (3, 8, 8), RAW).max() == 0
    (tmp_path / "dark.pgm").write_bytes(b"P5\n8 8\n65535\n" + bytes([0, 200]) * 64)
    assert decode(tmp_path / "dark.pgm", (3, 8, 8), RAW).max() == 0
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="no known range"):
        decode(tmp_path / "float.tif", (3, 8, 8), RAW)


def test_four_channels_and_long_fields_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the network reads 4"):
        load_dataset(str(folder), dataclasses.replace(inputs(), shape=(4, 8, 8)))
    flat = tmp_path / "flat"
    paint(flat / "0.png", (0, 0, 0))
    (flat / "labels.csv").write_text(f"0.png,{'x' * 200_000}\n")
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(str(flat), inputs())


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    for label in ("car", "train"):
        for i in range(4):
            paint(tmp_path / label / f"{i}.png", (0, 0, 0))
    assert load_dataset(str(tmp_path), inputs()).val.classes == ("car", "train")


def test_a_set_smaller_than_asked_for_is_mixed_as_well(folder: Path) -> None:
    train = load_dataset(str(folder), inputs()).train
    assert train.labels.tolist() == [0] * 6 + [1] * 6
    every = train.take(512, 0)
    assert sorted(every.labels.tolist()) == sorted(train.labels.tolist())
    assert set(every.labels[:2].tolist()) == set(every.labels[2:4].tolist()) == {0, 1}
