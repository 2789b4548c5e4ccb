"""Pruning quality side by side: ours and Torch-Pruning, on the same data, at the same MACs, with the same fine-tuning.

    python benchmarks/prune_quality.py CKPT --data CIFAR10 [--macs 0.5 0.3] [--seeds 0 1 2] [--epochs 1] [--work FOLDER]
    python benchmarks/prune_quality.py resnet18_imagenette.pt --data imagenette --input 3x128x128 --held 600 --macs 0.5 0.3 0.2

Torch-Pruning (``pip install --no-deps torch-pruning==1.6.1``) gets every combination of importance (L2, LAMP, Taylor) and
ranking (over the whole network, per layer), each with BatchNorm measured again on the calibration images; the best on
2,000 images (``--held``) of the training set that nothing else sees is the one that counts. By the same images each method
gets the best of several learning rates of the fine-tuning. Torch-Pruning cannot prune the residual streams of pad shortcuts,
so ``--scope all`` writes them as 1x1 projections with fixed zeros and ones first, for everybody: the same function, some MACs
more. ``val`` is read for the figures of the table alone.

With ``--work`` every figure is in ``results.json`` as soon as it is there, and a run that is started again goes on from
it, from the pruned networks and from the states of unfinished trainings beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.checkpoints.options import parse_shape
from compress.data import Split, load_dataset
from compress.evaluate import TorchRunner, evaluate
from compress.prune import Scope, measure, prune
from compress.prune.method import Curves
from compress.prune.recalibrate import recalibrate
from compress.resnet import build_model, tensors_of
from compress.train import train
from rescompress.core.artifact import write_text
from rescompress.core.graph import Network
from rescompress.core.layers import total_macs, walk
from rescompress.core.settings import PruneSettings, TrainSettings
from rescompress.core.spec import ModelSpec

PEER = "torch-pruning"
NO_REPAIR = "-no-repair"
IMPORTANCES = ("l2", "lamp", "taylor")
_NEEDS_IMAGES = ("taylor",)
RANKINGS = ("global", "layer")
_TOGETHER = 64
"""Images of one backward pass: 512 photographs at a time would need 16 GB."""


@dataclass(frozen=True)
class Cell:
    """One pruned (and tuned) network.

    Attributes:
        macs: Fraction of the dense network's MACs that is left.
        top1: On ``val``, in percent.
        seconds: Pruning took.
        chosen: What Torch-Pruning's best setting was.
        held: On the training images that were held out, in percent; learning rates are chosen by it.
    """

    macs: float
    top1: float
    seconds: float
    chosen: str = ""
    held: float = 0.0


def parted(train: Split, held: int) -> tuple[Split, Split]:
    """Return the training images that networks see, and those that settings are chosen by."""
    order = np.random.default_rng(0).permutation(len(train))
    return train.subset(order[held:]), train.subset(order[:held])


def top1(checkpoint: Checkpoint, split: Split) -> float:
    """Return the accuracy in percent."""
    return 100 * evaluate(TorchRunner(build_model(checkpoint.spec, checkpoint.state_dict)), split).top1


def fraction_left(pruned: ModelSpec | Network, dense: ModelSpec | Network) -> float:
    """Return which fraction of the MACs is left."""
    return total_macs(walk(pruned)) / total_macs(walk(dense))


def with_projections(checkpoint: Checkpoint) -> Checkpoint:
    """Return the same function with every pad shortcut written as a 1x1 convolution and BatchNorm."""
    changed, tensors = {}, dict(checkpoint.state_dict)
    one = (1.0 + checkpoint.spec.bn_eps) ** 0.5
    stream = checkpoint.spec.stem.convs[-1].width
    for block in checkpoint.spec.blocks:
        if block.channel_map is not None:
            out = block.widths[-1]
            weight = torch.zeros(out, stream, 1, 1)
            for o, i in enumerate(block.channel_map):
                if i >= 0:
                    weight[o, i] = 1.0
            tensors[f"{block.name}.downsample.0.weight"] = weight
            norm = {"weight": torch.full((out,), one), "bias": torch.zeros(out), "running_mean": torch.zeros(out)}
            norm |= {"running_var": torch.ones(out), "num_batches_tracked": torch.tensor(0)}
            tensors |= {f"{block.name}.downsample.1.{k}": v for k, v in norm.items()}
            changed[block.name] = block.model_copy(update={"shortcut": "projection", "channel_map": None})
        stream = block.widths[-1]
    return Checkpoint(checkpoint.spec.replace_blocks(changed), tensors)


def measured_spec(dense: ModelSpec, model: nn.Module) -> ModelSpec:
    """Return the spec of a network with the layers of `dense` whose widths have changed."""

    def width(name: str) -> int:
        return int(model.get_submodule(name).out_channels)  # type: ignore[arg-type]

    blocks = {
        b.name: b.model_copy(update={"widths": tuple(width(f"{b.name}.conv{i}") for i in range(1, len(b.widths) + 1))})
        for b in dense.blocks
    }
    convs = [c.model_copy(update={"width": width(f"conv{i}")}) for i, c in enumerate(dense.stem.convs, 1)]
    stem = dense.stem.model_copy(update={"convs": tuple(convs)})
    return dense.replace_blocks(blocks, stem=stem)


def peer_at(
    dense: Checkpoint, ratio: float, setting: tuple[str, str], scope: Scope, x: torch.Tensor, y: torch.Tensor
) -> Checkpoint:
    """Return the network that Torch-Pruning leaves at one pruning ratio."""
    import torch_pruning as tp

    importance, ranking = setting
    model = build_model(dense.spec, dense.state_dict)
    inner = {f"{b.name}.conv{i}" for b in dense.spec.blocks for i in range(1, len(b.widths))}
    prunable = inner if scope == "inner" else {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    ignored = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and n not in prunable]
    score = {
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "lamp": lambda: tp.importance.LAMPImportance(p=2),
        "taylor": lambda: tp.importance.GroupTaylorImportance(),
    }[importance]()
    pruner = tp.pruner.BasePruner(
        model, x[:1], importance=score, global_pruning=ranking == "global", pruning_ratio=ratio, ignored_layers=ignored
    )
    if importance == "taylor":
        for name, gradient in gradients(dense, x, y).items():
            model.get_parameter(name).grad = gradient.clone()
    pruner.step()
    model.zero_grad()
    return Checkpoint(measured_spec(dense.spec, model), tensors_of(model))


_GRADIENTS: dict[int, dict[str, torch.Tensor]] = {}


def gradients(dense: Checkpoint, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of the labels' cross-entropy over all calibration images, computed once per set."""
    if id(x) not in _GRADIENTS:
        model = build_model(dense.spec, dense.state_dict)
        for some, right in zip(x.split(_TOGETHER), y.split(_TOGETHER), strict=True):
            (nn.functional.cross_entropy(model(some), right, reduction="sum") / len(x)).backward()
        _GRADIENTS.clear()
        _GRADIENTS[id(x)] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return _GRADIENTS[id(x)]


