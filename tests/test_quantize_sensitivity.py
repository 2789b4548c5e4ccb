"""Per-layer sensitivity and the choice of layers that stay in floating point."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engines import ptq
from quantize_zoo import SPECS, checkpoint_of, images_for

from compress.quantize import fake_quant_model
from compress.quantize.ptq import divergence, log_probabilities
from compress.quantize.sensitivity import mixed_precision, restrict, sensitivities
from compress.resnet import build_model
from rescompress.core.errors import BudgetError, CheckpointError
from rescompress.core.layers import walk

torch.set_num_threads(1)


def damaged(arch, layer, sharpness=1.0):
    """A network that INT8 hurts in one layer: its scales there are far too coarse."""
    checkpoint = checkpoint_of(arch)
    surer = {k: v * sharpness if k.startswith("fc.") else v for k, v in checkpoint.state_dict.items()}
    quantized = ptq(replace(checkpoint, state_dict=surer), images_for(SPECS[arch]), calibration="max", bias_correction=False)
    coarse = tuple(
        q.model_copy(update={"scale": tuple(s * 30 for s in q.scale)}) if (q.kind, q.tensor) == ("weight", layer) else q
        for q in quantized.quantization.quantizers
    )
    return replace(quantized, quantization=quantized.quantization.model_copy(update={"quantizers": coarse}))


@pytest.mark.parametrize("arch", ["basic", "pad", "bottleneck", "hidden-head", "dropout-head"])
def test_every_quantized_layer_is_measured_and_the_damaged_one_minds_most(arch):
    layers = [layer.name for layer in walk(SPECS[arch]) if layer.op in ("conv", "linear")]
    for layer in (layers[1], layers[-1]):
        found = sensitivities(damaged(arch, layer), images_for(SPECS[arch]))
        assert [s.layer for s in found] == layers
        assert max(found, key=lambda s: s.divergence).layer == layer
        assert max(found, key=lambda s: s.divergence).weight_share > 0.8
        assert all(s.divergence > 0 and 0 <= s.weight_share <= 1 for s in found)


def test_the_damaged_layer_is_kept_in_float_and_the_result_is_what_it_says():
    spec, batches = SPECS["pad"], images_for(SPECS["pad"])
    checkpoint = damaged("pad", "fc", sharpness=10.0)
    chosen = mixed_precision(checkpoint, batches)
    assert chosen.keep_float == ("fc",)
    assert chosen.divergence <= 0.01 < chosen.all_int8
    mixed = replace(checkpoint, quantization=restrict(checkpoint, frozenset(chosen.keep_float)))
    mixed.quantization.check(spec)
    assert mixed.quantization.keep_float(spec) == set(chosen.keep_float)
    model = build_model(spec, checkpoint.state_dict)
    wanted = [log_probabilities(model, x) for x in batches]
    assert divergence(fake_quant_model(mixed), batches, wanted) == pytest.approx(chosen.divergence)
    assert divergence(fake_quant_model(checkpoint), batches, wanted) == pytest.approx(chosen.all_int8)


def test_budgets_are_kept_or_refused():
    batches = images_for(SPECS["basic"])
    checkpoint = damaged("basic", "layer2.0.conv1")
    found = sensitivities(checkpoint, batches)
    cost = len  # one millisecond more for each layer in floating point
    assert mixed_precision(checkpoint, batches, layers=0, found=found).keep_float == ()
    assert len(mixed_precision(checkpoint, batches, layers=3, found=found).keep_float) == 3
    afforded = mixed_precision(checkpoint, batches, cost=cost, max_cost=2, found=found)
    assert len(afforded.keep_float) == 2
    assert afforded.cost == 2
    assert afforded.keep_float[0] == "layer2.0.conv1"
    healthy = ptq(checkpoint_of("basic"), batches, calibration="max")
    assert mixed_precision(healthy, batches).keep_float == ()
    loose = mixed_precision(checkpoint, batches, max_divergence=1e9, cost=cost, max_cost=2, found=found)
    assert loose.keep_float == ()
    with pytest.raises(BudgetError, match="give 0 to 8"):
        mixed_precision(checkpoint, batches, layers=9, found=found)
    with pytest.raises(BudgetError, match="divergence is"):
        mixed_precision(checkpoint, batches, max_divergence=0.0, cost=cost, max_cost=1, found=found)
    with pytest.raises(BudgetError, match="all-INT8 network costs"):
        mixed_precision(checkpoint, batches, cost=lambda k: 5 + len(k), max_cost=4, found=found)
    with pytest.raises(CheckpointError, match="not quantized"):
        sensitivities(checkpoint_of("basic"), batches)
