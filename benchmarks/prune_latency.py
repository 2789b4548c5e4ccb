"""What a latency budget is worth, and what a MACs budget is worth in measured time: ResNet-50 at 224, random weights.

    python benchmarks/prune_latency.py predicted [--target jetson-orin-nano-8gb-super] [--latency 0.6] [--images 128]
    python benchmarks/prune_latency.py measured [--macs 0.5] [--threads 2]

``predicted``: error curves are measured once; then the plan of least summed error within the latency budget is set beside
the best plan that a MACs budget can buy at the same predicted latency, without and with leave to drop blocks.
``measured``: dense and pruned network run in OpenVINO on this processor in float32, in rounds that alternate.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from prune_cost import images, settled

from compress.prune import Budget, Choice, Scope, apply, choose, measure, prune
from compress.prune.groups import droppable
from edge_targets.backends import openvino
from edge_targets.benchmark import Candidate, Effort, measure_processes
from edge_targets.catalog import load_target
from edge_targets.latency import cost_function
from export.to_onnx import ExportOptions
from rescompress.core.errors import BudgetError
from rescompress.core.layers import total_macs, walk
from rescompress.core.settings import PruneSettings
from rescompress.runs.stages.shared import onnx_of, write_onnx


def predicted(args: argparse.Namespace) -> None:
    """Print what each kind of budget leaves at one predicted latency."""
    target = load_target(args.target)
    x = images(args.images, (3, 224, 224))
    dense = settled(args.arch, x)
    layers = walk(dense.spec)
    cost = cost_function(target.device, precision=target.check_precision())
    align = target.align()
    print(
        f"{args.arch} for {target.name} ({target.check_precision()}), widths in multiples of {align}: "
        f"{cost(layers):.3f} ms predicted; curves from {args.images} images"
    )
    print(f"{'scope':6} {'blocks':7} {'budget':14} {'latency':>8} {'MACs':>6} {'error':>8} {'dropped':>8}")
    for scope in args.scopes:
        curves = measure(dense, scope=scope, calibration_x=x)
        for drop in ((), tuple(droppable(dense.spec))):

            def plan(kind: str, value: float, scope: Scope = scope, drop: tuple[str, ...] = drop, curves=curves) -> Choice:  # type: ignore[no-untyped-def]
                budget = Budget.model_validate({"kind": kind, "value": value})
                chosen = cost if kind == "latency" else None
                return choose(dense.spec, curves, budget=budget, scope=scope, align=align, drop=drop, cost=chosen)

            def latency(choice: Choice) -> float:
                return cost(walk(apply(dense, choice.plan).spec)) / cost(layers)

            def show(choice: Choice, words: str, scope: Scope = scope, drop: tuple[str, ...] = drop) -> None:
                macs = total_macs(walk(apply(dense, choice.plan).spec)) / total_macs(layers)
                print(
                    f"{scope:6} {'may go' if drop else 'stay':7} {words:14} {latency(choice):8.4f} {macs:6.3f} "
                    f"{choice.error:8.4f} {len(choice.plan.dropped_blocks):8d}",
                    flush=True,
                )

            try:
                by_latency = plan("latency", args.latency)
            except BudgetError as e:
                print(f"{scope:6} {'may go' if drop else 'stay':7} {e}", flush=True)
                continue
            show(by_latency, f"latency {args.latency:g}")
            allowed = latency(by_latency)
            low, high, best = 0.0, 1.0, None
            for _ in range(14):
                value = (low + high) / 2
                try:
                    found = plan("macs", value)
                except BudgetError:  # fewer than can be reached
                    low = value
                    continue
                if latency(found) <= allowed * 1.0005:
                    low, best = value, found if best is None or found.error < best.error else best
                else:
                    high = value
            if best is None:
                print(f"{scope:6} {'may go' if drop else 'stay':7} no MACs budget is predicted to be that quick")
            else:
                show(best, "MACs")


def measured(args: argparse.Namespace) -> None:
    """Print measured milliseconds of the dense and the pruned network."""
    target = load_target("cpu")
    align = target.align()  # what --align auto takes
    x = images(args.images, (3, 224, 224))
    dense = settled(args.arch, x)
    half = prune(dense, PruneSettings(macs=args.macs), multiple=align, calibration_x=x)
    print(f"{args.arch}: {half.macs_after / half.macs_before:.4f} of the MACs, widths in multiples of {align}")
    with tempfile.TemporaryDirectory() as folder:
        candidates = []
        for name, checkpoint in (("dense", dense), ("pruned", half.checkpoint)):
            path = Path(folder) / f"{name}.onnx"
            write_onnx(onnx_of(checkpoint, ExportOptions()), path)
            built = openvino.build(path, Path(folder), target=target, precision="fp32")
            candidates.append(Candidate(built.path, "openvino", (3, 224, 224), threads=args.threads, precision="fp32"))
        found = [m.metrics for m in measure_processes(candidates, effort=Effort(seconds=args.seconds, rounds=7))]
    for name, metrics in zip(("dense", "pruned"), found, strict=True):
        p50 = metrics["p50_ms"]
        print(f"{name:7} {p50.value:7.2f} ms (p50, {args.threads} threads, batch 1; {p50.low} to {p50.high})")
    print(f"{found[0]['p50_ms'].value / found[1]['p50_ms'].value:.2f} times faster")


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["predicted", "measured"])
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--target", default="jetson-orin-nano-8gb-super")
    parser.add_argument("--latency", type=float, default=0.6)
    parser.add_argument("--scopes", nargs="+", choices=["inner", "all"], default=["inner", "all"])
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    {"predicted": predicted, "measured": measured}[args.what](args)


if __name__ == "__main__":
    main()
