"""Every supported system goes the whole way: load, inspect, prune, export in float32 and INT8, with parity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engines import prune, ptq

from compress import zoo
from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.checkpoints.base import Checkpoint
from compress.prune import Budget
from compress.quantize import fake_quant_model
from compress.resnet import ResNet, build_model, tensors_of
from export.parity import OrtRunner, compare_logits
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.layers import total_macs, total_params, walk
from rescompress.core.spec import Block, Head, ModelSpec, Stem, StemConv
from rescompress.runs.inspection import describe

SLOW = pytest.mark.slow


def plain() -> ModelSpec:
    """Two-convolution blocks with identity shortcuts, biases and no BatchNorm."""
    blocks = tuple(
        Block(name=f"layer1.{i}", kind="basic", widths=(32, 32), batch_norm=False, conv_bias=True, stride_at=0)
        for i in range(4)
    )
    stem = Stem(convs=(StemConv(width=32, kernel=3, stride=1),), max_pool=False, batch_norm=False, conv_bias=True)
    return ModelSpec(arch="plain", input_shape=(3, 32, 32), stem=stem, stages=(blocks,), head=Head(num_classes=10))


def system(name: str) -> ModelSpec:
    if name == "plain":
        return plain()
    if name == "cat/dog":
        return zoo.spec("keras_resnet50", num_classes=1, hidden=(256,), input_shape=(3, 64, 64))
    if name == "several hidden layers":
        return zoo.spec("resnet18", num_classes=10, hidden=(64, 32), dropout=0.5, input_shape=(3, 64, 64))
    if name == "concatenated pooling":
        spec = zoo.spec("resnet20_b", num_classes=10, hidden=(24,), input_shape=(3, 32, 32))
        assert spec.head is not None
        return spec.model_copy(update={"head": spec.head.model_copy(update={"pool": "max_avg"})})
    side = 32 if zoo.spec(name).input_shape[1] == 32 else 64
    return zoo.spec(name, num_classes=10, input_shape=(3, side, side))


def pictures(spec: ModelSpec, n: int, seed: int) -> torch.Tensor:
    """Return images with some structure: smooth noise of several strengths."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 4, 4, generator=generator) * torch.rand(n, 1, 1, 1, generator=generator) * 3
    return (
        torch.nn.functional.interpolate(coarse, spec.input_shape[1:], mode="bilinear")
        + torch.randn(n, *spec.input_shape, generator=generator) * 0.3
    )


def settled(spec: ModelSpec) -> ResNet:
    """Return a network whose BatchNorms have the statistics of its activations, and whose branches add little to the stream.

    Trained networks are like that. In a random one every flipped rounding grows from block to block, and parity of INT8
    says nothing.
    """
    torch.manual_seed(0)
    model = build_model(spec)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.weight.data.uniform_(0.5, 1.0)
        norm.bias.data.normal_(0, 0.1)
    for block in spec.blocks:
        if block.batch_norm:
            model.get_submodule(f"{block.name}.bn{len(block.widths)}").weight.data.uniform_(0.05, 0.2)
    model.train()
    with torch.no_grad():
        model(pictures(spec, 32, 1))
        for name, linear in model.named_modules():  # logits of about unit spread
            if isinstance(linear, torch.nn.Linear):
                linear.weight *= 3 if name.startswith("fc.") else 5
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


QUICK = ["resnet20", "resnet18d", "plain", "concatenated pooling"]
THOROUGH = """
    resnet20_b resnet32 resnet32_b resnet44 resnet56 resnet110 resnet110_b resnet18_cifar resnet18 resnet34 resnet50 resnet50_v1
    resnet101 resnet152 resnet200 resnet50d resnext50_32x4d wide_resnet50_2 keras_resnet101
"""
NAMES = [*QUICK, *(pytest.param(n, marks=SLOW) for n in ("cat/dog", "several hidden layers", *THOROUGH.split()))]


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    spec = system(name)
    save_checkpoint(Checkpoint(spec, tensors_of(settled(spec)), None, {}), tmp_path / "net.safetensors")
    dense = load_checkpoint(tmp_path / "net.safetensors")

    seen = describe(dense)
    assert seen["totals"]["params"] == total_params(walk(spec))
    assert sum(block["params"] for block in seen["blocks"]) < seen["totals"]["params"]

    pruned = prune(dense, method="magnitude", budget=Budget(kind="ratio", value=0.3), align=8).checkpoint
    assert total_macs(walk(pruned.spec)) < total_macs(walk(spec))
    for group in describe(pruned)["groups"]:
        if group["kind"] == "inner" and group["size"] == group["channels"] and group["channels"] > 32:
            assert group["channels"] % 8 == 0
    save_checkpoint(pruned, tmp_path / "pruned.safetensors")
    assert load_checkpoint(tmp_path / "pruned.safetensors").spec == pruned.spec

    x = pictures(spec, 12, 2)
    for checkpoint in (dense, pruned):
        tensors = {k: v.numpy() for k, v in checkpoint.state_dict.items()}
        with torch.no_grad():
            expected = build_model(checkpoint.spec, checkpoint.state_dict)(x).numpy()
        exported = OrtRunner(to_onnx(checkpoint.spec, tensors, None, ExportOptions(batch="dynamic", precision="fp32")))
        parity = compare_logits(expected, exported(x.numpy()))
        assert parity.max_abs <= 1e-4 * parity.logit_range, parity

    int8 = ptq(pruned, [pictures(spec, 16, 3)], calibration="max", bias_correction=False)
    with torch.no_grad():
        simulated = fake_quant_model(int8)(x).numpy()
    tensors = {k: v.numpy() for k, v in int8.state_dict.items()}
    model = to_onnx(int8.spec, tensors, int8.quantization, ExportOptions(batch="dynamic", precision="int8"))
    # A rounding that flips may grow from block to block in an untrained network: then no two computations agree.
    parity = compare_logits(simulated, OrtRunner(model, optimize=False)(x.numpy()))
    with torch.no_grad():  # how far the simulation is from itself when its input differs in the last digits
        near = [fake_quant_model(int8)(x * (1 + e)).numpy() for e in (1e-6, -1e-6, 3e-6, -3e-6)]
    chaos = max(float(np.abs(y - simulated).mean()) for y in near)
    assert parity.relative <= 1 / 255 or parity.mean_abs <= 2 * chaos, (parity, chaos)
    integers = {i.data_type for i in model.graph.initializer if len(i.dims) == 4}
    assert integers == {3}, "convolution weights are stored as int8"
    assert np.isfinite(simulated).all()
