"""The published latencies that the latency model is fitted to: which rows count, how much, and what network each one ran.

The figures are in ``data/published_latencies.csv``, each with its source; the table holds more than is used. Used are
latencies (no throughputs) on the GPU alone (no DLA), at one fixed batch, of networks whose kernels can be written down here:
ResNet, ResNeXt, VGG. Rows of equal device, network, input, precision, batch, power mode and kind of measurement form one
group, whose median counts.

Judgement calls, all here:

* A power mode that is not stated is taken as the one with the highest clocks; "default (30W?)" as the board's 30 W mode.
* An "Orin Nano" of unstated memory is taken as the one with 8 GB, and counts less. Three of its four figures, not of
  trtexec, count very little: they are 28 % slower than the fourth allows, as of a board whose clocks were not locked.
* Times on the host's clock contain the call, the synchronisation and often copies: a constant per kind of measurement, fitted
  along and not part of predictions.
* NVIDIA's MLPerf entries run stage 2 in a hand-written kernel and read int8 input. They share one factor, fitted along.
* A file with Q/DQ on both inputs of every Add (293 Q/DQ nodes) runs its Adds as kernels of their own.
* Figures from TensorFlow are of its own ResNets, which put the stride into the last unit of a stage, and v2 has a kernel
  for the BatchNorm before each unit.
* "Compressed, ratio 0.5" is taken as half of the channels inside each block, and counts little: the method is not stated.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from edge_targets.catalog import load_device
from edge_targets.device import PRECISIONS, Device, Precision
from edge_targets.kernels import Kernel, fuse
from rescompress.core.layers import walk
from rescompress.core.spec import Block, Head, ModelSpec, Stem, StemConv

PUBLISHED = Path(__file__).parent / "data" / "published_latencies.csv"

DEVICES = {
    "AGX Orin": "jetson-agx-orin-64gb",
    "AGX Orin 64GB": "jetson-agx-orin-64gb",
    "Orin NX 16GB": "jetson-orin-nx-16gb",
    "Orin Nano": "jetson-orin-nano-8gb",
    "Orin Nano 8GB (Super)": "jetson-orin-nano-8gb-super",
    "AGX Xavier": "jetson-agx-xavier",
    "Xavier NX": "jetson-xavier-nx",
    "Nano": "jetson-nano",
    "Nano 2GB": "jetson-nano",
    "TX2": "jetson-tx2",
}


class Kind(NamedTuple):
    """One way in which figures were measured.

    Attributes:
        name: What it is called here.
        text: Of its rows: occurs in source and metric.
        weight: How much its groups count; 1 for the GPU's own clock in a documented state.
        call_ms: What a call takes beside the GPU, before fitting; 0 where the figure does not contain it.
    """

    name: str
    text: str
    weight: float
    call_ms: float = 0.0


KINDS = (
    Kind("mlperf", "mlcommons", 0.7),
    Kind("netspresso", "Nota-NetsPresso", 0.8),
    Kind("super-gradients", "super-gradients.*without IO", 0.8),
    Kind("super-gradients with copies", "super-gradients", 0.8, 0.3),
    Kind("mmdeploy", "mmdeploy", 0.8, 1.0),
    Kind("torch2trt", "torch2trt @", 0.8, 0.5),
    Kind("torch2trt, another host", "kentaroy47", 0.5, 0.5),
    Kind("tf-trt", "tf_trt_models", 0.6, 1.0),
    Kind("tensorflow, 2018, with copies", "tf_to_trt", 0.3, 2.0),
    Kind("gpu", "trtexec|GPU latency|jetson-intro", 1.0),
)
"""The first one whose text is found is a row's kind; a row of none is not used."""

_MODEL = re.compile(r"ResNet-(\d+)( v1\.5| v1| v2| torchvision)?( compressed ratio 0\.5)?|vgg(\d+)(_bn)?|(ResNeXt-50)-32x4d")
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class Group:
    """Published latencies of one configuration.

    Attributes:
        device: As the catalogue names it.
        network: Such as ``ResNet-50``, whatever its variant is called.
        input_size: Side of the input in pixels.
        precision: What it computes in.
        batch: Images per call.
        power_mode: As the table names it.
        kind: How it was measured.
        weight: How much it counts.
        hardware: The device.
        sm_count: Active multiprocessors.
        gpu_mhz: GPU clock.
        emc_mhz: Memory clock.
        latency_ms: Median of the rows.
        rows: How many rows.
        kernels: What it runs.
    """

    device: str
    network: str
    input_size: int
    precision: Precision
    batch: int
    power_mode: str
    kind: Kind
    weight: float
    hardware: Device
    sm_count: int
    gpu_mhz: float
    emc_mhz: float
    latency_ms: float
    rows: int
    kernels: tuple[Kernel, ...]

    @property
    def architecture(self) -> str:
        """Of the GPU."""
        return self.hardware.architecture

    @property
    def name(self) -> str:
        """A short description."""
        what = f"{self.device.removeprefix('jetson-')}, {self.network} {self.input_size} px, {self.precision}"
        return f"{what}, batch {self.batch}, {self.power_mode}, {self.kind.name}"


