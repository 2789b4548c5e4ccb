"""How many of the ResNets that torchvision and timm know are read, proven, and can be pruned and exported.

Random weights, small inputs, `rc.from_module`; what is not read is named with the operation that is the reason::

    python benchmarks/zoo_coverage.py [--names PATTERN] [--side 64] [--all-steps] [--json FILE]

Names that differ in their weights alone (timm's tags behind a dot) count once. Without ``--all-steps`` a network is read and
proven; with it, it is also pruned to 0.7 of its MACs by magnitude and written as ONNX.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import rescompress as rc
from rescompress.core.errors import RescompressError

FAMILIES = (
    *(
        "resnet",
        "resnext",
        "wide_resnet",
        "seresnet",
        "seresnext",
        "ecaresnet",
        "resnetv2",
        "resnetaa",
        "resnetblur",
        "resnetrs",
    ),
    *("skresnet", "skresnext", "regnet"),
)


def names() -> Iterator[tuple[str, str]]:
    """Yield library and name of every network."""
    for name in torchvision.models.list_models(module=torchvision.models):
        if name.startswith(("resnet", "resnext", "wide_resnet", "regnet")):
            yield "torchvision", name
    for name in timm.list_models():
        if name.startswith(FAMILIES):
            yield "timm", name


def parameters(library: str, name: str) -> float:
    """Return how many parameters a network has, without the memory for them; where that fails, as its name suggests."""
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    try:
        with torch.device("meta"):
            return float(sum(p.numel() for p in make(name).parameters()))
    except (NotImplementedError, RuntimeError):  # an initialisation that computes
        sizes = [int(n) for n in re.findall(r"\d+", name)]
        return 1e9 if max(sizes, default=0) >= 160 else 0.0


def network(library: str, name: str) -> torch.nn.Module:
    """Return a network with random weights and statistics, on which nothing is zero or one by chance."""
    torch.manual_seed(0)
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    made = make(name, num_classes=10)
    for part in made.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            for key, value in part.state_dict().items():
                if value.is_floating_point():
                    value.copy_(torch.rand_like(value) * 0.5 + (0.75 if key in ("weight", "running_var") else -0.25))
    return made.eval()


def tried(library: str, name: str, side: int, *, all_steps: bool) -> dict[str, Any]:
    """Return how far a network comes."""
    start = time.perf_counter()
    row: dict[str, Any] = {"library": library, "name": name, "loaded": False, "pruned": None, "exported": None, "reason": ""}
    step = "loaded"
    try:
        made = network(library, name)
        row["params"] = sum(p.numel() for p in made.parameters())
        try:
            checkpoint = rc.from_module(made, torch.zeros(1, 3, side, side), arch=name)
        except RescompressError as e:
            if "does not run" not in str(e):
                raise
            checkpoint = rc.from_module(made, torch.zeros(1, 3, 224, 224), arch=name)
        row |= {"loaded": True, "blocks": len(checkpoint.network.blocks), "layers": len(checkpoint.network.layers)}
        if all_steps:
            step = "pruned"
            smaller = rc.prune(checkpoint, method="magnitude", budget=rc.Budget(kind="macs", value=0.7)).checkpoint
            row["pruned"] = True
            step = "exported"
            with tempfile.TemporaryDirectory() as folder:
                rc.export_onnx(smaller, Path(folder) / "net.onnx")
            row["exported"] = True
    except Exception as e:
        row |= {step: False, "reason": f"{'' if isinstance(e, RescompressError) else type(e).__name__ + ': '}{str(e)[:300]}"}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    """Try every network and print how many come through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default="*")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--most", type=float, default=120.0, help="millions of parameters; larger networks are left out")
    parser.add_argument("--all-steps", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, large = [], []
    for library, name in names():
        if not fnmatch.fnmatch(name, args.names):
            continue
        if parameters(library, name) > args.most * 1e6:
            large.append(name)
            continue
        rows.append(tried(library, name, args.side, all_steps=args.all_steps))
        row = rows[-1]
        done = "".join(letter if row[key] else "-" for letter, key in zip("lpe", ("loaded", "pruned", "exported"), strict=True))
        print(f"{done} {row['seconds']:6.1f}s {library:11} {name:40} {row['reason']}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    for step in ("loaded", *(("pruned", "exported") if args.all_steps else ())):
        good = sum(bool(r[step]) for r in rows)
        print(f"{step}: {good} of {len(rows)} ({100 * good / max(len(rows), 1):.1f} %)")
    print("left out as too large:", ", ".join(large) or "none")
    for reason, count in Counter(r["reason"].split("(")[0][:120] for r in rows if r["reason"]).most_common():
        print(f"{count:4}  {reason}")
    sys.exit(0 if sum(r["loaded"] for r in rows) >= 0.85 * len(rows) else 1)


if __name__ == "__main__":
    main()
