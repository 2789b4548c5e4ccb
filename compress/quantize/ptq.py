"""Post-training quantization: placement, calibration, scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.quantize import calibrate
from compress.quantize.calibrate import Estimator
from compress.quantize.fake_quant import weight_scale
from compress.resnet import build_model
from rescompress.core.errors import CheckpointError, ConfigError
from rescompress.core.quantizers import Profile, Quantization, Quantizer, place


def ptq(
    checkpoint: Checkpoint,
    batches: Iterable[Tensor | Sequence[Tensor]],
    *,
    profile: Profile = "tensorrt",
    calibration: Literal["nncf"] | Estimator = "nncf",
    percentile: float = 99.99,
    keep_float: frozenset[str] = frozenset(),
) -> Checkpoint:
    """Return the checkpoint with every quantizer of the profile, calibrated.

    The tensors stay the float ones: scales are all that is added, and weights are rounded by who computes with them.

    Args:
        checkpoint: A float network.
        batches: Preprocessed calibration images (N, C, H, W), or pairs whose second part is left aside.
        profile: The runtime family whose placement to use.
        calibration: ``nncf``: NNCF's calibration, with ranges for places it has none at by the same estimator; or one
            of ours: ``mean-max``, ``max``, ``percentile``, ``mse``.
        percentile: In percent, for ``percentile``.
        keep_float: Convolution and linear layers to leave in floating point.

    Raises:
        CheckpointError: Already quantized, or a weight that is not finite.
        DataError: Too few images, or an activation that is not finite or zero everywhere.
        ConfigError: A layer of `keep_float` that is not there.
    """
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"already quantized ({checkpoint.quantization.method})", remedy="quantize the float checkpoint it was made from"
        )
    broken = [k for k, v in checkpoint.state_dict.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise CheckpointError(f"{broken[0]} holds NaN or infinity", remedy="use a checkpoint from before training diverged")
    try:
        placed = place(checkpoint.spec, profile, keep_float=keep_float)
    except ValueError as e:
        raise ConfigError(str(e), where="keep_float") from e
    images = calibrate.images(batches)
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    reaches = calibrate.observe(model, images, [q.tensor for q in placed if q.kind == "activation"])
    if calibration == "nncf":
        from compress.quantize import nncf_ptq

        ranges = calibrate.activation_ranges(reaches, placed, "mean-max", percentile=percentile)
        found = nncf_ptq.placement(nncf_ptq.quantize(model, images), model)
        ranges.update({f.tensor: max(f.range) for f in found if f.kind == "activation" and f.tensor in ranges})
    else:
        ranges = calibrate.activation_ranges(reaches, placed, calibration, percentile=percentile)
    quantizers = scaled(placed, ranges, checkpoint.state_dict)
    return replace(checkpoint, quantization=Quantization(profile=profile, quantizers=quantizers))


def scaled(placed: Iterable[Quantizer], ranges: Mapping[str, float], state_dict: Mapping[str, Tensor]) -> tuple[Quantizer, ...]:
    """Return the quantizers with their scales.

    Args:
        placed: Quantizers in order of computation.
        ranges: Per activation tensor, the magnitude of its largest integer.
        state_dict: Where the weights are; each weight's scale maps its channel's largest magnitude to 127.
    """
    done: dict[tuple[str, str], Quantizer] = {}
    for q in placed:
        if q.kind == "weight":
            scale = tuple(weight_scale(state_dict[f"{q.tensor}.weight"], q.high).tolist())
        else:
            scale = (float(np.float32(ranges[q.shares or q.tensor] / q.high)),)
        done[q.kind, q.tensor] = q.model_copy(update={"scale": scale})
    return tuple(done.values())
