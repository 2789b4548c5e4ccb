"""Puts the biases of INT8 layers on the grid of their integer accumulators.

An INT8 layer sums products of integers, each worth ``s_x s_w`` (the scales of its input and of the output channel's
weight). Runtimes that keep biases as integers round them to that step; onnxruntime does so when it loads a file with float
biases. A bias that is a multiple of the step already survives every such rounding unchanged, so the network that was
evaluated is the network that runs. The step is a small fraction of an activation's, and moving a bias by half of it does
not change accuracy; not doing it makes onnxruntime differ five times more from fake quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from rescompress.core.graph import Layer
from rescompress.core.operations import BatchNorm
from rescompress.core.quantizers import rounded_at

LARGEST = 2**22
"""Biases of more steps than this stay: float32 could not tell the multiples apart."""


def on_grid(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the bias of every INT8 layer, BatchNorm included, at a multiple of its step.

    Args:
        checkpoint: A quantized network; a float one is returned as it is.
    """
    quantization = checkpoint.quantization
    if quantization is None:
        return checkpoint
    network = checkpoint.network
    tensors = dict(checkpoint.state_dict)
    for layer in network.layers:
        weight = quantization.weight(layer.name)
        norm = network.folded_norms.get(layer.name)
        key = f"{(norm or layer).name}.bias"
        if weight is None or weight.scale is None or key not in tensors:
            continue
        data = quantization.activation(rounded_at(layer.inputs[0], network))
        if data is None or data.scale is None:
            continue
        step_O = torch.tensor(weight.scale, dtype=torch.float64) * data.scale[0]
        offset_O = torch.zeros_like(step_O)
        if norm is not None:
            gain_O = exact_gain(tensors, norm)
            own = f"{layer.name}.bias"
            inner_O = tensors[own].double() if own in tensors else torch.zeros_like(gain_O)
            offset_O = (inner_O - tensors[f"{norm.name}.running_mean"].double()) * gain_O
            step_O = step_O * gain_O.abs()
        bias_O = tensors[key].double() + offset_O
        steps_O = torch.round(bias_O / step_O.clamp_min(torch.finfo(torch.float64).tiny))
        moved_O = torch.where((steps_O.abs() < LARGEST) & (step_O > 0), steps_O * step_O, bias_O)
        tensors[key] = (moved_O - offset_O).to(tensors[key].dtype)
    return replace(checkpoint, state_dict=tensors)


def exact_gain(tensors: Mapping[str, Tensor], norm: Layer) -> Tensor:
    """Return the factor of each channel of a BatchNorm in eval mode, in float64."""
    assert isinstance(norm.operation, BatchNorm)
    spread_O = torch.sqrt(tensors[f"{norm.name}.running_var"].double() + norm.operation.eps)
    weight = tensors.get(f"{norm.name}.weight")
    return (torch.ones_like(spread_O) if weight is None else weight.double()) / spread_O
