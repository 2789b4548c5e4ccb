"""Slips that random graphs meet too seldom: each was planted once, and found by none of the quick tests."""

from __future__ import annotations

import pytest
import torch
from graph_zoo import Maker, images, random_checkpoint
from test_graph_property import ort_outputs
from torch import Tensor, nn
from torch.nn import functional as F

import rescompress as rc
from compress.importers.proof import difference
from compress.resnet import build_model
from export.to_onnx import ExportOptions, to_onnx
from rescompress.core.graph import INPUT, Network
from rescompress.core.operations import Add, AvgPool, BatchNorm, Dropout, Flatten, Linear, Relu


class Slips(nn.Module):
    """A grouped, dilated convolution; branches joined in an order; means with the zeros around counted or not."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2)
        self.other = nn.Conv2d(4, 6, 1)
        self.norm = nn.BatchNorm2d(8, eps=0.1)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([F.leaky_relu(self.norm(self.grouped(x)), 0.3), self.other(x)], 1)
        counted = F.avg_pool2d(joined, 3, 2, 1)
        uncounted = F.avg_pool2d(joined, 3, 2, 1, count_include_pad=False)
        return torch.flatten(torch.cat([counted, uncounted[:, :3]], 1), 1)


def test_a_module_with_all_of_them_is_read() -> None:
    torch.manual_seed(0)
    module = Slips().eval()
    checkpoint = rc.from_module(module, torch.zeros(1, 4, 11, 9))  # proves itself, or refuses
    x = torch.randn(2, 4, 11, 9)
    with torch.no_grad():
        assert difference(build_model(checkpoint.network, checkpoint.state_dict)(x), module(x)) < 1e-5


def shared_norm() -> Network:
    """A convolution of which one reader is a BatchNorm, as behind a shortcut: the two are not one."""
    m = Maker()
    a = m.conv(INPUT, 6, bias=True)
    return m.network(m.add(Relu(), m.add(Add(), m.add(BatchNorm(eps=0.1), a), a)))


def counted(*, count: bool, ceil: bool) -> Network:
    m = Maker(3, (9, 10))
    pool = AvgPool(kernel=(3, 2), stride=(2, 2), pads=(1, 1, 0, 1), ceil=ceil, count_pads=count)
    return m.network(m.add(Linear(width=3), m.add(Flatten(), m.add(pool, m.conv(INPUT, 4)))))


NETWORKS = {
    "a convolution with another reader than its norm": shared_norm(),
    **{f"zeros counted {c}, cut windows {e}": counted(count=c, ceil=e) for c in (False, True) for e in (False, True)},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_computes_what_torch_computes(name: str) -> None:
    network = NETWORKS[name]
    checkpoint = random_checkpoint(network)
    x = images(network) + 1.0
    proto = to_onnx(network, {k: v.numpy() for k, v in checkpoint.state_dict.items()}, None, ExportOptions(batch="dynamic"))
    with torch.no_grad():
        wanted = build_model(network, checkpoint.state_dict)(x)
    assert difference(torch.from_numpy(ort_outputs(proto, x)[0]), wanted) < 1e-5


@pytest.mark.parametrize("whole", [False, True])
def test_dropout_keeps_the_mean_and_does_nothing_in_evaluation(whole: bool) -> None:
    m = Maker(1, (16, 16))
    model = build_model(m.network(m.add(Dropout(probability=0.4, whole=whole), INPUT)))
    x = torch.ones(400, 1, 16, 16)
    torch.manual_seed(0)
    assert torch.equal(model(x), x)
    dropped = model.train()(x)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 1 / 0.6])
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.15)
    assert (dropped.flatten(1).std(1) == 0).all() == whole
