"""What each stage needs in memory, and how that grows with the number of images: no stage may list a split.

    python benchmarks/memory.py [--images 2000 50000] [--side 96] [--input 3x64x64]

JPEGs of noise are made in a temporary folder, ten classes with `train` and `val`; a ResNet-18 with random weights goes through
the commands on them as a user would call them. Every row is a process of its own, so the peak is its own: what Python, torch
and the calibration images take is in it. What grows from one column to the next is what an image costs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from compress.checkpoints import save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.checkpoints.options import parse_shape
from compress.resnet import build_model, tensors_of
from compress.zoo import spec as spec_of

CLASSES = 10
EVALUATED = 200
"""Of `val`, whatever the training images are: fewer than a batch would make it smaller."""
STEPS = 4
"""Of training: memory does not grow with more."""


def pictures(folder: Path, n: int, side: int) -> None:
    """Make `n` training images, and some for evaluation, every one another."""
    for split, count in (("train", n), ("val", EVALUATED)):
        rng = np.random.default_rng(0 if split == "train" else 1)
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
            image.save(folder / split / f"class{i % CLASSES}" / f"{i:06}.jpg", quality=80)


def peak(words: list[str], folder: Path) -> tuple[float, float]:
    """Return the peak memory of a command in MiB, of its largest process, and its seconds.

    Raises:
        SystemExit: The command failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "rescompress", *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}\n{said[-2000:]}")
    return used.ru_maxrss / 1024, time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 50_000])
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--input", default="3x64x64")
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    for n in args.images:
        with tempfile.TemporaryDirectory(prefix="rescompress-memory-") as temporary:
            folder = Path(temporary)
            start = time.perf_counter()
            pictures(folder / "data", n, args.side)
            print(f"{n} images made in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            spec = spec_of("resnet18", num_classes=CLASSES, input_shape=parse_shape(args.input))
            save_checkpoint(Checkpoint(spec, tensors_of(build_model(spec))), folder / "dense.safetensors")
            data = ["--data", "data"]
            training = ["--epochs", str(STEPS * 32 / n), "--train-batch", "32"]
            dense, pruned, tuned = "dense.safetensors", "pruned.safetensors", "tuned.safetensors"
            rows = {
                "prune, 256 images": ["prune", dense, *data, "--macs", "0.5", "--calib", "256", "-o", pruned],
                "finetune": ["finetune", pruned, *data, *training, "-o", tuned],
                "finetune, a part held out": ["finetune", pruned, *data, *training, "--hold-out", "0.02"],
                "quantize, calibrated": ["quantize", tuned, *data, "--calib", "256"],
                "quantize, trained": ["quantize", tuned, *data, "--mode", "qat", *training, "-o", "int8.safetensors"],
                "export for onnxruntime": ["export", "int8.safetensors", *data, "--target", "cpu-ort", "-o", "out"],
                "evaluate, the training split": ["evaluate", dense, *data, "--split", "train"],
            }
            for name, words in rows.items():
                found.setdefault(name, []).append(peak(words, folder))
                print(
                    f"{name}, {n} images: {found[name][-1][0]:.0f} MiB, {found[name][-1][1]:.0f} s", file=sys.stderr, flush=True
                )
    print(f"{'peak memory, MiB':30}" + "".join(f"{n:>12}" for n in args.images) + f"{'bytes an image':>18}")
    for name, values in found.items():
        more = (values[-1][0] - values[0][0]) * 2**20 / max(args.images[-1] - args.images[0], 1)
        print(f"{name:30}" + "".join(f"{mib:12.0f}" for mib, _ in values) + f"{more:18.0f}")


if __name__ == "__main__":
    main()
