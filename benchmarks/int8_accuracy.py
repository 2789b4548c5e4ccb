"""What INT8 costs in accuracy, over several seeds: calibrated and trained, of the dense network and of its pruned half.

    python benchmarks/int8_accuracy.py OUT --data CIFAR10 CHECKPOINT... [--seeds 0 1 2] [--cells N]

Per network and seed: ``ptq`` calibrates the dense network; ``qat`` trains that for a fraction of an epoch, distilled from
the float network; ``pruned`` removes half of the MACs (reconstruct) and fine-tunes; ``pruned-ptq`` and ``pruned-qat`` are
the same of that. The seed draws the calibration images, the order of training and the held-out images by which the trained
or the calibrated network is kept, as in the product. Everything is chosen on training images; figures are of ``val``.

Each cell is kept in OUT, so a run that was stopped goes on where it was; ``--cells`` does so many and stops.

A drop is in points, of an INT8 network below the float network it was made from, on the same images; its mean over the
seeds is compared with a limit. Its one-sided 95 % lower bound is taken over the images, each with its mean over the seeds,
since the seeds share the images; the bound of each single seed is Tango's (`rescompress.show.gate.tango`). The table says
whether the mean is within the limit, or only the bound: then the images do not show that the limit is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import Dataset, load_dataset
from compress.evaluate import TorchRunner, evaluate
from compress.prune import prune
from compress.quantize import best_of, fake_quant_model, finish_qat, on_grid, prepare_qat, ptq
from compress.resnet import build_model, tensors_of
from compress.train import train
from rescompress.core.artifact import write_text
from rescompress.core.outcomes import Outcomes
from rescompress.core.settings import TrainSettings
from rescompress.show.gate import tango

HELD_OUT = 0.04
CONFIDENCE = 0.95
CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Kind:
    """One kind of cell.

    Attributes:
        name: Of the cell.
        source: The cell whose network it starts from; None is the dense network.
        reference: The float network its drop is counted from.
        limit: On the mean drop, in points; None where none is set.
    """

    name: str
    source: str | None
    reference: str | None
    limit: float | None


KINDS = (
    Kind("ptq", None, None, 0.3),
    Kind("qat", "ptq", None, 0.1),
    Kind("pruned", None, None, None),
    Kind("pruned-ptq", "pruned", "pruned", None),
    Kind("pruned-qat", "pruned-ptq", "pruned", 0.3),
)


@dataclass(frozen=True)
class Settings:
    """How much is trained.

    Attributes:
        qat_epochs: Of quantization-aware training.
        qat_lr: Its learning rate.
        freeze_bn_after: Part of its steps after which BatchNorm keeps its statistics.
        finetune_epochs: Of the pruned network.
    """

    qat_epochs: float
    qat_lr: float
    freeze_bn_after: float
    finetune_epochs: float


class Cells:
    """The cells of one network, computed when they are asked for and kept in a folder."""

    def __init__(self, folder: Path, path: Path, data: Dataset, dense: Checkpoint, settings: Settings) -> None:
        self.folder, self.data, self.dense, self.settings = folder, data, dense, settings
        self.name = path.stem

    def file(self, kind: str, seed: int | None, suffix: str) -> Path:
        """Return the path of a cell's result."""
        return self.folder / f"{self.name}-{kind}{'' if seed is None else f'-{seed}'}.{suffix}"

    def done(self, kind: str, seed: int | None) -> bool:
        """Whether a cell is there."""
        return self.file(kind, seed, "json").is_file()

    def outcomes(self, kind: str | None, seed: int) -> Outcomes:
        """Return which images of ``val`` a cell's network gets right."""
        path = self.file("float", None, "json") if kind is None else self.file(kind, seed, "json")
        return Outcomes.model_validate(json.loads(path.read_text())["outcomes"])

    def note(self, kind: str, seed: int | None, checkpoint: Checkpoint, seconds: float, **facts: object) -> None:
        """Evaluate a network and keep it."""
        build = fake_quant_model if checkpoint.quantization is not None else network
        with torch.inference_mode():
            found = evaluate(TorchRunner(build(checkpoint)), self.data.val)
        save_checkpoint(checkpoint, self.file(kind, seed, "safetensors"))
        document = {"top1": found.top1, "seconds": seconds, **facts, "outcomes": found.outcomes.model_dump()}
        write_text(self.file(kind, seed, "json"), json.dumps(document) + "\n")
        print(
            f"{self.name} {kind} {seed if seed is not None else ''}: {100 * found.top1:.2f} ({seconds:.0f} s) {facts}",
            flush=True,
        )

    def compute(self, kind: Kind, seed: int) -> None:
        """Compute one cell; what it starts from must be there."""
        start = time.perf_counter()
        source = self.dense if kind.source is None else load_checkpoint(self.file(kind.source, seed, "safetensors"))
        rest, _ = self.data.train.part(HELD_OUT, seed)
        calibration = rest.take(CALIBRATION_IMAGES, seed)
        facts: dict[str, object] = {}
        if kind.name.endswith("ptq"):
            made = on_grid(ptq(source, [x for x, _ in calibration.batches(64)], profile="tensorrt"))
            facts["chosen"] = made.provenance["calibration"]["chosen"]  # type: ignore[index]
        elif kind.name.endswith("qat"):
            made, facts["kept"] = self.trained(source, seed)
        else:
            result = prune(source, calibration_x=calibration.tensor())
            model = network(result.checkpoint)
            settings = TrainSettings(epochs=self.settings.finetune_epochs, seed=seed, precision="bf16")
            train(model, rest, settings, teacher=network(self.dense))
            made = Checkpoint(result.checkpoint.spec, tensors_of(model))
            facts["macs"] = result.macs_after / result.macs_before
        self.note(kind.name, seed, made, time.perf_counter() - start, **facts)

    def trained(self, int8: Checkpoint, seed: int) -> tuple[Checkpoint, str]:
        """Return the better of the trained and the calibrated network, by held-out training images, as the product does."""
        rest, held = self.data.train.part(HELD_OUT, seed)
        model = prepare_qat(int8)
        settings = TrainSettings(
            epochs=self.settings.qat_epochs,
            lr=self.settings.qat_lr,
            freeze_bn_after=self.settings.freeze_bn_after,
            distill=1.0,
            seed=seed,
        )
        train(model, rest, settings, teacher=network(self.dense))
        qat = on_grid(finish_qat(model, int8))
        best = best_of([qat, int8], list(held.batches(250)))
        return best, "qat" if best is qat else "ptq"


