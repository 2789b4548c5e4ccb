"""What 2:4 sparsity and FP8 are said to bring: nothing is promised that the sources do not hold."""

import json
import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_targets import catalog
from edge_targets.catalog import all_targets, load_device, load_target
from edge_targets.fp8 import refuse_file
from edge_targets.kernels import Kernel, fuse
from edge_targets.latency import predict_kernels
from edge_targets.sparsity import gain_note, gain_of, weights_note
from rescompress.core.errors import ModelFileError, TargetError
from rescompress.core.layers import walk
from rescompress.core.settings import ExportSettings
from rescompress.runs.stages.export import export_options

ORIN = "jetson-orin-nano-8gb-super"

CAPABILITIES_WITH_FP8 = ("8.9", "9.0", "10.0", "11.0", "12.0", "12.1")
"""Ada, Hopper, Blackwell and Thor."""


def kernels(*sizes, groups=1):
    return [Kernel(f"k{i}", "conv", 49, a, b, 9, groups, 49) for i, (a, b) in enumerate(sizes)]


def test_only_layers_with_more_than_256_channels_on_both_sides_count():
    device = load_device(ORIN)
    found = gain_of(kernels((256, 512), (512, 256), (257, 257), (512, 512)), device, "int8")
    assert found.wide == ["k2", "k3"]
    assert [layer[:3] for layer in found.layers] == [("k0", 256, 512), ("k1", 512, 256), ("k2", 257, 257), ("k3", 512, 512)]
    assert gain_of(kernels((512, 512), groups=2), device, "int8").wide == []


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_bound_is_half_of_what_the_wide_layers_compute_and_move(precision):
    device, some = load_device(ORIN), kernels((64, 64), (512, 512))
    found = gain_of(some, device, precision)
    predicted = predict_kernels(some, device, precision=precision)
    wide = predicted.kernels[1]
    assert found.share == pytest.approx((wide.compute_ms + wide.memory_ms) / 2 / predicted.p50_ms)
    assert 0 < found.share < 0.5
    assert "an upper bound" in gain_note(found)
    assert "k1" in gain_note(found)


@pytest.mark.parametrize(
    ("device", "precision", "text"),
    [
        ("jetson-nano", "fp16", "no sparse tensor cores"),
        ("jetson-agx-xavier", "int8", "no sparse tensor cores"),
        ("cpu", "int8", "no sparse kernels"),
        (ORIN, "fp32", "FP16 or INT8"),
    ],
)
def test_where_nothing_can_be_gained_that_is_said(device, precision, text):
    found = gain_of(kernels((512, 512)), load_device(device), precision)
    assert (found.wide, found.share) == ([], 0.0)
    assert text in gain_note(found)
    assert "no gain is to be expected" in gain_note(found)


def test_a_cifar_network_gains_nothing_and_a_resnet50_something_at_most():
    from compress.zoo import spec

    device = load_device(ORIN)
    small = gain_of(fuse(walk(spec("resnet20-cifar"))), device, "int8") if _has("resnet20-cifar") else None
    large = gain_of(fuse(walk(spec("resnet50"))), device, "int8")
    assert large.wide
    assert 0 < large.share < 0.5
    assert small is None or "no gain" in gain_note(small)


def _has(name):
    from compress.zoo import spec
    from rescompress.core.errors import RescompressError

    try:
        spec(name)
    except RescompressError:
        return False
    return True


def write(path, weight, *, fp8=False):
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="c")]
    if fp8:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("Conv", ["d", "w"], ["y"], name="c"),
        ]
    constants = [numpy_helper.from_array(weight.astype(np.float32), "w")]
    if fp8:
        constants += [
            numpy_helper.from_array(np.float32(0.1), "s"),
            helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0]),
        ]
    o, i = weight.shape[:2]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, i, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, o, 4, 4])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    return path


def test_a_file_without_zeros_is_told(tmp_path):
    weight = np.random.default_rng(0).standard_normal((8, 8, 1, 1))
    assert "no weight of dense.onnx" in weights_note(write(tmp_path / "dense.onnx", weight))
    sparse = weight.copy()
    sparse[:, [0, 1, 4, 5]] = 0
    assert weights_note(write(tmp_path / "sparse.onnx", sparse)) is None
    almost = sparse.copy()
    almost[0, 0] = 1.0
    assert weights_note(write(tmp_path / "almost.onnx", almost)) is not None


def test_deploy_tells_what_sparsity_can_bring(rescompress, tmp_path):
    file = write(tmp_path / "m.onnx", np.ones((8, 8, 1, 1)))
    done = rescompress("deploy", file, "--dry-run", "-t", ORIN, "--sparsity", "--json")
    notes = json.loads(done.stdout)["notes"]
    assert any("no gain is to be expected" in n for n in notes)
    assert any("no weight of m.onnx" in n for n in notes)


@pytest.fixture
def read_once(monkeypatch):
    """Have the device files read once, not for every refusal, which names the boards with units."""
    targets = all_targets()
    monkeypatch.setattr(catalog, "all_targets", lambda: targets)


@pytest.mark.usefixtures("read_once")
def test_fp8_is_refused_for_want_of_evidence_where_there_are_units():
    for name in ("jetson-thor-t5000", "rtx-sm89", "rtx-sm120"):
        with pytest.raises(TargetError, match="nothing shows") as e:
            load_target(name).check_precision("fp8")
        for source in ("TensorRT #4590", "TensorRT #4599", "rf-detr #955"):
            assert source in e.value.what


@pytest.mark.usefixtures("read_once")
def test_fp8_is_refused_for_want_of_units_elsewhere():
    for name in (ORIN, "jetson-nano", "rtx-sm86", "cpu"):
        with pytest.raises(TargetError, match="no FP8 units"):
            load_target(name).check_precision("fp8")


def test_a_file_in_fp8_is_refused_with_the_boards_that_have_units_and_the_reason():
    with pytest.raises(TargetError, match="no file is written in FP8") as e:
        export_options(ExportSettings(precision="fp8"))
    named = set(re.findall(r"[a-z0-9-]+", e.value.what.partition(" have units")[0]))
    with_units = {t.name for t in all_targets() if t.device.compute_capability in CAPABILITIES_WITH_FP8}
    assert with_units
    assert with_units == named & {t.name for t in all_targets()}
    assert "INT8 has the same peak" in e.value.what
    for source in ("TensorRT #4590", "TensorRT #4599", "rf-detr #955"):
        assert source in e.value.what


def test_a_file_in_fp8_is_not_taken_for_a_float_one(rescompress, tmp_path):
    weight = np.ones((8, 8, 1, 1))
    refuse_file(write(tmp_path / "float.onnx", weight))
    file = write(tmp_path / "fp8.onnx", weight, fp8=True)
    with pytest.raises(ModelFileError, match="FP8"):
        refuse_file(file)
    for words in (("deploy", file, "--dry-run", "-t", "jetson-thor-t5000"), ("predict", file, "-t", ORIN)):
        assert "FP8" in rescompress(*words, code=5).stderr
    assert "no FP8 units" in rescompress("predict", "arch:resnet18", "-t", ORIN, "--precision", "fp8", code=5).stderr
