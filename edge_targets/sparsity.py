"""What 2:4 sparsity can bring with TensorRT: which layers, and at most how much. Nothing here was measured on a board.

Sparse tensor cores multiply at twice the dense rate from compute capability 8.0 on. TensorRT has sparse kernels for
convolutions and matrix products, and its developers expect a gain only from more than 256 input and output channels
(NVIDIA/TensorRT #3849); #4056 and #4065 there and NVIDIA/Model-Optimizer #1974 report none on Orin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_targets.device import Device, Precision
from edge_targets.kernels import Kernel
from edge_targets.latency import predict_kernels
from rescompress.core.errors import TargetError

CHANNELS = 256
"""Input and output channels have to be more."""

SOURCE = "NVIDIA/TensorRT #3849"

FIRST_CAPABILITY = (8, 0)


def is_wide(in_width: int, width: int, groups: int = 1) -> bool:
    """Return whether TensorRT can profit from a layer of so many channels."""
    return groups == 1 and in_width > CHANNELS and width > CHANNELS


def capability_of(device: Device) -> tuple[int, int] | None:
    """Return the compute capability of a device's GPU."""
    major, _, minor = (device.compute_capability or "").partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


@dataclass(frozen=True)
class Gain:
    """What sparse kernels can bring at most.

    Attributes:
        layers: Name of each convolution and matrix product, its input and output channels, and whether it can profit.
        reason: Why nothing can profit on this device or in this precision; empty where something can, or no layer is wide.
        share: Predicted share of the latency that goes at most: half of the arithmetic and of the traffic of the wide layers,
            as if their activations shrank with the weights. None where no latency can be predicted.
    """

    layers: tuple[tuple[str, int, int, bool], ...]
    reason: str
    share: float | None

    @property
    def wide(self) -> list[str]:
        """The layers that can profit."""
        return [name for name, _, _, can in self.layers if can]


def gain_of(kernels: Sequence[Kernel], device: Device, precision: Precision, *, batch: int = 1) -> Gain:
    """Return what sparse kernels can bring a network at most, if the weights of all wide layers have the zeros."""
    known = capability_of(device)
    reason = ""
    if device.runtime not in ("tensorrt", "tensorrt_rtx"):
        reason = f"{device.runtime} has no sparse kernels"
    elif known is None or known < FIRST_CAPABILITY:
        reason = f"{device.title} has no sparse tensor cores (they begin with compute capability 8.0)"
    elif precision == "fp32":
        reason = "sparse kernels compute in FP16 or INT8"
    able = not reason
    layers = tuple(
        (k.name, k.in_width, k.width, able and is_wide(k.in_width, k.width, k.groups))
        for k in kernels
        if k.kind in ("conv", "linear")
    )
    names = {name for name, _, _, can in layers if can}
    if not names:
        return Gain(layers, reason, 0.0)
    try:
        predicted = predict_kernels(kernels, device, precision=precision, batch=batch)
    except TargetError:
        return Gain(layers, reason, None)
    return Gain(
        layers, reason, sum(t.compute_ms + t.memory_ms for t in predicted.kernels if t.name in names) / 2 / predicted.p50_ms
    )


def gain_note(gain: Gain) -> str:
    """Return one sentence: which layers can profit and how much at most, or that nothing is to be expected."""
    if gain.reason:
        return f"2:4 sparsity: no gain is to be expected: {gain.reason}"
    if not gain.wide:
        return (
            f"2:4 sparsity: no gain is to be expected: no layer has more than {CHANNELS} input and output channels ({SOURCE})"
        )
    bound = "no latency is predicted here" if gain.share is None else f"at most {gain.share:.0%} of the predicted latency goes"
    return (
        f"2:4 sparsity: {len(gain.wide)} of {len(gain.layers)} layers have more than {CHANNELS} input and output channels "
        f"({SOURCE}): {', '.join(gain.wide)}; {bound}, an upper bound: users report none on Orin"
    )


def weights_note(path: Path) -> str | None:
    """Return a warning where no weight of an ONNX file has the zeros, which leaves sparse kernels without work."""
    import numpy as np
    from onnx import numpy_helper

    from export.load import load_onnx

    for tensor in load_onnx(path).graph.initializer:
        if len(tensor.dims) not in (2, 4) or tensor.dims[1] % 4:
            continue
        weight = numpy_helper.to_array(tensor)
        groups = weight.reshape(weight.shape[0], weight.shape[1] // 4, 4, -1)
        if np.any(weight) and (np.count_nonzero(groups, axis=2) <= 2).all():
            return None
    return f"2:4 sparsity: no weight of {path.name} has such zeros (`rescompress prune --sparsity 2:4` makes them): no gain"
