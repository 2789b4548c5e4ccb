"""INT8 on this computer's CPU: ResNet-50 at 224, batch 1, our files beside float32, onnxruntime's and NNCF's quantizers.

Building takes minutes and disturbs nobody; timing wants a machine that does nothing else. So there are two parts:

    python benchmarks/cpu_latency.py build FOLDER --data IMAGES
    python benchmarks/cpu_latency.py time FOLDER [--rounds 7] [--seconds 7] [--threads 2] [--json FILE]

The network has random weights, with BatchNorm statistics of the images: latency does not depend on what a network has
learnt. All files come from this one network. Candidates take turns in short rounds and every round starts new processes;
a figure is the median over the processes of each one's median, so a machine that slows down for a while favours nobody.
Peers: onnxruntime's `quantize_static` (its QDQ defaults) and NNCF's post-training quantization of the OpenVINO model (its
defaults, including its placement). OpenVINO runs every INT8 file with the options of our runner (docs/targets.md).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from compress import zoo
from compress.checkpoints.base import Checkpoint
from compress.files import IMAGE_SUFFIXES
from compress.pixels import decode, normalise
from compress.prune import prune
from compress.prune.recalibrate import recalibrate
from compress.quantize import on_grid, ptq
from compress.resnet import build_model, tensors_of
from edge_targets.benchmark import Candidate, Effort, cpu_name, measure_processes
from edge_targets.catalog import load_target
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.layers import total_macs, walk
from rescompress.core.quantizers import Profile
from rescompress.core.settings import PruneSettings, QuantizeSettings
from rescompress.core.spec import ModelSpec

SHAPE = (3, 224, 224)
INT8_LIMIT = 2.8
PRUNED_LIMIT = 5.0
NNCF_LIMIT = 1.05


@dataclass(frozen=True)
class Contender:
    """One file in one runtime.

    Attributes:
        name: What the table calls it.
        file: In the folder.
        runtime: What runs it.
        precision: ``fp32`` or ``int8``.
    """

    name: str
    file: str
    runtime: str
    precision: str


OURS = Contender("ours INT8 (openvino profile), OpenVINO", "ours.onnx", "openvino", "int8")
PRUNED = Contender("ours pruned to 0.5 of the MACs, INT8, OpenVINO", "pruned.onnx", "openvino", "int8")
NNCF = Contender("NNCF's own INT8, OpenVINO", "nncf.xml", "openvino", "int8")
CONTENDERS = (
    Contender("float32, onnxruntime", "float.onnx", "onnxruntime", "fp32"),
    Contender("float32, OpenVINO", "float.onnx", "openvino", "fp32"),
    OURS,
    Contender("ours INT8 (onnxruntime profile), OpenVINO", "ours-onnxruntime.onnx", "openvino", "int8"),
    Contender("ours INT8 (tensorrt profile), OpenVINO", "ours-tensorrt.onnx", "openvino", "int8"),
    PRUNED,
    NNCF,
    Contender("onnxruntime quantize_static, onnxruntime", "ort-static.onnx", "onnxruntime", "int8"),
    Contender("onnxruntime quantize_static, OpenVINO", "ort-static.onnx", "openvino", "int8"),
    Contender("ours INT8 (onnxruntime profile), onnxruntime", "ours-onnxruntime.onnx", "onnxruntime", "int8"),
    Contender("ours INT8 (openvino profile), onnxruntime", "ours.onnx", "onnxruntime", "int8"),
)


def pictures(folder: Path, count: int, spec: ModelSpec) -> Tensor:
    """Return preprocessed images (N, C, H, W) drawn from everything below a folder."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    chosen = np.random.default_rng(0).permutation(len(paths))[:count]
    x_NHWC = np.stack([decode(paths[i], spec.input_shape, spec.preprocessing) for i in chosen])
    return normalise(torch.from_numpy(x_NHWC).permute(0, 3, 1, 2), spec.preprocessing)


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint as ONNX, batch 1."""
    tensors = {k: v.numpy() for k, v in checkpoint.state_dict.items()}
    onnx.save(to_onnx(checkpoint.spec, tensors, checkpoint.quantization, ExportOptions(batch=1)), path)


def int8(checkpoint: Checkpoint, x_NCHW: Tensor, profile: Profile) -> Checkpoint:
    """Return the checkpoint, calibrated for a profile."""
    return on_grid(
        ptq(checkpoint, list(x_NCHW.split(16)), QuantizeSettings(calibration="mse", bias_correction=False), profile=profile)
    )


def ort_static(folder: Path, x_NCHW: Tensor) -> None:
    """Quantize the float file with onnxruntime's defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"input": x.numpy()} for x in x_NCHW.split(1)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    quantize_static(folder / "float.onnx", folder / "ort-static.onnx", Images())


def nncf_own(folder: Path, x_NCHW: Tensor) -> None:
    """Quantize the float file with NNCF's defaults, as an OpenVINO model."""
    os.environ.setdefault("NNCF_CI", "1")  # NNCF then does not report its use
    import nncf
    import openvino as ov

    model = ov.convert_model(folder / "float.onnx")
    quantized = nncf.quantize(model, nncf.Dataset([x.numpy() for x in x_NCHW.split(1)]), subset_size=len(x_NCHW))
    ov.save_model(quantized, folder / "nncf.xml", compress_to_fp16=False)


