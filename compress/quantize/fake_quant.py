"""Fake quantization: values rounded to 8 bits and back, with straight-through gradients.

The arithmetic is exactly `integer = clamp(rint(value * (1 / scale)), low, high)` in float32, halves to even, and
`value = integer * scale`; `integer_weights` is the same in integers, so what is trained is what is exported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.checkpoints.base import Checkpoint
from compress.quantize.rounding import round_activation
from compress.resnet import PaddedConv2d, ResNet, build_model
from rescompress.core.errors import CheckpointError
from rescompress.core.quantizers import Quantization, Quantizer

SMALLEST_RANGE = 1e-30
"""A range below this counts as zero: its reciprocal would leave float32."""

SMALLEST_LEARNT = 1e-12
"""A learnt scale stays above this: a step of the optimizer must not carry it through zero."""


def weight_scale(w: Tensor, high: int = 127) -> Tensor:
    """Return the scale (O,) that maps the largest magnitude of each output channel of `w` to `high`.

    A channel of zeros gets the scale 1, and so integers that are all zero.
    """
    largest = w.detach().abs().flatten(1).amax(1)
    return torch.where(largest > SMALLEST_RANGE, largest / high, torch.ones_like(largest))


class ActivationQuantizer(nn.Module):
    """Rounds a whole tensor with one scale.

    Attributes:
        low: Smallest integer.
        high: Largest integer.
        learnable: Whether the scale gets a gradient (LSQ: Esser et al. 2020, arXiv:1902.08153).
    """

    scale: Tensor

    def __init__(self, quantizer: Quantizer, *, learnable: bool = False) -> None:
        """Build from a calibrated quantizer."""
        super().__init__()
        assert quantizer.scale is not None
        self.low, self.high, self.learnable = quantizer.low, quantizer.high, learnable
        scale = torch.tensor(quantizer.scale, dtype=torch.float32)
        if learnable:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid of the scale."""
        if self.learnable:
            self.scale.data.clamp_(min=SMALLEST_LEARNT)
        return round_activation(x, self.scale, self.low, self.high, learnable=self.learnable)


class WeightQuantizer(nn.Module):
    """Rounds a weight with one scale per output channel.

    Attributes:
        low: Smallest integer.
        high: Largest integer.
        follow: Whether the scale is recomputed from the weight in every forward pass.
        learnable: Whether the scale gets a gradient.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, quantizer: Quantizer, *, follow: bool, learnable: bool) -> None:
        """Build from a calibrated quantizer."""
        super().__init__()
        assert quantizer.scale is not None
        self.low, self.high, self.follow, self.learnable = quantizer.low, quantizer.high, follow and not learnable, learnable
        scale = torch.tensor(quantizer.scale, dtype=torch.float32)
        if learnable:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        zero = torch.zeros(len(scale), dtype=torch.float32 if learnable else torch.int32)
        self.register_buffer("zero", zero, persistent=False)

    def forward(self, w: Tensor) -> Tensor:
        """Return `w` on the grid of its scales."""
        if self.learnable:
            self.scale.data.clamp_(min=SMALLEST_LEARNT)
            factor = 1.0 / math.sqrt(w[0].numel() * self.high)
            y: Tensor = torch._fake_quantize_learnable_per_channel_affine(
                w, self.scale, self.zero, 0, self.low, self.high, factor
            )
            return y
        if self.follow:
            self.scale.copy_(weight_scale(w, self.high))
        return torch.fake_quantize_per_channel_affine(w, self.scale, self.zero, 0, self.low, self.high)


class QuantConv2d(PaddedConv2d):
    """A convolution with a rounded weight; its own parameters keep their names."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution with the rounded weight."""
        input = self.padded(input)
        return F.conv2d(
            input, self.weight_quantizer(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class QuantLinear(nn.Linear):
    """A linear layer with a rounded weight; its own parameters keep their names."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with the rounded weight."""
        return F.linear(input, self.weight_quantizer(self.weight), self.bias)


def attach(model: ResNet, quantization: Quantization, *, follow_weights: bool = False, learnable: bool = False) -> None:
    """Put a fake quantizer at every place of `quantization`, in place.

    Args:
        model: A float network.
        quantization: With scales. Quantizers that share another's scale change nothing and get no module.
        follow_weights: Recompute each weight's scale from the weight in every forward pass, for training.
        learnable: Give every scale a gradient.
    """
    for q in quantization.quantizers:
        if q.kind == "activation":
            if q.shares is None:
                model.activations[q.tensor.replace(".", "/")] = ActivationQuantizer(q, learnable=learnable)
            continue
        layer = model.get_submodule(q.tensor)
        # The layer keeps its tensors, names and hooks; only its forward changes.
        layer.__class__ = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
        layer.weight_quantizer = WeightQuantizer(q, follow=follow_weights, learnable=learnable)


def require_quantization(checkpoint: Checkpoint) -> Quantization:
    """Return the checkpoint's quantizers, checked against its spec.

    Raises:
        CheckpointError: There are none, or they do not fit.
    """
    if checkpoint.quantization is None:
        raise CheckpointError("this checkpoint is not quantized", remedy="calibrate it first: rescompress quantize --mode ptq")
    try:
        checkpoint.quantization.check(checkpoint.spec)
    except ValueError as e:
        raise CheckpointError(f"quantizers that do not fit the network: {e}") from e
    return checkpoint.quantization


def fake_quant_model(checkpoint: Checkpoint) -> ResNet:
    """Return the network of a quantized checkpoint, in eval mode, computing as the INT8 network does.

    Raises:
        CheckpointError: The checkpoint is not quantized, or its quantizers do not fit.
    """
    quantization = require_quantization(checkpoint)
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    attach(model, quantization)
    return model.eval()


def integers(w: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], low: int, high: int) -> npt.NDArray[np.int8]:
    """Return the integers of a weight: ``clamp(rint(w * (1 / scale)), low, high)`` in float32, halves to even.

    Args:
        w: The float weight, output channels first.
        scale: One per output channel (O,).
        low: Smallest integer.
        high: Largest integer.
    """
    inverse = (np.float32(1.0) / scale.astype(np.float32)).reshape(-1, *[1] * (w.ndim - 1))
    clamped: npt.NDArray[np.int8] = np.clip(np.rint(w.astype(np.float32) * inverse), low, high).astype(np.int8)
    return clamped


def integer_weights(state_dict: Mapping[str, Tensor], quantization: Quantization) -> dict[str, npt.NDArray[np.int8]]:
    """Return the int8 weight of every quantized layer, by layer name: the integers the network was trained with."""
    return {
        q.tensor: integers(
            state_dict[f"{q.tensor}.weight"].detach().cpu().numpy(), np.asarray(q.scale, dtype=np.float32), q.low, q.high
        )
        for q in quantization.quantizers
        if q.kind == "weight"
    }
