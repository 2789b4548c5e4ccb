"""One table about this machine's GPU, in under eight minutes: does it compute what the CPU does, and how fast does it train?

    python benchmarks/gpu_check.py [--seconds 20] [--json FILE]

Rows: steps a second of ResNet-50 at 224 pixels in fp32, tf32, bf16 and fp16, bf16 compiled, and a bare PyTorch loop's; the
loader's images a second and the share of a training that waits for it; pruning and PTQ on the device against the CPU's
result; a TensorRT build of the exported file where TensorRT is installed. Without a CUDA device it says so and ends with 4.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from loader import PREPROCESSING, make_images
from torch import nn
from torch.nn import functional as F

from compress.checkpoints.base import Checkpoint, on_device
from compress.data import Inputs, MemoryStore, Split, load_dataset
from compress.data.loader import Batches
from compress.device import computing_on
from compress.prune import prune
from compress.quantize import ptq
from compress.resnet import build_model, tensors_of
from compress.train import TrainState, train
from compress.zoo import spec
from rescompress.core.settings import QuantizeSettings, TrainSettings

BATCH = 128


class _Enough(Exception):
    pass


def dense() -> Checkpoint:
    """Return a ResNet-50 with random weights and statistics that belong to them."""
    torch.manual_seed(0)
    known = spec("resnet50", num_classes=10)
    model = build_model(known).train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(16, 3, 224, 224))
    return Checkpoint(known, tensors_of(model.eval()))


def noise(images: int) -> Split:
    """Return images that cost nothing to read."""
    x = np.random.default_rng(0).integers(0, 256, (images, 224, 224, 3), dtype=np.uint8)
    return Split(MemoryStore(x), np.arange(images) % 10, tuple("0123456789"), PREPROCESSING, "noise")


def steps_a_second(checkpoint: Checkpoint, split: Split, seconds: float, **changed: object) -> float:
    """Return the steps a second of a training, the first ten left out."""
    given = {"epochs": 1e6, "batch_size": BATCH, "augment": "none", "teacher": None, "device": "cuda", "workers": 0, "seed": 0}
    settings = TrainSettings.model_validate(given | changed)
    began = last = 0.0
    steps = 0

    def watch(state: TrainState) -> None:
        nonlocal began, last, steps
        if state.step == 10:
            torch.cuda.synchronize()
            began = time.perf_counter()
        if state.step > 10:
            steps = state.step - 10
            if time.perf_counter() - began > seconds:
                torch.cuda.synchronize()
                last = time.perf_counter()
                raise _Enough

    with contextlib.suppress(_Enough):
        train(build_model(checkpoint.spec, checkpoint.state_dict), split, settings, progress=watch)
    return steps / (last - began)


def bare(checkpoint: Checkpoint, seconds: float) -> float:
    """Return the steps a second of the shortest loop that PyTorch allows, in bfloat16, the images on the device already."""
    model = build_model(checkpoint.spec, checkpoint.state_dict).cuda().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    x = torch.randn(BATCH, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    y = torch.arange(BATCH, device="cuda") % 10
    began, steps = 0.0, 0
    while steps < 10 or time.perf_counter() - began < seconds:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps == 10:
            torch.cuda.synchronize()
            began = time.perf_counter()
        elif steps % 20 == 0:
            loss.item()
    torch.cuda.synchronize()
    return (steps - 10) / (time.perf_counter() - began)


def data_path(checkpoint: Checkpoint, folder: Path, seconds: float) -> dict[str, float]:
    """Return the loader's images a second alone, and the part of a training that waits for it."""
    make_images(folder, 4_000)
    split = load_dataset(str(folder), Inputs((3, 224, 224), 10, PREPROCESSING, None)).train
    workers = os.cpu_count() or 1
    settings = TrainSettings(augment="photo", cache_gib=0.0).preset(224, normalised=True)
    batches = Batches(split, settings, BATCH)
    began, images = time.perf_counter(), 0
    with batches.stream(0, 4 * batches.per_epoch, workers) as stream:
        for x, _ in stream:
            images += len(x)
            if time.perf_counter() - began > seconds:
                break
    rate = images / (time.perf_counter() - began)
    waiting = 0.0
    until = time.perf_counter() + seconds

    def watch(state: TrainState) -> None:
        nonlocal waiting
        waiting = state.waiting
        if time.perf_counter() > until:
            raise _Enough

    given = {"epochs": 100, "batch_size": BATCH, "precision": "bf16", "teacher": None, "device": "cuda", "cache_gib": 0.0}
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    with contextlib.suppress(_Enough):
        train(model, split, TrainSettings.model_validate(given | {"workers": workers}), progress=watch)
    return {f"loader, {workers} workers, images/s": rate, "waiting for data": waiting}