def build(folder: Path, data: Path, arch: str, images: int, method: str, scope: str) -> None:
    """Write every contender's file."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    spec = zoo.spec(arch)
    x_NCHW = pictures(data, images, spec)
    checkpoint = recalibrate(Checkpoint(spec, tensors_of(build_model(spec))), x_NCHW, 32)

    def note(what: str, start: float) -> None:
        print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)

    start = time.perf_counter()
    write(checkpoint, folder / "float.onnx")
    write(int8(checkpoint, x_NCHW, "openvino"), folder / "ours.onnx")
    write(int8(checkpoint, x_NCHW, "onnxruntime"), folder / "ours-onnxruntime.onnx")
    write(int8(checkpoint, x_NCHW, "tensorrt"), folder / "ours-tensorrt.onnx")
    note("ours", start)
    start = time.perf_counter()
    align = load_target("cpu").align("int8")
    result = prune(
        checkpoint,
        PruneSettings(method=method, scope="all" if scope == "all" else "inner"),
        multiple=align,
        calibration_x=x_NCHW,
    )
    write(int8(result.checkpoint, x_NCHW, "openvino"), folder / "pruned.onnx")
    share = total_macs(walk(result.checkpoint.spec)) / total_macs(walk(spec))
    note(f"pruned by {method}, scope {scope}, widths multiples of {align}, {share:.3f} of the MACs", start)
    start = time.perf_counter()
    ort_static(folder, x_NCHW)
    note("onnxruntime", start)
    start = time.perf_counter()
    nncf_own(folder, x_NCHW)
    note("NNCF", start)
    about = {"arch": arch, "images": images, "prune_method": method, "prune_scope": scope, "align": align, "macs": share}
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def timed(folder: Path, effort: Effort, threads: int, only: Sequence[str]) -> dict[str, object]:
    """Return the table as a document."""
    about = json.loads((folder / "about.json").read_text())
    chosen = [c for c in CONTENDERS if not only or any(o in c.name for o in only)]
    candidates = [Candidate(folder / c.file, c.runtime, SHAPE, threads=threads, precision=c.precision) for c in chosen]
    rows = []
    for contender, measured in zip(chosen, measure_processes(candidates, effort=effort), strict=True):
        rows.append(
            {
                "name": contender.name,
                "median_ms": statistics.median(measured.process_medians_ms),
                "p90_ms": measured.metrics["p90_ms"].value,
                "process_medians_ms": [round(ms, 3) for ms in measured.process_medians_ms],
                "runtime_options": measured.runtime_options,
                "bytes": sum(p.stat().st_size for p in folder.glob(f"{Path(contender.file).stem}.*") if p.suffix != ".json"),
            }
        )
    versions = {name: importlib.metadata.version(name) for name in ("openvino", "onnxruntime", "nncf")}
    return {"about": about, "cpu": cpu_name(), "threads": threads, "rounds": effort.rounds, "versions": versions, "rows": rows}


def report(document: dict[str, object]) -> list[str]:
    """Return the lines of the table and the answers."""
    rows = {row["name"]: row["median_ms"] for row in document["rows"]}  # type: ignore[attr-defined]
    floats = [ms for name, ms in rows.items() if name.startswith("float32")]
    lines = [f"ResNet-50, 224, batch 1, {document['threads']} threads, {document['cpu']}, {document['versions']}"]
    lines += [f"{'':<52}{'median, ms':>12}{'x fastest float32':>20}"]
    lines += [f"{name:<52}{ms:>12.2f}{min(floats) / ms if floats else float('nan'):>20.2f}" for name, ms in rows.items()]
    if not floats:
        return lines

    def answer(what: str, value: float, limit: float, *, at_least: bool) -> None:
        met = value >= limit if at_least else value <= limit
        lines.append(f"{what}: {value:.2f} ({'at least' if at_least else 'at most'} {limit}): {'met' if met else 'MISSED'}")

    ours, pruned, nncf = OURS.name, PRUNED.name, NNCF.name
    if ours in rows:
        answer("ours INT8, times faster than the fastest float32", min(floats) / rows[ours], INT8_LIMIT, at_least=True)
    if pruned in rows:
        answer("pruned + INT8, times faster", min(floats) / rows[pruned], PRUNED_LIMIT, at_least=True)
    if ours in rows and nncf in rows:
        answer("ours INT8, latency over NNCF's own", rows[ours] / rows[nncf], NNCF_LIMIT, at_least=False)
    return lines


def main() -> int:
    """Build, or measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    make = parts.add_parser("build", help="write the files")
    make.add_argument("folder", type=Path)
    make.add_argument("--data", type=Path, required=True, help="a folder with images somewhere below it")
    make.add_argument("--arch", default="resnet50")
    make.add_argument("--images", type=int, default=64)
    make.add_argument("--method", default="magnitude")
    make.add_argument("--scope", default="inner", choices=["inner", "all"])
    clock = parts.add_parser("time", help="measure them")
    clock.add_argument("folder", type=Path)
    clock.add_argument("--rounds", type=int, default=7)
    clock.add_argument("--seconds", type=float, default=7.0, help="of samples per candidate, over all rounds")
    clock.add_argument("--threads", type=int, default=2)
    clock.add_argument("--only", action="append", default=[], help="part of a name; repeatable")
    clock.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.part == "build":
        build(args.folder, args.data, args.arch, args.images, args.method, args.scope)
        return 0
    document = timed(args.folder, Effort(seconds=args.seconds, rounds=args.rounds), args.threads, args.only)
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(report(document)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
