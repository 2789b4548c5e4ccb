"""Convolution and BatchNorm as one linear map, and back.

Shape suffixes: O output channels, I input channels of a group, K kernel side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from rescompress.core.layers import Layer

_DEAD = 1e-6


def norm_of(layer: Layer) -> str:
    """Return the name of the BatchNorm behind a convolution, whether or not there is one."""
    *path, leaf = layer.name.split(".")
    if path and path[-1] == "downsample":
        return ".".join([*path, "1"])
    return ".".join([*path, leaf.replace("conv", "bn")])


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
    norm = norm_of(layer)
    if layer.op != "conv" or f"{norm}.weight" not in t:
        return Folded(w, b, layer.name)
    scale = t[f"{norm}.weight"] / (t[f"{norm}.running_var"] + checkpoint.spec.bn_eps).sqrt()
    bias = t[f"{norm}.bias"] + scale * (b - t[f"{norm}.running_mean"])
    return Folded(w * scale[:, None, None, None], bias, norm)


def unfolded(checkpoint: Checkpoint, layer: Layer, new: Folded, mean_O: Tensor, var_O: Tensor) -> dict[str, Tensor]:
    """Return the tensors of convolution and BatchNorm that together compute `new` in eval mode.

    The BatchNorm's running statistics become those of the data, so that training goes on from there.

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
    if new.output == layer.name:
        result[f"{layer.name}.weight"] = new.weight_OIKK.reshape(w.shape)
        if f"{layer.name}.bias" in t:
            result[f"{layer.name}.bias"] = new.bias_O
        return {k: v.to(w.dtype).contiguous() for k, v in result.items()}
    n = new.output
    eps = checkpoint.spec.bn_eps
    old = (t[f"{n}.weight"] / (t[f"{n}.running_var"] + eps).sqrt()).to(new.weight_OIKK.dtype)
    scale = torch.where(old.abs() < _DEAD, torch.ones_like(old), old)
    conv_bias = t.get(f"{layer.name}.bias", torch.zeros(len(w))).to(scale.dtype)
    running_mean = (mean_O - new.bias_O) / scale + conv_bias
    running_var = var_O / scale.square()
    result[f"{layer.name}.weight"] = new.weight_OIKK.reshape(w.shape) / scale[:, None, None, None]
    result[f"{n}.weight"] = scale * (running_var + eps).sqrt()
    result[f"{n}.bias"] = mean_O
    result[f"{n}.running_mean"] = running_mean
    result[f"{n}.running_var"] = running_var
    return {k: v.to(w.dtype).contiguous() for k, v in result.items()}
