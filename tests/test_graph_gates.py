"""Gates whose channels see their neighbours: one operation, which stays right when channels go."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from importer_nets import Head, stem
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import rescompress as rc
from compress.importers.proof import difference
from compress.prune import PruningPlan, apply
from compress.prune.apply import channels_kept
from compress.prune.groups import Sizes
from compress.resnet import build_model
from edge_targets.kernels import fuse
from rescompress.core.errors import CheckpointError
from rescompress.core.graph import Network
from rescompress.core.layers import total_macs
from rescompress.core.operations import BatchNorm, ChannelConv
from rescompress.core.quantizers import float_operations


class Neighbours(nn.Module):
    """A block with efficient channel attention; `circular` as the variant that sees the line as a ring."""

    def __init__(self, channels: int, kernel: int = 5, *, bias: bool = False, circular: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.eca = nn.Conv1d(1, 1, kernel, padding=0 if circular else kernel // 2, bias=bias)
        self.ring = kernel // 2 if circular else 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        line = y.mean((2, 3)).view(len(y), 1, -1)
        if self.ring:
            line = torch.cat([line[:, :, -self.ring :], line, line[:, :, : self.ring]], 2)
        return F.relu(x + y * torch.sigmoid(self.eca(line)[:, :, : y.shape[1]].view(len(y), -1, 1, 1)))


def made(**options: bool) -> tuple[nn.Module, rc.Checkpoint]:
    torch.manual_seed(0)
    module = nn.Sequential(stem(), Neighbours(8, **options), nn.Conv2d(8, 6, 3), nn.ReLU(), Head(6, 5)).eval()
    return module, rc.from_module(module, torch.zeros(1, 3, 16, 16))


def convs(network: Network) -> list[ChannelConv]:
    return [layer.operation for layer in network.layers if isinstance(layer.operation, ChannelConv)]


def outputs(checkpoint: rc.Checkpoint, x: Tensor) -> Tensor:
    with torch.no_grad():
        return build_model(checkpoint.network, checkpoint.state_dict)(x)


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_one_operation_with_the_parameters_and_macs_of_the_module(bias: bool) -> None:
    module, checkpoint = made(bias=bias)
    network = checkpoint.network
    assert [(op.kernel, op.places, op.bias) for op in convs(network)] == [(5, tuple(range(8)), bias)]
    assert sum(layer.params for layer in network.layers) == sum(p.numel() for p in module.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, 16, 16))
    assert 2 * total_macs(network.layers) == counter.get_total_flops()
    assert float_operations(network)["convolutions over channels"] == 1
    (kernel,) = [k for k in fuse(network.layers) if k.kind == "conv" and k.in_width == k.width == 1]
    assert (kernel.pixels, kernel.taps, kernel.macs) == (8, 5, 40)


def test_a_channel_that_goes_leaves_its_place_and_comes_back_from_onnx(tmp_path: Path) -> None:
    _, checkpoint = made()
    network = checkpoint.network
    (gate,) = [layer for layer in network.layers if isinstance(layer.operation, ChannelConv)]
    group = Sizes(network).group_of[gate.name]
    plan = PruningPlan(arch="x", spec_digest=network.digest, method="by hand", keep={group: (0, 2, 3, 7)})
    pruned = apply(checkpoint, plan)
    kept = channels_kept(network, plan)
    x = torch.randn(2, 3, 16, 16)

    def zeroed(name: str, value: Tensor) -> Tensor:
        mask = torch.zeros(value.shape[1])
        mask[kept[name]] = 1
        return value * mask.view(1, -1, *[1] * (value.dim() - 2))

    with torch.no_grad():
        wanted = build_model(network, checkpoint.state_dict)(x, zeroed)
    assert pruned.network.by_name[gate.name].operation == gate.operation.model_copy(update={"places": (0, 2, 3, 7)})
    assert difference(outputs(pruned, x), wanted) < 1e-6
    path = rc.export_onnx(pruned, tmp_path / "net.onnx", batch="dynamic")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert difference(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), wanted) < 1e-5
    back = rc.load_checkpoint(path)
    assert convs(back.network) == convs(pruned.network)
    assert len(back.network.nodes) == sum(not isinstance(n.operation, BatchNorm) for n in pruned.network.nodes)
    assert difference(outputs(back, x), wanted) < 1e-5


def test_a_ring_is_a_line_with_its_ends_repeated() -> None:
    module, checkpoint = made(circular=True)
    assert [op.length for op in convs(checkpoint.network)] == [12]
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert difference(outputs(checkpoint, x), module(x)) < 1e-5


def test_a_kernel_without_a_middle_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"conv1d.*4 places"):
        rc.from_module(nn.Sequential(stem(), Neighbours(8, 4), Head(8, 5)).eval(), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="no middle"):
        ChannelConv(kernel=2, length=4, places=(0, 1))
    with pytest.raises(ValueError, match="two channels at one place"):
        ChannelConv(kernel=3, length=4, places=(0, 0))
