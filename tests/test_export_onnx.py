"""The ONNX writer against torch, for every kind of ResNet, in float32, float16, INT8 and INT8 + float16."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from export_zoo import (
    ZOO,
    arrays,
    cifar_pad,
    fake_quantized,
    imagenet_bottleneck,
    images,
    logits,
    network,
    quantization_of,
    resnet_d,
)
from onnx import numpy_helper

from export.metadata import read_metadata
from export.parity import OrtRunner, compare_logits
from export.recount import recount
from export.to_onnx import OPSETS, ExportOptions, Precision, to_onnx, weight_integers
from rescompress.core.errors import BadInput, CheckpointError
from rescompress.core.layers import total_macs, walk
from rescompress.core.quantizers import PROFILES, Quantization
from rescompress.core.spec import ModelSpec

DYNAMIC = ExportOptions(batch="dynamic")
every_network = pytest.mark.parametrize("spec", [make() for make in ZOO.values()], ids=list(ZOO))


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


@every_network
def test_float32_computes_what_torch_computes(spec: ModelSpec) -> None:
    model = network(spec)
    x = images(spec, 64, seed=7)
    exported = to_onnx(spec, arrays(model), None, DYNAMIC)
    onnx.checker.check_model(exported, full_check=True)
    expected = logits(model, x)
    parity = compare_logits(expected, OrtRunner(exported)(x.numpy()))
    assert parity.classes >= min(4, expected.shape[1], 2 if expected.shape[1] == 1 else 4)
    assert parity.max_abs < 2e-5 * parity.logit_range
    assert parity.top1_agreement == 1.0


@every_network
def test_every_named_tensor_is_the_one_of_that_name_in_torch(spec: ModelSpec) -> None:
    """All values of the graph that carry a name of the walk, not only the output."""
    model = network(spec)
    x = images(spec, 2, seed=8)
    seen: dict[str, np.ndarray] = {}
    with torch.no_grad():
        model(x, lambda name, value: seen.__setitem__(name, value.numpy()))
    exported = to_onnx(spec, arrays(model), None, DYNAMIC)
    made = [out for node in exported.graph.node for out in node.output if out in seen]
    folded = {layer.inputs[0] for layer in walk(spec) if layer.op == "batch_norm"}
    expected = {layer.name for layer in walk(spec) if layer.op not in ("input", "dropout")} - folded
    last = walk(spec)[-1].name
    identity = {
        layer.name
        for layer in walk(spec)
        if layer.op == "channel_select"
        and layer.operation.channels == tuple(range(layer.in_shape[0]))
        and layer.operation.stride == (1, 1)
    }
    assert set(made) == expected - {last} - identity
    del exported.graph.output[:]
    exported.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    outputs = OrtRunner(exported, optimize=False)._session.run(made, {"input": x.numpy()})
    for name, value in zip(made, outputs, strict=True):
        np.testing.assert_allclose(value, seen[name], atol=2e-5 * np.abs(seen[name]).max(), err_msg=name)


@every_network
@pytest.mark.parametrize("profile", PROFILES)
def test_int8_computes_what_fake_quantization_computes(spec: ModelSpec, profile: str) -> None:
    model = network(spec)
    quantization = quantization_of(model, images(spec, 64, seed=1), profile)
    x = images(spec, 100, seed=9)
    exported = to_onnx(spec, arrays(model), quantization, DYNAMIC)
    onnx.checker.check_model(exported, full_check=True)
    expected = logits(fake_quantized(model, quantization), x)
    parity = compare_logits(expected, OrtRunner(exported, optimize=False)(x.numpy()))
    assert parity.classes >= (2 if expected.shape[1] == 1 else 4)
    assert parity.relative < 1 / 2550, parity
    # Float sums in two orders turn a few roundings over, and these networks decide by little: most where onnxruntime runs
    # convolutions in float. In exact sums of integers torch and the file are equal to the bit: tests/test_quantize_integer.py.
    assert parity.top1_agreement >= (0.98 if profile == "openvino" else 0.99)


@every_network
def test_int8_integers_are_those_of_the_training(spec: ModelSpec) -> None:
    model = network(spec)
    tensors = arrays(model)
    quantization = quantization_of(model, images(spec, 8))
    stored = initializers(to_onnx(spec, tensors, quantization, DYNAMIC))
    rounded = fake_quantized(model, quantization)
    norm_of = {layer.inputs[0]: layer.name for layer in walk(spec) if layer.op == "batch_norm"}
    flipped = 0
    for layer in walk(spec):
        if layer.op not in ("conv", "linear"):
            continue
        weight = stored[f"{layer.name}.weight"]
        assert weight.dtype == np.int8
        assert weight.min() >= -127
        scale = np.asarray(quantization.weight(layer.name).scale, np.float32).reshape(-1, *[1] * (weight.ndim - 1))
        trained = np.rint(rounded.get_submodule(layer.name).weight.detach().numpy() / scale).astype(np.int8)
        gamma = tensors[f"{norm_of[layer.name]}.weight"] if layer.name in norm_of else np.ones(len(weight))
        sign = np.sign(gamma).astype(np.int8).reshape(scale.shape)
        np.testing.assert_array_equal(weight, trained * sign)
        assert (stored[f"{layer.name}.weight.scale"] > 0).all()
        flipped += int((gamma < 0).sum())
    assert flipped or not norm_of


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_passes_the_checker_and_computes_the_same(opset: int) -> None:
    spec = resnet_d()
    model = network(spec)
    quantization = quantization_of(model, images(spec, 16))
    x = images(spec, 4, seed=3).numpy()
    expected = OrtRunner(to_onnx(spec, arrays(model), quantization, DYNAMIC), optimize=False)(x)
    for precision in ("fp32", "fp16", "int8", "int8+fp16"):
        if precision == "int8+fp16" and opset < 19:
            with pytest.raises(BadInput, match="float16 scales"):
                ExportOptions(opset=opset, precision=precision)
            continue
        exported = to_onnx(spec, arrays(model), quantization, ExportOptions(4, opset, precision))
        onnx.checker.check_model(exported, full_check=True)
        assert [(o.domain, o.version) for o in exported.opset_import] == [("", opset)]
        if precision == "int8":
            np.testing.assert_array_equal(OrtRunner(exported, optimize=False)(x), expected)


@pytest.mark.parametrize("profile", ["openvino", "onnxruntime"])
def test_int8_beside_float16_is_for_the_tensorrt_profile_only(profile: str) -> None:
    spec = resnet_d()
    model = network(spec)
    unsigned = quantization_of(model, images(spec, 16), profile)
    with pytest.raises(BadInput, match="tensorrt profile only"):
        to_onnx(spec, arrays(model), unsigned, ExportOptions(1, 19, "int8+fp16"))


@every_network
@pytest.mark.parametrize("precision", ["fp16", "int8+fp16"])
def test_float16_stays_close(spec: ModelSpec, precision: str) -> None:
    model = network(spec)
    quantization = quantization_of(model, images(spec, 64, seed=1))
    x = images(spec, 100, seed=9)
    exported = to_onnx(spec, arrays(model), quantization, ExportOptions("dynamic", 19, precision))
    onnx.checker.check_model(exported, full_check=True)
    expected = logits(model if precision == "fp16" else fake_quantized(model, quantization), x)
    parity = compare_logits(expected, OrtRunner(exported)(x.numpy()))
    # Float16 turns some activations near a rounding border over: less noise than the quantization itself makes.
    noise = compare_logits(logits(model, x), expected).relative
    assert parity.relative < (1 / 255 if precision == "fp16" else 1.5 * noise), parity
    kinds = {a.dtype for a in initializers(exported).values()}
    assert np.dtype(np.float32) not in kinds
    assert np.dtype(np.float16) in kinds


def test_one_pair_per_tensor_shared_by_its_readers_and_scalar_scales() -> None:
    spec = imagenet_bottleneck()
    model = network(spec)
    quantization = quantization_of(model, images(spec, 8))
    exported = to_onnx(spec, arrays(model), quantization, DYNAMIC)
    stored = initializers(exported)
    quantizes = [n for n in exported.graph.node if n.op_type == "QuantizeLinear"]
    assert sorted(n.name for n in quantizes) == sorted(
        f"{q.tensor}.q" for q in quantization.quantizers if q.kind == "activation"
    )
    for node in quantizes:
        assert stored[node.input[1]].shape == ()
        assert stored[node.input[2]].shape == ()
        assert stored[node.input[1]] == np.float32(quantization.activation(node.name[:-2]).scale[0])
    relu = "layer1.1.relu"
    readers = [n.name for n in exported.graph.node if f"{relu}.dq" in n.input]
    assert sorted(readers) == ["layer2.0.conv1", "layer2.0.downsample.0"]
    by_name = {n.name: n for n in exported.graph.node}
    assert list(by_name["layer1.1.add"].input) == ["layer1.1.bn3", "layer1.0.relu.dq"]  # none between Conv and Add
    assert all(stored[n.input[2]].dtype == np.float32 for n in exported.graph.node if n.op_type in ("Conv", "Gemm"))


def test_layers_kept_in_float_have_float_weights() -> None:
    spec = cifar_pad()
    model = network(spec)
    kept = frozenset({"conv1", "fc"})
    quantization = quantization_of(model, images(spec, 64, seed=1), keep_float=kept)
    x = images(spec, 100, seed=2)
    exported = to_onnx(spec, arrays(model), quantization, DYNAMIC)
    stored = initializers(exported)
    assert stored["conv1.weight"].dtype == stored["fc.weight"].dtype == np.float32
    assert stored["layer1.0.conv1.weight"].dtype == np.int8
    assert "input.q" not in {n.name for n in exported.graph.node}
    parity = compare_logits(logits(fake_quantized(model, quantization), x), OrtRunner(exported, optimize=False)(x.numpy()))
    assert parity.relative < 1 / 2550


def test_fixed_batch_takes_any_number_of_images() -> None:
    spec = cifar_pad()
    tensors = arrays(network(spec))
    x = images(spec, 10).numpy()
    expected = OrtRunner(to_onnx(spec, tensors, None, DYNAMIC))(x)
    for batch in (1, 4):
        exported = to_onnx(spec, tensors, None, ExportOptions(batch=batch))
        assert exported.graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
        np.testing.assert_allclose(OrtRunner(exported)(x), expected, atol=1e-4)


@every_network
def test_counts_of_the_file_agree_with_the_walk(spec: ModelSpec) -> None:
    model = network(spec)
    layers = walk(spec)
    weighted = [layer for layer in layers if layer.op in ("conv", "linear")]
    norms = {layer.inputs[0] for layer in layers if layer.op == "batch_norm"}
    biases = sum(layer.out_shape[0] for layer in weighted if layer.operation.bias or layer.name in norms)
    for quantization in (None, quantization_of(model, images(spec, 4))):
        count = recount(to_onnx(spec, arrays(model), quantization, DYNAMIC))
        assert count.macs == total_macs(layers)
        assert count.macs_by_node == {layer.name: layer.macs for layer in weighted}
        assert count.params == sum(layer.weights for layer in weighted) + biases
    sizes = [
        len(to_onnx(spec, arrays(model), quantization, DYNAMIC).SerializeToString())
        for quantization in (None, quantization_of(model, images(spec, 4)))
    ]
    assert sizes[1] < sizes[0]


@every_network
def test_the_file_says_what_it_is(spec: ModelSpec) -> None:
    labels = tuple(f"klasse {i} ü" for i in range(max(2, spec.head.num_classes))) if spec.head else None
    spec = spec.replace(labels=labels)
    model = network(spec)
    exported = onnx.load_from_string(to_onnx(spec, arrays(model), None, DYNAMIC).SerializeToString())
    about = read_metadata(exported)
    assert about is not None
    assert (about.spec, about.profile) == (spec, None)
    for profile in PROFILES:
        quantized = to_onnx(spec, arrays(model), quantization_of(model, images(spec, 4), profile), DYNAMIC)
        assert read_metadata(quantized).profile == profile
    next(p for p in quantized.metadata_props if p.value == profile).value = "tflite"
    with pytest.raises(BadInput, match="tflite"):
        read_metadata(quantized)
    assert exported.producer_name == "rescompress"
    assert read_metadata(onnx.ModelProto()) is None


def test_the_same_network_gives_the_same_bytes() -> None:
    spec = cifar_pad()
    model = network(spec)
    quantization = quantization_of(model, images(spec, 4))
    a, b = (to_onnx(spec, arrays(model), quantization, DYNAMIC).SerializeToString() for _ in range(2))
    assert a == b


def test_bad_tensors_are_refused_by_name() -> None:
    spec = cifar_pad()
    tensors = arrays(network(spec))
    name = "layer2.0.conv1.weight"
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != name}, "missing"),
        ({**tensors, name: tensors[name][:3]}, "shape"),
        ({**tensors, name: np.full_like(tensors[name], np.nan)}, "NaN"),
        ({**tensors, "layer2.0.bn1.running_var": -np.ones(32, np.float32)}, "negative"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            to_onnx(spec, broken, None, DYNAMIC)
        assert caught.value.where.startswith("layer2.0.")
    huge = {**tensors, "fc.bias": np.full(10, 1e6, np.float32)}
    with pytest.raises(CheckpointError, match="float16"):
        to_onnx(spec, huge, None, ExportOptions(precision="fp16"))


def test_quantizers_that_do_not_fit_are_refused() -> None:
    spec = cifar_pad()
    model = network(spec)
    tensors, quantization = arrays(model), quantization_of(model, images(spec, 4))
    with pytest.raises(BadInput, match="needs a quantized network"):
        to_onnx(spec, tensors, None, ExportOptions(precision="int8"))
    first = quantization.quantizers[0]
    for broken, message in (
        (first.model_copy(update={"scale": None}), "no scale"),
        (first.model_copy(update={"tensor": "layer9.0.relu"}), "layer9.0.relu"),
        (first.model_copy(update={"low": -8, "high": 7}), "not the placement"),
        (first.model_copy(update={"tensor": "conv1"}), "not the placement"),
    ):
        with pytest.raises(BadInput, match=message):
            to_onnx(spec, tensors, Quantization(profile="tensorrt", quantizers=(broken, *quantization.quantizers[1:])), DYNAMIC)


@pytest.mark.parametrize("options", [{"opset": 12}, {"opset": 99}, {"batch": 0}, {"batch": "many"}, {"precision": "int4"}])
def test_options_that_no_file_can_meet_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        ExportOptions(**options)


def test_integers_round_as_torch_rounds() -> None:
    """On values at and around the ties, where a division would round otherwise than torch's reciprocal."""
    spec = cifar_pad()
    quantizer = quantization_of(network(spec), images(spec, 2)).weight("layer1.0.conv1")
    scale = torch.rand(16) * 0.01 + 1e-3
    steps = torch.randint(-140, 140, (16, 4000)) + torch.tensor([0.5, 0.4999999, 0.0, 0.5000001]).repeat(1000)
    weight = steps * scale[:, None]
    rounded = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(16, dtype=torch.int32), 0, -127, 127)
    expected = torch.round(rounded / scale[:, None]).numpy().astype(np.int8)
    quantizer = quantizer.model_copy(update={"scale": tuple(scale.tolist())})
    np.testing.assert_array_equal(weight_integers(weight.numpy(), quantizer), expected)


