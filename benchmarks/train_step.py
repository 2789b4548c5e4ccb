"""Steps a second of a training on photographs beside a bare PyTorch loop, and the share of the time that waits for data.

    python benchmarks/train_step.py CKPT --data imagenette --input 3x128x128 [--workers 1] [--threads 1] [--precision bf16]

The bare loop has its images in memory, prepared: nothing but forward, backward and the optimizer. Both take turns, and medians
of the steps are compared, so that what else the machine does meets them alike; time of processors hardly depends on it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch
from torch.nn import functional as F

from compress.checkpoints import load_checkpoint
from compress.checkpoints.options import parse_shape
from compress.data import load_dataset
from compress.data.loader import Batches
from compress.pixels import normalise
from compress.resnet import build_model
from compress.train import TrainState, train
from rescompress.core.settings import TrainSettings


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--input", default="3x128x128")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12, help="of each in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense = load_checkpoint(args.checkpoint, input_shape=parse_shape(args.input))
    split = load_dataset(args.data, dense.spec).train
    settings = TrainSettings(
        epochs=args.steps / (len(split) // args.batch), batch_size=args.batch, augment="photo", precision=args.precision,
        workers=args.workers, teacher=None, device="cpu", seed=0, cache_gib=0.0,
    )  # fmt: skip
    layout = torch.channels_last if args.precision == "bf16" else torch.contiguous_format
    batches = Batches(split, settings.preset(dense.spec.input_shape[1], normalised=True), args.batch)
    ready = [(normalise(x, split.preprocessing, layout), y) for x, y in map(batches.read, range(2))]
    ours: list[float] = []
    bare: list[float] = []
    ours_cpu: list[float] = []
    bare_cpu: list[float] = []
    waiting = []
    for _ in range(args.rounds):
        stamps: list[float] = []
        waited: list[float] = []
        used: list[float] = []

        def watch(
            state: TrainState, stamps: list[float] = stamps, waited: list[float] = waited, used: list[float] = used
        ) -> None:
            stamps.append(time.perf_counter())
            used.append(time.process_time())
            waited.append(state.waited_s)

        log = train(build_model(dense.spec, dense.state_dict), split, settings, progress=watch)
        ours += [b - a for a, b in itertools.pairwise(stamps[1:])]  # the first steps start the processes
        ours_cpu += [b - a for a, b in itertools.pairwise(used[1:])]
        spent = stamps[-1] - stamps[1]
        waiting.append((log.waited_s - waited[1]) / spent)
        model = build_model(dense.spec, dense.state_dict).train().to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
        for step in range(args.steps):
            began, busy = time.perf_counter(), time.process_time()
            x, y = ready[step % 2]
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            if step > 1:
                bare.append(time.perf_counter() - began)
                bare_cpu.append(time.process_time() - busy)
    a, b = statistics.median(ours), statistics.median(bare)
    about = f"{args.batch} images a step, {args.precision}; {args.threads} threads, {args.workers} workers"
    print(f"{dense.spec.arch}, {args.input}, {about}")
    c, d = statistics.median(ours_cpu), statistics.median(bare_cpu)
    print(f"seconds of processors a step in the training process: ours {c:.3f}, bare {d:.3f}: {d / c:.3f} of it")
    print(f"ours {1 / a:.3f} steps/s, bare {1 / b:.3f}: {b / a:.3f} of it; waiting for data {[f'{w:.3f}' for w in waiting]}")


if __name__ == "__main__":
    main()
