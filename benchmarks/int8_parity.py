"""How equal an INT8 network is to its file: torch, onnxruntime and OpenVINO on the same images, in two kinds of arithmetic.

    python benchmarks/int8_parity.py --data IMAGES CHECKPOINT... [--images 5000] [--calib 256] [--json FILE]

Each checkpoint is calibrated for all three profiles (a quantized one is taken as it is). Rows: the file as onnxruntime and
OpenVINO run it, against fake quantization and against exact sums of integers; and the file rewritten into exact sums, in
onnxruntime, against torch's. Differences are means over all logits, in 1/255 of the logit range.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from compress.checkpoints import load_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.data import Split, load_dataset
from compress.evaluate import TorchRunner
from compress.quantize import fake_quant_model, integer_model, on_grid, ptq
from edge_targets.backends import openvino
from export.integers import in_integers
from export.parity import OrtRunner, compare_logits
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.quantizers import PROFILES
from rescompress.core.runner import Runner
from rescompress.core.settings import QuantizeSettings

PAIRS = (
    ("fake quantization", "onnxruntime"),
    ("fake quantization", "OpenVINO"),
    ("exact sums", "onnxruntime"),
    ("exact sums", "OpenVINO"),
    ("exact sums", "onnxruntime, exact sums"),
    ("exact sums", "fake quantization"),
)


def rows_of(name: str, checkpoint: Checkpoint, split: Split) -> list[dict[str, object]]:
    """Return a row per pair for one quantized checkpoint."""
    assert checkpoint.quantization is not None
    tensors = {k: v.numpy() for k, v in checkpoint.state_dict.items()}
    model = to_onnx(checkpoint.spec, tensors, checkpoint.quantization, ExportOptions("dynamic"))
    logits: dict[str, list[NDArray[np.float32]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        runners: dict[str, Runner] = {
            "fake quantization": TorchRunner(fake_quant_model(checkpoint)),
            "exact sums": TorchRunner(integer_model(checkpoint)),
            "onnxruntime": OrtRunner(model),
            "onnxruntime, exact sums": OrtRunner(in_integers(model), optimize=False),
            "OpenVINO": openvino.runner(path, threads=torch.get_num_threads()),
        }
        for x, _ in split.batches(100):
            for who, runner in runners.items():
                logits.setdefault(who, []).append(runner(x.numpy()))
    whole = {who: np.concatenate(parts) for who, parts in logits.items()}
    rows: list[dict[str, object]] = []
    for a, b in PAIRS:
        parity = compare_logits(whole[a], whole[b])
        rows.append(
            {
                "network": name,
                "profile": checkpoint.quantization.profile,
                "between": f"{a} / {b}",
                "agreement": parity.top1_agreement,
                "mean_255": 255 * parity.relative,
                "max_abs": parity.max_abs,
                "n": parity.n,
            }
        )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--calib", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    print(f"{'network':<22}{'profile':<13}{'between':<46}{'agreement':>10}{'mean /255':>11}{'largest':>9}")
    for path in args.checkpoints:
        given = load_checkpoint(path)
        data = load_dataset(args.data, given.spec)
        images = [x for x, _ in data.train.take(args.calib, 0).batches(64)]
        if given.quantization is not None:
            made = [given]
        else:
            made = [on_grid(ptq(given, images, QuantizeSettings(calibration="mse"), profile=profile)) for profile in PROFILES]
        for checkpoint in made:
            for row in rows_of(path.stem, checkpoint, data.val.take(args.images, 0)):
                print(
                    f"{row['network']:<22}{row['profile']:<13}{row['between']:<46}{100 * row['agreement']:>9.2f}%"  # type: ignore[operator]
                    f"{row['mean_255']:>11.4f}{row['max_abs']:>9.4f}",
                    flush=True,
                )
                rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
