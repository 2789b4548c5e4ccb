"""What one step of quantization-aware training costs beside one float step, in one run with NNCF and ModelOpt.

ResNet-32 for 32x32 images, batch 128, cross-entropy, SGD; random images, since the arithmetic does not depend on them.
The variants take turns, and each ratio is the median over the rounds of this round's step by this round's float step, so
that a machine that slows down for a while does not favour one of them.

    python benchmarks/qat_step.py [--rounds 7] [--threads 2] [--json]

NNCF trains on its own hooks, as `nncf.quantize` leaves them; ModelOpt (PyPI: nvidia-modelopt) is left out where it is not
installed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress import zoo
from compress.checkpoints.base import Checkpoint
from compress.quantize import prepare_qat, ptq
from compress.resnet import build_model, tensors_of
from rescompress.core.settings import QuantizeSettings

LIMIT = 1.6


def with_nncf(checkpoint: Checkpoint, batches: list[Tensor]) -> nn.Module:
    """Return NNCF's quantized network, which trains through its hooks."""
    from compress.quantize import nncf_ptq

    return nncf_ptq.quantize(build_model(checkpoint.spec, checkpoint.state_dict), batches).train()


def with_modelopt(checkpoint: Checkpoint, batches: list[Tensor]) -> nn.Module:
    """Return ModelOpt's quantized network: INT8, per-channel weights, max calibration, its default placement."""
    import modelopt.torch.quantization as mtq

    model = build_model(checkpoint.spec, checkpoint.state_dict)
    quantized: nn.Module = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda m: [m(x) for x in batches])
    return quantized.train()


def stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    """Return a function that makes one training step and returns its seconds."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--skip", action="append", default=[], metavar="VARIANT", help="leave a variant out; repeatable")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # NNCF compiles its kernels once; on a busy machine, slowly
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    spec = zoo.spec("resnet32")
    checkpoint = Checkpoint(spec, tensors_of(build_model(spec)))
    batches = [torch.randn(32, *spec.input_shape) for _ in range(2)]
    quantized = ptq(checkpoint, batches, QuantizeSettings(calibration="max"))
    variants: dict[str, Callable[[], nn.Module]] = {
        "float32": lambda: build_model(spec, checkpoint.state_dict).train(),
        "rescompress": lambda: prepare_qat(quantized),
        "rescompress, learnable scales": lambda: prepare_qat(quantized, learnable_scales=True),
        "NNCF hooks": lambda: with_nncf(checkpoint, batches),
        "ModelOpt": lambda: with_modelopt(checkpoint, batches),
    }
    x, y = torch.randn(args.batch, *spec.input_shape), torch.randint(0, 10, (args.batch,))
    steps: dict[str, Callable[[], float]] = {}
    absent: dict[str, str] = {}
    for name, make in variants.items():
        if name in args.skip:
            absent[name] = "skipped"
            continue
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                start = time.perf_counter()
                steps[name] = stepper(make(), x, y)
                steps[name]()  # warm up: kernels are chosen, and NNCF compiles its own
                ready, second = time.perf_counter() - start, steps[name]()
            print(f"{name}: ready in {ready:.0f} s, a step {second:.2f} s", file=sys.stderr, flush=True)
        except ImportError as e:
            absent[name] = f"not installed: {e}"
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(args.rounds):
        for name, step in steps.items():
            seconds[name].append(step())
        print(f"round {done + 1} of {args.rounds}", file=sys.stderr, flush=True)
    rows = []
    for name, times in seconds.items():
        ratios = [t / f for t, f in zip(times, seconds["float32"], strict=True)]
        rows.append({"variant": name, "median_s": statistics.median(times), "ratio": statistics.median(ratios)})
    document = {
        "rows": rows,
        "absent": absent,
        "limit": LIMIT,
        "rounds": args.rounds,
        "threads": args.threads,
        "batch": args.batch,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    if args.json:
        print(json.dumps(document, indent=2))
        return
    print(f"ResNet-32, batch {args.batch}, {args.threads} threads, {args.rounds} rounds, torch {torch.__version__}")
    print(f"{'variant':<32}{'step, s':>10}{'x float':>10}")
    for row in rows:
        print(f"{row['variant']:<32}{row['median_s']:>10.3f}{row['ratio']:>10.2f}")
    for name, why in absent.items():
        print(f"{name:<32}{why}")


if __name__ == "__main__":
    main()
