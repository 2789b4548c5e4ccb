"""Post-training quantization: placement, calibration, scales, bias correction, and the choice between calibrations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.checkpoints.base import Checkpoint
from compress.finite import all_finite
from compress.processes import ALONE, Together
from compress.quantize import calibrate
from compress.quantize.bias_correction import carriers, correct_biases, one_batch
from compress.quantize.calibrate import Reach
from compress.quantize.fake_quant import fake_quant_model, weight_scale
from compress.resnet import ResNet, build_model
from rescompress.core.errors import CheckpointError, ConfigError, DataError
from rescompress.core.operations import Weighted
from rescompress.core.quantizers import Profile, Quantization, Quantizer, place, rounded_at
from rescompress.core.settings import QuantizeSettings

QUANTIZE = QuantizeSettings()

HELD_OUT = 4
"""``auto`` without images of its own to choose by keeps every fourth calibration image for that."""


@dataclass(frozen=True)
class Candidate:
    """One way to calibrate, and how far the INT8 network's answers are from the float one's on held-out images.

    Attributes:
        calibration: The estimator.
        percentile: For ``percentile``, in percent.
        bias_correction: Whether biases were corrected.
        divergence: Mean Kullback-Leibler divergence of the predicted distributions, in nats; None where it was not needed.
    """

    calibration: str
    percentile: float | None = None
    bias_correction: bool = True
    divergence: float | None = None


def ptq(
    checkpoint: Checkpoint,
    batches: Iterable[Tensor | Sequence[Tensor]],
    settings: QuantizeSettings = QUANTIZE,
    *,
    profile: Profile = "tensorrt",
    keep_float: frozenset[str] = frozenset(),
    selection: Iterable[Tensor | Sequence[Tensor]] | None = None,
    sharing: Together = ALONE,
) -> Checkpoint:
    """Return the checkpoint with every quantizer of the profile, calibrated.

    The weights stay the float ones; scales are added, and with bias correction the biases of BatchNorm, convolution and
    linear layers move. What was chosen, and between what, stands in the provenance under ``calibration``.

    Args:
        checkpoint: A float network.
        batches: Preprocessed calibration images (N, C, H, W), or pairs whose second part is left aside.
        settings: How ranges are estimated, and whether biases are corrected. ``nncf`` is NNCF's calibration, with ranges for
            places it has none at by the same estimator; ``auto`` takes the best of that and ours by the divergence from the
            float network on `selection`, and corrects biases where that is nearer to it.
        profile: The runtime whose placement to use.
        keep_float: Convolution and linear layers to leave in floating point.
        selection: For ``auto``: images from the training data to choose by. None holds a quarter of `batches` out.
        sharing: The processes that share the statistics of our own estimators.

    Raises:
        CheckpointError: Already quantized, or a weight that is not finite.
        DataError: Too few images, or an activation that is not finite or zero everywhere.
        ConfigError: A layer of `keep_float` that is not there.
    """
    calibration, percentile = settings.calibration, settings.percentile
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"already quantized ({checkpoint.quantization.method})", remedy="quantize the float checkpoint it was made from"
        )
    broken = [k for k, v in checkpoint.state_dict.items() if v.is_floating_point() and not all_finite(v)]
    if broken:
        raise CheckpointError(f"{broken[0]} holds NaN or infinity", remedy="use a checkpoint from before training diverged")
    try:
        placed = place(checkpoint.spec, profile, keep_float=keep_float)
    except ValueError as e:
        raise ConfigError(str(e), where="keep_float") from e

    images = calibrate.images(batches)
    chosen_by: list[Tensor] = []
    if calibration == "auto":
        if selection is None:
            images, chosen_by = _hold_out(images)
        else:
            chosen_by = calibrate.images(selection)
    model = build_model(checkpoint.spec, checkpoint.state_dict)
    reaches = calibrate.observe(
        model, images, [q.tensor for q in placed if q.kind == "activation" and q.shares is None], sharing
    )

    dead = sorted({q.tensor for q in placed if q.kind == "activation" and q.shares is None} - set(reaches))
    if dead:  # what reads it stays in floating point: no image says what a step should be worth
        network = checkpoint.network
        readers = {
            layer.name
            for layer in network.layers
            if isinstance(layer.operation, Weighted) and rounded_at(layer.inputs[0], network) in dead
        }
        placed = place(checkpoint.spec, profile, keep_float=keep_float | readers)
        if (
            q := next((q for q in placed if q.kind == "activation" and (q.shares or q.tensor) not in reaches), None)
        ) is not None:
            raise calibrate.no_scale(q.tensor)

    def quantized(candidate: Candidate) -> Checkpoint:
        ranges = _ranges(candidate, model, images, reaches, placed)
        quantizers = scaled(placed, ranges, checkpoint.state_dict)
        result = replace(checkpoint, quantization=Quantization(profile=profile, quantizers=quantizers))
        return _with_biases(result, model, images) if candidate.bias_correction else result

    if calibration != "auto":
        chosen = Candidate(calibration, percentile if calibration == "percentile" else None, settings.bias_correction)
        return _noted(quantized(chosen), chosen, (), dead)
    judge = _Judge(model, chosen_by)
    first = Candidate(calibration="nncf", bias_correction=False)
    ways = [first, *(replace(first, calibration=e) for e in calibrate.ESTIMATORS if e not in ("mean-max", "percentile"))]
    ways += [replace(first, calibration="percentile", percentile=p) for p in sorted({percentile, 99.999})]
    tried = [judge(candidate, quantized(candidate)) for candidate in ways]
    if settings.bias_correction:
        candidate = replace(_best(tried)[0], bias_correction=True)
        tried.append(judge(candidate, quantized(candidate)))
    chosen, result = _best(tried)
    return _noted(result, chosen, [candidate for candidate, _ in tried], dead)


def _best(tried: Sequence[tuple[Candidate, Checkpoint]]) -> tuple[Candidate, Checkpoint]:
    return min(tried, key=lambda pair: pair[0].divergence or 0.0)


class _Judge:
    """Measures candidates against one float network, whose answers it computes once."""

    def __init__(self, model: ResNet, images: Sequence[Tensor]) -> None:
        self.images = images
        self.wanted = [log_probabilities(model, x_NCHW) for x_NCHW in images]

    def __call__(self, candidate: Candidate, result: Checkpoint) -> tuple[Candidate, Checkpoint]:
        return replace(candidate, divergence=divergence(fake_quant_model(result), self.images, self.wanted)), result


def _noted(result: Checkpoint, chosen: Candidate, tried: Sequence[Candidate], dead: Sequence[str]) -> Checkpoint:
    note: dict[str, object] = {"chosen": asdict(chosen), "tried": [asdict(c) for c in tried]}
    said = {"zero_on_all_images": ", ".join(dead)} if dead else {}
    return replace(result, provenance={**result.provenance, "calibration": note, **said})


def _hold_out(images: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    every = torch.cat(list(images))
    size = len(images[0])
    held = torch.arange(len(every)) % HELD_OUT == HELD_OUT - 1
    if int(held.sum()) < calibrate.FEWEST_IMAGES:
        raise DataError(f"{len(every)} images are too few to choose a calibration by", remedy=calibrate.REMEDY)
    return list(torch.split(every[~held], size)), list(torch.split(every[held], size))


def _ranges(
    candidate: Candidate,
    model: ResNet,
    images: Sequence[Tensor],
    reaches: Mapping[str, Reach],
    placed: Sequence[Quantizer],
) -> dict[str, float]:
    percentile = 100.0 if candidate.percentile is None else candidate.percentile
    if candidate.calibration != "nncf":
        estimator = next(e for e in calibrate.ESTIMATORS if e == candidate.calibration)
        return calibrate.activation_ranges(reaches, placed, estimator, percentile=percentile)
    from compress.quantize import nncf_ptq

    ranges = calibrate.activation_ranges(reaches, placed, "mean-max", percentile=percentile)
    found = nncf_ptq.placement(nncf_ptq.quantize(model, images), model)
    ranges.update({f.tensor: max(f.range) for f in found if f.kind == "activation" and f.tensor in ranges})
    return ranges


def _with_biases(quantized: Checkpoint, model: ResNet, images: Sequence[Tensor]) -> Checkpoint:
    assert quantized.quantization is not None
    names = carriers(model, frozenset(q.tensor for q in quantized.quantization.quantizers if q.kind == "weight"))
    corrected = correct_biases(fake_quant_model(quantized), model, one_batch(model, images), names)
    return replace(quantized, state_dict={**quantized.state_dict, **corrected})


def scaled(placed: Iterable[Quantizer], ranges: Mapping[str, float], state_dict: Mapping[str, Tensor]) -> tuple[Quantizer, ...]:
    """Return the quantizers with their scales.

    Args:
        placed: Quantizers in order of computation.
        ranges: Per activation tensor, the magnitude of its largest integer.
        state_dict: Where the weights are; each weight's scale maps its channel's largest magnitude to 127.
    """
    done: list[Quantizer] = []
    for q in placed:
        if q.kind == "weight":
            scale = tuple(weight_scale(state_dict[f"{q.tensor}.weight"], q.high).tolist())
        else:
            scale = (float(np.float32(ranges[q.shares or q.tensor] / q.high)),)
        done.append(q.model_copy(update={"scale": scale}))
    return tuple(done)


def divergence(quantized: ResNet, batches: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the mean Kullback-Leibler divergence, in nats, of a network's predictions from the float network's.

    Args:
        quantized: In eval mode.
        batches: Images, each (N, C, H, W).
        wanted: The float network's `log_probabilities` for each batch.

    Without class scores it is the mean squared distance of the outputs, relative to the float network's.
    """
    total = 0.0
    if sizes := feature_sizes(quantized):
        for x_NCHW, wanted_NF in zip(batches, wanted, strict=True):
            found_NF = log_probabilities(quantized, x_NCHW)
            for a, b in zip(torch.split(wanted_NF, sizes, 1), torch.split(found_NF, sizes, 1), strict=True):
                energy_N = a.double().square().sum(1).clamp_min(1e-12)
                total += float(((b - a).double().square().sum(1) / energy_N).sum()) / len(sizes)
        return total / sum(len(x_NCHW) for x_NCHW in batches)
    for x_NCHW, wanted_NK in zip(batches, wanted, strict=True):
        total += float(F.kl_div(log_probabilities(quantized, x_NCHW), wanted_NK, reduction="sum", log_target=True))
    return total / sum(len(x_NCHW) for x_NCHW in batches)


def feature_sizes(model: ResNet) -> list[int]:
    """Return how many numbers each output of a network has that makes maps or several outputs; nothing of others."""
    shapes = [model.network.by_name[output.tensor].out_shape for output in model.network.outputs]
    return [math.prod(shape) for shape in shapes] if len(shapes) > 1 or len(shapes[0]) > 1 else []


@torch.no_grad()
def log_probabilities(model: ResNet, x_NCHW: Tensor) -> Tensor:
    """Return the log of the predicted distribution (N, K), float64.

    Where the network has one output it is a logit against zero, so K is 2; a backbone's vector of features is taken for
    logits. Maps, and several outputs, are returned one behind the other as they are (N, F), float32.
    """
    if feature_sizes(model):
        return torch.cat([value.flatten(1) for value in model.outputs(x_NCHW)], 1)
    logits_NK = model(x_NCHW).double()
    logits_NK = torch.cat([logits_NK, torch.zeros_like(logits_NK)], 1) if logits_NK.shape[1] == 1 else logits_NK
    return logits_NK.log_softmax(1)
