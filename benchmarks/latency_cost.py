"""How long a call of the cost function takes, which a search over widths makes a million times.

    python benchmarks/latency_cost.py [calls]

Prints the shortest and the median time of a call per network, in ms, on one thread.
"""

from __future__ import annotations

import statistics
import sys
import time

from compress.zoo import spec
from edge_targets.catalog import DEFAULT_JETSON, load_device
from edge_targets.latency import cost_function
from rescompress.core.layers import walk


def main() -> None:
    """Measure and print."""
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    cost = cost_function(load_device(DEFAULT_JETSON), precision="int8")
    for arch in ("resnet20", "resnet18", "resnet50", "resnet152"):
        layers = walk(spec(arch))
        taken = []
        for _ in range(calls):
            start = time.perf_counter()
            cost(layers)
            taken.append((time.perf_counter() - start) * 1e3)
        print(f"{arch:10} {len(layers):4d} layers  shortest {min(taken):.3f} ms  median {statistics.median(taken):.3f} ms")


if __name__ == "__main__":
    main()
