"""Lint on files that other tools really wrote."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_zoo import arrays, cifar_pad, imagenet_basic, images, network
from test_lint_rules import BOARD

from export.lint import lint
from export.passes import repair
from export.to_onnx import ExportOptions, to_onnx


@pytest.mark.slow
def test_onnxruntime_static_quantization_as_it_comes(tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self, x_NCHW: np.ndarray) -> None:
            self.batches = iter([{"input": x_NCHW}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    spec = cifar_pad()
    model = network(spec)
    onnx.save(to_onnx(spec, arrays(model), None, ExportOptions("dynamic")), tmp_path / "float.onnx")
    quantize_static(tmp_path / "float.onnx", tmp_path / "int8.onnx", Images(images(spec, 16).numpy()))
    found = {f.rule for f in lint(onnx.load(tmp_path / "int8.onnx"), BOARD) if f.severity == "error"}
    assert {"int32-bias", "nonzero-zero-point"} <= found
    assert "per-tensor-weights" in {f.rule for f in lint(onnx.load(tmp_path / "int8.onnx"), BOARD)}

    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    reader = Images(images(spec, 16).numpy())
    quantize_static(tmp_path / "float.onnx", tmp_path / "symmetric.onnx", reader, per_channel=True, extra_options=symmetric)
    repaired = repair(onnx.load(tmp_path / "symmetric.onnx"), BOARD)
    assert repaired.modified
    assert [f for f in lint(repaired.model, BOARD) if f.severity == "error"] == []


@pytest.mark.slow
def test_raw_nncf_export(tmp_path: Path) -> None:
    nncf = pytest.importorskip("nncf")
    spec = cifar_pad()
    model = network(spec)
    x = images(spec, 16)
    path = tmp_path / "nncf.onnx"
    try:
        quantized = nncf.quantize(model, nncf.Dataset([x]), subset_size=1)
        torch.onnx.export(quantized, (x[:1],), path, dynamo=False, opset_version=17, input_names=["input"])
    except Exception as e:
        if type(e).__name__ == "ExtensionLoaderTimeoutException":  # NNCF compiles its kernels on first use
            pytest.skip(f"NNCF could not compile its kernels here: {e}")
        raise
    findings = lint(onnx.load(path), BOARD)
    assert "custom-operators" in {f.rule for f in findings if f.severity == "error"}
    assert any("FakeQuantize" in f.message for f in findings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_modelopts_torch_export(tmp_path: Path) -> None:
    """Float weights, BatchNorm left behind the convolutions, a quantizer per reader, and float skips."""
    mtq = pytest.importorskip("modelopt.torch.quantization", reason="ModelOpt (nvidia-modelopt) is not installed")
    spec = imagenet_basic()
    x = images(spec, 16)
    quantized = mtq.quantize(network(spec), copy.deepcopy(mtq.INT8_DEFAULT_CFG), lambda m: m(x))
    path = tmp_path / "modelopt.onnx"
    torch.onnx.export(quantized, (x[:1],), path, dynamo=False, opset_version=17, input_names=["input"])
    model = onnx.load(path)
    found = Counter(f.rule for f in lint(model, BOARD))
    convs = sum(n.op_type == "Conv" for n in model.graph.node)
    assert found == {
        "float-weights": convs + 1,  # and the linear layer
        "batch-norm-unfolded": convs,
        "skip-not-quantized": 4,
        "duplicate-quantizers": 1,  # the first convolution of a stage and its projection read the same tensor
    }
    repaired = repair(model, BOARD)
    # What no pass can mend is the output of the projection: it has no quantizer, so nobody knows its range.
    assert [f.rule for f in lint(repaired.model, BOARD)] == ["skip-not-quantized"]
    assert len(repaired.model.SerializeToString()) < 0.35 * len(model.SerializeToString())
