"""Biases on the grid of the integers: what onnxruntime rounds when it loads a file is rounded already."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from export_zoo import ZOO, arrays, fake_quantized, images, logits, network, quantization_of
from onnx import numpy_helper

from compress.checkpoints.base import Checkpoint
from compress.quantize.bias_grid import on_grid
from compress.resnet import build_model, tensors_of
from export.parity import OrtRunner, compare_logits
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.layers import walk
from rescompress.core.spec import ModelSpec


@pytest.mark.parametrize("spec", [make() for make in ZOO.values()], ids=list(ZOO))
def test_exported_biases_are_multiples_of_the_step_and_default_onnxruntime_agrees(spec: ModelSpec) -> None:
    model = network(spec)
    checkpoint = Checkpoint(spec, tensors_of(model), quantization_of(model, images(spec, 64, seed=1)))
    snapped = on_grid(checkpoint)
    assert set(snapped.state_dict) == set(checkpoint.state_dict)
    moved = build_model(spec, snapped.state_dict)
    exported = to_onnx(spec, arrays(moved), snapped.quantization, ExportOptions("dynamic"))
    stored = {i.name: numpy_helper.to_array(i) for i in exported.graph.initializer}
    for layer in walk(spec):
        if layer.op not in ("conv", "linear") or f"{layer.name}.bias" not in stored:
            continue
        source = next(n.input[0] for n in exported.graph.node if n.name == layer.name)
        step_O = stored[f"{layer.name}.weight.scale"].astype(np.float64) * stored[source.removesuffix(".dq") + ".scale"]
        steps_O = stored[f"{layer.name}.bias"] / step_O
        alive_O = (stored[f"{layer.name}.weight"].reshape(len(step_O), -1) != 0).any(1) & (np.abs(steps_O) < 2**20)
        assert np.abs(steps_O - np.rint(steps_O))[alive_O].max(initial=0) < 0.05
    x = images(spec, 200, seed=9)
    exact = compare_logits(logits(fake_quantized(moved, snapped.quantization), x), OrtRunner(exported)(x.numpy()))
    noise = compare_logits(logits(model, x), logits(fake_quantized(model, checkpoint.quantization), x)).relative
    assert exact.relative < noise / 2


def test_a_float_network_stays() -> None:
    spec = ZOO["cifar_pad"]()
    checkpoint = Checkpoint(spec, tensors_of(network(spec)), None)
    assert on_grid(checkpoint) is checkpoint


def test_twice_is_once() -> None:
    spec = ZOO["biased"]()
    model = network(spec)
    once = on_grid(Checkpoint(spec, tensors_of(model), quantization_of(model, images(spec, 8))))
    twice = on_grid(replace(once))
    for name, value in once.state_dict.items():
        np.testing.assert_allclose(value.numpy(), twice.state_dict[name].numpy(), rtol=1e-5, atol=1e-7)
