"""Predicted latency of a network on a device that is not here, per kernel and in total, with an error band.

One kernel takes::

    overhead * (1 GHz / f)^1.25
    + padded MACs * w / (SMs * f * rate * e)  +  depth * reduce * width of a number / f
    + (weights + activations * c) / (bandwidth * b)

with f the GPU clock, rate the dense MACs per multiprocessor and clock, e and b the fractions of compute and bandwidth that
real kernels reach. w is below 1 for 3x3 convolutions of stride 1 that run as Winograd kernels (GPUs before Ampere, not in
INT8) and above 1 for grouped ones. `reduce` is the length of the sum that makes one output: it cannot be spread over
multiprocessors. c runs from `cached` (activations that are small beside the second-level cache) to 1. Channels are padded to
the multiple that the kernels work on; a convolution in FP16 whose channels are not a multiple of it also pays a kernel that
pads them. Everything is a sum, so the cost of a network is the sum over its kernels, and a width function costs
microseconds.

The constants are fitted to published latencies by `edge_targets.fit`; its cross-validation gives the bands.
docs/latency.md has the figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from edge_targets.device import Device, Precision
from edge_targets.kernels import Kernel, fuse
from edge_targets.likeness import Profile, alike, profile_of
from rescompress.core.errors import BadInput, TargetError
from rescompress.core.layers import Layer
from rescompress.core.metric import Metric
from rescompress.core.showing import Showing

CONSTANTS = Path(__file__).parent / "data" / "latency_constants.json"

BYTES: Mapping[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
WINOGRAD_TAPS = 9
GROUP_ALIGN = 8
"""Channels per group of a grouped convolution are padded to this: such kernels do not use the 32-channel vectors."""


@dataclass(frozen=True)
class Constants:
    """What is fitted for one GPU architecture.

    Attributes:
        overhead_us: Of one kernel at a GPU clock of 1 GHz.
        bandwidth: Fraction of the memory bandwidth that kernels reach.
        compute: Per precision, the fraction of the dense peak that kernels reach.
        winograd: Per precision that has Winograd kernels, the share of the direct arithmetic that they need.
    """

    overhead_us: float
    bandwidth: float
    compute: Mapping[Precision, float]
    winograd: Mapping[Precision, float]


@dataclass(frozen=True)
class Model:
    """The whole fitted model.

    Attributes:
        version: Changes whenever a constant or a band does.
        clock_exponent: How the overhead grows as the GPU clock falls.
        depth_ns: Time per term of the sum behind one output, at 1 GHz, for numbers of two bytes.
        grouped: Time per MAC of a grouped convolution, in that of a dense one.
        cached: Time per byte of an activation that stays in the second-level cache, in that of one that does not.
        architectures: Constants per GPU architecture.
        bands: Per architecture and precision, the half-width of the band in log space, for boards in `devices` and networks
            like those in `networks`: from errors with all figures of the network on the board held out.
        devices: Boards with published figures in the fit.
        unseen_device_bands: As `bands`, for any other board: from errors with whole devices held out.
        networks: Per architecture, the networks that enough is known of there.
        unlike_bands: As `bands`, for networks unlike those: from errors with whole networks held out.
        unlike_unseen_bands: As `unlike_bands`, for any other board: from errors with network and device held out.
    """

    version: str
    clock_exponent: float
    depth_ns: float
    grouped: float
    cached: float
    architectures: Mapping[str, Constants]
    bands: Mapping[str, Mapping[str, float]]
    devices: tuple[str, ...]
    unseen_device_bands: Mapping[str, Mapping[str, float]]
    networks: Mapping[str, Sequence[Profile]]
    unlike_bands: Mapping[str, Mapping[str, float]]
    unlike_unseen_bands: Mapping[str, Mapping[str, float]]


@cache
def fitted_model() -> Model:
    """Return the model that ships with this package."""
    document = json.loads(CONSTANTS.read_text(encoding="utf-8"))
    del document["made_by"]
    architectures = {name: Constants(**c) for name, c in document.pop("architectures").items()}
    networks = {name: tuple(Profile(*p) for p in found) for name, found in document.pop("networks").items()}
    devices = tuple(document.pop("devices"))
    return Model(**document, architectures=architectures, devices=devices, networks=networks)


@dataclass(frozen=True)
class Overrides:
    """Clocks and multiprocessors that differ from a named power mode.

    Attributes:
        sm_count: Active multiprocessors.
        gpu_mhz: GPU clock.
        emc_mhz: Memory clock.
    """

    sm_count: int | None = None
    gpu_mhz: float | None = None
    emc_mhz: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no hardware has.

        Raises:
            BadInput: A value is not positive.
        """
        for name, value in (("--sm-count", self.sm_count), ("--gpu-mhz", self.gpu_mhz), ("--emc-mhz", self.emc_mhz)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise BadInput(
                    f"must be a positive number, not {value}", where=name, remedy="leave it out for the power mode's"
                )


@dataclass(frozen=True)
class KernelTime:
    """Predicted time of one kernel.

    Attributes:
        name: Of the layer it starts with.
        kind: ``conv``, ``linear``, ``pool``, ``move`` or ``pad``.
        ms: All of it.
        overhead_ms: Launch and start.
        compute_ms: Arithmetic, what cannot be spread over multiprocessors included.
        memory_ms: Traffic.
    """

    name: str
    kind: str
    ms: float
    overhead_ms: float
    compute_ms: float
    memory_ms: float


@dataclass(frozen=True, repr=False)
class LatencyPrediction(Showing):
    """Predicted latency of one call.

    Attributes:
        p50_ms: Of the whole network.
        low_ms: Lower end of the band.
        high_ms: Upper end.
        kernels: Per kernel, in order.
        device: Name of the device.
        precision: What it computes in.
        batch: Images per call.
        power_mode: Name of the mode, ``custom`` where something was overridden.
        sm_count: Active multiprocessors.
        gpu_mhz: GPU clock.
        emc_mhz: Memory clock.
        model: Version of the constants.
        notes: What to know before trusting the band.
    """

    p50_ms: float
    low_ms: float
    high_ms: float
    kernels: tuple[KernelTime, ...]
    device: str
    precision: Precision
    batch: int
    power_mode: str
    sm_count: int
    gpu_mhz: float
    emc_mhz: float
    model: str
    notes: tuple[str, ...] = ()

    def shows(self) -> Mapping[str, str]:
        """Return the latency with its band, and of what."""
        return {
            "predicted": f"{self.p50_ms:.3g} ms ({self.low_ms:.3g} to {self.high_ms:.3g})",
            "device": self.device,
            "precision": self.precision,
            "batch": str(self.batch),
            "mode": self.power_mode,
            **({"notes": "; ".join(self.notes)} if self.notes else {}),
        }

    def metric(self) -> Metric:
        """Return the latency as a predicted `Metric` with its band."""
        return Metric(
            value=self.p50_ms,
            unit="ms",
            provenance="predicted",
            low=self.low_ms,
            high=self.high_ms,
            device=self.device,
            runtime="tensorrt",
            precision=self.precision,
            batch=self.batch,
            power_mode=self.power_mode,
            model=self.model,
        )


class Rates(NamedTuple):
    """The price of each unit of work, in ms.

    Attributes:
        overhead_ms: Per kernel.
        mac_ms: Per padded multiply-accumulate of a dense convolution.
        byte_ms: Per byte from memory.
        depth_ms: Per term of the sum behind one output.
        winograd: Share of the arithmetic that 3x3 convolutions of stride 1 need; 1 where they run directly.
        grouped: Times the arithmetic of a dense one that a grouped convolution costs.
        cached: Share of `byte_ms` that a byte of a small activation costs.
        cache_bytes: An activation of this size is half-way between a cached one and one in memory.
        align: Channels are padded to multiples of this.
        element_bytes: Of one weight or activation.
        pad_kernels: Whether unaligned channels cost a kernel of their own.
    """

    overhead_ms: float
    mac_ms: float
    byte_ms: float
    depth_ms: float
    winograd: float
    grouped: float
    cached: float
    cache_bytes: float
    align: int
    element_bytes: int
    pad_kernels: bool


class Work(NamedTuple):
    """What one kernel does for a batch.

    Attributes:
        macs: Multiply-accumulates, channels padded.
        bytes: Read and written, channels padded.
        pad_bytes: Moved by a kernel that pads the input's channels; 0 where none is needed.
        weight_bytes: The weights among `bytes`.
        reduce: Terms of the sum behind one output, channels padded.
    """

    macs: int
    bytes: int
    pad_bytes: int
    weight_bytes: int
    reduce: int


def padded(channels: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `channels`."""
    return -(-channels // multiple) * multiple


def work_of(kernel: Kernel, *, batch: int, align: int, element_bytes: int, pad_kernels: bool) -> Work:
    """Return what `kernel` does for `batch` images."""
    into, out = kernel.in_width, kernel.width
    if kernel.kind in ("conv", "linear"):
        unaligned = not kernel.first and into % align != 0
        into = into if kernel.first else padded(into, align)
        out = padded(out, align)
        per_group = into if kernel.groups == 1 else padded(kernel.in_width // kernel.groups, min(align, GROUP_ALIGN))
        weights = out * kernel.taps * per_group
        read = batch * kernel.in_pixels * into
        moved = read + batch * kernel.pixels * out * (2 if kernel.skip else 1) + weights
        pad = 2 * read if unaligned and pad_kernels and kernel.kind == "conv" else 0
        return Work(
            batch * kernel.pixels * weights,
            moved * element_bytes,
            pad * element_bytes,
            weights * element_bytes,
            kernel.taps * per_group,
        )
    if not kernel.first:
        into, out = padded(into, align), padded(out, align)
    moved = batch * (kernel.in_pixels * into + kernel.pixels * out * (2 if kernel.skip else 1))
    return Work(0, moved * element_bytes, 0, 0, 0)


def runs_winograd(kernel: Kernel) -> bool:
    """Whether a convolution has the shape that Winograd kernels take: dense, 3x3, stride 1, and not of the image itself."""
    return (
        kernel.kind == "conv"
        and kernel.taps == WINOGRAD_TAPS
        and kernel.groups == 1
        and kernel.pixels == kernel.in_pixels
        and not kernel.first
    )


def rates(
    device: Device,
    precision: Precision,
    *,
    power_mode: str | None = None,
    overrides: Overrides | None = None,
    model: Model | None = None,
) -> Rates:
    """Return the prices of a device in one power mode.

    Raises:
        TargetError: The device has no latency model, lacks the precision, or has no such power mode.
    """
    model = model or fitted_model()
    sms, gpu_mhz, emc_mhz, _ = clocks(device, power_mode, overrides)
    constants = _constants(device, model)
    if device.bandwidth_gb_s is None or device.max_emc_mhz is None or device.l2_mb is None:
        raise _no_model(device)
    bandwidth = device.bandwidth_gb_s.value * emc_mhz / device.max_emc_mhz.value
    efficiency = constants.compute.get(precision)
    rate = device.macs_per_clock(precision)
    if efficiency is None:
        raise _no_model(device)
    return Rates(
        overhead_ms=constants.overhead_us / 1000.0 * (1000.0 / gpu_mhz) ** model.clock_exponent,
        mac_ms=1.0 / (sms * gpu_mhz * 1e3 * rate * efficiency),
        byte_ms=1.0 / (bandwidth * 1e6 * constants.bandwidth),
        depth_ms=model.depth_ns * 1e-6 * 1000.0 / gpu_mhz * BYTES[precision] / 2,
        winograd=constants.winograd.get(precision, 1.0),
        grouped=model.grouped,
        cached=model.cached,
        cache_bytes=device.l2_mb.value * 2**20,
        align=device.align[precision],
        element_bytes=BYTES[precision],
        pad_kernels=precision == "fp16",
    )


def clocks(device: Device, power_mode: str | None, overrides: Overrides | None) -> tuple[int, float, float, str]:
    """Return multiprocessors, GPU MHz, memory MHz and the name of the mode that a prediction is for.

    Raises:
        TargetError: The device has no latency model or no such power mode.
        BadInput: An override is none that the device can have.
    """
    if not device.modes:
        raise _no_model(device)
    mode = device.mode(power_mode)
    if overrides is None or overrides == Overrides():
        return mode.sm_count, mode.gpu_mhz, mode.emc_mhz, mode.name
    _check_range("--sm-count", overrides.sm_count, 1, max(m.sm_count for m in device.modes), device)
    for option, value, own in (
        ("--gpu-mhz", overrides.gpu_mhz, max(m.gpu_mhz for m in device.modes)),
        ("--emc-mhz", overrides.emc_mhz, max(m.emc_mhz for m in device.modes)),
    ):
        _check_range(option, value, SLOWEST_MHZ, OVERCLOCKED * own, device)
    return (
        overrides.sm_count or mode.sm_count,
        overrides.gpu_mhz or mode.gpu_mhz,
        overrides.emc_mhz or mode.emc_mhz,
        f"{mode.name}, changed",
    )


def _check_memory(kernels: Sequence[Kernel], price: Rates, batch: int, device: Device) -> None:
    """Refuse a batch of which one layer alone reads and writes more than the board's memory holds.

    Raises:
        BadInput: It does.
    """
    if device.memory_gb is None:
        return

    def needed(kernel: Kernel) -> int:
        return work_of(
            kernel, batch=batch, align=price.align, element_bytes=price.element_bytes, pad_kernels=price.pad_kernels
        ).bytes

    largest = max(kernels, key=needed, default=None)
    memory = device.memory_gb.value * 1e9
    if largest is not None and needed(largest) > memory:
        raise BadInput(
            f"{largest.name} alone moves {needed(largest) / 1e9:.3g} GB for {batch} images, the board has {memory / 1e9:g}",
            where="--batch",
            remedy="give a smaller batch, or smaller images",
        )


SLOWEST_MHZ = 10.0
OVERCLOCKED = 2.0
"""How far above the highest clock of its modes a board is believed to run; later releases of its software add modes."""


def _check_range(option: str, value: float | None, low: float, high: float, device: Device) -> None:
    if value is not None and not low <= value <= high:
        raise BadInput(
            f"{value:g} is out of the range of {device.title}",
            where=option,
            remedy=f"give {low:g} to {high:g}, or leave it out",
        )


def _no_model(device: Device) -> TargetError:
    return TargetError(
        f"no latency is predicted for {device.title}",
        where=f"--target {device.name}",
        remedy="measure there with `rescompress bench`, or name a Jetson",
    )


LIKE = {"blackwell": "ampere"}
"""Architectures without published ResNet latencies, and whose constants stand in; their bands are twice as wide as those of
other boards without published figures."""


def _constants(device: Device, model: Model) -> Constants:
    found = model.architectures.get(LIKE.get(device.architecture, device.architecture))
    if found is None:
        raise _no_model(device)
    return found


def is_known(kernels: Sequence[Kernel], device: Device, model: Model | None = None) -> bool:
    """Whether enough published figures are of networks like this one, on boards of the same GPU architecture."""
    model = model or fitted_model()
    profile = profile_of(kernels)
    return any(alike(profile, p) for p in model.networks.get(LIKE.get(device.architecture, device.architecture), ()))


def band(device: Device, precision: Precision, *, known: bool, model: Model | None = None) -> float:
    """Return the half-width of the error band in log space: low = p50 / exp(band), high = p50 * exp(band).

    Args:
        device: With figures of its own in the fit, a board is predicted far better than one that the fit never saw.
        precision: What the network computes in.
        known: Whether the network is like those of the fit (`is_known`).
        model: The fitted one when None.
    """
    model = model or fitted_model()
    if device.name in model.devices:
        bands = model.bands if known else model.unlike_bands
    else:
        bands = model.unseen_device_bands if known else model.unlike_unseen_bands
    half = bands[LIKE.get(device.architecture, device.architecture)][precision]
    return half * (2.0 if device.architecture in LIKE else 1.0)


def band_notes(device: Device, *, known: bool, model: Model | None = None) -> tuple[str, ...]:
    """Return which band a prediction has, and why: what was known of the network and of the board."""
    model = model or fitted_model()
    notes = []
    if device.name not in model.devices:
        fitted_on = "other boards" if device.architecture not in LIKE else "boards of another GPU architecture"
        notes.append(
            f"no published figure of this board: the constants are fitted to {fitted_on}, and the band is wider for it"
        )
    architecture = LIKE.get(device.architecture, device.architecture).capitalize()
    if known:
        notes.append(f"the band is that of networks like those with published figures on {architecture} GPUs")
    else:
        notes.append(
            f"too few published figures on {architecture} GPUs are of networks like this one: the band is wider for it, "
            "made from errors with whole networks held out"
        )
    return tuple(notes)


def price_of(kernel: Kernel, price: Rates, *, batch: int) -> tuple[float, float, float]:
    """Return the ms that a kernel computes and moves data, and those of a kernel that pads its input (0 where none does)."""
    macs, moved, pad, weights, reduce = work_of(
        kernel, batch=batch, align=price.align, element_bytes=price.element_bytes, pad_kernels=price.pad_kernels
    )
    factor = price.grouped if kernel.groups > 1 else price.winograd if runs_winograd(kernel) else 1.0
    compute = macs * factor * price.mac_ms + reduce * price.depth_ms
    return compute, _traffic(moved - weights, weights, price), price.overhead_ms + _traffic(pad, 0, price) if pad else 0.0


def _traffic(activations: int, weights: int, price: Rates) -> float:
    share = price.cached + (1 - price.cached) * activations / (activations + price.cache_bytes)
    return (activations * share + weights) * price.byte_ms


def kernel_times(kernels: Sequence[Kernel], price: Rates, *, batch: int) -> list[KernelTime]:
    """Return the predicted time of each kernel, pad kernels included."""
    times = []
    for kernel in kernels:
        compute, memory, pad = price_of(kernel, price, batch=batch)
        if pad:
            times.append(KernelTime(f"{kernel.name} pad", "pad", pad, price.overhead_ms, 0.0, pad - price.overhead_ms))
        total = price.overhead_ms + compute + memory
        times.append(KernelTime(kernel.name, kernel.kind, total, price.overhead_ms, compute, memory))
    return times


def predict(
    layers: Sequence[Layer],
    device: Device,
    *,
    precision: Precision,
    batch: int = 1,
    power_mode: str | None = None,
    overrides: Overrides | None = None,
) -> LatencyPrediction:
    """Return the predicted latency of a network on `device`.

    Args:
        layers: The walk over its spec (`rescompress.core.layers.walk`).
        device: A device with a latency model: a Jetson.
        precision: What it computes in.
        batch: Images per call, at least 1.
        power_mode: Of the device; the one with the highest clocks when None.
        overrides: Clocks and multiprocessors that differ from the mode.

    Raises:
        TargetError: The device has no latency model, lacks the precision, or has no such power mode.
        BadInput: The batch is smaller than 1.
    """
    return predict_kernels(fuse(layers), device, precision=precision, batch=batch, power_mode=power_mode, overrides=overrides)


def predict_kernels(
    kernels: Sequence[Kernel],
    device: Device,
    *,
    precision: Precision,
    batch: int = 1,
    power_mode: str | None = None,
    overrides: Overrides | None = None,
) -> LatencyPrediction:
    """Return the predicted latency of kernels that were read from somewhere else than a spec; otherwise as `predict`."""
    if batch < 1:
        raise BadInput(f"a batch of {batch} images", where="--batch", remedy="give 1 or more")
    price = rates(device, precision, power_mode=power_mode, overrides=overrides)
    sms, gpu_mhz, emc_mhz, mode = clocks(device, power_mode, overrides)
    _check_memory(kernels, price, batch, device)
    times = tuple(kernel_times(kernels, price, batch=batch))
    total = sum(t.ms for t in times)
    known = is_known(kernels, device)
    width = math.exp(band(device, precision, known=known))
    return LatencyPrediction(
        p50_ms=total,
        low_ms=total / width,
        high_ms=total * width,
        kernels=times,
        device=device.name,
        precision=precision,
        batch=batch,
        power_mode=mode,
        sm_count=sms,
        gpu_mhz=gpu_mhz,
        emc_mhz=emc_mhz,
        model=fitted_model().version,
        notes=band_notes(device, known=known),
    )


def cost_function(
    device: Device,
    *,
    precision: Precision,
    batch: int = 1,
    power_mode: str | None = None,
    overrides: Overrides | None = None,
) -> Callable[[Sequence[Layer]], float]:
    """Return a function from layers to predicted milliseconds, for a budget in latency.

    The cost of a walk is the sum over its segments (a convolution with what fuses into it), so it can be called with
    either. It takes some 0.3 ms for a ResNet-50 (benchmarks/latency_cost.py).

    Raises:
        TargetError: As `rates`.
    """
    price = rates(device, precision, power_mode=power_mode, overrides=overrides)

    def cost(layers: Sequence[Layer]) -> float:
        total = 0.0
        for kernel in fuse(layers):
            compute, memory, pad = price_of(kernel, price, batch=batch)
            total += price.overhead_ms + compute + memory + pad
        return total

    return cost


def as_document(prediction: LatencyPrediction) -> dict[str, Any]:
    """Return a prediction as JSON values: what ``rescompress predict --json`` prints."""
    return {
        "p50_ms": prediction.p50_ms,
        "low_ms": prediction.low_ms,
        "high_ms": prediction.high_ms,
        "provenance": "predicted",
        "device": prediction.device,
        "precision": prediction.precision,
        "batch": prediction.batch,
        "power_mode": prediction.power_mode,
        "sm_count": prediction.sm_count,
        "gpu_mhz": prediction.gpu_mhz,
        "emc_mhz": prediction.emc_mhz,
        "model": prediction.model,
        "notes": list(prediction.notes),
        "layers": [
            {
                "name": k.name,
                "kind": k.kind,
                "ms": k.ms,
                "overhead_ms": k.overhead_ms,
                "compute_ms": k.compute_ms,
                "memory_ms": k.memory_ms,
            }
            for k in prediction.kernels
        ],
    }
