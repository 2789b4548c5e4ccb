"""Images per second of the training's loader, beside torchvision's reference loader, the former path, and pure decoding.

    python benchmarks/loader.py --folder /tmp/jpegs --images 20000 --workers 2

Makes synthetic JPEGs of 500x375 where the folder is missing, and measures all ways in one sitting, in turns, so that what
else the machine does meets them alike; ratios are what counts. Also the cost of an epoch's order at 1.28 million images, the
time of a scan, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from compress.data import Inputs, MemoryStore, Split, load_dataset
from compress.data.augment import shifted
from compress.data.loader import Batches
from compress.memory import kept_memory
from compress.pixels import fit, normalise, picture
from rescompress.core.settings import TrainSettings
from rescompress.core.spec import Preprocessing

PREPROCESSING = Preprocessing(name="imagenet", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256, assumed=False)


def make_images(folder: Path, count: int, distinct: int = 200) -> None:
    """Write JPEGs of 500x375 with the look of photographs: smooth shapes, edges and some noise; `distinct` of them differ."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(min(distinct, count)):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        fine = np.asarray(Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8)).resize((500, 375)), np.int16)
        noise = rng.integers(-6, 7, (375, 500, 1))
        pixels = np.clip(smooth + (fine - 128) // 5 + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    for part, many in (("train", count), ("val", 20)):
        for i in range(many):
            path = folder / part / f"class{i % 10}" / f"{i:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(made[i % len(made)])


def ours(split: Split, settings: TrainSettings, batch: int, workers: int) -> Callable[[int, int], Iterator[int]]:
    """Return a loader of this package: steps from one number to another, normalised."""

    def load(start: int, stop: int) -> Iterator[int]:
        batches = Batches(split, settings, batch)
        with kept_memory(), batches.stream(start, stop, workers) as stream:  # as training does
            for x, _ in stream:
                yield len(normalise(x, split.preprocessing))

    return load


def reference(folder: Path, batch: int, workers: int, min_area: float) -> Callable[[int, int], Iterator[int]]:
    """Return torchvision's reference loader with the same transforms."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(min_area, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(PREPROCESSING.mean, PREPROCESSING.std),
        ]
    )
    data = ImageFolder(str(folder / "train"), transform=transform)

    def load(start: int, stop: int) -> Iterator[int]:
        order = torch.randperm(len(data)).tolist()
        chosen = [order[i * batch : (i + 1) * batch] for i in range(start, stop)]
        for x, _ in DataLoader(data, batch_sampler=chosen, num_workers=workers):
            yield len(x)

    return load


def former(folder: Path, batch: int) -> Callable[[int, int], Iterator[int]]:
    """Return what training did before: a new pool of two threads per batch, cut at the centre, shifted, all between steps."""
    paths = sorted((folder / "train").rglob("*.jpg"))
    labels = len(paths)

    def one(i: int) -> np.ndarray:
        return fit(picture(paths[i], 3), (3, 224, 224), PREPROCESSING)

    def load(start: int, stop: int) -> Iterator[int]:
        for step in range(start, stop):
            order = np.random.default_rng([0, 0]).permutation(labels)
            with ThreadPoolExecutor(2) as pool:
                pixels = np.stack(list(pool.map(one, order[step * batch : (step + 1) * batch].tolist())))
            x: Tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            yield len(normalise(shifted(x, flip=True), PREPROCESSING))

    return load


def decoding(folder: Path, batch: int, workers: int) -> Callable[[int, int], Iterator[int]]:
    """Return the limit: as many threads that do nothing but decode whole JPEGs."""
    paths = sorted((folder / "train").rglob("*.jpg"))

    def load(start: int, stop: int) -> Iterator[int]:
        with ThreadPoolExecutor(workers) as pool:
            for step in range(start, stop):
                yield sum(1 for _ in pool.map(lambda p: Image.open(p).load(), paths[step * batch : (step + 1) * batch]))

    return load


def measured(
    ways: dict[str, Callable[[int, int], Iterator[int]]], steps: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return images per second, and milliseconds of processors per image, of each way in each round.

    The first step of a round, which starts processes, counts too. Time of processors hardly depends on what else runs.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    costs: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        names = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]  # nobody is always the first to read a file
        for name in names:
            used, began = processors(), time.perf_counter()
            images = sum(ways[name](number * steps, (number + 1) * steps))
            rates[name].append(images / (time.perf_counter() - began))
            costs[name].append(1000 * (processors() - used) / images)
    return rates, costs


def processors() -> float:
    """Return the seconds of processors that this process and those that it waited for have used."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def order_cost() -> float:
    """Return the mean milliseconds that the order costs a step, at 1,281,167 images and 256 a step."""
    split = Split(MemoryStore(np.zeros((1, 1, 1, 3), np.uint8)), np.zeros(1_281_167, np.int64), ("a",), PREPROCESSING, "none")
    batches = Batches(split, TrainSettings(augment="none"), 256)
    began = time.perf_counter()
    for step in range(batches.per_epoch):
        batches.of(step)
    return 1000 * (time.perf_counter() - began) / batches.per_epoch


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/rescompress-jpegs"), help="of JPEGs; made where missing")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="per way and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not (args.folder / "train").is_dir():
        make_images(args.folder, args.images)
    began = time.perf_counter()
    split = load_dataset(str(args.folder), Inputs((3, 224, 224), 10, PREPROCESSING, None)).train
    scan = time.perf_counter() - began
    settings = TrainSettings(augment="photo", seed=0).preset(224, normalised=True)
    ways = {
        "ours": ours(split, settings, args.batch, args.workers),
        "torchvision": reference(args.folder, args.batch, args.workers, settings.min_area),
        "former path": former(args.folder, args.batch),
        "decoding alone": decoding(args.folder, args.batch, args.workers),
    }
    found, costs = measured(ways, args.steps, args.rounds)
    best = {name: max(rates) for name, rates in found.items()}
    print(f"{len(split)} images, {args.workers} workers, batches of {args.batch}; images per second:")
    for name, rate in best.items():
        cost = min(costs[name])
        print(f"  {name:<15} {rate:8.1f}   {rate / best['ours']:.2f} of ours; {cost:.1f} ms of processors an image")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    cost = order_cost()
    print(f"scan {scan:.2f} s; order at 1.28 million {cost:.3f} ms a step; peak memory {peak:.2f} GiB")
    if args.json:
        document = {"rates": found, "costs_ms": costs, "scan_s": scan, "order_ms": cost, "peak_gib": peak, "images": len(split)}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
