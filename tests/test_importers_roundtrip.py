"""Our own ONNX files come back as the network that they were written from, for every architecture that has a name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rescompress as rc
from compress import zoo
from compress.checkpoints.base import Checkpoint
from compress.importers.proof import difference
from compress.resnet import build_model, tensors_of
from rescompress.core.layers import total_macs
from rescompress.core.operations import BatchNorm

QUICK = ("resnet20", "resnet20_b", "resnet26d", "resnet26_v1")
NAMES = [pytest.param(n, marks=() if n in QUICK else (pytest.mark.slow,)) for n in zoo.names()]


@pytest.mark.parametrize("name", NAMES)
def test_a_network_comes_back_from_onnx(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = tuple(f"kind {i}" for i in range(7))
    spec = zoo.spec(name, num_classes=7, input_shape=(3, 64, 64)).replace(labels=labels)
    model = build_model(spec)
    for key, value in model.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand_like(value) * 0.5 + (0.75 if key.endswith(("weight", "running_var")) else -0.25))
    checkpoint = Checkpoint(spec, tensors_of(model))
    rc.export_onnx(checkpoint, tmp_path / "net.onnx", batch="dynamic")
    back = rc.load_checkpoint(tmp_path / "net.onnx")
    mine, theirs = back.network, checkpoint.network
    assert total_macs(mine.layers) == total_macs(theirs.layers)
    assert (mine.arch, mine.labels, mine.preprocessing) == (theirs.arch, theirs.labels, theirs.preprocessing)
    assert [b.name for b in mine.blocks] == [b.name for b in theirs.blocks]
    kept = [n for n in theirs.nodes if not isinstance(n.operation, BatchNorm)]  # the file has them folded into convolutions
    assert [n.operation.op for n in mine.nodes] == [n.operation.op for n in kept]
    assert list(mine.tensor_shapes)[:2] == ["conv1.weight", "conv1.bias"]
    own = [layer.name for layer in theirs.layers if layer.tensors and not isinstance(layer.operation, BatchNorm)]
    assert [layer.name for layer in mine.layers if layer.tensors] == own
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert difference(build_model(mine, back.state_dict)(x), model.eval()(x)) < 1e-4
