"""How many of the ResNets that torchvision and timm know are read, proven, pruned and exported with parity.

Random weights, small inputs, `rc.from_module`; what is not read is named with the operation that is the reason::

    python benchmarks/zoo_coverage.py --rows rows.jsonl [--names PATTERN] [--seconds 150] [--most 120] [--table]

Names that differ in their weights alone (timm's tags behind a dot) count once. Each row is appended to the file as it is
found, and names that are in the file are not tried again: a run that was stopped goes on where it ended. Exit code 0 means that
every name has its row, 3 that the time was up before.

* loaded: read, and its outputs proven against the module's own on random images, 64 pixels high and wide or the network's own
  size where it takes no other;
* pruned: to at most 0.7 of the MACs by magnitude;
* exported: the pruned network as ONNX, its outputs in onnxruntime within 1e-4 of the largest number of torch's.
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

import onnx
import timm
import torch
import torchvision
from torch import Tensor

import rescompress as rc
from compress.importers.proof import difference, random_images
from compress.resnet import build_model
from export.parity import OrtRunner
from rescompress.core.errors import RescompressError

FAMILIES = (
    *("resnetaa", "resnetblur", "resnetrs", "resnetv2", "resnet", "resnext", "wide_resnet"),
    *("seresnext", "seresnet", "ecaresnext", "ecaresnet", "skresnext", "skresnet", "regnet"),
)
SIDE = 64
BUDGET = 0.7
TOLERANCE = 1e-4
STEPS = ("loaded", "pruned", "exported")


def names() -> Iterator[tuple[str, str]]:
    """Yield library and name of every network."""
    for name in torchvision.models.list_models(module=torchvision.models):
        if name.startswith(FAMILIES):
            yield "torchvision", name
    for name in timm.list_models():
        if name.startswith(FAMILIES):
            yield "timm", name


def family(name: str) -> str:
    """Return the family that a name begins with."""
    return next(f for f in FAMILIES if name.startswith(f))


def parameters(library: str, name: str) -> float:
    """Return how many parameters a network has, without the memory for them."""
    if library == "torchvision":
        return float(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])
    with torch.device("meta"):
        return float(sum(p.numel() for p in timm.create_model(name).parameters()))


def network(library: str, name: str) -> tuple[torch.nn.Module, int]:
    """Return a network with random weights, on which nothing is zero or one by chance, and the height of its images.

    The statistics are those of random images: with others a gate of a deep network sees numbers so large that single bits
    decide whether it opens, and no two programs agree.
    """
    torch.manual_seed(0)
    made = timm.create_model(name, num_classes=10) if library == "timm" else torchvision.models.get_model(name, num_classes=10)
    for part in made.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = None  # the statistics of all images seen, not those of the first ones
            for key, value in part.state_dict().items():
                if key in ("weight", "bias"):
                    value.copy_(torch.rand_like(value) * 0.5 + (0.75 if key == "weight" else -0.25))
    own = int(made.pretrained_cfg["input_size"][-1]) if library == "timm" else 224
    with torch.no_grad():
        try:
            made.train()(torch.randn(2, 3, SIDE, SIDE))
            return made.eval(), SIDE
        except (RuntimeError, ValueError, AssertionError):  # too small for it
            made.train()(torch.randn(2, 3, own, own))
            return made.eval(), own


def loaded(library: str, name: str) -> Any:
    """Return a network as a checkpoint, for small images where it takes them."""
    module, side = network(library, name)
    return rc.from_module(module, torch.zeros(1, 3, side, side), arch=name)


def parity(checkpoint: Any) -> float:
    """Return how far the outputs of a checkpoint's ONNX file are from torch's, relative to the largest number."""
    x_NCHW = random_images(checkpoint.network.input_shape, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = rc.export_onnx(checkpoint, Path(folder) / "net.onnx")
        with OrtRunner(onnx.load(path), optimize=False) as runner:
            found = runner.outputs(x_NCHW.numpy())
    with torch.no_grad():
        wanted: tuple[Tensor, ...] = build_model(checkpoint.network, checkpoint.state_dict).outputs(x_NCHW)
    return max(difference(torch.from_numpy(a), b) for a, b in zip(found, wanted, strict=True))


def tried(library: str, name: str) -> dict[str, Any]:
    """Return how far a network comes."""
    start = time.perf_counter()
    row: dict[str, Any] = {"library": library, "name": name, **dict.fromkeys(STEPS, False), "reason": ""}
    try:
        checkpoint = loaded(library, name)
        dense = checkpoint.network
        row |= {"loaded": True, "side": dense.input_shape[1], "blocks": len(dense.blocks), "seconds_loaded": _since(start)}
        smaller = rc.prune(checkpoint, method="magnitude", budget=rc.Budget(kind="macs", value=BUDGET)).checkpoint
        kept = sum(layer.macs for layer in smaller.network.layers) / sum(layer.macs for layer in dense.layers)
        row |= {"pruned": kept <= BUDGET, "macs": round(kept, 4)}
        off = parity(smaller)
        row |= {"exported": off <= TOLERANCE, "off": float(f"{off:.2g}")}
    except Exception as e:
        row["reason"] = f"{'' if isinstance(e, RescompressError) else type(e).__name__ + ': '}{str(e)[:300]}"
    return row | {"seconds": _since(start)}


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 1)


def refusal(row: dict[str, Any]) -> str:
    """Return the operation that is the reason, and why; else the whole reason."""
    reason = str(row["reason"])
    found = re.search(r"not known here: (.*?)(?: in \S+)? \(reads .*?\): (.*)", reason)
    return (
        f"{found[1]}: {found[2]}" if found else reason.removeprefix("the network computes something that is not known here: ")
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return the counts by family as a Markdown table."""
    lines = ["| family | names | load | prune | export | too large | refused |", "|---|---|---|---|---|---|---|"]
    found = {f: [r for r in rows if family(r["name"]) == f] for f in sorted(FAMILIES)}
    for title, group in {**found, "all": rows}.items():
        if not group:
            continue
        small = [r for r in group if not r.get("large")]
        counts = [sum(bool(r[step]) for r in small) for step in STEPS]
        reasons = Counter(refusal(r) for r in small if r["reason"]) if title != "all" else {}
        told = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        numbers = " | ".join(str(n) for n in (len(small), *counts, len(group) - len(small)))
        lines.append(f"| {title} | {numbers} | {told} |")
    return "\n".join(lines)


def main() -> None:
    """Try every network that has no row yet, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines: one for each name")
    parser.add_argument("--names", default="*")
    parser.add_argument("--most", type=float, default=120.0, help="millions of parameters; larger networks count apart")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no network after so many")
    parser.add_argument("--table", action="store_true", help="print the table of the rows that there are, and try nothing")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    if args.table:
        print(table(rows))
        return
    start, have = time.perf_counter(), {(r["library"], r["name"]) for r in rows}
    with args.rows.open("a") as out:
        for library, name in names():
            if not fnmatch.fnmatch(name, args.names) or (library, name) in have:
                continue
            if _since(start) > args.seconds:
                sys.exit(3)
            size = parameters(library, name)
            large = {"library": library, "name": name, "large": True, **dict.fromkeys(STEPS), "reason": ""}
            row = (large if size > args.most * 1e6 else tried(library, name)) | {"params": size}
            out.write(json.dumps(row) + "\n")
            out.flush()
            done = "".join(letter if row[key] else "-" for letter, key in zip("lpe", STEPS, strict=True))
            print(f"{done} {row.get('seconds', 0):6.1f}s {library:11} {name:30} {row['reason']}", flush=True)


if __name__ == "__main__":
    main()
