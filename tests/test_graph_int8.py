"""INT8 over random graphs: every profile's placement is written, and the file is the network to the last integer."""

from __future__ import annotations

import pytest
from engines import ptq
from graph_zoo import Maker, images, random_checkpoint, random_network

from compress.checkpoints.base import Checkpoint
from compress.evaluate import TorchRunner
from compress.quantize.bias_grid import on_grid
from compress.quantize.fake_quant import fake_quant_model
from compress.quantize.integer import integer_model
from export.integers import in_integers
from export.lint import TargetFacts, lint
from export.parity import OrtRunner, compare_outputs
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.errors import DataError
from rescompress.core.graph import INPUT
from rescompress.core.operations import Add, BatchNorm, Conv, GlobalPool, GroupNorm, Linear, Multiply, Relu, Sigmoid, Silu
from rescompress.core.quantizers import PROFILES, float_operations, place

seeds = pytest.mark.parametrize("seed", [*range(12), *(pytest.param(s, marks=pytest.mark.slow) for s in range(12, 200))])


FEW_STEPS = 16


def one_step(int8: Checkpoint) -> float:
    """How far an output moves if one value before the last layer is rounded the other way: outputs may lie nearer than that."""
    assert int8.quantization is not None
    last = next(node for node in reversed(int8.spec.nodes) if isinstance(node.operation, Linear | Conv))
    in_order = [max(q.scale) for q in int8.quantization.quantizers if q.kind == "activation" and q.scale]
    return float(int8.state_dict[f"{last.name}.weight"].abs().max()) * in_order[-1]


@seeds
def test_the_file_computes_the_integers_of_the_network(seed: int) -> None:
    network = random_network(seed)
    checkpoint = random_checkpoint(network, seed)
    profile = PROFILES[seed % 3]
    x = images(network, 8)
    try:
        int8 = on_grid(ptq(checkpoint, [x], profile=profile, calibration="max", bias_correction=seed % 2 == 0))
    except DataError as e:
        pytest.skip(f"a tensor of this random network is constant: {e}")
    assert int8.quantization is not None
    int8.quantization.check(network)
    tensors = {k: v.numpy() for k, v in int8.state_dict.items()}
    proto = to_onnx(network, tensors, int8.quantization, ExportOptions(batch="dynamic"))
    whole = OrtRunner(in_integers(proto), optimize=False)
    batch = images(network, 4, seed=5).numpy()
    in_sums = compare_outputs(TorchRunner(integer_model(int8)), whole, [batch])
    in_float = compare_outputs(TorchRunner(fake_quant_model(int8)), TorchRunner(integer_model(int8)), [batch])
    if in_sums.logit_range < FEW_STEPS * one_step(int8):  # the images' outputs are nearly one: no measure of a difference
        assert max(in_sums.mean_abs, in_float.mean_abs) <= one_step(int8)
    else:
        assert in_sums.relative < 2e-3  # what stays float may round another way at the border of two integers
        assert in_float.relative < 2e-2
    facts = TargetFacts(
        "this computer", "onnxruntime" if profile == "onnxruntime" else "openvino", 17, ("fp32", "int8"), {"int8": 1}
    )
    assert not [issue for issue in lint(proto, facts) if issue.severity == "error"]


def test_the_signs_are_proven_and_what_stays_float_is_named() -> None:
    m = Maker()
    a = m.add(Silu(), m.add(BatchNorm(), m.conv(INPUT, 8)), name="silu")
    b = m.add(Relu(), m.add(BatchNorm(), m.conv(a, 8)), name="relu")
    gate = m.add(Sigmoid(), m.add(Linear(width=8), m.add(GlobalPool(), b, name="squeezed")), name="gate")
    c = m.add(Multiply(), b, gate, name="gated")
    d = m.conv(c, 8)
    e = m.add(GroupNorm(groups=2), m.add(Add(), d, c), name="normed")
    network = m.network(m.add(Linear(width=3), m.add(GlobalPool(), e)), classes=True)
    unsigned = {q.tensor for q in place(network, "openvino") if q.kind == "activation" and not q.signed}
    assert {"relu", "squeezed", "gated"} <= unsigned
    assert not {"silu", INPUT, "normed"} & unsigned
    assert all(q.signed for q in place(network, "tensorrt"))
    assert float_operations(network) == {"SiLU": 1, "sigmoid": 1, "products of two tensors": 1, "GroupNorm": 1}


def test_of_a_pre_activation_sum_the_stream_is_the_skip() -> None:
    m = Maker()
    stem = m.conv(INPUT, 8)
    y = m.add(Relu(), m.add(BatchNorm(), stem))
    y = m.conv(y, 8)
    network = m.network(m.add(Linear(width=2), m.add(GlobalPool(), m.add(Add(), stem, y, name="sum"))))
    for profile in PROFILES:
        rounded = [q.tensor for q in place(network, profile) if q.kind == "activation"]
        assert stem in rounded
        assert (y in rounded) == (profile == "onnxruntime")


def test_a_dead_branch_stays_in_float_and_a_dead_stream_is_refused() -> None:
    m = Maker()
    stem = m.add(Relu(), m.add(BatchNorm(), m.conv(INPUT, 8)), name="stem.relu")
    y = m.add(Relu(), m.add(BatchNorm(), stem, name="dead"), name="dead.relu")
    y = m.conv(y, 8, bias=True)
    x = m.add(Add(), y, stem, name="b.add")
    network = m.network(m.add(Linear(width=3), m.add(GlobalPool(), x)), classes=True)
    checkpoint = random_checkpoint(network)
    checkpoint.state_dict["dead.weight"].zero_()
    checkpoint.state_dict["dead.bias"].fill_(-1.0)
    int8 = ptq(checkpoint, [images(network, 8)], profile="onnxruntime", calibration="max")
    assert int8.quantization is not None
    assert int8.quantization.keep_float(network) == {y}
    assert int8.provenance["zero_on_all_images"] == "dead.relu"
    checkpoint.state_dict[network.layers[2].name + ".weight"].zero_()
    checkpoint.state_dict[network.layers[2].name + ".bias"].fill_(-1.0)
    with pytest.raises(DataError, match=r"stem\.relu is zero on all"):
        ptq(checkpoint, [images(network, 8)], profile="onnxruntime", calibration="max")


def test_a_batch_norm_of_its_own_is_the_same_to_the_bit_in_both() -> None:
    m = Maker()
    x = m.conv(INPUT, 8)
    for _ in range(3):
        y = m.conv(m.add(Relu(), m.add(BatchNorm(), x)), 8)
        x = m.add(Add(), x, y)
    network = m.network(m.add(Linear(width=3), m.add(GlobalPool(), x)), classes=True)
    checkpoint = random_checkpoint(network)
    int8 = on_grid(ptq(checkpoint, [images(network, 16)], calibration="max"))
    proto = to_onnx(network, {k: v.numpy() for k, v in int8.state_dict.items()}, int8.quantization, ExportOptions("dynamic"))
    found = compare_outputs(
        TorchRunner(integer_model(int8)), OrtRunner(in_integers(proto), optimize=False), [images(network, 256, 9).numpy()]
    )
    assert found.relative < 1e-5
