"""The network on integers against fake quantization and against exact arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from engines import ptq
from quantize_zoo import SPECS, checkpoint_of, images_for
from test_quantize_core import numpy_network

from compress.quantize import fake_quant_model, integer_model, on_grid
from compress.quantize.integer import IntegerLayer
from compress.resnet import tensors_of
from export.integers import in_integers
from export.parity import OrtRunner, compare_logits
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.errors import CheckpointError
from rescompress.core.quantizers import PROFILES

torch.set_num_threads(1)
zoo = pytest.mark.parametrize("arch", sorted(SPECS))
profiles = pytest.mark.parametrize("profile", PROFILES)


def quantized(arch, profile, **options):
    return on_grid(ptq(checkpoint_of(arch), images_for(SPECS[arch]), profile=profile, calibration="max", **options))


@zoo
@profiles
def test_it_is_the_fake_quantized_network(arch, profile):
    checkpoint = quantized(arch, profile)
    x = torch.cat(images_for(SPECS[arch]))
    model = integer_model(checkpoint)
    weights = [q.tensor for q in checkpoint.quantization.quantizers if q.kind == "weight"]
    assert [n for n, m in model.named_modules() if isinstance(m, IntegerLayer)] == weights
    with torch.inference_mode():
        ours, fake = model(x), fake_quant_model(checkpoint)(x)
    exact = numpy_network(checkpoint, x)
    span = float(fake.max() - fake.min())
    assert float((ours - fake).abs().mean()) <= span / 255
    assert float((ours - exact).abs().median()) <= 1e-3 * span


@zoo
@profiles
def test_the_file_in_integers_gives_the_same_bits_in_onnxruntime(arch, profile):
    checkpoint = quantized(arch, profile)
    tensors = {k: v.numpy() for k, v in checkpoint.state_dict.items()}
    exported = to_onnx(checkpoint.spec, tensors, checkpoint.quantization, ExportOptions("dynamic"))
    whole = in_integers(exported)
    onnx.checker.check_model(whole, full_check=True)
    weights = sum(q.kind == "weight" for q in checkpoint.quantization.quantizers)
    assert sum(n.op_type == "Mul" for n in whole.graph.node) == weights
    x = torch.cat(images_for(SPECS[arch], 8))
    with torch.inference_mode():
        ours = integer_model(checkpoint)(x).numpy()
    theirs = OrtRunner(whole, optimize=False)(x.numpy())
    # Only where the output is an average of a pool may the order of a float sum show, in its last bits.
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-6 * float(ours.max() - ours.min()))
    assert SPECS[arch].head is None or np.array_equal(theirs, ours)


@zoo
def test_onnxruntime_in_its_own_integers_is_a_hundredth_of_a_step_away(arch):
    """The profile in which every convolution has a rounded output, so that onnxruntime computes all of them in integers."""
    checkpoint = quantized(arch, "onnxruntime")
    tensors = {k: v.numpy() for k, v in checkpoint.state_dict.items()}
    runner = OrtRunner(to_onnx(checkpoint.spec, tensors, checkpoint.quantization, ExportOptions("dynamic")))
    x = torch.cat(images_for(SPECS[arch], 8))
    with torch.inference_mode():
        parity = compare_logits(integer_model(checkpoint)(x).numpy(), runner(x.numpy()))
    assert parity.relative < 0.1 / 255, parity


def test_the_sums_are_those_of_the_integers_in_any_order():
    checkpoint = quantized("bottleneck", "openvino")
    layer = next(m for m in integer_model(checkpoint).modules() if isinstance(m, IntegerLayer))
    assert torch.equal(layer.layer.weight, layer.layer.weight.round())
    x = torch.randint(-128, 128, (2, *SPECS["bottleneck"].input_shape)).float() / layer.inverse
    with torch.backends.mkldnn.flags(enabled=False):
        other = layer(x)
    assert torch.equal(layer(x), other)


def test_layers_in_floating_point_stay_what_they_are_and_the_checkpoint_too():
    checkpoint = quantized("basic", "tensorrt", keep_float=frozenset({"conv1", "fc"}))
    before = {k: v.clone() for k, v in checkpoint.state_dict.items()}
    model = integer_model(checkpoint)
    assert {"conv1.weight", "bn1.running_var", "fc.bias"} <= set(tensors_of(model))
    assert not isinstance(model.get_submodule("fc"), IntegerLayer)
    with torch.inference_mode():
        x = torch.cat(images_for(SPECS["basic"]))
        ours, fake = model(x), fake_quant_model(checkpoint)(x)
    assert float((ours - fake).abs().mean()) <= float(fake.max() - fake.min()) / 255
    assert all(torch.equal(checkpoint.state_dict[k], v) for k, v in before.items())


def test_a_float_checkpoint_is_refused():
    with pytest.raises(CheckpointError, match="not quantized"):
        integer_model(checkpoint_of("basic"))
