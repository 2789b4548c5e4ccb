"""Puts the biases of INT8 layers on the grid of their integer accumulators.

An INT8 layer sums products of integers, each worth ``s_x s_w`` (the scales of its input and of the output channel's
weight). Runtimes that keep biases as integers round them to that step; onnxruntime does so when it loads a file with float
biases. A bias that is a multiple of the step already survives every such rounding unchanged, so the network that was
evaluated is the network that runs. The step is a small fraction of an activation's, and moving a bias by half of it does
not change accuracy; not doing it makes onnxruntime differ five times more from fake quantization.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from compress.checkpoints.base import Checkpoint
from rescompress.core.layers import walk

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
    layers = walk(checkpoint.spec)
    norm_of = {layer.inputs[0]: layer for layer in layers if layer.op == "batch_norm"}
    source_of = {layer.name: layer.inputs[0] for layer in layers if layer.op == "dropout"}
    tensors = dict(checkpoint.state_dict)
    for layer in layers:
        weight = quantization.weight(layer.name)
        if weight is None or weight.scale is None or (layer.name not in norm_of and not layer.bias):
            continue
        data = quantization.activation(source_of.get(layer.inputs[0], layer.inputs[0]))
        if data is None or data.scale is None:
            continue
        step_O = torch.tensor(weight.scale, dtype=torch.float64) * data.scale[0]
        offset_O = torch.zeros_like(step_O)
        key = f"{layer.name}.bias"
        if layer.name in norm_of:
            norm = norm_of[layer.name]
            gain_O = tensors[f"{norm.name}.weight"].double() / torch.sqrt(
                tensors[f"{norm.name}.running_var"].double() + norm.eps
            )
            inner_O = tensors[key].double() if layer.bias else torch.zeros_like(gain_O)
            offset_O = (inner_O - tensors[f"{norm.name}.running_mean"].double()) * gain_O
            step_O = step_O * gain_O.abs()
            key = f"{norm.name}.bias"
        bias_O = tensors[key].double() + offset_O
        steps_O = torch.round(bias_O / step_O.clamp_min(torch.finfo(torch.float64).tiny))
        moved_O = torch.where((steps_O.abs() < LARGEST) & (step_O > 0), steps_O * step_O, bias_O)
        tensors[key] = (moved_O - offset_O).to(tensors[key].dtype)
    return replace(checkpoint, state_dict=tensors)