def resnet(depth: int, size: int, *, stride_at: int = 1, inner: float = 1.0, groups: int = 1) -> ModelSpec:
    """Return the spec of an ImageNet ResNet (He et al. 2015, table 1).

    Args:
        depth: 18, 34, 50, 101 or 152.
        size: Side of the input in pixels.
        stride_at: Which convolution of a bottleneck has the stride: 1 in torchvision ("v1.5"), 0 in "v1".
        inner: Share of the channels inside each block that is left.
        groups: Of the 3x3 convolutions, which are then twice as wide (ResNeXt 32x4d).
    """
    basic = depth < 50
    stages, stream = [], 64
    for number, (count, width) in enumerate(zip(_BLOCKS[depth], _WIDTHS, strict=True), 1):
        out = width if basic else 4 * width
        left = round(width * inner * (2 if groups > 1 else 1))
        blocks = []
        for i in range(count):
            stride = 2 if i == 0 and number > 1 else 1
            blocks.append(
                Block(
                    name=f"layer{number}.{i}",
                    kind="basic" if basic else "bottleneck",
                    widths=(left, out) if basic else (left, left, out),
                    stride=stride,
                    stride_at=0 if basic else stride_at,
                    groups=groups,
                    shortcut="identity" if stride == 1 and stream == out else "projection",
                )
            )
            stream = out
        stages.append(tuple(blocks))
    return ModelSpec(
        arch=f"resnet{depth}",
        input_shape=(3, size, size),
        stem=Stem(convs=(StemConv(width=64),)),
        stages=tuple(stages),
        head=Head(num_classes=1000),
    )


