"""How sensitive each layer is to quantization, and which layers to leave in floating point.

The measure is the divergence of the network's predictions from the float network's, in nats, on calibration images: it
needs no labels, and sees changes long before a predicted class flips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.quantize import calibrate
from compress.quantize.fake_quant import attach, require_quantization
from compress.quantize.ptq import divergence, log_probabilities
from compress.resnet import ResNet, build_model
from rescompress.core.errors import BudgetError
from rescompress.core.layers import walk
from rescompress.core.quantizers import Quantization, Quantizer, place, rounded_at

AUTO_DIVERGENCE = 0.01
"""In nats: what `mixed_precision` aims at unless told otherwise. About one answer in a hundred changes there."""

Cost = Callable[[frozenset[str]], float]
"""What a network costs, such as predicted milliseconds, with the named layers in floating point."""


@dataclass(frozen=True)
class LayerSensitivity:
    """How sensitive one layer is.

    Attributes:
        layer: A convolution or linear layer.
        divergence: From the float network when this layer alone is quantized (its weight and what it reads), in nats.
        weight_share: Part of the divergence that remains when only its weight is quantized.
    """

    layer: str
    divergence: float
    weight_share: float


@dataclass(frozen=True)
class MixedPrecision:
    """A choice of layers that stay in floating point.

    Attributes:
        keep_float: The layers, the most sensitive first.
        divergence: Of the whole network with them in floating point, in nats.
        all_int8: Of the network with every layer quantized.
        cost: What it costs, where a cost was given.
    """

    keep_float: tuple[str, ...]
    divergence: float
    all_int8: float
    cost: float | None = None


class _Probe:
    """A float network and its answers, against which parts of a quantization are measured."""

    def __init__(self, checkpoint: Checkpoint, reference: Checkpoint | None, images: Sequence[Tensor]) -> None:
        self.checkpoint = checkpoint
        self.quantization = require_quantization(checkpoint)
        self.images = images
        compared = reference or checkpoint
        model = build_model(compared.spec, compared.state_dict)
        self.wanted = [log_probabilities(model, x_NCHW) for x_NCHW in images]

    def __call__(self, quantizers: Sequence[Quantizer]) -> float:
        """Return the divergence with only these quantizers in the network."""
        model: ResNet = build_model(self.checkpoint.spec, self.checkpoint.state_dict)
        if quantizers:
            attach(model, self.quantization.model_copy(update={"quantizers": tuple(quantizers)}))
        return divergence(model, self.images, self.wanted)

    def without(self, keep_float: Iterable[str]) -> tuple[Quantizer, ...]:
        """Return the quantizers that remain when the named layers stay in floating point."""
        return restrict(self.checkpoint, frozenset(keep_float)).quantizers


def restrict(checkpoint: Checkpoint, keep_float: frozenset[str]) -> Quantization:
    """Return the quantization of a checkpoint with more layers in floating point; the scales stay.

    Args:
        checkpoint: Quantized.
        keep_float: Layers to leave in floating point, besides those that are.

    Raises:
        CheckpointError: The checkpoint is not quantized.
        ValueError: A name is no layer, or no layer would be left.
    """
    quantization = require_quantization(checkpoint)
    kept = keep_float | quantization.keep_float(checkpoint.spec)
    places = place(checkpoint.spec, quantization.profile, keep_float=kept)
    scales = {(q.kind, q.tensor): q.scale for q in quantization.quantizers}
    scaled = tuple(q.model_copy(update={"scale": scales[q.kind, q.tensor]}) for q in places)
    return quantization.model_copy(update={"quantizers": scaled})


def sensitivities(
    checkpoint: Checkpoint,
    batches: Iterable[Tensor | Sequence[Tensor]],
    *,
    reference: Checkpoint | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerSensitivity]:
    """Return how sensitive each quantized layer is, in the order of computation.

    Args:
        checkpoint: Quantized.
        batches: Preprocessed images (N, C, H, W), or pairs whose second part is left aside; 64 to 256 are enough.
        reference: The float network to compare with. None compares with the checkpoint's own tensors, unrounded, which
            leaves out what a bias correction did.
        progress: Called with (done, total).

    Raises:
        CheckpointError: The checkpoint is not quantized.
        DataError: Too few images.
    """
    probe = _Probe(checkpoint, reference, calibrate.images(batches))
    layers = [layer for layer in walk(checkpoint.spec) if probe.quantization.weight(layer.name) is not None]
    found = []
    for i, layer in enumerate(layers):
        weight = probe.quantization.weight(layer.name)
        reads = probe.quantization.activation(rounded_at(layer.inputs[0], checkpoint.network))
        assert weight is not None
        whole = probe([q for q in (reads, weight) if q is not None])
        alone = probe([weight])
        found.append(LayerSensitivity(layer.name, whole, min(1.0, alone / whole) if whole > 0 else 0.0))
        if progress is not None:
            progress(i + 1, len(layers))
    return found


def mixed_precision(
    checkpoint: Checkpoint,
    batches: Iterable[Tensor | Sequence[Tensor]],
    *,
    layers: int | None = None,
    max_divergence: float | None = None,
    cost: Cost | None = None,
    max_cost: float | None = None,
    reference: Checkpoint | None = None,
    found: Sequence[LayerSensitivity] | None = None,
) -> MixedPrecision:
    """Return which layers to leave in floating point: the most sensitive first, until the budget is met.

    With `layers`, that many. With `max_divergence`, the fewest of that order that bring the network within it. With
    `max_cost`, as many as the cost allows, and no more than `max_divergence` wants when both are given. With none of
    them, the fewest that bring the network within `AUTO_DIVERGENCE`, but at most a tenth of the layers.

    Args:
        checkpoint: Quantized.
        batches: Preprocessed images (N, C, H, W), or pairs whose second part is left aside.
        layers: Number of layers.
        max_divergence: Accuracy budget, in nats.
        cost: What a network costs with the named layers in floating point, such as a predicted latency.
        max_cost: Latency budget, in the unit of `cost`.
        reference: As in `sensitivities`.
        found: What `sensitivities` returned for the same checkpoint; None measures them.

    Raises:
        BudgetError: No number of layers meets the budget.
        CheckpointError: The checkpoint is not quantized.
        DataError: Too few images.
    """
    images = calibrate.images(batches)
    probe = _Probe(checkpoint, reference, images)
    if found is None:
        found = sensitivities(checkpoint, images, reference=reference)
    order = [s.layer for s in sorted(found, key=lambda s: -s.divergence)]
    most = len(order) - 1
    all_int8 = probe(probe.quantization.quantizers)
    if layers is not None and not 0 <= layers <= most:
        raise BudgetError(f"{layers} of {len(order)} layers in floating point", remedy=f"give 0 to {most}")
    if max_cost is not None:
        if cost is None:
            raise ValueError("a cost budget needs a cost")
        if cost(frozenset()) > max_cost:
            raise BudgetError(
                f"the all-INT8 network costs {cost(frozenset()):.3g}, more than {max_cost:.3g}", remedy="allow more, or prune"
            )
        affordable = [n for n in range(most + 1) if cost(frozenset(order[:n])) <= max_cost]
        most = max(affordable)

    def fewest(wanted: float, most: int) -> int | None:
        return next((n for n in range(most + 1) if probe(probe.without(order[:n])) <= wanted), None)

    if layers is not None:
        count = layers
    elif max_divergence is not None:
        enough = fewest(max_divergence, most)
        if enough is None:
            reached = probe(probe.without(order[:most]))
            raise BudgetError(
                f"with {most} layers in floating point the divergence is {reached:.3g}, more than {max_divergence:.3g}",
                remedy="allow more, calibrate on more images, or train with --mode qat",
            )
        count = enough
    elif max_cost is not None:
        count = most
    else:
        most = min(most, math.ceil(len(order) / 10))
        enough = fewest(AUTO_DIVERGENCE, most)
        count = most if enough is None else enough
    keep = tuple(order[:count])
    value = probe(probe.without(keep))
    return MixedPrecision(keep, value, all_int8, cost(frozenset(keep)) if cost is not None else None)
