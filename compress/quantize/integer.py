"""The INT8 network computed as integer hardware computes it: exact sums of integers, one multiplication per output.

`fake_quant_model` sums products of rounded *floats*, and its BatchNorms stand behind the sums; every rounding of a partial
sum may push a value across the border between two integers, and what reads it carries that on. Here convolutions see the
integers themselves, held in float32: every partial sum below 2**24 is exact whatever the order of the sum, so the only
float arithmetic left is one multiplication and one addition per output. A runtime that computes in integers agrees with
this network better than fake quantization agrees with itself on another processor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.checkpoints.base import Checkpoint
from compress.prune.fold import shift
from compress.quantize.bias_grid import exact_gain
from compress.quantize.fake_quant import ActivationQuantizer, fake_quant_model, integer_weights, require_quantization
from compress.resnet import AffineLayer, ResNet, conv_module
from rescompress.core.graph import Layer
from rescompress.core.operations import BatchNorm, Conv
from rescompress.core.quantizers import rounded_at


class DividedActivation(nn.Module):
    """Rounds an activation as ONNX's QuantizeLinear does: ``clamp(rint(x / scale), low, high) * scale``."""

    scale: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.low, self.high = quantizer.low, quantizer.high
        self.register_buffer("scale", quantizer.scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid of the scale."""
        return torch.div(x, self.scale).round_().clamp_(self.low, self.high).mul_(self.scale)


class IntegerLayer(nn.Module):
    """A convolution or linear layer on integers, with its BatchNorm folded into the factor and the bias.

    Attributes:
        layer: The float layer: stride, padding and groups; its weight holds the integers.
    """

    inverse: Tensor
    factor: Tensor
    offset: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, integers: Tensor, step: float, factor_O: Tensor, offset_O: Tensor) -> None:
        """Build from a layer.

        Args:
            layer: The float layer; it is changed.
            integers: Its weight, whole numbers in float32.
            step: Scale of its input.
            factor_O: What one step of the sum is worth, float64.
            offset_O: What is added, float64.
        """
        super().__init__()
        layer.weight = nn.Parameter(integers, requires_grad=False)
        layer.bias = None
        self.layer = layer
        per_channel = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        self.register_buffer("inverse", torch.tensor(step, dtype=torch.float32).reciprocal())
        self.register_buffer("factor", factor_O.float().reshape(per_channel))
        self.register_buffer("offset", offset_O.float().reshape(per_channel))

    def forward(self, x: Tensor) -> Tensor:
        """Return the real values of the outputs for an input on its grid."""
        # The kernels that torch has without oneDNN may be Winograd's, which do not sum integers.
        with torch.backends.nnpack.flags(enabled=False):
            sums: Tensor = self.layer(torch.round(x * self.inverse))
        return sums.mul_(self.factor).add_(self.offset)


@torch.no_grad()
def integer_model(checkpoint: Checkpoint) -> ResNet:
    """Return the network of a quantized checkpoint in eval mode, its INT8 layers computed in exact integer sums.

    Raises:
        CheckpointError: The checkpoint is not quantized, or its quantizers do not fit.
    """
    quantization = require_quantization(checkpoint)
    model = fake_quant_model(checkpoint)
    network = model.network
    tensors = {name: value.double() for name, value in checkpoint.state_dict.items()}
    integers = integer_weights(checkpoint.state_dict, quantization)
    for name, module in model.activations.items():
        assert isinstance(module, ActivationQuantizer)
        model.activations[name] = DividedActivation(module)
    folded = {norm.name for norm in network.folded_norms.values()}
    for layer in model.layers:
        if isinstance(layer.operation, BatchNorm) and layer.name not in folded:
            model.replace_module(layer.name, _normalised(layer, tensors))
        data = quantization.activation(rounded_at(layer.inputs[0], network)) if layer.inputs else None
        weight = quantization.weight(layer.name)
        if data is None or data.scale is None or weight is None or weight.scale is None:
            continue
        gain_O = torch.ones(len(weight.scale), dtype=torch.float64)
        offset_O = tensors.get(f"{layer.name}.bias", torch.zeros_like(gain_O))
        if (norm := network.folded_norms.get(layer.name)) is not None:
            gain_O = exact_gain(tensors, norm)
            offset_O = shift(tensors, norm) + (offset_O - tensors[f"{norm.name}.running_mean"]) * gain_O
            model.replace_module(norm.name, nn.Identity())
        # The file holds the folded scale in float32; so does this factor.
        folded_O = (torch.tensor(weight.scale, dtype=torch.float64) * gain_O).float().double()
        factor_O = folded_O * data.scale[0]
        plain = _plain(layer)
        whole = torch.from_numpy(integers[layer.name]).float()
        model.replace_module(layer.name, IntegerLayer(plain, whole, data.scale[0], factor_O, offset_O))
    return model.eval()


def _normalised(layer: Layer, tensors: Mapping[str, Tensor]) -> AffineLayer:
    """Return a BatchNorm of its own as one factor and one summand in float32, as the file holds it."""
    gain_O = exact_gain(tensors, layer)
    made = AffineLayer(len(gain_O), shift=True)
    assert made.bias is not None
    made.weight.copy_(gain_O)
    made.bias.copy_(shift(tensors, layer) - tensors[f"{layer.name}.running_mean"] * gain_O)
    return made


def _plain(layer: Layer) -> nn.Conv2d | nn.Linear:
    """Return a module of the layer's geometry."""
    if isinstance(layer.operation, Conv):
        return conv_module(layer.operation, layer.in_shape[0])
    return nn.Linear(layer.in_shape[0], layer.out_shape[0])