def network(checkpoint: Checkpoint) -> torch.nn.Module:
    """Return the float network of a checkpoint."""
    return build_model(checkpoint.spec, checkpoint.state_dict)


def drop_of(reference: list[Outcomes], candidate: list[Outcomes]) -> dict[str, object]:
    """Return the mean drop in points and its bounds, from outcomes of the same images, one pair per seed."""
    pairs = [(np.array(r.unpack()), np.array(c.unpack())) for r, c in zip(reference, candidate, strict=True)]
    lost_SN = np.stack([r.astype(float) - c.astype(float) for r, c in pairs])
    per_image_N = lost_SN.mean(0)
    mean = float(per_image_N.mean())
    half = NormalDist().inv_cdf(CONFIDENCE) * float(per_image_N.std(ddof=1)) / math.sqrt(len(per_image_N))
    single = [tango.Paired(len(r), int((r & ~c).sum()), int((~r & c).sum())) for r, c in pairs]
    return {
        "drop": 100 * mean,
        "lower": 100 * (mean - half),
        "upper": 100 * (mean + half),
        "per_seed": [round(100 * p.drop, 3) for p in single],
        "per_seed_lower": [round(100 * tango.lower_bound(p, CONFIDENCE), 3) for p in single],
    }


def table(cells: list[Cells], seeds: list[int]) -> list[dict[str, Any]]:
    """Return a row per network and kind, of the seeds that are there."""
    rows: list[dict[str, Any]] = []
    for one in cells:
        for kind in KINDS:
            there = [s for s in seeds if one.done(kind.name, s)]
            if not there:
                continue
            own = [one.outcomes(kind.name, s) for s in there]
            reference = [one.outcomes(kind.reference, s) for s in there]
            row = {
                "network": one.name,
                "kind": kind.name,
                "seeds": there,
                "top1": statistics.mean(100 * o.correct / o.n for o in own),
                "reference_top1": statistics.mean(
                    100 * o.correct / o.n for o in [one.outcomes(kind.reference, s) for s in there]
                ),
                "limit": kind.limit,
                **drop_of(reference, own),
            }
            rows.append(row)
    return rows


def verdict(row: Mapping[str, Any]) -> str:
    """Return how a row stands to its limit."""
    if row["drop"] <= row["limit"]:
        return "met"
    return "bound within" if row["lower"] <= row["limit"] else "MISSED"


def main() -> None:
    """Compute what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--qat-epochs", type=float, default=0.25)
    parser.add_argument("--qat-lr", type=float, default=0.002)
    parser.add_argument("--freeze-bn-after", type=float, default=0.0)
    parser.add_argument("--finetune-epochs", type=float, default=0.5)
    parser.add_argument("--cells", type=int, default=10**6, help="compute at most so many, then stop")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(args.qat_epochs, args.qat_lr, args.freeze_bn_after, args.finetune_epochs)
    every: list[Cells] = []
    data: Dataset | None = None
    left = args.cells
    for path in args.checkpoints:
        dense = load_checkpoint(path)
        data = data or load_dataset(args.data, dense.spec)
        one = Cells(args.out, path, data, dense, settings)
        every.append(one)
        if not one.done("float", None):
            one.note("float", None, dense, 0.0)
        todo: list[tuple[Kind, int]] = [(k, s) for s in args.seeds for k in KINDS if not one.done(k.name, s)]
        for kind, seed in todo[:left]:
            one.compute(kind, seed)
        left -= min(left, len(todo))
    rows = table(every, args.seeds)
    document = {"settings": vars(settings), "images": len(data.val) if data else 0, "rows": rows, "cells_left": left == 0}
    write_text(args.out / "table.json", json.dumps(document, indent=1) + "\n")
    print(f"{'network':<22}{'kind':<12}{'seeds':>6}{'top-1':>8}{'float':>8}{'drop':>8}{'95 % lower':>12}{'limit':>7}")
    for r in rows:
        limit = "" if r["limit"] is None else f"{r['limit']:.1f} {verdict(r)}"
        print(
            f"{r['network']:<22}{r['kind']:<12}{len(r['seeds']):>6}{r['top1']:>8.2f}{r['reference_top1']:>8.2f}"
            f"{r['drop']:>8.3f}{r['lower']:>12.3f}  {limit:<18}{r['per_seed']}"
        )


if __name__ == "__main__":
    main()
