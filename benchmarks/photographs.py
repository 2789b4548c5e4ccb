"""What training on photographs gains: presets, starts, INT8 and uneven classes, on one data set and one network.

    python benchmarks/photographs.py CKPT --data imagenette --input 3x128x128 --work FOLDER [--parts presets int8 uneven]

`presets`: the network pruned to fractions of its MACs and distilled for some epochs under `cifar` (what training did before),
`photo` and `photo+`; from our start and from Torch-Pruning's best of six (``--peer``). `int8`: PTQ and QAT of the result.
`uneven`: 43 classes of 16 to 278 images, made of photographs that are turned or inverted; balanced sampling and class weights
against neither, by the recall of the worst class.
Learning rates are chosen on training images that nothing else sees; ``val`` is read for the table alone. Differences are paired
by image, with their standard error. Every figure is in ``photographs.json`` as soon as it is there; started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from prune_quality import Results, parted, peer_best

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.checkpoints.options import parse_shape
from compress.data import Dataset, MemoryStore, Split, load_dataset
from compress.evaluate import TorchRunner, evaluate
from compress.prune import prune
from compress.quantize import best_of, fake_quant_model, finish_qat, on_grid, prepare_qat, ptq
from compress.resnet import build_model, tensors_of
from compress.train import train
from rescompress.core.artifact import write_text
from rescompress.core.operations import Linear
from rescompress.core.settings import PruneSettings, TrainSettings


class Book:
    """Figures by key, kept in a JSON file, with the networks beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "photographs.json"
        self.known: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """Return a figure, made if it is not there."""
        if key not in self.known:
            self.known[key] = make()
            write_text(self.file, json.dumps(self.known, indent=1) + "\n")
        return self.known[key]

    def network(self, key: str, make: Callable[[], Checkpoint]) -> Checkpoint:
        """Return a network, made if it is not there."""
        path = self.folder / f"{key.replace(' ', '_').replace('/', '-')}.safetensors"
        if not path.is_file():
            save_checkpoint(make(), path)
        return load_checkpoint(path)


def right(checkpoint: Checkpoint, split: Split) -> list[int]:
    """Return 1 for each image that a network gets right, else 0."""
    model = (
        build_model(checkpoint.spec, checkpoint.state_dict) if checkpoint.quantization is None else fake_quant_model(checkpoint)
    )
    found = evaluate(TorchRunner(model), split)
    return (found.predictions == split.labels).astype(int).tolist()


def recalls(checkpoint: Checkpoint, split: Split) -> list[float]:
    """Return the recall of each class in percent."""
    hits = np.array(right(checkpoint, split))
    return [100 * float(hits[split.labels == label].mean()) for label in np.unique(split.labels)]


def paired(a: ArrayLike, b: ArrayLike) -> tuple[float, float]:
    """Return by how many points `a` is above `b` (shares right, by image), and the standard error of that over images."""
    d = 100 * (np.asarray(a) - np.asarray(b))
    return float(d.mean()), float(d.std(ddof=1) / math.sqrt(len(d)))


