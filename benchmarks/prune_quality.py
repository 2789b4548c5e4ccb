"""Pruning quality side by side: our methods and Torch-Pruning 1.6.1, same data, same MACs, same fine-tuning.

    python benchmarks/prune_quality.py CKPT --data CIFAR10 [--macs 0.5 0.3] [--seeds 0 1 2] [--epochs 0]

Torch-Pruning (``pip install --no-deps torch-pruning==1.6.1``; without it its rows are left out, and the output says so)
gets its best importance (L2, LAMP, Taylor), chosen on images of the training set, global ranking, and BatchNorm
recalibration on the same images. Inner channels only: it cannot prune the streams of pad shortcuts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import numpy as np
import torch
from torch import nn

from compress.checkpoints import load_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import Split, load_dataset
from compress.evaluate import TorchRunner, evaluate
from compress.prune import Budget, prune
from compress.prune.recalibrate import recalibrate
from compress.resnet import build_model, tensors_of
from compress.train import TrainSettings, train
from rescompress.core.layers import total_macs, walk


def top1(checkpoint: Checkpoint, split: Split) -> float:
    """Return the accuracy in percent."""
    return 100 * evaluate(TorchRunner(build_model(checkpoint.spec, checkpoint.state_dict)), split).top1


def tuned(checkpoint: Checkpoint, dense: Checkpoint, split: Split, epochs: int, seed: int, *, distil: bool) -> Checkpoint:
    """Return the checkpoint after identical fine-tuning for everybody."""
    if not epochs:
        return checkpoint
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    teacher = build_model(dense.spec, dense.state_dict) if distil else None
    train(model, split, TrainSettings(epochs=epochs, seed=seed), teacher=teacher)
    return Checkpoint(checkpoint.spec, tensors_of(model))


def torch_pruning(dense: Checkpoint, fraction: float, importance: str, x: torch.Tensor, y: torch.Tensor) -> Checkpoint:
    """Return the dense network pruned by Torch-Pruning to at most `fraction` of its MACs, BatchNorm measured again."""
    import torch_pruning as tp

    goal = fraction * total_macs(walk(dense.spec))
    inner = {f"{b.name}.conv{i + 1}" for b in dense.spec.blocks for i in range(len(b.widths) - 1)}
    low, high, best = 0.0, 0.98, None
    for _ in range(12):
        ratio = (low + high) / 2
        model = build_model(dense.spec, dense.state_dict).requires_grad_(True)
        ignored = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and n not in inner]
        kinds = {"l2": tp.importance.GroupMagnitudeImportance, "lamp": tp.importance.LAMPImportance}
        score = tp.importance.GroupTaylorImportance() if importance == "taylor" else kinds[importance](p=2)
        pruner = tp.pruner.MetaPruner(
            model, x[:1], importance=score, global_pruning=True, pruning_ratio=ratio, ignored_layers=ignored
        )
        if importance == "taylor":
            nn.functional.cross_entropy(model(x), y).backward()
        pruner.step()
        changed = {
            b.name: b.model_copy(
                update={
                    "widths": tuple(model.get_submodule(f"{b.name}.conv{i + 1}").out_channels for i in range(len(b.widths)))
                }
            )
            for b in dense.spec.blocks
        }
        spec = dense.spec.replace_blocks(copy.copy(changed))
        macs = total_macs(walk(spec))
        if macs <= goal:
            best, high = Checkpoint(spec, tensors_of(model)), ratio
        else:
            low = ratio
    assert best is not None
    return recalibrate(best, x)


def main() -> None:
    """Print one row per fraction and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["reconstruct", "magnitude"])
    parser.add_argument("--calib", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--distil", action="store_true")
    args = parser.parse_args()
    dense = load_checkpoint(args.checkpoint)
    data = load_dataset(args.data, dense.spec)
    val = data.val
    held = data.train.take(len(data.train), 0).subset(np.arange(2000))
    rest = data.train.take(len(data.train), 0).subset(np.arange(2000, len(data.train)))
    print(f"{dense.spec.arch}: dense {top1(dense, val):.2f} on {len(val)} images; {args.epochs} epochs of fine-tuning")
    try:
        import torch_pruning

        print("Torch-Pruning: MetaPruner, global ranking, inner channels, best of l2/lamp/taylor, BatchNorm recalibrated")
        names = [*args.methods, "torch-pruning"]
    except ImportError:
        print("Torch-Pruning is not installed: pip install --no-deps torch-pruning==1.6.1")
        names = list(args.methods)
    for fraction in args.macs:
        for name in names:
            figures, seconds, reached, chosen = [], [], [], ""
            for seed in args.seeds:
                calibration = rest.take(args.calib, seed)
                x, y = calibration.tensor(), torch.from_numpy(calibration.labels)
                start = time.perf_counter()
                if name == "torch-pruning":
                    tried = {i: torch_pruning(dense, fraction, i, x, y) for i in ("l2", "lamp", "taylor")}
                    chosen = max(tried, key=lambda i: top1(tried[i], held))
                    pruned = tried[chosen]
                else:
                    budget = Budget(kind="macs", value=fraction)
                    pruned = prune(dense, method=name, budget=budget, align=1, calibration_x=x, seed=seed).checkpoint
                seconds.append(time.perf_counter() - start)
                reached.append(total_macs(walk(pruned.spec)) / total_macs(walk(dense.spec)))
                figures.append(top1(tuned(pruned, dense, rest, args.epochs, seed, distil=args.distil), val))
            spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
            print(
                f"macs {fraction:.2f} (reached {statistics.mean(reached):.4f})  {name:14s} {statistics.mean(figures):6.2f} "
                f"+- {spread:.2f}  {statistics.mean(seconds):6.1f} s  {chosen}",
                flush=True,
            )


if __name__ == "__main__":
    main()
