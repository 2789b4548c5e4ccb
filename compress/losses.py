"""What training lowers: losses of labels, of a teacher's answers, and of its features.

Shape suffixes: N batch, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compress.resnet import ResNet
from rescompress.core.errors import BadInput


def distillation_loss(student_NK: Tensor, teacher_NK: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch (Hinton et al. 2015, eq. 1-4).

    A network with one output is read as the two-class network with logits (0, z).
    """
    if student_NK.shape[1] == 1:
        student_NK, teacher_NK = F.pad(student_NK, (1, 0)), F.pad(teacher_NK, (1, 0))
    log_p = F.log_softmax(student_NK / temperature, 1)
    log_q = F.log_softmax(teacher_NK / temperature, 1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def label_loss(logits_NK: Tensor, y: Tensor, *, smoothing: float = 0.0, weights_K: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy; binary where the network has one output.

    The mean is over images, with weights, too: a batch in parts, or shared out to processes, has the loss of the whole one.

    Args:
        logits_NK: Of the network.
        y: Labels (N,), or how much of each class an image is (N, K).
        smoothing: Part of each label that is spread over all classes.
        weights_K: Of the classes.
    """
    if logits_NK.shape[1] > 1:
        if weights_K is None:
            return F.cross_entropy(logits_NK, y, label_smoothing=smoothing)
        return F.cross_entropy(logits_NK, y, weight=weights_K, label_smoothing=smoothing, reduction="sum") / len(y)
    second = y.float() if y.ndim == 1 else y[:, 1]
    if smoothing:
        second = second * (1.0 - smoothing) + smoothing / 2.0
    if weights_K is None:
        return F.binary_cross_entropy_with_logits(logits_NK[:, 0], second)
    z_N = logits_NK[:, 0]
    return -(weights_K[1] * second * F.logsigmoid(z_N) + weights_K[0] * (1.0 - second) * F.logsigmoid(-z_N)).mean()


def class_weights(labels_N: NDArray[np.int64], classes: int) -> Tensor:
    """Return weights (K,) by which every class counts as much as any other; 1 where classes are equally frequent.

    Args:
        labels_N: Of the training images.
        classes: K; those without images weigh nothing.
    """
    counts = np.bincount(labels_N, minlength=classes)
    weights = len(labels_N) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.tensor(np.where(counts > 0, weights, 0.0), dtype=torch.float32)


def output_tensors(model: nn.Module) -> tuple[str, ...]:
    """Return the outputs of a network without class scores, which learns by them alone; none of a classifier."""
    if not isinstance(model, ResNet) or model.network.num_classes is not None:
        return ()
    return tuple(dict.fromkeys(output.tensor for output in model.network.outputs))


def paired_outputs(student: nn.Module, teacher: nn.Module | None) -> tuple[tuple[str, str], ...]:
    """Return the outputs that a network without class scores learns by, with the teacher's; none of a classifier.

    Raises:
        BadInput: There is no teacher, or its outputs are others.
    """
    mine = output_tensors(student)
    if not mine:
        return ()
    theirs = output_tensors(teacher) if teacher is not None else ()
    shapes = [
        [tuple(m.network.by_name[name].out_shape) for name in names] if isinstance(m, ResNet) else []
        for m, names in ((student, mine), (teacher, theirs))
    ]
    if not theirs or shapes[0] != shapes[1]:
        what = "has outputs of other shapes" if theirs else "is needed: a network without class scores learns its outputs"
        raise BadInput(f"a teacher {what}", where="teacher", remedy="give the dense network")
    return tuple(zip(mine, theirs, strict=True))


def shared_features(student: nn.Module, teacher: nn.Module | None) -> tuple[str, ...]:
    """Return the blocks' outputs that student and teacher both have, in the same shape.

    Args:
        student: A `ResNet`.
        teacher: Likewise.

    Raises:
        BadInput: There is no teacher, or they share none.
    """
    outputs = [_block_outputs(m) for m in (student, teacher) if isinstance(m, ResNet)]
    shared = tuple(name for name, shape in outputs[0].items() if outputs[1].get(name) == shape) if len(outputs) == 2 else ()
    if not shared:
        raise BadInput(
            "student and teacher have no block output of the same shape in common",
            where="features",
            remedy="distil the outputs alone, or prune with --scope inner",
        )
    return shared


def _block_outputs(model: ResNet) -> dict[str, tuple[int, ...]]:
    last = {layer.block: layer for layer in model.layers if layer.block is not None}
    return {layer.name: tuple(layer.out_shape) for layer in last.values()}


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over tensors of the squared distance, relative to the teacher's energy.

    The hint loss of Romero et al. 2015 (arXiv:1412.6550, equation 3) without a regressor.

    Args:
        student: Tensors by name.
        teacher: The same names and shapes.
    """
    shares = [
        (student[name].float() - t.float()).square().sum() / t.float().square().sum().clamp_min(1e-12)
        for name, t in teacher.items()
    ]
    return torch.stack(shares).mean()
