"""Gradients of the loss at inner tensors, without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.device import drawn
from compress.finite import all_finite
from compress.prune.method import Context
from compress.resnet import ResNet
from rescompress.core.errors import DataError


def sampled_gradients(
    context: Context, model: ResNet, x_NCHW: Tensor, tensors: Sequence[str]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield, batch by batch, the value and the per-image gradient of the named tensors.

    The loss is the cross entropy with labels drawn from the network's own predictions: its gradients have the Fisher
    matrix as their second moment, and no true label is needed. The loss of any other network is a
    random projection of its outputs.

    Args:
        context: For the seed and the progress.
        model: The dense network, in eval mode.
        x_NCHW: Images.
        tensors: Names of the walk.

    Raises:
        DataError: The outputs are not finite.
    """
    generator = torch.Generator("cpu").manual_seed(context.seed)
    wanted = set(tensors)
    size = max(1, min(64, 64_000_000 // max(sum(layer.out_elements for layer in model.layers), 1)))
    for start in range(0, len(x_NCHW), size):
        batch = x_NCHW[start : start + size].clone().requires_grad_(True)
        seen: dict[str, Tensor] = {}

        def watch(name: str, value: Tensor, seen: dict[str, Tensor] = seen) -> None:
            if name in wanted:
                seen[name] = value

        outputs = model.outputs(batch, watch)
        if not all(all_finite(output) for output in outputs):
            raise DataError("the dense network's outputs hold NaN or infinity", remedy="check the checkpoint and the data")
        head = model.network.num_classes is not None
        loss = torch.stack([_sampled_loss(output, generator, head=head) for output in outputs]).sum()
        gradients = torch.autograd.grad(loss, list(seen.values()))
        yield {name: (value.detach(), g) for (name, value), g in zip(seen.items(), gradients, strict=True)}
        context.progress("measuring the loss", min(start + size, len(x_NCHW)), len(x_NCHW))


def _sampled_loss(logits_NK: Tensor, generator: torch.Generator, *, head: bool) -> Tensor:
    """Return the summed loss."""
    if not head:
        directions_NK = torch.randn(logits_NK.shape, generator=generator, device="cpu")
        return (logits_NK * directions_NK.to(logits_NK.device)).sum()
    if logits_NK.shape[1] == 1:
        p = torch.sigmoid(logits_NK.detach())
        y = (drawn(tuple(p.shape), generator) < p).to(p.dtype)
        return F.binary_cross_entropy_with_logits(logits_NK, y, reduction="sum")
    y = torch.multinomial(logits_NK.detach().softmax(1).cpu(), 1, generator=generator).flatten().to(logits_NK.device)
    return F.cross_entropy(logits_NK, y, reduction="sum")