class Bench:
    """What all parts share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.book = Book(args.work)
        shape = parse_shape(args.input) if args.input else None
        self.dense = load_checkpoint(args.checkpoint, input_shape=shape)
        self.data: Dataset = load_dataset(args.data, self.dense.spec)
        self.rest, self.held = parted(self.data.train, args.held)

    def start(self, fraction: float, who: str, seed: int) -> Checkpoint:
        """Return the network pruned to a fraction of the MACs, by ours or by Torch-Pruning."""

        def make() -> Checkpoint:
            images = self.rest.take(512, seed)
            if who == "torch-pruning":
                key = f"{fraction:g} torch-pruning seed={seed}"
                return peer_best(self.dense, fraction, "inner", images, self.held, Results(self.book.folder), key)[0]
            return prune(
                self.dense, PruneSettings(macs=fraction), multiple=1, calibration_x=images.tensor(), seed=seed
            ).checkpoint

        return self.book.network(f"start {who} {fraction:g} seed {seed}", make)

    def recipe(self, lr: float) -> str:
        """Return what of a training stands in the keys of its figures."""
        return f"lr {lr:g} distill {self.args.distill:g} epochs {self.args.epochs:g}"

    def tuned(self, fraction: float, who: str, preset: str, seed: int, lr: float) -> Checkpoint:
        """Return that network after its distilled epochs."""
        a = self.args
        key = f"tuned {who} {fraction:g} {preset} seed {seed} {self.recipe(lr)}"
        name, _, area = preset.partition(":")

        def make() -> Checkpoint:
            begin = self.start(fraction, who, seed)
            model = build_model(begin.spec, begin.state_dict)
            settings = TrainSettings(
                epochs=a.epochs,
                lr=lr,
                batch_size=a.batch,
                augment=name,
                min_area=float(area or TrainSettings().min_area),
                precision=a.precision,
                workers=a.workers,
                distill=a.distill,
                seed=seed,
            )
            teacher = build_model(self.dense.spec, self.dense.state_dict)
            state = self.book.folder / f"{key.replace(' ', '_')}.state"
            log = train(model, self.rest, settings, teacher=teacher, resume_file=state)
            self.book.get(f"{key}: waiting", lambda: log.waiting)
            state.unlink(missing_ok=True)
            return Checkpoint(begin.spec, tensors_of(model))

        return self.book.network(key, make)

    def held_out(self, fraction: float, who: str, preset: str, seed: int, lr: float) -> float:
        """Return the share of the images held out that the network of a recipe has right."""
        key = f"held {who} {fraction:g} {preset} seed {seed} {self.recipe(lr)}"
        return float(self.book.get(key, lambda: float(np.mean(right(self.tuned(fraction, who, preset, seed, lr), self.held)))))

    def best(self, fraction: float, who: str, preset: str, seed: int) -> tuple[Checkpoint, float]:
        """Return the network of the learning rate that is best on images held out with the first seed, and that rate."""
        lr = max(self.args.lr, key=lambda rate: self.held_out(fraction, who, preset, self.args.seeds[0], rate))
        return self.tuned(fraction, who, preset, seed, lr), lr

    def answers(self, key: str, network: Callable[[], Checkpoint]) -> list[int]:
        """Return which images of ``val`` a network gets right."""
        found: list[int] = self.book.get(f"val {key}", lambda: right(network(), self.data.val))
        return found


def presets(bench: Bench) -> None:
    """Print the rows of presets and starts."""
    a = bench.args
    dense = bench.answers("dense", lambda: bench.dense)
    print(f"dense: {100 * np.mean(dense):.2f} on {len(dense)} images; {a.epochs:g} distilled epochs, {a.precision}")
    for fraction in a.macs:
        right_of: dict[tuple[str, str], list[list[int]]] = {}
        rows = [("ours", "none"), *(("ours", p) for p in a.presets), *((("torch-pruning", "photo"),) if a.peer else ())]
        for who, preset in rows:
            for seed in a.seeds:
                if preset == "none":
                    network, lr = bench.start(fraction, who, seed), 0.0
                else:
                    network, lr = bench.best(fraction, who, preset, seed)
                key = f"{who} {fraction:g} {preset} seed {seed} {bench.recipe(lr)}"
                answers = bench.answers(key, lambda network=network: network)  # type: ignore[misc]
                right_of.setdefault((who, preset), []).append(answers)
                difference, error = paired(answers, dense)
                text = f"{fraction:5.2f} {who:13} {preset:9} seed {seed} lr {lr:g}: {100 * np.mean(answers):6.2f}"
                text += f"  {difference:+6.2f} +- {error:.2f} of dense"
                if lr:
                    text += f"  held out {100 * bench.held_out(fraction, who, preset, seed, lr):.2f}"
                print(text, flush=True)
        shares = {row: np.mean(found, axis=0) for row, found in right_of.items()}
        beside = {"dense": np.asarray(dense)} | {name: shares[row] for name, row in _OTHERS.items() if row in shares}
        for row, share in shares.items():
            found = [(name, *paired(share, other)) for name, other in beside.items() if other is not share]
            text = "  ".join(f"{difference:+6.2f} +- {error:.2f} of {name}" for name, difference, error in found)
            print(
                f"{fraction:5.2f} {row[0]:13} {row[1]:9} mean of {len(a.seeds)}: {100 * share.mean():6.2f}  {text}", flush=True
            )


_OTHERS = {"cifar": ("ours", "cifar"), "Torch-Pruning trained": ("torch-pruning", "photo")}
"""What each row of presets is compared with, besides the dense network."""


def trained_int8(bench: Bench, network: Checkpoint, calibrated: Checkpoint, seed: int) -> Checkpoint:
    """Return a calibrated network after an epoch with the rounding in place, or as it was, by the images held out."""
    a = bench.args
    model = prepare_qat(calibrated)
    settings = TrainSettings(
        epochs=1, lr=0.002, batch_size=a.batch, distill=1.0, freeze_bn_after=0.0, workers=a.workers, seed=seed
    )
    train(model, bench.rest, settings, teacher=build_model(network.spec, network.state_dict))
    return on_grid(best_of([finish_qat(model, calibrated), calibrated], bench.held.again(250)))


def int8(bench: Bench) -> None:
    """Print the rows of INT8: calibrated, and trained with the rounding in place."""
    a = bench.args
    for fraction in a.macs:
        below: dict[str, list[float]] = {"PTQ": [], "QAT": []}
        for seed in a.seeds:
            network, _ = bench.best(fraction, "ours", "photo", seed)
            calibrated = ptq(network, [x for x, _ in bench.rest.take(512, seed).batches(64)])
            key = f"int8 {fraction:g} seed {seed}"
            plain = bench.answers(f"{key} float", lambda network=network: network)  # type: ignore[misc]
            makers = {"PTQ": partial(on_grid, calibrated), "QAT": partial(trained_int8, bench, network, calibrated, seed)}
            for name, make in makers.items():
                answers = bench.answers(f"{key} {name}", make)
                difference, error = paired(answers, plain)
                below[name].append(difference)
                text = f"{fraction:5.2f} {name} seed {seed}: {100 * np.mean(answers):.2f}"
                print(f"{text}  {difference:+.2f} +- {error:.2f} of float {100 * np.mean(plain):.2f}", flush=True)
        means = ", ".join(f"{name} {np.mean(found):+.2f} of float" for name, found in below.items())
        print(f"{fraction:5.2f} mean of {len(a.seeds)}: {means}", flush=True)


CLASSES, JUDGED = 43, 60
"""As many classes as traffic signs have in a well-known set of photographs (GTSRB), and images of each that judge."""
TURNS = 4
"""Each class of photographs makes as many: upright, and turned by quarters; more classes are negatives of the upright ones."""


def turned(split: Split, classes: int, counts: list[int], seed: int) -> Split:
    """Return as many classes as are wanted, made of turned photographs and of negatives, with `counts` images each."""
    rng = np.random.default_rng(seed)
    ten = np.unique(split.labels)
    pictures, labels = [], []
    for k, count in zip(range(classes), counts, strict=True):
        label, change = ten[k % len(ten)], k // len(ten)
        index = rng.permutation(np.flatnonzero(split.labels == label))[:count]
        x_NHWC = split.store.read(np.sort(index))
        pictures.append(255 - x_NHWC if change == TURNS else np.rot90(x_NHWC, change, axes=(1, 2)))
        labels += [k] * len(index)
    names = tuple(f"{split.classes[ten[k % len(ten)]]} {k // len(ten)}" for k in range(classes))
    found, y_N = np.concatenate(pictures), np.array(labels, dtype=np.int64)
    # A mirrored picture that is turned left is a turned mirrored one that is turned right.
    return Split(MemoryStore(found), y_N, names, split.preprocessing, f"turned {classes} {seed} {len(y_N)}", flips=False)


def with_head(checkpoint: Checkpoint, classes: int) -> Checkpoint:
    """Return a network with a last layer of random weights for other classes, as a user begins with classes of his own."""
    spec, tensors = checkpoint.spec, dict(checkpoint.state_dict)
    last = spec.outputs[0].tensor
    linear = Linear(width=classes)
    nodes = tuple(node.model_copy(update={"operation": linear}) if node.name == last else node for node in spec.nodes)
    features = tensors[f"{last}.weight"].shape[1]
    tensors[f"{last}.weight"] = 0.01 * torch.randn(classes, features, generator=torch.Generator().manual_seed(0))
    tensors[f"{last}.bias"] = torch.zeros(classes)
    return Checkpoint(spec.replace(nodes=nodes, labels=None), tensors)


def uneven(bench: Bench) -> None:
    """Print the recall of the worst class on 43 classes of 16 to 278 images, with and without a remedy."""
    a = bench.args
    counts = np.random.default_rng(0).permutation(np.geomspace(16, 278, CLASSES).round().astype(int)).tolist()
    split = turned(bench.rest, CLASSES, counts, 0)
    judged = turned(bench.data.val, CLASSES, [JUDGED] * CLASSES, 1)
    begin = with_head(bench.start(a.macs[0], "ours", a.seeds[0]), CLASSES)
    print(f"{CLASSES} classes, {len(split)} images, {min(counts)} to {max(counts)} each, labels, {a.uneven_epochs:g} epochs:")
    for name, more in (
        ("neither", {}),
        ("sampling: balanced", {"sampling": "balanced"}),
        ("class_weights: balanced", {"class_weights": "balanced"}),
    ):

        def make(more: dict[str, str] = more) -> list[float]:
            model = build_model(begin.spec, begin.state_dict)
            settings = TrainSettings.model_validate(
                {"epochs": a.uneven_epochs, "lr": 0.02, "batch_size": 32, "precision": a.precision, "workers": a.workers} | more
            )
            train(model, split, settings)
            return recalls(Checkpoint(begin.spec, tensors_of(model)), judged)

        found = bench.book.get(f"uneven {CLASSES} {name} {a.uneven_epochs:g}", make)
        few = np.argsort(counts)[: CLASSES // 4]
        text = f"worst class {min(found):6.2f}  the rarest quarter {np.mean(np.array(found)[few]):6.2f}"
        print(f"  {name:24} {text}  mean {np.mean(found):6.2f}", flush=True)


PARTS = {"presets": presets, "int8": int8, "uneven": uneven}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--input", help="shape, such as 3x128x128")
    parser.add_argument("--held", type=int, default=600, help="training images that alone choose settings")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--macs", type=float, nargs="+", default=[0.3, 0.15])
    parser.add_argument(
        "--presets", nargs="+", default=["cifar", "photo", "photo+"], help="of augmentation; photo:0.5 has another min_area"
    )
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning's start, too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--uneven-epochs", type=float, default=10)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--distill", type=float, default=0.5, help="part of the loss that is the teacher's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    args = parser.parse_args()
    bench = Bench(args)
    for name in args.parts:
        PARTS[name](bench)


if __name__ == "__main__":
    main()