def tensorflow_resnet(depth: int, size: int, *, v2: bool) -> list[Kernel]:
    """Return the kernels of a bottleneck ResNet as TensorFlow's slim library builds it.

    Args:
        depth: 50, 101 or 152.
        size: Side of the input in pixels.
        v2: BatchNorm and ReLU come before each unit (He et al. 2016), as a kernel of their own.
    """
    side = -(-size // 2)
    found = [
        Kernel("input reformat", "move", size**2, 3, 3, in_pixels=size**2, first=True),
        Kernel("stem", "conv", side**2, 3, 64, taps=49, in_pixels=size**2, first=True),
        Kernel("pool", "pool", (-(-side // 2)) ** 2, 64, 64, in_pixels=side**2),
    ]
    side, stream = -(-side // 2), 64
    for number, (count, width) in enumerate(zip(_BLOCKS[depth], _WIDTHS, strict=True), 1):
        for i in range(count):
            after = -(-side // 2) if i == count - 1 and number < len(_WIDTHS) else side
            pixels, in_pixels, name = after**2, side**2, f"layer{number}.{i}"
            if v2:
                found.append(Kernel(f"{name}.norm", "move", in_pixels, stream, stream, in_pixels=in_pixels))
            if stream != 4 * width:
                found.append(Kernel(f"{name}.shortcut", "conv", pixels, stream, 4 * width, in_pixels=in_pixels))
            elif after != side:
                found.append(Kernel(f"{name}.shortcut", "pool", pixels, stream, stream, in_pixels=in_pixels))
            found += [
                Kernel(f"{name}.conv1", "conv", in_pixels, stream, width, in_pixels=in_pixels),
                Kernel(f"{name}.conv2", "conv", pixels, width, width, taps=9, in_pixels=in_pixels),
                Kernel(f"{name}.conv3", "conv", pixels, width, 4 * width, in_pixels=pixels, skip=True),
            ]
            side, stream = after, 4 * width
    if v2:
        found.append(Kernel("norm", "move", side**2, stream, stream, in_pixels=side**2))
    return [
        *found,
        Kernel("global_pool", "pool", 1, stream, stream, in_pixels=side**2),
        Kernel("fc", "linear", 1, stream, 1000),
    ]


def vgg(depth: int, size: int) -> list[Kernel]:
    """Return the kernels of a VGG network (Simonyan and Zisserman 2014, table 1).

    Args:
        depth: 11, 13, 16 or 19.
        size: Side of the input in pixels, a multiple of 32.
    """
    found = [Kernel("input reformat", "move", size**2, 3, 3, in_pixels=size**2, first=True)]
    side, stream = size, 3
    for number, (count, width) in enumerate(zip(_VGG[depth], (*_WIDTHS, 512), strict=True), 1):
        for i in range(count):
            first = stream == 3
            found.append(Kernel(f"conv{number}.{i}", "conv", side**2, stream, width, taps=9, in_pixels=side**2, first=first))
            stream = width
        found.append(Kernel(f"pool{number}", "pool", (side // 2) ** 2, stream, stream, in_pixels=side**2))
        side //= 2
    widths = (stream * side**2, 4096, 4096, 1000)
    return found + [Kernel(f"fc{i}", "linear", 1, a, b) for i, (a, b) in enumerate(pairwise(widths), 1)]


@cache
def _network(model: str, size: int, kind: Kind, *, add_fuses: bool) -> tuple[str, list[Kernel]]:
    """Return the name and the kernels of the network that the table calls `model`."""
    found = _MODEL.fullmatch(model)
    assert found is not None
    depth, variant, compressed, vgg_depth, _, resnext = found.groups()
    if vgg_depth:
        return f"VGG-{vgg_depth}", vgg(int(vgg_depth), size)
    if resnext:
        return "ResNeXt-50", fuse(walk(resnet(50, size, groups=32)), add_fuses=add_fuses)
    if "tensorflow" in kind.name or kind.name == "tf-trt":
        return f"ResNet-{depth}", tensorflow_resnet(int(depth), size, v2=variant == " v2")
    spec = resnet(int(depth), size, stride_at=0 if variant == " v1" else 1, inner=0.5 if compressed else 1.0)
    return f"ResNet-{depth}{' compressed' if compressed else ''}", fuse(walk(spec), add_fuses=add_fuses)


def _kind(row: dict[str, str]) -> Kind | None:
    text = f"{row['source']} {row['metric']} {row['note']}"
    return next((k for k in KINDS if re.search(k.text, text)), None)


def load_groups(path: Path = PUBLISHED) -> list[Group]:
    """Return the groups of the published table that the model is fitted on."""
    rows: dict[tuple[str, str, int, Precision, int, str, Kind], list[dict[str, str]]] = {}
    with path.open(newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            whole = row["unit"] == "ms" and row["batch"].isdigit() and row["input"].isdigit()
            if not whole or not _MODEL.fullmatch(row["model"]) or row["device"] not in DEVICES or "DLA" in row["precision"]:
                continue
            precision = next((p for p in PRECISIONS if row["precision"].startswith(p)), None)
            kind = _kind(row)
            if precision is None or kind is None or "asked" in row["precision"]:
                continue
            model = row["model"].removesuffix("_bn")  # folded into the convolutions
            key = (row["device"], model, int(row["input"]), precision, int(row["batch"]), row["power_mode"], kind)
            rows.setdefault(key, []).append(row)
    return [_group(*key, rows=found) for key, found in rows.items()]


@cache
def _device(name: str) -> Device:
    return load_device(name)


def _number(text: str) -> float | None:
    found = re.match(r"[\d.]+", text)
    return float(found[0]) if found else None


def _weight(kind: Kind, model: str, mode: str, notes: str) -> float:
    """Return how much a group counts: less where it is not known what was measured."""
    weight = kind.weight
    if "memory size not stated" in notes:
        weight *= 0.5 if kind.name == "gpu" else 0.15
    if "compressed" in model:
        weight *= 0.25
    if kind.name == "mlperf" and (mode == "?" or mode.startswith("default")):
        weight *= 0.4
    if "CPU 576 MHz" in notes:  # the host is too slow to keep the GPU busy
        weight *= 0.4
    return weight


def _group(
    device: str,
    model: str,
    size: int,
    precision: Precision,
    batch: int,
    mode: str,
    kind: Kind,
    *,
    rows: Sequence[dict[str, str]],
) -> Group:
    import numpy as np

    hardware = _device(DEVICES[device])
    power = hardware.mode("30W" if mode.startswith("default") else None)
    network, kernels = _network(model, size, kind, add_fuses=not any("QDQ nodes" in r["precision"] for r in rows))
    return Group(
        device=hardware.name,
        network=network,
        input_size=size,
        precision=precision,
        batch=batch,
        power_mode=mode,
        kind=kind,
        weight=_weight(kind, model, mode, " ".join(r["note"] for r in rows)),
        hardware=hardware,
        sm_count=power.sm_count,
        gpu_mhz=next((n for n in map(_number, (r["gpu_mhz"] for r in rows)) if n), power.gpu_mhz),
        emc_mhz=next((n for n in map(_number, (r["emc_mhz"] for r in rows)) if n), power.emc_mhz),
        latency_ms=float(np.median([float(r["value"]) for r in rows])),
        rows=len(rows),
        kernels=tuple(kernels),
    )
