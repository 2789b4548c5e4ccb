"""What training on photographs gains: presets, starts, INT8 and uneven classes, on one data set and one network.

    python benchmarks/photographs.py CKPT --data imagenette --input 3x128x128 --work FOLDER [--parts presets int8 uneven]

`presets`: the network pruned to fractions of its MACs and distilled for some epochs under `cifar` (what training did before),
`photo` and `photo+`; from our start and from Torch-Pruning's best of six (``--peer``). `int8`: PTQ and QAT of the result.
`uneven`: classes of 16 to 278 images; balanced sampling and class weights against neither, by the recall of the worst class.
Learning rates are chosen on training images that nothing else sees; ``val`` is read for the table alone. Differences are paired
by image, with their standard error. Every figure is in ``photographs.json`` as soon as it is there; started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prune_quality import Results, parted, peer_best

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.checkpoints.options import parse_shape
from compress.data import Dataset, Split, load_dataset
from compress.evaluate import TorchRunner, evaluate
from compress.prune import prune
from compress.quantize import best_of, fake_quant_model, finish_qat, on_grid, prepare_qat, ptq
from compress.resnet import build_model, tensors_of
from compress.train import train
from rescompress.core.artifact import write_text
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


def paired(a: list[int], b: list[int]) -> tuple[float, float]:
    """Return by how many points `a` is above `b`, and the standard error of that difference."""
    d = 100 * (np.array(a) - np.array(b))
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

        def make() -> Checkpoint:
            begin = self.start(fraction, who, seed)
            model = build_model(begin.spec, begin.state_dict)
            settings = TrainSettings(
                epochs=a.epochs,
                lr=lr,
                batch_size=a.batch,
                augment=preset,
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

    def best(self, fraction: float, who: str, preset: str, seed: int) -> tuple[Checkpoint, float]:
        """Return the network of the learning rate that is best on images held out with the first seed, and that rate."""
        rates: list[float] = self.args.lr

        def score(lr: float) -> float:
            network = self.tuned(fraction, who, preset, self.args.seeds[0], lr)
            key = f"held {who} {fraction:g} {preset} {self.recipe(lr)}"
            return float(self.book.get(key, lambda: float(np.mean(right(network, self.held)))))

        lr = max(rates, key=score) if len(rates) > 1 else rates[0]
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
        former: dict[int, list[int]] = {}
        rows = [("ours", "none"), *(("ours", p) for p in a.presets), *((("torch-pruning", "photo"),) if a.peer else ())]
        for who, preset in rows:
            for seed in a.seeds:
                if preset == "none":
                    network, lr = bench.start(fraction, who, seed), 0.0
                else:
                    network, lr = bench.best(fraction, who, preset, seed)
                key = f"{who} {fraction:g} {preset} seed {seed} {bench.recipe(lr)}"
                answers = bench.answers(key, lambda network=network: network)  # type: ignore[misc]
                if preset == "cifar":
                    former[seed] = answers
                text = f"{fraction:5.2f} {who:13} {preset:7} seed {seed} lr {lr:g}: {100 * np.mean(answers):6.2f}"
                difference, error = paired(answers, dense)
                text += f"  {difference:+6.2f} +- {error:.2f} of dense"
                if seed in former and preset != "cifar":
                    difference, error = paired(answers, former[seed])
                    text += f"  {difference:+6.2f} +- {error:.2f} of cifar"
                print(text, flush=True)


def int8(bench: Bench) -> None:
    """Print the rows of INT8: calibrated, and trained with the rounding in place."""
    a = bench.args
    for fraction in a.macs:
        network, _ = bench.best(fraction, "ours", "photo", a.seeds[0])
        images = [x for x, _ in bench.rest.take(512, 0).batches(64)]

        def calibrated(network: Checkpoint = network, images: list[torch.Tensor] = images) -> Checkpoint:
            return ptq(network, images)

        def trained(network: Checkpoint = network, make: Callable[[], Checkpoint] = calibrated) -> Checkpoint:
            before = make()
            model = prepare_qat(before)
            settings = TrainSettings(
                epochs=1, lr=0.002, batch_size=a.batch, distill=1.0, freeze_bn_after=0.0, workers=a.workers
            )
            train(model, bench.rest, settings, teacher=build_model(network.spec, network.state_dict))
            return best_of([finish_qat(model, before), before], bench.held.again(250))

        plain = bench.answers(f"int8 float {fraction:g}", lambda network=network: network)  # type: ignore[misc]
        for name, make in (("PTQ", calibrated), ("QAT", trained)):
            answers = bench.answers(f"int8 {name} {fraction:g}", lambda make=make: on_grid(make()))  # type: ignore[misc]
            difference, error = paired(answers, plain)
            print(
                f"{fraction:5.2f} {name}: {100 * np.mean(answers):.2f}  {difference:+.2f} +- {error:.2f} of float", flush=True
            )


def uneven(bench: Bench) -> None:
    """Print the recall of the worst class on classes of 16 to 278 images, with and without a remedy."""
    a = bench.args
    rng = np.random.default_rng(0)
    classes = rng.permutation(np.unique(bench.rest.labels))
    counts = np.geomspace(16, 278, len(classes)).round().astype(int)
    chosen = np.concatenate(
        [rng.permutation(np.flatnonzero(bench.rest.labels == c))[:n] for c, n in zip(classes, counts, strict=True)]
    )
    split = bench.rest.subset(np.sort(chosen))
    fraction = a.macs[0]
    print(f"{len(classes)} classes of {counts.min()} to {counts.max()} images, labels alone, {a.uneven_epochs:g} epochs:")
    for name, more in (
        ("neither", {}),
        ("sampling: balanced", {"sampling": "balanced"}),
        ("class_weights: balanced", {"class_weights": "balanced"}),
    ):

        def make(more: dict[str, str] = more) -> list[float]:
            begin = bench.start(fraction, "ours", a.seeds[0])
            torch.manual_seed(0)
            model = build_model(begin.spec, begin.state_dict)
            torch.nn.init.normal_(model.get_parameter("fc.weight"), std=0.01)  # what was known of the classes is forgotten
            torch.nn.init.zeros_(model.get_parameter("fc.bias"))
            settings = TrainSettings.model_validate(
                {"epochs": a.uneven_epochs, "lr": 0.02, "batch_size": 32, "precision": a.precision, "workers": a.workers} | more
            )
            train(model, split, settings)
            return recalls(Checkpoint(begin.spec, tensors_of(model)), bench.data.val)

        found = bench.book.get(f"uneven {name} {a.uneven_epochs:g}", make)
        print(f"  {name:24} worst class {min(found):6.2f}  mean {np.mean(found):6.2f}", flush=True)


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
    parser.add_argument("--presets", nargs="+", default=["cifar", "photo", "photo+"])
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
