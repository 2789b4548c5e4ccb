"""Bias correction: rounding shifts each channel's mean a little; a layer's bias can shift it back.

The idea is that of Nagel et al. 2019, arXiv:1906.04721, section 4.2, here measured on data and done in the order of
computation, so that each layer also takes back what the layers before it left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from compress.resnet import ResNet
from rescompress.core.graph import Layer
from rescompress.core.operations import BatchNorm, Conv

LARGEST_BATCH = 2**26
"""Elements of the largest activation that the one batch of a correction may have: 256 MiB in float32."""


def carriers(model: ResNet, quantized: frozenset[str]) -> list[str]:
    """Return the layers whose bias can correct a quantized layer: its BatchNorm, or itself where it has a bias.

    Args:
        model: The network.
        quantized: Names of the layers with rounded weights.
    """
    norms = model.network.folded_norms
    carrier_of = {name: norms.get(name, model.network.by_name[name]) for name in quantized}
    with_bias = {layer.name for layer in carrier_of.values() if f"{layer.name}.bias" in layer.tensors and not _frozen(layer)}
    return [layer.name for layer in model.layers if layer.name in with_bias]


def _frozen(layer: Layer) -> bool:
    return isinstance(layer.operation, BatchNorm | Conv) and layer.operation.frozen


def one_batch(model: ResNet, batches: Sequence[Tensor]) -> Tensor:
    """Return as many of the images as one batch may hold (N, C, H, W), at least 16 where there are so many."""
    largest = max(layer.out_elements for layer in model.layers)
    return torch.cat(list(batches))[: max(16, LARGEST_BATCH // largest)]


@torch.no_grad()
def correct_biases(quantized: ResNet, model: ResNet, x_NCHW: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Return new biases that give each named layer the mean output per channel that it has in the float network.

    Args:
        quantized: Fake-quantized, in eval mode; stays as it is.
        model: The float network, in eval mode.
        x_NCHW: Calibration images.
        names: Layers whose ``bias`` may change, in order of computation.

    Returns:
        Per parameter name (``<layer>.bias``), the corrected bias.
    """
    wanted: dict[str, Tensor] = {}
    corrected: dict[str, Tensor] = {}

    def channels(value: Tensor) -> Tensor:
        return value.double().mean([d for d in range(value.dim()) if d != 1])

    def note(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, value: Tensor) -> None:
            wanted[name] = channels(value)

        return hook

    def repair(name: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(layer: nn.Module, _: object, value: Tensor) -> Tensor:
            shift = (channels(value) - wanted[name]).to(value.dtype)
            bias = layer.bias
            assert isinstance(bias, Tensor)
            corrected[f"{name}.bias"] = bias.detach() - shift
            return value - shift.reshape(-1, *[1] * (value.dim() - 2))

        return hook

    for network, make in ((model, note), (quantized, repair)):
        handles = [network.get_submodule(name).register_forward_hook(make(name)) for name in names]
        try:
            network(x_NCHW)
        finally:
            for handle in handles:
                handle.remove()
    return corrected
