"""NNCF as the calibrating engine: its ranges, brought to the names of our walk. The only file that imports nncf."""

# ruff: noqa: E402

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# NNCF reports its use to its makers unless this is set before it is imported (nncf/telemetry/wrapper.py); a calibration
# has no reason to reach for the network. Who wants that sets the variable to an empty string.
os.environ.setdefault("NNCF_CI", "1")
# Importing NNCF makes torch look for a CUDA compiler and warn that there is no GPU to compile for; nothing is compiled here.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

import nncf
import torch
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode
from nncf.torch.function_hook.hook_storage import HookStorage, decode_hook_name
from torch import Tensor, nn

from compress.resnet import ResNet, build_model, tensors_of
from rescompress.core.layers import INPUT


@dataclass(frozen=True)
class Found:
    """One quantizer that NNCF placed, by our names.

    Attributes:
        kind: ``weight``, or ``activation``.
        tensor: Layer name of the weight, or name of the activation tensor.
        low: Smallest integer.
        high: Largest integer.
        range: Magnitude that the largest integer stands for: one number, or one per output channel.
    """

    kind: str
    tensor: str
    low: int
    high: int
    range: tuple[float, ...]


def operations(model: ResNet) -> dict[str, str]:
    """Return, per name that NNCF gives a torch function call of the network, the layer that makes the call.

    NNCF names a call by the module it is made in, the function and a counter. The names are read off its own tracer
    while the network runs layer by layer, so they need no guessing.
    """
    named: dict[str, str] = {}
    copy = build_model(model.spec, tensors_of(model))
    with FunctionHookMode(model=copy, hook_storage=HookStorage()) as mode, torch.no_grad():

        def note(layer: str, _: Tensor) -> None:
            for function, calls in mode.op_calls.items():
                for i in range(calls):
                    named.setdefault(f"{function}/{i}", layer)

        copy.forward(torch.zeros(1, *model.spec.input_shape), note)
    return named


def quantize(model: ResNet, batches: Sequence[Tensor]) -> nn.Module:
    """Return NNCF's own post-training quantization of a float network, with its hooks, not strip()ped.

    Args:
        model: In eval mode; stays as it is.
        batches: Calibration images, each (N, C, H, W).
    """
    copy = build_model(model.spec, tensors_of(model))
    with _quiet():
        quantized: nn.Module = nncf.quantize(
            copy,
            nncf.Dataset(list(batches)),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            target_device=nncf.TargetDevice.ANY,
            subset_size=len(batches),
            advanced_parameters=AdvancedQuantizationParameters(
                # Half the range for the first convolution is for processors whose 16-bit sums overflow; ours do not.
                overflow_fix=OverflowFix.DISABLE,
                disable_bias_correction=True,
                batchwise_statistics=True,
            ),
        )
    return quantized


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's progress bar off the standard output, where our data goes, and its notes off the error output."""
    log = logging.getLogger("nncf")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(before)


def placement(quantized: nn.Module, model: ResNet) -> list[Found]:
    """Return every quantizer in NNCF's result, by our names.

    Args:
        quantized: What `quantize` returned.
        model: The float network it was made from.

    Raises:
        RuntimeError: A quantizer sits where our walk has no tensor.
    """
    layer_of = operations(model)
    layers = {layer.name: layer for layer in model.layers}
    found = []
    for hook, module in get_hook_storage(quantized).named_hooks():
        side, operation, port = decode_hook_name(hook)
        layer = layers.get(layer_of.get(operation, ""))
        if side == "post_hooks" and layer is None and "/" not in operation:
            kind, tensor = "activation", INPUT  # the forward's argument
        elif layer is None:
            raise RuntimeError(f"NNCF placed a quantizer at {hook}, which is no operation of this network")
        elif side == "post_hooks":
            kind, tensor = "activation", layer.name
        elif port == 1 and layer.op in ("conv", "linear"):
            kind, tensor = "weight", layer.name
        elif port < len(layer.inputs):
            kind, tensor = "activation", layer.inputs[port]
        else:
            raise RuntimeError(f"NNCF placed a quantizer at {hook}, which is no input of layer {layer.name}")
        scale = module.scale.detach().abs().flatten().tolist()
        found.append(Found(kind, tensor, module.level_low, module.level_high, tuple(scale)))
    return found
