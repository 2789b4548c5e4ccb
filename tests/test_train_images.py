"""Images for training: what the presets do, that batches do not depend on who reads, and what is said when reading fails."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from compress.data import FileStore, Inputs, MemoryStore, Split, load_dataset
from compress.data import loader as loading
from compress.data.augment import PhotoTransform, draw, seed_of
from compress.data.cache import PixelCache
from compress.data.loader import Batches, cache_for, epoch_order, workers_for
from compress.pixels import decode, picture
from compress.processes import Together
from compress.resnet import build_model
from compress.train import TrainState, hold_out, train
from rescompress.core.errors import BadInput, DataError, EnvironmentFailed
from rescompress.core.settings import TrainSettings
from rescompress.core.spec import Block, Head, ModelSpec, Preprocessing, Stem, StemConv

HALF = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=18)
SPEC = ModelSpec(
    input_shape=(3, 16, 16),
    stem=Stem(convs=(StemConv(width=4, kernel=3, stride=2),), max_pool=False),
    stages=((Block(name="layer1.0", kind="basic", widths=(4, 4)),),),
    head=Head(num_classes=2, dropout=0.1),
    preprocessing=HALF,
)


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return a smooth picture, as photographs are."""
    small = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, many in (("train", 12), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(many):
                width, height = rng.integers(18, 32, 2)  # too small to be decoded smaller, which the cache does not do
                photograph(rng, int(width), int(height)).save(tmp_path / part / name / f"{i}.jpg")
    return tmp_path


@pytest.fixture
def split(folder: Path) -> Split:
    return load_dataset(str(folder), SPEC).train


def how(**changed: object) -> TrainSettings:
    given = {"epochs": 2.0, "batch_size": 8, "device": "cpu", "augment": "photo", "teacher": None, "seed": 1}
    return TrainSettings.model_validate(given | changed)


@pytest.mark.parametrize("name", ["photo", "photo+"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_photograph_is_changed_as_torchvision_does_it(name: str, mode: str) -> None:
    image = photograph(np.random.default_rng(1), 50, 37).convert(mode)
    ours = PhotoTransform(name, (24, 16), min_area=0.3, flip=True)
    steps = [v2.RandomResizedCrop((24, 16), scale=(0.3, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    if name == "photo+":
        steps += [v2.TrivialAugmentWide(), v2.PILToTensor(), v2.RandomErasing(0.1)]
    else:
        steps += [v2.PILToTensor()]
    reference = v2.Compose(steps)
    results = []
    for seed in range(12):
        torch.manual_seed(seed)
        expected = reference(image).permute(1, 2, 0).numpy()

        def read(reduce: object) -> Image.Image:
            reduce(image)  # type: ignore[operator]
            return image

        results.append(draw(ours, read, seed))
        assert np.array_equal(results[-1], expected), seed
    assert len({r.tobytes() for r in results}) == 12


def test_a_jpeg_is_decoded_smaller_where_its_part_has_pixels_to_spare(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    photograph(np.random.default_rng(2), 400, 300).save(path, quality=95)
    transform = PhotoTransform("photo", (32, 32), min_area=0.3, flip=False)
    sizes = []
    for seed in range(8):

        def read(reduce: object) -> Image.Image:
            image = picture(path, 3, reduce=reduce)  # type: ignore[arg-type]
            sizes.append(image.width)
            return image

        def whole(reduce: object) -> Image.Image:
            with Image.open(path) as image:
                reduce(image)  # type: ignore[operator]
                return image.convert("RGB")

        ours, exact = draw(transform, read, seed), draw(transform, whole, seed)
        assert np.abs(ours.astype(int) - exact).mean() < 2.5, (
            "the same part of the picture, with less detail than is thrown away"
        )
    assert min(sizes) < 200
    assert min(sizes) >= 400 // 8
    with Image.open(path) as image:
        fitted = decode(path, (3, 32, 32), Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=None))
        assert np.array_equal(fitted, np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)))


def test_a_part_keeps_the_pixels_of_the_result() -> None:
    transform = PhotoTransform("photo", (32, 48), min_area=0.05, flip=False)
    image = Image.new("RGB", (1000, 750))
    for seed in range(50):
        torch.manual_seed(seed)
        by = transform.reduce(image)
        part = transform._part
        assert by == 1 or (part["height"] >= 64 * by and part["width"] >= 96 * by)


def all_of(split: Split, settings: TrainSettings, workers: int, folder: Path | None) -> list[torch.Tensor]:
    settings = settings.preset(16, normalised=True)
    cache = cache_for(split, settings, workers, folder / "training.pt") if folder is not None else None
    if cache is not None:
        cache.create()
    batches = Batches(split, settings, 8, cache=cache)
    with batches.stream(0, 2 * batches.per_epoch, workers) as stream:
        return [t.clone() for batch in stream for t in batch]


@pytest.mark.parametrize("augment", ["none", "photo", "photo+"])
def test_batches_do_not_depend_on_who_reads(split: Split, tmp_path: Path, augment: str) -> None:
    expected = all_of(split, how(augment=augment), 0, None)
    assert len(expected) == 12
    assert len({t.numpy().tobytes() for t in expected[::2]}) == 6
    kept = tmp_path / "cache"
    for workers, cached in ((1, None), (2, kept), (1, kept), (0, kept)):  # the second time all is in the cache
        found = all_of(split, how(augment=augment), workers, cached)
        assert all(map(torch.equal, found, expected)), (workers, cached)
    assert any((tmp_path / "cache").iterdir()), "decoded images were kept"


def test_what_happens_to_an_image_depends_on_seed_epoch_and_image() -> None:
    seeds = {seed_of(seed, epoch, i) for seed in range(5) for epoch in range(5) for i in range(40)}
    assert len(seeds) == 1000
    assert len({s & 0xFFFFFFFF for s in seeds}) == 1000  # all that torch's generator takes of it
    assert abs(np.mean([s >> 63 for s in seeds]) - 0.5) < 0.06


def test_the_order_of_a_million_images_is_drawn_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it costs under a millisecond a step (benchmarks/loader.py)."""
    labels = np.zeros(1_281_167, np.int64)
    split = Split(MemoryStore(np.zeros((1, 1, 1, 3), np.uint8)), labels, ("a",), HALF, "test")
    batches = Batches(split, how(augment="none"), 256)
    drawn: list[int] = []

    def counted(labels: np.ndarray, seed: int, epoch: int, *given: object) -> np.ndarray:
        drawn.append(epoch)
        return epoch_order(labels, seed, epoch, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "epoch_order", counted)
    for step in range(batches.per_epoch - 10, batches.per_epoch + 10):
        batches.of(step)
    assert drawn == [0, 1]


@pytest.mark.parametrize("counts", [(16, 278, 90), (1, 7), (5,), (3, 3, 3, 100), (5, 6, 9)])
def test_balanced_sampling_shows_each_class_equally_often(counts: tuple[int, ...]) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    orders = [epoch_order(labels, 3, epoch, "balanced") for epoch in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    shown = np.bincount(labels[orders[0]], minlength=len(counts))
    assert shown.sum() == len(labels)
    assert shown.max() - shown.min() <= 1
    for label in range(len(counts)):
        often = np.bincount(orders[0], minlength=len(labels))[labels == label]
        assert often.max() - often.min() <= 1, "no image again before all others of its class"


class Killed(Exception):
    pass


def kill_at(step: int) -> object:
    def kill(state: TrainState) -> None:
        if state.step == step:
            raise Killed

    return kill


@pytest.mark.parametrize("stop", [1, 3])
def test_killed_and_resumed_ends_with_the_same_bits_whoever_reads(split: Split, tmp_path: Path, stop: int) -> None:
    settings = how(augment="photo+", ema=0.9, hold_out=0.2, class_weights="balanced", accumulate=2, clip=1.0)

    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        return build_model(SPEC)

    whole = fresh()
    expected = train(whole, split, settings)
    for workers, again in ((1, 0),) if stop == 1 else ((0, 2),):
        resume = tmp_path / f"{workers}.pt"
        first = settings.model_copy(update={"workers": workers})
        with pytest.raises(Killed):
            train(fresh(), split, first, resume_file=resume, save_every_s=0.0, progress=kill_at(stop + 1))  # type: ignore[arg-type]
        second = fresh()
        log = train(second, split, settings.model_copy(update={"workers": again}), resume_file=resume)
        assert log.resumed_at == stop
        assert log.epochs == expected.epochs
        for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert not list(tmp_path.glob("*pixels-*")), "the decoded images went with the training"


def train_aloud(folder: str, state: str, result: str, workers: int, linger: int) -> None:
    """Train in a process of its own, say every step, and write down the weights' hash at the end.

    Args:
        folder: The images.
        state: Where the training's state is saved, after every step.
        result: For the hash.
        workers: Processes that read.
        linger: The step after which it waits to be killed.
    """

    def say(at: TrainState) -> None:
        print(at.step, flush=True)
        time.sleep(60.0 if at.step == linger else 0.0)

    torch.set_num_threads(1)
    split = load_dataset(folder, SPEC).train
    settings = how(epochs=LONG, workers=workers, augment="photo+", ema=0.9, hold_out=0.2)
    torch.manual_seed(0)
    model = build_model(SPEC)
    train(model, split, settings, resume_file=Path(state), save_every_s=0.0, progress=say)
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()
    Path(result).write_text(digest)


LONG = 10
"""Epochs of two steps."""


@pytest.mark.slow
def test_killed_ten_times_early_and_late_it_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    code = "import sys; from test_train_images import train_aloud; train_aloud(*sys.argv[1:4], *map(int, sys.argv[4:]))"
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, str(Path(here).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

    def start(name: str, workers: int, linger: int = 0) -> subprocess.Popen[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        state, result = tmp_path / name / "state", tmp_path / name / "digest"
        args = [sys.executable, "-c", code, str(folder), str(state), str(result), str(workers), str(linger)]
        return subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})

    calm = start("calm", 0)
    steps = [int(line) for line in calm.communicate()[0].split()]
    assert steps == list(range(1, 2 * LONG + 1))
    late = [2 * LONG - 1, 2 * LONG, 2 * LONG]  # before the last step, and after it, before its end is written down
    first: list[int] = []
    for number, stop in enumerate(sorted(chance.sample(range(1, 2 * LONG - 1), 7)) + late):
        process = start("rough", number % 3, stop if stop in late else 0)
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(int(line))
            if seen[-1] >= stop:
                time.sleep(chance.uniform(0.0, 0.01))
                break
        process.kill()
        process.communicate()
        first.append(seen[0])
        assert not (tmp_path / "rough" / "digest").exists(), "it was killed before its end"
    assert first == sorted(first)
    assert first[-1] > 2 * LONG - 3, "each goes on near where the one before was killed"
    last = start("rough", 2)
    last.communicate()
    assert last.returncode == 0
    assert (tmp_path / "rough" / "digest").read_text() == (tmp_path / "calm" / "digest").read_text()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_across_processes(split: Split, workers: int) -> None:
    store = split.store.files  # type: ignore[attr-defined]
    bad = store.paths[5]
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(DataError, match=f"{bad.name}.*skip-corrupt"):
        train(build_model(SPEC), split, how(workers=workers, cache_gib=0.0))


def test_a_process_that_ends_is_told(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()

    def ended(_: object) -> None:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(FileStore, "encoded", lambda self, i: ended(i))
    with pytest.raises(EnvironmentFailed, match="1 workers"):
        all_of(split, how(), 1, None)


def test_more_processes_than_memory_are_refused(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_free_memory", lambda: 4 << 30)
    assert workers_for(how(workers=8), split, Together(), 8) == 8
    with pytest.raises(BadInput, match=r"1000 processes that read images need some .* 4\.0 are free"):
        train(build_model(SPEC), split, how(workers=1000))


def test_a_cache_knows_what_is_whole(tmp_path: Path) -> None:
    shapes = np.array([[3, 5, 3], [2, 2, 3]])
    images = [np.arange(45, dtype=np.uint8).reshape(3, 5, 3), np.zeros((2, 2, 3), np.uint8)]
    cache = PixelCache(tmp_path / "pixels", shapes)
    cache.create()
    assert cache.get(0) is None
    assert cache.get(1) is None, "zeros are no image before they were stored"
    for i, image in enumerate(images):
        cache.put(i, image)
    other = PixelCache(tmp_path / "pixels", shapes)
    other.create()  # again: what is there stays
    assert all(np.array_equal(other.get(i), image) for i, image in enumerate(images))
    content = bytearray(cache.path.read_bytes())
    content[16 + 7] ^= 1
    cache.path.write_bytes(content)
    damaged = PixelCache(tmp_path / "pixels", shapes)
    assert damaged.get(0) is None
    assert damaged.get(1) is not None


def test_only_what_fits_is_kept(split: Split, tmp_path: Path) -> None:
    settings = how().preset(16, normalised=True)
    assert cache_for(split, settings, 2, tmp_path / "training.pt") is not None
    assert cache_for(split, settings.model_copy(update={"cache_gib": 1e-6}), 2, tmp_path / "training.pt") is None
    memory = dataclasses.replace(split, store=MemoryStore(split.store.read(np.arange(len(split)))))
    assert cache_for(memory, settings, 2, tmp_path / "training.pt") is None


def test_what_is_kept_for_one_fit_is_not_read_for_another(split: Split, tmp_path: Path) -> None:
    """A training that was killed left its pixels; the next one brings pictures to their size in another way."""
    state, settings = tmp_path / "finetune.pt", how(augment="none", lr=0.05)

    def trained(resize: int | None, where: Path) -> torch.Tensor:
        torch.manual_seed(0)
        spec = SPEC.replace(preprocessing=HALF.model_copy(update={"resize": resize}))
        model = build_model(spec)
        train(model, load_dataset(str(tmp_path), spec).train, settings.model_copy(update={"workers": 1}), resume_file=where)
        return torch.cat([v.double().flatten() for v in model.state_dict().values()])

    kept = cache_for(split, settings.preset(16, normalised=True), 1, state)
    assert kept is not None
    kept.create()
    for i in range(len(split)):
        kept.put(i, split.store.read(np.array([i]))[0])
    alone = trained(None, tmp_path / "elsewhere" / "finetune.pt")
    assert torch.equal(trained(None, state), alone)
    assert not torch.equal(alone, trained(18, tmp_path / "again" / "finetune.pt"))
    assert not list(tmp_path.glob("*pixels-*")), "the killed training's, too"


def test_images_held_out_are_of_every_class_that_has_some_to_spare() -> None:
    labels = np.repeat(np.arange(4), (1, 3, 10, 50))
    whole = Split(
        MemoryStore(np.arange(64, dtype=np.uint8)[:, None, None, None].repeat(3, 3)), labels, tuple("abcd"), HALF, "x"
    )
    seen, held = hold_out(whole, 0.2, 7)
    assert len(seen) + len(held) == 64
    assert np.bincount(held.labels, minlength=4).tolist() == [0, 1, 2, 10]
    both = [set(part.store.read(np.arange(len(part)))[:, 0, 0, 0].tolist()) for part in (seen, held)]
    assert both[0] | both[1] == set(range(64))
    with pytest.raises(DataError, match="to spare"):
        hold_out(whole.subset(np.array([0, 1, 4])), 0.2, 7)


def test_waiting_for_data_is_measured(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FileStore.encoded

    def slow(self: FileStore, i: int) -> Path:
        time.sleep(0.02)
        return real(self, i)

    monkeypatch.setattr(FileStore, "encoded", slow)
    shares: list[float] = []
    log = train(build_model(SPEC), split, how(workers=0, epochs=1), progress=lambda state: shares.append(state.waiting))
    assert log.waited_s > 3 * 8 * 0.02
    assert log.waiting == shares[-1]
    assert 0.3 < log.waiting <= 1.0


def test_the_preset_goes_by_the_size_of_the_input() -> None:
    usual = TrainSettings()
    assert [usual.preset(side, normalised=True).augment for side in (32, 63, 64, 224)] == ["cifar", "cifar", "photo", "photo"]
    assert usual.preset(224, normalised=True).mixup == usual.preset(224, normalised=True).ema == 0.0
    strong = TrainSettings(augment="photo+", ema=0.0).preset(224, normalised=True)
    assert (strong.mixup, strong.cutmix, strong.label_smoothing, strong.ema) == (0.2, 1.0, 0.1, 0.0)
    assert Inputs.of(SPEC).shape == (3, 16, 16)
