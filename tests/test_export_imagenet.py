"""The networks for 224x224 images, whole: INT8 files that are the trained integers, in onnxruntime and TensorRT for RTX.

Random weights with BatchNorm statistics of real images; in a network that predicts one class for everything, equal answers
would say nothing, so at least four classes must be predicted.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from engines import ptq
from onnx import numpy_helper
from photos import crops

from compress import zoo
from compress.checkpoints.base import Checkpoint
from compress.prune.recalibrate import recalibrate
from compress.quantize import fake_quant_model, integer_model, integer_weights, on_grid
from compress.resnet import build_model, tensors_of
from edge_targets.backends import tensorrt_rtx
from export.integers import in_integers
from export.parity import OrtRunner, compare
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.layers import walk

pytestmark = pytest.mark.slow
IMAGES = 100
NETWORKS = {
    "resnet18": {},
    "resnet34": {},
    "resnet50": {},
    "resnet101": {},
    "resnet50-custom-head": {"hidden": (256,), "num_classes": 37, "dropout": 0.2},
}
every_network = pytest.mark.parametrize("name", NETWORKS)


@lru_cache(maxsize=1)
def quantized(name: str) -> Checkpoint:
    torch.manual_seed(0)
    spec = zoo.spec(name.removesuffix("-custom-head"), **NETWORKS[name])
    x = crops(spec, 64, seed=0)
    settled = recalibrate(Checkpoint(spec, tensors_of(build_model(spec))), x, 32)
    with torch.inference_mode():  # no class of its own accord wins
        common_K = torch.cat([build_model(spec, settled.state_dict)(part) for part in x.split(16)]).mean(0)
    last = [layer.name for layer in walk(spec) if layer.op == "linear"][-1]
    settled.state_dict[f"{last}.bias"] -= common_K
    return on_grid(ptq(settled, list(x.split(16)), calibration="mse", bias_correction=False))


def exported(name: str, precision: str = "int8", batch: int | str = "dynamic") -> onnx.ModelProto:
    checkpoint = quantized(name)
    tensors = {k: v.numpy() for k, v in checkpoint.state_dict.items()}
    return to_onnx(checkpoint.spec, tensors, checkpoint.quantization, ExportOptions(batch, precision=precision))


class Torch:
    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self, x_NCHW: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.from_numpy(x_NCHW)).numpy()


@every_network
def test_the_file_holds_the_trained_integers_and_computes_the_same(name: str, record_property) -> None:
    checkpoint, model = quantized(name), exported(name)
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    norm_of = {layer.inputs[0]: layer.name for layer in walk(checkpoint.spec) if layer.op == "batch_norm"}
    for layer, integers in integer_weights(checkpoint.state_dict, checkpoint.quantization).items():
        sign = np.ones(len(integers), np.int8)
        if layer in norm_of:
            sign = np.sign(checkpoint.state_dict[f"{norm_of[layer]}.weight"].numpy()).astype(np.int8)
        assert stored[f"{layer}.weight"].dtype == np.int8
        np.testing.assert_array_equal(stored[f"{layer}.weight"], integers * sign.reshape(-1, *[1] * (integers.ndim - 1)))
    batches = [x.numpy() for x in crops(checkpoint.spec, IMAGES, seed=1).split(20)]
    exact = compare(Torch(integer_model(checkpoint)), OrtRunner(in_integers(model), optimize=False), batches)
    runs = compare(Torch(fake_quant_model(checkpoint)), OrtRunner(model), batches)
    rounding = compare(Torch(build_model(checkpoint.spec, checkpoint.state_dict)), Torch(fake_quant_model(checkpoint)), batches)
    print(f"\n{name}: in integers {exact}\n  as it runs {runs}, {255 * runs.relative:.3f}/255")
    print(f"  INT8 itself {rounding}")
    assert exact.classes >= 4
    assert exact.top1_agreement >= 0.999
    assert exact.relative <= 1e-6
    # Random networks hand every rounding on that float sums turn over; it stays below what INT8 itself does.
    assert runs.mean_abs < rounding.mean_abs


@every_network
@pytest.mark.skipif(not tensorrt_rtx.available(), reason="tensorrt_rtx is not installed")
def test_tensorrt_runs_every_convolution_in_int8_and_builds_the_float_files(name: str, tmp_path: Path) -> None:
    for precision, kind in (("int8", "Int8"), ("fp16", "Half"), ("fp32", "Float")):
        path = tmp_path / f"{precision}.onnx"
        onnx.save(exported(name, precision, 1), path)
        convs = tensorrt_rtx.conv_nodes(path)
        types = dict(tensorrt_rtx.engine(path).compute_types(convs))
        if kind == "Int8":
            assert types == dict.fromkeys(convs, kind)
        else:  # float convolutions that share a kernel are listed under the name of one of them
            assert set(types.values()) - {None} == {kind}
