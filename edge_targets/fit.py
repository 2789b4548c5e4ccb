"""Fits the latency model to published figures, and says how far off it is: ``python -m edge_targets.fit``.

The figures are in ``data/published_latencies.csv``, each with its source. Used are the latencies of ResNet classifiers on
the GPU (no DLA, no throughput of several accelerators together); rows of equal device, model, input, precision, batch and
power mode form one group, whose median counts.

Judgement calls, all here:

* A power mode that is not stated is taken as the one with the highest clocks.
* "default (30W?)" is taken as the board's 30 W mode: 8 multiprocessors at 612 MHz.
* NVIDIA's MLPerf entries run stage 2 in a hand-written kernel and read int8 input: a floor. They share one factor, fitted
  along; predictions for users do not carry it.
* A file with Q/DQ on both inputs of every Add (293 Q/DQ nodes) runs its Adds as kernels of their own.
* ResNet v2 and the torch2trt networks of 256 pixels are taken as v1 networks of that input size.

The fit minimises the squared log error (soft L1) plus weak priors: each architecture's constants are shrunk towards
common ones, so that an architecture with few figures borrows from the others.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_targets.catalog import load_device
from edge_targets.device import PRECISIONS, Device, Precision
from edge_targets.kernels import fuse
from edge_targets.latency import BYTES, CONSTANTS, Constants, Model, work_of
from rescompress.core.artifact import write_text
from rescompress.core.errors import ToolMissing
from rescompress.core.layers import walk
from rescompress.core.spec import Block, Head, ModelSpec, Stem, StemConv

PUBLISHED = Path(__file__).parent / "data" / "published_latencies.csv"
CLOCK_EXPONENT = 1.25
"""Chosen by cross-validation among 1, 1.25 and 1.4: lower-power modes slow the CPU and the memory too."""

COVERAGE = 0.88
"""Share of held-out groups that a band should hold."""

ARCHITECTURES = ("ampere", "volta", "maxwell", "pascal")
WITHOUT_INT8 = ("maxwell", "pascal")
DEVICES = {
    "AGX Orin 64GB": "jetson-agx-orin-64gb",
    "Orin NX 16GB": "jetson-orin-nx-16gb",
    "AGX Xavier": "jetson-agx-xavier",
    "Xavier NX": "jetson-xavier-nx",
    "Nano": "jetson-nano",
    "TX2": "jetson-tx2",
}
_MODEL = re.compile(r"ResNet-(\d+)( v1\.5| v1| v2| torchvision)?")
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@dataclass(frozen=True)
class Group:
    """Published latencies of one configuration.

    Attributes:
        device: As the table names it.
        model: As the table names it.
        input_size: Side of the input in pixels.
        precision: What it computes in.
        batch: Images per call.
        power_mode: As the table names it.
        mlperf: Whether it is an MLPerf entry.
        architecture: Of the GPU.
        latency_ms: Median of the rows.
        rows: How many rows.
        work: Overhead at 1 us per kernel, compute at the full peak, traffic at the full bandwidth; each in ms.
    """

    device: str
    model: str
    input_size: int
    precision: Precision
    batch: int
    power_mode: str
    mlperf: bool
    architecture: str
    latency_ms: float
    rows: int
    work: tuple[float, float, float]

    @property
    def name(self) -> str:
        """A short description."""
        return f"{self.device}, {self.model} {self.input_size} px, {self.precision}, batch {self.batch}, {self.power_mode}"


def resnet(depth: int, size: int) -> ModelSpec:
    """Return the spec of an ImageNet ResNet (He et al. 2015, table 1), stride on the 3x3 convolution.

    Args:
        depth: 18, 34, 50, 101 or 152.
        size: Side of the input in pixels.
    """
    basic = depth < 50
    stages, stream = [], 64
    for number, (count, width) in enumerate(zip(_BLOCKS[depth], (64, 128, 256, 512), strict=True), 1):
        out = width if basic else 4 * width
        blocks = []
        for i in range(count):
            stride = 2 if i == 0 and number > 1 else 1
            blocks.append(
                Block(
                    name=f"layer{number}.{i}",
                    kind="basic" if basic else "bottleneck",
                    widths=(width, width) if basic else (width, width, out),
                    stride=stride,
                    stride_at=0 if basic else 1,
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


def load_groups(path: Path = PUBLISHED) -> list[Group]:
    """Return the groups of the published table that the model is fitted on."""
    rows: dict[tuple[str, str, int, Precision, int, str], list[dict[str, str]]] = {}
    with path.open(newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            usable = _MODEL.fullmatch(row["model"]) and row["unit"] == "ms" and row["batch"].isdigit()
            if not usable or "DLA" in row["precision"] or row["device"] not in DEVICES:
                continue
            precision = next(p for p in PRECISIONS if row["precision"].startswith(p))
            key = (row["device"], row["model"], int(row["input"]), precision, int(row["batch"]), row["power_mode"])
            # rows of one key from different kinds of source stay one group, as the key says
            rows.setdefault(key, []).append(row)
    return [_group(*key, rows=found) for key, found in rows.items()]


def _number(text: str) -> float | None:
    found = re.match(r"[\d.]+", text)
    return float(found[0]) if found else None


def _group(
    device: str, model: str, size: int, precision: Precision, batch: int, mode: str, *, rows: Sequence[dict[str, str]]
) -> Group:
    hardware = load_device(DEVICES[device])
    power = hardware.mode("30W" if mode.startswith("default") else None)
    gpu_mhz = next((n for n in map(_number, (r["gpu_mhz"] for r in rows)) if n), power.gpu_mhz)
    emc_mhz = next((n for n in map(_number, (r["emc_mhz"] for r in rows)) if n), power.emc_mhz)
    depth = _MODEL.fullmatch(model)
    assert depth is not None
    both_adds = any("QDQ nodes" in r["precision"] for r in rows)
    return Group(
        device=device,
        model=model,
        input_size=size,
        precision=precision,
        batch=batch,
        power_mode=mode,
        mlperf=any("mlcommons" in r["source"] for r in rows),
        architecture=hardware.architecture,
        latency_ms=float(np.median([float(r["value"]) for r in rows])),
        rows=len(rows),
        work=_work(
            hardware, resnet(int(depth[1]), size), precision, batch, power.sm_count, gpu_mhz, emc_mhz, add_fuses=not both_adds
        ),
    )


def _work(
    device: Device,
    spec: ModelSpec,
    precision: Precision,
    batch: int,
    sms: int,
    gpu_mhz: float,
    emc_mhz: float,
    *,
    add_fuses: bool,
) -> tuple[float, float, float]:
    assert device.bandwidth_gb_s is not None
    assert device.max_emc_mhz is not None
    kernels = fuse(walk(spec), add_fuses=add_fuses)
    work = [
        work_of(k, batch=batch, align=device.align[precision], element_bytes=BYTES[precision], pad_kernels=False)
        for k in kernels
    ]
    bandwidth = device.bandwidth_gb_s.value * emc_mhz / device.max_emc_mhz.value
    return (
        len(kernels) * 1e-3 * (1000.0 / gpu_mhz) ** CLOCK_EXPONENT,
        sum(w.macs for w in work) / (sms * gpu_mhz * 1e3 * device.macs_per_clock(precision)),
        sum(w.bytes for w in work) / (bandwidth * 1e6),
    )


# Parameters, all in log space: overhead, 1/bandwidth share, MLPerf factor, 1/compute share per precision; then per
# architecture the deviations of overhead, bandwidth and compute shares.
_SHARED = 3 + len(PRECISIONS)
_OWN = 2 + len(PRECISIONS)
_PRIOR = np.array([math.log(10.0), -math.log(0.7), -0.1, *[-math.log(0.5)] * len(PRECISIONS), *[0.0] * (_OWN * 4)])
_WIDTH = np.array([1.0, 0.5, 0.05, *[0.7] * len(PRECISIONS), *[0.3] * (_OWN * 4)])
_NOISE = 0.1
"""Log error that a published figure is trusted to."""

Floats = NDArray[np.float64]


def _log_latency(x: Floats, work: Floats, arch: NDArray[np.int64], prec: NDArray[np.int64], mlperf: Floats) -> Floats:
    own = x[_SHARED:].reshape(len(ARCHITECTURES), _OWN)
    scale = np.stack([x[0] + own[arch, 0], x[3 + prec] + own[arch, 2 + prec], x[1] + own[arch, 1]], axis=1)
    latency: Floats = np.log((work * np.exp(scale)).sum(axis=1)) + x[2] * mlperf
    return latency


def _arrays(groups: Sequence[Group]) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64], Floats]:
    return (
        np.array([g.work for g in groups]),
        np.array([ARCHITECTURES.index(g.architecture) for g in groups]),
        np.array([PRECISIONS.index(g.precision) for g in groups]),
        np.array([float(g.mlperf) for g in groups]),
    )


def fit(groups: Sequence[Group], start: Floats | None = None) -> Floats:
    """Return the parameters that fit `groups` best.

    Raises:
        ToolMissing: scipy is not installed.
    """
    try:
        from scipy.optimize import least_squares
    except ModuleNotFoundError as e:
        raise ToolMissing("fitting needs scipy, which is not installed", remedy="pip install 'rescompress[fit]'") from e
    arrays = _arrays(groups)
    target = np.log([g.latency_ms for g in groups])

    def residuals(x: Floats) -> Floats:
        return np.concatenate([_log_latency(x, *arrays) - target, (x - _PRIOR) / _WIDTH * _NOISE])

    found: Floats = least_squares(residuals, _PRIOR if start is None else start, loss="soft_l1", f_scale=0.15).x
    return found


def log_errors(groups: Sequence[Group], x: Floats) -> Floats:
    """Return log(predicted / published) per group."""
    errors: Floats = _log_latency(x, *_arrays(groups)) - np.log([g.latency_ms for g in groups])
    return errors


def held_out(groups: Sequence[Group], key: Callable[[Group], Hashable]) -> Floats:
    """Return log(predicted / published) per group, each predicted by a fit that saw no group of equal `key`."""
    start = fit(groups)
    errors = np.zeros(len(groups))
    keys = [key(g) for g in groups]
    for k in dict.fromkeys(keys):
        out = [i for i, other in enumerate(keys) if other == k]
        x = fit([g for g, other in zip(groups, keys, strict=True) if other != k], start)
        errors[out] = log_errors([groups[i] for i in out], x)
    return errors


def by_group(group: Group) -> Hashable:
    """Key that holds out one configuration."""
    return (group.device, group.model, group.precision, group.batch, group.power_mode)


def by_device(group: Group) -> Hashable:
    """Key that holds out one device."""
    return group.device


def by_model(group: Group) -> Hashable:
    """Key that holds out one network (its depth, whatever its variant is called)."""
    found = _MODEL.fullmatch(group.model)
    return found[1] if found else group.model


def band_of(pool: Floats) -> float:
    """Return the half-width in log space that holds the share `COVERAGE` of absolute errors like `pool`."""
    return float(np.quantile(np.abs(pool), COVERAGE, method="higher"))


def bands(groups: Sequence[Group], errors: Floats) -> dict[str, dict[str, float]]:
    """Return the band per architecture and precision: from all held-out errors of that precision class.

    What was held out decides what the band is of: of a configuration of a known board, of a board, or of a network.

    float32 has a class of its own (fewer and older figures); float16 and INT8 share one.
    """
    low = np.array([g.precision != "fp32" for g in groups])
    widths = {"fp32": band_of(errors[~low]), "fp16": band_of(errors[low]), "int8": band_of(errors[low])}
    return {a: {p: round(widths[p], 3) for p in _precisions(a)} for a in ARCHITECTURES}


def _precisions(architecture: str) -> tuple[Precision, ...]:
    return tuple(p for p in PRECISIONS if p != "int8" or architecture not in WITHOUT_INT8)


def coverage(groups: Sequence[Group], errors: Floats) -> tuple[float, float]:
    """Return the share of FP16 and INT8 groups inside a band made without them, and the median relative half-width."""
    low = [i for i, g in enumerate(groups) if g.precision != "fp32"]
    inside, halves = [], []
    for i in low:
        width = band_of(errors[[j for j in low if j != i]])
        inside.append(abs(errors[i]) <= width)
        halves.append(math.sinh(width))
    return float(np.mean(inside)), float(np.median(halves))


def model_of(
    x: Floats,
    widths: dict[str, dict[str, float]],
    *,
    devices: Sequence[str],
    unseen_device: dict[str, dict[str, float]],
    unseen_network: dict[str, dict[str, float]],
) -> Model:
    """Return the fitted model with its bands.

    Args:
        x: The parameters.
        widths: Bands of the boards that the fit has figures of.
        devices: These boards, as the catalogue names them.
        unseen_device: Bands of any other board.
        unseen_network: Bands of a network that the fit has no figures of.
    """
    architectures = {}
    for i, name in enumerate(ARCHITECTURES):
        own = x[_SHARED + i * _OWN : _SHARED + (i + 1) * _OWN]
        compute = {p: round(float(np.exp(-x[3 + j] - own[2 + j])), 4) for j, p in enumerate(_precisions(name))}
        architectures[name] = Constants(
            overhead_us=round(float(np.exp(x[0] + own[0])), 3),
            bandwidth=round(float(np.exp(-x[1] - own[1])), 4),
            compute=compute,
        )
    # the bands of what is unseen stay out of it: gates compare predictions of one version, and these move none of them
    document = json.dumps([{n: vars(c) for n, c in architectures.items()}, widths, CLOCK_EXPONENT], sort_keys=True)
    version = "published-" + hashlib.sha256(document.encode()).hexdigest()[:8]
    return Model(version, CLOCK_EXPONENT, architectures, widths, tuple(devices), unseen_device, unseen_network)


@dataclass(frozen=True)
class Report:
    """How far off the model is.

    Attributes:
        groups: The configurations.
        group_errors: Relative error with the group held out.
        device_errors: With its device held out.
        model_errors: With its network held out.
        coverage: Share of FP16 and INT8 groups inside their band.
        half_width: Median half-width of a band, relative.
        mlperf_factor: Of MLPerf entries.
        fitted: The model.
    """

    groups: Sequence[Group]
    group_errors: Floats
    device_errors: Floats
    model_errors: Floats
    coverage: float
    half_width: float
    mlperf_factor: float
    fitted: Model


def report() -> Report:
    """Return the fit to all groups and the errors of its cross-validation."""
    groups = load_groups()
    errors, device_errors, model_errors = (held_out(groups, key) for key in (by_group, by_device, by_model))
    share, half = coverage(groups, errors)
    x = fit(groups)
    return Report(
        groups=groups,
        group_errors=np.expm1(errors),
        device_errors=np.expm1(device_errors),
        model_errors=np.expm1(model_errors),
        coverage=share,
        half_width=half,
        mlperf_factor=float(np.exp(x[2])),
        fitted=model_of(
            x,
            bands(groups, errors),
            devices=sorted({DEVICES[g.device] for g in groups}),
            unseen_device=bands(groups, device_errors),
            unseen_network=bands(groups, model_errors),
        ),
    )


def table(found: Report) -> str:
    """Return the report as text."""
    lines = [f"{'configuration':82s} {'ms':>8s} {'group':>7s} {'device':>7s} {'model':>7s}   (relative error, held out)"]
    for g, *errors in zip(found.groups, found.group_errors, found.device_errors, found.model_errors, strict=True):
        lines.append(f"{g.name:82s} {g.latency_ms:8.3f} " + " ".join(f"{e:+7.0%}" for e in errors))
    orin = np.array([g.architecture == "ampere" and g.precision == "int8" for g in found.groups])
    low = np.array([g.precision != "fp32" for g in found.groups])
    for title, held in (("groups", found.group_errors), ("devices", found.device_errors), ("models", found.model_errors)):
        size = np.abs(held)
        lines.append(
            f"{title} held out: median {np.median(size[orin]):.1%} (Orin INT8), {np.median(size[low]):.1%} (FP16 and INT8), "
            f"{np.median(size):.1%} (all); worst {size[low].max():.1%} (FP16 and INT8), {size.max():.1%} (all)"
        )
    lines.append(f"bands: {found.coverage:.0%} of held-out groups inside, median half-width {found.half_width:.0%}")
    for title, widths in (
        ("a board with published figures", found.fitted.bands),
        ("any other board", found.fitted.unseen_device_bands),
        ("a network unlike those published", found.fitted.unseen_network_bands),
    ):
        halves = ", ".join(f"{p} {math.expm1(width):.0%}" for p, width in widths["ampere"].items())
        lines.append(f"band of {title}: up to {halves} above the prediction")
    lines.append(f"MLPerf entries: {found.mlperf_factor:.2f} of what the model says for a plain file")
    return "\n".join(lines)


def document_of(fitted: Model) -> dict[str, Any]:
    """Return the model as it is stored."""
    return {
        "version": fitted.version,
        "made_by": "python -m edge_targets.fit",
        "clock_exponent": fitted.clock_exponent,
        "architectures": {n: vars(c) for n, c in fitted.architectures.items()},
        "bands": fitted.bands,
        "devices": fitted.devices,
        "unseen_device_bands": fitted.unseen_device_bands,
        "unseen_network_bands": fitted.unseen_network_bands,
    }


def main() -> None:
    """Print the report and write the constants."""
    try:
        found = report()
    except ToolMissing as e:
        sys.exit(str(e))
    sys.stdout.write(table(found) + "\n")
    write_text(CONSTANTS, json.dumps(document_of(found.fitted), indent=1) + "\n")


if __name__ == "__main__":
    main()