@pytest.mark.parametrize("opset", OPSETS)
def test_onnxruntime_loads_quantized_pad_shortcuts_as_users_do(opset: int) -> None:
    """With its optimizations on: they move quantizers over the Slice of the shortcut."""
    spec = cifar_pad()
    model = network(spec)
    exported = to_onnx(spec, arrays(model), quantization_of(model, images(spec, 16)), ExportOptions(4, opset, "int8"))
    x = images(spec, 4, seed=3).numpy()
    plain = OrtRunner(exported, optimize=False)(x)
    assert np.abs(OrtRunner(exported)(x) - plain).max() <= 0.1 * np.ptp(plain)


def test_a_scale_too_small_for_float16_is_told() -> None:
    spec = resnet_d()
    model = network(spec)
    quantization = quantization_of(model, images(spec, 8))
    first = next(q for q in quantization.quantizers if q.kind == "activation")
    small = tuple(q.model_copy(update={"scale": (1e-8,)}) if q is first else q for q in quantization.quantizers)
    damped = Quantization(profile=quantization.profile, quantizers=small)
    to_onnx(spec, arrays(model), damped, ExportOptions(opset=19, precision="int8"))
    with pytest.raises(CheckpointError, match="1e-08 does not fit float16"):
        to_onnx(spec, arrays(model), damped, ExportOptions(opset=19, precision="int8+fp16"))


@pytest.mark.parametrize("precision", ["int8", "int8+fp16"])
def test_a_layer_of_dead_channels_has_positive_scales(precision: Precision) -> None:
    spec = resnet_d()
    model = network(spec)
    quantization = quantization_of(model, images(spec, 8))
    small = tuple(
        q.model_copy(update={"scale": (1e-9,) * len(q.scale or ())}) if q.tensor == "layer1.0.conv1.weight" else q
        for q in quantization.quantizers
    )
    tensors = {**arrays(model), "layer1.0.bn1.weight": np.zeros_like(arrays(model)["layer1.0.bn1.weight"])}
    exported = to_onnx(
        spec,
        tensors,
        Quantization(profile=quantization.profile, quantizers=small),
        ExportOptions(opset=19, precision=precision),
    )
    stored = {t.name: numpy_helper.to_array(t) for t in exported.graph.initializer}
    assert (stored["layer1.0.conv1.weight.scale"] > 0).all()
    assert not stored["layer1.0.conv1.weight"].any()
