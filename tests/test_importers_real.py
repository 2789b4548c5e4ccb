"""Networks by other people's training codes (../shared/data/real): opened by a way, equal, pruned, quantized, exported."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from real_nets import CODE, FILES
from torch import nn

import rescompress as rc
from compress.checkpoints.base import Checkpoint
from compress.checkpoints.files import open_file
from compress.checkpoints.roots import flatten
from compress.importers.code import build
from compress.importers.module import tensors_in
from compress.importers.proof import difference
from compress.resnet import build_model
from export.to_onnx import ExportOptions
from rescompress.core.layers import total_macs
from rescompress.runs.settings import Settings
from rescompress.runs.stages.export import write_export

pytestmark = pytest.mark.slow
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def real(shared: Path) -> Path:
    if not (shared / "data" / "real").is_dir():
        pytest.skip("../shared/data/real is not here")
    return shared / "data" / "real"


def opened(real: Path, name: str, folder: Path) -> tuple[Checkpoint, nn.Module | None]:
    """Return the checkpoint of a file, and the network that its code builds with its weights, where it comes by code."""
    function, shape, _ = FILES[name]
    if function is None:
        return rc.load_checkpoint(real / name), None
    (folder / "model.py").write_text(CODE)
    code = f"{folder}/model.py:{function}"
    checkpoint = rc.load_checkpoint(real / name, arch_options={"code": code}, input_shape=shape)
    module = build(code)
    stored = flatten(open_file(real / name))
    own = {key: next(k for k in stored if k == key or k.endswith(f".{key}")) for key in module.state_dict()}
    module.load_state_dict({key: stored[k].read() for key, k in own.items()})
    return checkpoint, module.eval()


@pytest.mark.parametrize("name", FILES)
def test_a_real_network_goes_all_the_way(name: str, real: Path, tmp_path: Path, rescompress: Command) -> None:
    checkpoint, module = opened(real, name, tmp_path)
    _, shape, blocks = FILES[name]
    network = checkpoint.network
    assert network.input_shape == shape
    assert len(network.blocks) == blocks
    assert network.is_residual == bool(blocks)
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(7))
    if module is not None:
        with torch.no_grad():
            wanted = tensors_in(module(x))
        mine = build_model(network, checkpoint.state_dict).outputs(x)
        assert max(difference(a, b) for a, b in zip(mine, wanted, strict=True)) < 1e-4
    smaller = rc.prune(checkpoint, budget=rc.Budget(kind="macs", value=0.6), calibration_x=x).checkpoint
    assert 0.5 < total_macs(smaller.network.layers) / total_macs(network.layers) <= 0.6
    assert smaller.network.is_residual == bool(blocks)
    int8 = rc.quantize(smaller, [x])
    _, _, details = write_export(int8, ExportOptions(), tmp_path / "int8.onnx", Settings(), "key")
    same = details.parity_in_integers
    assert same is not None
    assert same["mean_abs"] <= 1e-4 * same["logit_range"], same  # a BatchNorm that no convolution takes may round otherwise
    assert same["top1_agreement"] >= 0.999
    assert details.parity["exact"]
    rescompress("lint", tmp_path / "int8.onnx", "--target", "jetson-orin-nano-8gb", code=0)


def test_the_plain_network_is_a_chain(real: Path, tmp_path: Path, rescompress: Command) -> None:
    (tmp_path / "model.py").write_text(CODE)
    plain = real / "atreides-K__plainnet_neo_v1_5e4_20.pth"
    told = rescompress("inspect", plain, "--code", f"{tmp_path}/model.py:plain20").stdout
    assert "a chain of 19 convolutions without shortcuts" in told
    refused = rescompress("inspect", plain, code=5)
    assert "ResNet" in refused.stderr