def same_as_cpu() -> Iterator[tuple[str, float | str]]:
    """Yield how far pruning and PTQ on the device are from the CPU's."""
    torch.manual_seed(0)
    small = spec("resnet18", num_classes=10, input_shape=(3, 64, 64))
    model = build_model(small).train()
    images = torch.rand(256, 3, 64, 64) * torch.linspace(0.2, 2, 256)[:, None, None, None]
    with torch.no_grad():
        model(images)
    checkpoint = Checkpoint(small, tensors_of(model.eval()))
    made: dict[str, tuple[Checkpoint, dict[str, tuple[int, ...]], Checkpoint, float]] = {}
    for device in ("cpu", "cuda"):
        began = time.perf_counter()
        with computing_on(device):
            here, x = on_device(checkpoint, device), images.to(device)
            half = prune(here, calibration_x=x)
            int8 = ptq(here, list(x.split(64)), QuantizeSettings(calibration="mse"))
        made[device] = on_device(half.checkpoint, "cpu"), dict(half.plan.keep), int8, time.perf_counter() - began
    (cpu, plan, int8, slow), (gpu, other, int8_gpu, fast) = made["cpu"], made["cuda"]
    same = sum(len(set(plan[g]) & set(other.get(g, ()))) for g in plan) / sum(map(len, plan.values()))
    yield "channels that both keep", same
    if plan == other:
        worst = max(
            float((cpu.state_dict[k] - v).abs().max() / cpu.state_dict[k].abs().max().clamp_min(1e-12))
            for k, v in gpu.state_dict.items()
            if v.is_floating_point()
        )
        yield "largest relative difference of refitted weights", worst
    assert int8.quantization is not None
    assert int8_gpu.quantization is not None
    scales = [(a.scale, b.scale) for a, b in zip(int8.quantization.quantizers, int8_gpu.quantization.quantizers, strict=True)]
    yield (
        "largest relative difference of INT8 scales",
        max(abs(x - y) / x for a, b in scales if a and b for x, y in zip(a, b, strict=True)),
    )
    yield "seconds on the CPU / on the device", f"{slow:.1f} / {fast:.1f}"


def tensorrt(folder: Path) -> str:
    """Return what a TensorRT build of an exported file came to."""
    from edge_targets.backends import load_backend
    from export.to_onnx import ExportOptions, to_onnx

    found = load_backend("tensorrt").available()
    if found.reason is not None:
        return f"not here: {found.reason}"
    checkpoint = dense()
    tensors = {k: v.numpy() for k, v in checkpoint.state_dict.items()}
    path = folder / "resnet50.onnx"
    path.write_bytes(to_onnx(checkpoint.spec, tensors, None, ExportOptions()).SerializeToString())
    x = np.random.default_rng(0).random((1, 3, 224, 224), dtype=np.float32)
    with load_backend("tensorrt").runner(path, threads=None) as runner:
        theirs = runner(x)
    with torch.inference_mode():
        ours = build_model(checkpoint.spec, checkpoint.state_dict)(torch.from_numpy(x)).numpy()
    off = np.abs(theirs - ours).max() / np.abs(ours).max()
    return f"version {found.version}: largest difference {off:.1e} of the largest score"


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each measurement of speed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return 4
    table: dict[str, float | str] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}

    def note(name: str, make: Callable[[], float | str]) -> None:
        try:
            table[name] = make()
        except Exception as e:  # one row that fails leaves the others
            table[name] = f"failed: {type(e).__name__}: {str(e).splitlines()[0][:160] if str(e) else ''}"
        value = table[name]
        print(f"{name:<52} {value:.4g}" if isinstance(value, float) else f"{name:<52} {value}", flush=True)

    print(f"{table['device']}, torch {table['torch']}; ResNet-50, 224 pixels, {BATCH} images a step")
    network, split = dense(), noise(512)
    nn.Module.cuda(build_model(network.spec))  # the first use of the device is nobody's
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        note(f"steps/s, {precision}", lambda p=precision: steps_a_second(network, split, args.seconds, precision=p))  # type: ignore[misc]
    note(
        "steps/s, bf16, compiled",
        lambda: steps_a_second(network, split, args.seconds, precision="bf16", compile=True),
    )
    note("steps/s, bf16, bare PyTorch loop", lambda: bare(network, args.seconds))
    with tempfile.TemporaryDirectory() as name:
        try:
            table |= data_path(network, Path(name) / "jpegs", args.seconds)
        except Exception as e:
            table["data path"] = f"failed: {type(e).__name__}: {e}"
        for key in list(table)[-2:]:
            print(f"{key:<52} {table[key]}")
        try:
            for key, value in same_as_cpu():
                note(key, lambda value=value: value)  # type: ignore[misc]
        except Exception as e:
            table["same as the CPU"] = f"failed: {type(e).__name__}: {e}"
            print(table["same as the CPU"])
        note("TensorRT", lambda: tensorrt(Path(name)))
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
