"""Convolution and BatchNorm as one linear map, and back.

Shape suffixes: O output channels, I input channels of a group, K kernel side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from rescompress.core.graph import Layer
from rescompress.core.operations import BatchNorm
from rescompress.core.recipe import network_of

_DEAD = 1e-6


def norm_of(checkpoint: Checkpoint, layer: Layer) -> Layer | None:
    """Return the BatchNorm that is one with a convolution or linear layer, or None."""
    return network_of(checkpoint.spec).folded_norms.get(layer.name)


def gain(tensors: Mapping[str, Tensor], norm: Layer) -> Tensor:
    """Return the factor of each channel of a BatchNorm in eval mode."""
    assert isinstance(norm.operation, BatchNorm)
    var_O = tensors[f"{norm.name}.running_var"]
    spread_O = (var_O + norm.operation.eps).sqrt()
    return tensors[f"{norm.name}.weight"] / spread_O if norm.operation.scale else torch.ones_like(var_O) / spread_O


def shift(tensors: Mapping[str, Tensor], norm: Layer) -> Tensor:
    """Return the bias of a BatchNorm; zeros where it has none."""
    key = f"{norm.name}.bias"
    return tensors[key] if key in tensors else torch.zeros_like(tensors[f"{norm.name}.running_var"])


@dataclass(frozen=True)
class Folded:
    """A convolution (or linear layer) with what follows it linearly.

    Attributes:
        weight_OIKK: OIKK, or OI for a linear layer.
        bias_O: Of the output.
        output: Name of the tensor it makes: the BatchNorm's where there is one.
    """

    weight_OIKK: Tensor
    bias_O: Tensor
    output: str


def folded(checkpoint: Checkpoint, layer: Layer) -> Folded:
    """Return a convolution or linear layer with its BatchNorm (eval mode) folded in.

    Args:
        checkpoint: Where the tensors are.
        layer: A convolution or linear layer of its walk.
    """
    t = checkpoint.state_dict
    w = t[f"{layer.name}.weight"]
    b = t.get(f"{layer.name}.bias", torch.zeros(len(w), dtype=w.dtype))
    norm = norm_of(checkpoint, layer)
    if norm is None:
        return Folded(w, b, layer.name)
    scale = gain(t, norm)
    bias = shift(t, norm) + scale * (b - t[f"{norm.name}.running_mean"])
    return Folded(w * scale.reshape(-1, *[1] * (w.dim() - 1)), bias, norm.name)


def unfolded(checkpoint: Checkpoint, layer: Layer, new: Folded, mean_O: Tensor, var_O: Tensor) -> dict[str, Tensor]:
    """Return the tensors of convolution and BatchNorm that together compute `new` in eval mode.

    The BatchNorm's running statistics become those of the data, so that training goes on from there; but for what a BatchNorm
    without scale or shift has no other place for.

    Args:
        checkpoint: Where the old tensors are.
        layer: The convolution or linear layer.
        new: The linear map wanted, of the same shapes.
        mean_O: Mean of the output of `new` over the data.
        var_O: Its variance.
    """
    t = checkpoint.state_dict
    w = t[f"{layer.name}.weight"]
    result: dict[str, Tensor] = {}
    norm = norm_of(checkpoint, layer)
    if norm is None:
        result[f"{layer.name}.weight"] = new.weight_OIKK.reshape(w.shape)
        if f"{layer.name}.bias" in t:
            result[f"{layer.name}.bias"] = new.bias_O
        return {k: v.to(w.dtype).contiguous() for k, v in result.items()}
    n = norm.name
    assert isinstance(norm.operation, BatchNorm)
    eps = norm.operation.eps
    old = gain(t, norm).to(new.weight_OIKK.dtype)
    scale = torch.where(old.abs() < _DEAD, torch.ones_like(old), old)
    conv_bias = t.get(f"{layer.name}.bias", torch.zeros(len(w))).to(scale.dtype)
    running_mean = (mean_O - new.bias_O) / scale + conv_bias
    running_var = var_O / scale.square()
    if not norm.operation.scale:  # the factor is the variance's alone, so it stays
        running_var = t[f"{n}.running_var"]
    if not norm.operation.shift:
        running_mean = conv_bias - new.bias_O / scale
    result[f"{layer.name}.weight"] = new.weight_OIKK.reshape(w.shape) / scale.reshape(-1, *[1] * (w.dim() - 1))
    if norm.operation.scale:
        result[f"{n}.weight"] = scale * (running_var + eps).sqrt()
    if norm.operation.shift:
        result[f"{n}.bias"] = mean_O
    result[f"{n}.running_mean"] = running_mean
    result[f"{n}.running_var"] = running_var
    return {k: v.to(w.dtype).contiguous() for k, v in result.items()}
