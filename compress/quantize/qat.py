"""Quantization-aware training: the network to train, and the checkpoint it becomes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.checkpoints.base import Checkpoint
from compress.finite import all_finite
from compress.quantize.fake_quant import (
    SMALLEST_LEARNT,
    ActivationQuantizer,
    WeightQuantizer,
    attach,
    fake_quant_model,
    require_quantization,
    weight_scale,
)
from compress.resnet import ResNet, build_model, tensors_of
from rescompress.core.errors import CheckpointError, DataError
from rescompress.core.quantizers import Quantization


def prepare_qat(checkpoint: Checkpoint, *, learnable_scales: bool = False) -> ResNet:
    """Return a network to train whose forward computes as the INT8 network does, in training mode.

    Activation scales are the checkpoint's; each weight's scale follows the weight. Start from the result of `ptq`.

    Args:
        checkpoint: A quantized checkpoint.
        learnable_scales: Train all scales too (LSQ: Esser et al. 2020, arXiv:1902.08153).

    Raises:
        CheckpointError: The checkpoint is not quantized, or its quantizers do not fit.
    """
    quantization = require_quantization(checkpoint)
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    attach(model, quantization, follow_weights=True, learnable=learnable_scales)
    return model.train()


def finish_qat(model: ResNet, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint that a trained network of `prepare_qat` has become.

    Args:
        model: The trained network; stays as it is.
        checkpoint: The one it was prepared from.

    Raises:
        CheckpointError: The checkpoint is not quantized, or training diverged.
    """
    before = require_quantization(checkpoint)
    tensors = tensors_of(model)
    state_dict = {name: tensors[name] for name in checkpoint.state_dict}
    for name, value in state_dict.items():
        if value.is_floating_point() and not all_finite(value):
            raise CheckpointError(f"training diverged: {name} holds NaN or infinity", remedy="train with a lower learning rate")
    quantizers = []
    for q in before.quantizers:
        if q.kind == "weight":
            fake = model.get_submodule(f"{q.tensor}.weight_quantizer")
            assert isinstance(fake, WeightQuantizer)
            scale = (
                fake.scale.clamp(min=SMALLEST_LEARNT)
                if fake.learnable
                else weight_scale(state_dict[f"{q.tensor}.weight"], q.high)
            )
        else:
            module = model.activations[(q.shares or q.tensor).replace(".", "/")]
            assert isinstance(module, ActivationQuantizer)
            scale = module.scale.clamp(min=SMALLEST_LEARNT) if module.learnable else module.scale
        quantizers.append(q.model_copy(update={"scale": tuple(scale.detach().cpu().tolist())}))
    quantization = Quantization(profile=before.profile, quantizers=tuple(quantizers), method="qat")
    return replace(checkpoint, state_dict=state_dict, quantization=quantization)


@torch.no_grad()
def labelled_loss(checkpoint: Checkpoint, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return the fraction of wrong answers and the mean cross-entropy (nats) of a quantized checkpoint.

    Args:
        checkpoint: Quantized.
        batches: Preprocessed images (N, C, H, W) and labels (N,).

    Raises:
        DataError: No images.
    """
    model = fake_quant_model(checkpoint)
    wrong, entropy, count = 0, 0.0, 0
    for x_NCHW, y_N in batches:
        logits_NK = model(x_NCHW).double()
        if logits_NK.shape[1] == 1:
            logits_NK = torch.cat([torch.zeros_like(logits_NK), logits_NK], 1)
        wrong += int((logits_NK.argmax(1) != y_N).sum())
        entropy += float(F.cross_entropy(logits_NK, y_N.long(), reduction="sum"))
        count += len(y_N)
    if count == 0:
        raise DataError("no images to choose the better of two networks by", remedy="hold some training images out")
    return wrong / count, entropy / count


def best_of(candidates: Sequence[Checkpoint], batches: Iterable[tuple[Tensor, Tensor]]) -> Checkpoint:
    """Return the candidate with the fewest wrong answers, by cross-entropy where they are equal, the first of equals.

    Choosing is part of training: give images that were held out of the training split, never those that the result is
    reported on.

    Args:
        candidates: Quantized checkpoints, such as the results of calibration and of training.
        batches: Preprocessed images and labels; gone through once for each candidate.

    Raises:
        DataError: No images.
    """
    losses = [labelled_loss(candidate, batches) for candidate in candidates]
    return candidates[min(range(len(candidates)), key=lambda i: losses[i])]