_BLIND: dict[tuple[int, float, tuple[str, str], Scope], Checkpoint] = {}
"""Networks of importances that look at no images: the same for every seed until BatchNorm is measured again."""


def peer_network(
    dense: Checkpoint, fraction: float, setting: tuple[str, str], scope: Scope, x: torch.Tensor, y: torch.Tensor
) -> Checkpoint | None:
    """Return Torch-Pruning's network nearest to the fraction of MACs, BatchNorm measured again; None off by over 1 %."""
    key = id(dense), fraction, setting, scope
    best = _BLIND.get(key)
    low, high = 0.0, 1.0
    for _ in range(14 if best is None else 0):
        ratio = (low + high) / 2
        found = peer_at(dense, ratio, setting, scope, x, y)
        left = fraction_left(found.spec, dense.spec)
        if best is None or abs(left - fraction) < abs(fraction_left(best.spec, dense.spec) - fraction):
            best = found
        low, high = (ratio, high) if left > fraction else (low, ratio)
    assert best is not None
    if setting[0] not in _NEEDS_IMAGES:
        _BLIND[key] = best
    if abs(fraction_left(best.spec, dense.spec) / fraction - 1) > 0.01:
        return None
    return recalibrate(best, x)


class Results:
    """Cells by key, kept in a JSON file; beside it lie pruned networks and the states of trainings."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.cells: dict[str, Cell] = {}
        self.read()

    def read(self) -> None:
        """Take up what this or another process has found."""
        if self.folder is not None and (self.folder / "results.json").is_file():
            found = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
            self.cells |= {k: Cell(**v) for k, v in found.items()}

    def get(self, key: str, make: Callable[[], Cell]) -> Cell:
        """Return the cell, made if it is not there."""
        if key not in self.cells:
            made = make()
            self.read()
            self.cells[key] = made
            if self.folder is not None:
                text = json.dumps({k: asdict(c) for k, c in sorted(self.cells.items())}, indent=1)
                write_text(self.folder / "results.json", text + "\n")
        return self.cells[key]

    def file(self, key: str, suffix: str) -> Path | None:
        """Return where something that belongs to a cell is kept."""
        return None if self.folder is None else self.folder / (key.replace(" ", "_").replace("=", "") + suffix)


def peer_best(
    dense: Checkpoint, fraction: float, scope: Scope, calibration: Split, held: Split, results: Results, key: str
) -> tuple[Checkpoint, str]:
    """Return the best of Torch-Pruning's settings on the held-out images, and its name; each is a cell of `key`'s."""
    x, y = calibration.tensor(), torch.from_numpy(calibration.labels)
    found: dict[str, float] = {}
    networks: dict[str, Checkpoint] = {}
    for setting in [(i, r) for i in IMPORTANCES for r in RANKINGS]:
        name = "/".join(setting)
        made: list[Checkpoint] = []

        def make(setting: tuple[str, str] = setting, made: list[Checkpoint] = made) -> Cell:
            start = time.perf_counter()
            network = peer_network(dense, fraction, setting, scope, x, y)
            if network is None:
                return Cell(0.0, 0.0, time.perf_counter() - start)
            made.append(network)
            left = fraction_left(network.spec, dense.spec)
            return Cell(left, 0.0, time.perf_counter() - start, held=top1(network, held))

        cell = results.get(f"{key} {name}", make)
        if cell.macs:
            found[name] = cell.held
            if made:
                networks[name] = made[0]
    chosen = max(found, key=lambda name: found[name])
    if chosen not in networks:  # its cell is from an earlier process
        importance, ranking = chosen.split("/")
        again = peer_network(dense, fraction, (importance, ranking), scope, x, y)
        assert again is not None
        networks[chosen] = again
    return networks[chosen], chosen


@dataclass(frozen=True)
class Bench:
    """What all cells share."""

    name: str
    dense: Checkpoint
    rest: Split
    held: Split
    val: Split
    results: Results
    args: argparse.Namespace
    measured: dict[tuple[str, int], tuple[Curves, float]] = field(default_factory=dict)

    def curves(self, method: str, seed: int, x: torch.Tensor) -> tuple[Curves, float]:
        """Return what a method of ours says of the dense network, and the seconds that took; one set serves all fractions."""
        if (method, seed) not in self.measured:
            start = time.perf_counter()
            found = measure(self.dense, method=method, scope=self.args.scope, calibration_x=x, seed=seed)
            self.measured[method, seed] = found, time.perf_counter() - start
        return self.measured[method, seed]

    def cell(self, method: str, fraction: float, seed: int, lr: float) -> Cell:
        """Return the figures of one network, before or after fine-tuning."""
        key = f"{self.name} {fraction:g} {method} seed={seed} calib={self.args.calib}"
        tuning = self.tuning(lr)
        if not tuning:
            return self.results.get(key, lambda: self.pruned(key, method, fraction, seed)[0])
        return self.results.get(f"{key} {tuning}", lambda: self.tuned(key, method, fraction, seed, lr))

    def best_lr(self, method: str, fraction: float) -> float:
        """Return the learning rate that is best on the held-out training images after the first seed's fine-tuning."""
        rates: list[float] = self.args.lr
        if len(rates) == 1 or not self.args.epochs:
            return rates[0]
        cells = {lr: self.cell(method, fraction, self.args.seeds[0], lr) for lr in rates}
        tried = ", ".join(f"{lr:g}: {cell.held:.2f}" for lr, cell in cells.items())
        print(
            f"{method} at {fraction:g}: learning rates by top-1 on {len(self.held)} held-out training images: {tried}",
            flush=True,
        )
        return max(cells, key=lambda lr: cells[lr].held)

    def tuning(self, lr: float) -> str:
        """Return the fine-tuning in words."""
        a = self.args
        if not a.epochs:
            return ""
        words = f"epochs={a.epochs:g} lr={lr:g} {a.precision}"
        if a.distil:
            words += f" distil={a.distil:g}" + (f" features={a.features:g}" if a.features else "")
        return words

    def pruned(self, key: str, method: str, fraction: float, seed: int) -> tuple[Cell, Checkpoint]:
        """Prune and evaluate one network."""
        path = self.results.file(key, ".safetensors")
        if path is not None and path.is_file() and key in self.results.cells:
            return self.results.cells[key], load_checkpoint(path)
        calibration = self.rest.take(self.args.calib, seed)
        start, chosen, before = time.perf_counter(), "", 0.0
        if method == PEER:
            network, chosen = peer_best(self.dense, fraction, self.args.scope, calibration, self.held, self.results, key)
        else:
            x, name = calibration.tensor(), method.removesuffix(NO_REPAIR)
            curves, before = self.curves(name, seed, x)
            start = time.perf_counter()
            network = prune(
                self.dense,
                PruneSettings(method=name, macs=fraction, scope=self.args.scope, repair=not method.endswith(NO_REPAIR)),
                multiple=1,
                calibration_x=x,
                seed=seed,
                curves=curves,
            ).checkpoint
        seconds = before + time.perf_counter() - start
        left = fraction_left(network.spec, self.dense.spec)
        if abs(left / fraction - 1) > 0.01:
            raise SystemExit(f"{method} left {left:.4f} of the MACs instead of {fraction}: not comparable")
        if path is not None:
            save_checkpoint(network, path)
        return Cell(left, top1(network, self.val), seconds, chosen), network

    def tuned(self, key: str, method: str, fraction: float, seed: int, lr: float) -> Cell:
        """Fine-tune one network as everybody's is, and evaluate it."""
        cell = self.results.get(key, lambda: self.pruned(key, method, fraction, seed)[0])
        network = self.pruned(key, method, fraction, seed)[1]
        model = build_model(network.spec, network.state_dict)
        a = self.args
        settings = TrainSettings(
            epochs=a.epochs, lr=lr, seed=seed, precision=a.precision, distill=a.distil or 1.0, features=a.features
        )
        teacher = build_model(self.dense.spec, self.dense.state_dict) if a.distil else None
        state = self.results.file(f"{key} {self.tuning(lr)}", ".state")
        train(model, self.rest, settings, teacher=teacher, resume_file=state)
        after = Checkpoint(network.spec, tensors_of(model))
        figure = Cell(cell.macs, top1(after, self.val), cell.seconds, cell.chosen, top1(after, self.held))
        if state is not None:
            state.unlink(missing_ok=True)
        return figure


