"""What pruning costs: seconds and peak memory, per network and method, at ImageNet size.

    python benchmarks/prune_cost.py [resnet50 resnet152] [--methods reconstruct magnitude] [--images 512] [--macs 0.5]

Weights are random (the arithmetic does not depend on them) with BatchNorm statistics measured on the images; images are
smooth noise. Every row is a process of its own, so the peak is its own; what torch and the images take is in it.
Torch-Pruning, where it is installed, does magnitude pruning of the same channels at one ratio, and so does ours beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from compress.checkpoints.base import Checkpoint
from compress.prune import Budget, prune
from compress.prune.recalibrate import recalibrate
from compress.resnet import build_model, tensors_of
from compress.zoo import spec as spec_of
from rescompress.core.settings import PruneSettings

RATIO = 0.3


def images(n: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Return smooth random images (N, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = shape
    out = torch.empty(n, channels, height, width)
    for i in range(n):
        coarse = torch.randn(1, channels, height // 16, width // 16, generator=generator)
        out[i] = nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return out


def settled(arch: str, x: torch.Tensor) -> Checkpoint:
    """Return the network with random weights and the BatchNorm statistics of the images."""
    torch.manual_seed(0)
    spec = spec_of(arch)
    return recalibrate(Checkpoint(spec, tensors_of(build_model(spec))), x[:16], batch_size=16)


def peer_seconds(dense: Checkpoint, x: torch.Tensor) -> float:
    """Return how long Torch-Pruning takes to take `RATIO` of the inner channels, by magnitude."""
    import torch_pruning as tp

    start = time.perf_counter()
    model = build_model(dense.spec, dense.state_dict)
    inner = {f"{b.name}.conv{i}" for b in dense.spec.blocks for i in range(1, len(b.widths))}
    ignored = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and n not in inner]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(model, x[:1], importance=importance, pruning_ratio=RATIO, ignored_layers=ignored).step()
    tensors_of(model)
    return time.perf_counter() - start


def row(arch: str, method: str, budget: Budget, n: int, repeats: int) -> dict[str, object]:
    """Prune in this process, and say what it took."""
    needs = method not in ("magnitude", "torch-pruning")
    x = images(n if needs else 16, spec_of(arch).input_shape)
    dense = settled(arch, x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    used = time.process_time()
    if method == "torch-pruning":
        seconds = [peer_seconds(dense, x) for _ in range(repeats)]
    else:
        calibration = x if needs else None
        seconds = [
            prune(
                dense, PruneSettings(method=method).model_copy(update={budget.kind: budget.value}), calibration_x=calibration
            ).seconds
            for _ in range(repeats)
        ]
    used = (time.process_time() - used) / repeats
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": statistics.median(seconds), "cpu_s": used, "peak_gib": peak, "before_gib": before}


def main() -> None:
    """Print one row per network, method and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", nargs="*", default=["resnet50"])
    parser.add_argument("--methods", nargs="+", default=["reconstruct", "magnitude", "torch-pruning"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3, help="of the quick methods; the median counts")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ratio", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        budget = Budget(kind="ratio", value=RATIO) if args.ratio else Budget(kind="macs", value=args.macs)
        print(json.dumps(row(args.arch[0], args.methods[0], budget, args.images, args.repeats)))
        return
    print(f"{torch.get_num_threads()} threads, {args.images} images at the network's own size")
    print(f"{'network':10} {'method':14} {'budget':10} {'seconds':>8} {'CPU s':>7} {'peak GiB':>9}")
    for arch in args.arch:
        for method in args.methods:
            quick = method in ("magnitude", "torch-pruning")
            for ratio in [False, True] if method == "magnitude" else [quick]:
                command = [sys.executable, __file__, arch, "--row", "--methods", method, "--images", str(args.images)]
                command += ["--macs", str(args.macs), "--repeats", str(args.repeats if quick else 1)]
                done = subprocess.run([*command, *(["--ratio"] if ratio else [])], capture_output=True, text=True)
                if done.returncode:
                    print(f"{arch:10} {method:14} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                    continue
                found = json.loads(done.stdout)
                budget_text = f"ratio {RATIO:g}" if ratio else f"macs {args.macs:g}"
                figures = f"{found['seconds']:8.2f} {found['cpu_s']:7.1f} {found['peak_gib']:9.2f}"
                print(f"{arch:10} {method:14} {budget_text:10} {figures}", flush=True)


if __name__ == "__main__":
    main()