def main() -> None:
    """Print one row per fraction and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--input", help="shape, such as 3x128x128, where the checkpoint does not tell")
    parser.add_argument(
        "--held", type=int, default=2000, help="training images that settings are chosen by, kept from all else"
    )
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["reconstruct", PEER], help=f"one of ours may end in {NO_REPAIR}")
    parser.add_argument("--scope", choices=["inner", "all"], default="inner")
    parser.add_argument("--calib", type=int, default=512)
    parser.add_argument("--epochs", type=float, default=0)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.02], help="of several, each method gets its best")
    parser.add_argument("--distil", type=float, default=0.0, help="weight of the dense network's outputs in the loss")
    parser.add_argument("--features", type=float, default=0.0, help="weight of its stages' outputs, with --distil")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="of the fine-tuning")
    parser.add_argument("--work", type=Path, default=None, help="folder for results.json, pruned networks and states")
    args = parser.parse_args()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    dense = load_checkpoint(args.checkpoint, input_shape=parse_shape(args.input) if args.input else None)
    if args.scope == "all":
        dense = with_projections(dense)
    data = load_dataset(args.data, dense.spec)
    name = f"{Path(args.checkpoint).stem} {args.scope}"
    results = Results(args.work)
    rest, held = parted(data.train, args.held)
    bench = Bench(name, dense, rest, held, data.val, results, args)
    whole = results.get(f"{name} dense", lambda: Cell(1.0, top1(dense, data.val), 0.0))
    print(f"{name}: dense {whole.top1:.2f} on {len(data.val)} images of val; {args.calib} calibration images, align 1")
    print(f"fine-tuning: {bench.tuning(args.lr[0]) or 'none'}" + (f", lr of {args.lr}" if len(args.lr) > 1 else ""))
    if PEER in args.methods:
        version = importlib.metadata.version("torch-pruning")
        print(
            f"Torch-Pruning {version}: BasePruner, one step, best of {'/'.join(IMPORTANCES)} x {'/'.join(RANKINGS)} ranking on "
            f"{args.held} training images, BatchNorm recalibrated on the calibration images; MACs within 1 %"
        )
    print(f"{'MACs':>5} {'reached':>8} {'method':21} {'top-1':>6} {'spread':>6} {'below dense':>11} {'s':>6}  per seed")
    for fraction in args.macs:
        for method in args.methods:
            lr = bench.best_lr(method, fraction)
            cells = [bench.cell(method, fraction, seed, lr) for seed in args.seeds]
            figures = [c.top1 for c in cells]
            mean, spread = statistics.mean(figures), max(figures) - min(figures)
            macs, seconds = statistics.mean(c.macs for c in cells), statistics.mean(c.seconds for c in cells)
            each = " ".join(f"{c.top1:.2f}{' ' + c.chosen if c.chosen else ''}" for c in cells)
            each = f"lr {lr:g}: {each}" if len(args.lr) > 1 else each
            below = whole.top1 - mean
            print(
                f"{fraction:5.2f} {macs:8.4f} {method:21} {mean:6.2f} {spread:6.2f} {below:11.2f} {seconds:6.1f}  {each}",
                flush=True,
            )


if __name__ == "__main__":
    main()
