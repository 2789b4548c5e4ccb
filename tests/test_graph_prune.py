"""Pruning of networks that are no recipe: pre-activation, gates, chains, concatenations, flattened maps, several heads."""

from __future__ import annotations

import pytest
import torch
from engines import prune
from graph_zoo import SAME, Maker, images, random_checkpoint, random_network

from compress.prune import Budget, apply
from compress.prune.engine import method_names
from compress.prune.groups import Sizes, droppable, prunable, stages
from compress.prune.method import Context
from compress.prune.sparsity import has_pattern, sparsify
from compress.resnet import build_model
from rescompress.core.errors import BadInput, BudgetError
from rescompress.core.graph import INPUT, Network
from rescompress.core.layers import total_macs
from rescompress.core.operations import (
    Add,
    BatchNorm,
    Clip,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    GroupNorm,
    Linear,
    MaxPool,
    Multiply,
    Relu,
    Sigmoid,
    Silu,
)


def pre_activation() -> Network:
    m = Maker()
    x = m.conv(INPUT, 16)
    for i in range(3):
        y = m.add(Relu(), m.add(BatchNorm(), x, name=f"b{i}.bn1"))
        y = m.conv(y, 12, bias=True)
        y = m.conv(m.add(Relu(), m.add(BatchNorm(), y)), 16)
        x = m.add(Add(), x, y, name=f"b{i}.add")
    x = m.add(GlobalPool(), m.add(Relu(), m.add(BatchNorm(), x)))
    return m.network(m.add(Linear(width=5), x), classes=True)


def gated() -> Network:
    m = Maker()
    x = m.add(Silu(), m.add(BatchNorm(eps=1e-3), m.conv(INPUT, 16)))
    for i in range(2):
        y = m.add(Clip(), m.add(BatchNorm(), m.conv(x, 16)))
        y = m.add(Clip(), m.add(BatchNorm(), m.conv(y, 16, groups=16)))
        gate = m.add(Relu(), m.add(Linear(width=4), m.add(GlobalPool(), y)))
        y = m.add(Multiply(), y, m.add(Sigmoid(), m.add(Linear(width=16), gate)))
        x = m.add(Add(), m.add(BatchNorm(), m.conv(y, 16, 1)), x, name=f"b{i}.add")
    return m.network(m.add(Linear(width=5), m.add(GlobalPool(), x)), classes=True)


def chain() -> Network:
    m = Maker()
    x = INPUT
    for width in (8, 12, 12, 12, 12, 8):
        x = m.add(Relu(), m.conv(x, width, bias=True))
    x = m.add(Flatten(), m.add(MaxPool(kernel=(2, 2), stride=(2, 2)), x))
    return m.network(m.add(Linear(width=5), m.add(Relu(), m.add(Linear(width=16), x))), classes=True)


def joined() -> Network:
    m = Maker()
    x = m.add(Relu(), m.add(GroupNorm(groups=4), m.conv(INPUT, 16)))
    one = m.add(Relu(), m.conv(x, 8, 1, bias=True))
    two = m.add(Relu(), m.conv(x, 16, 3, bias=True))
    both = m.add(Concat(), one, two, x)
    x = m.add(Relu(), m.add(BatchNorm(), m.conv(both, 24)))
    return m.network(m.add(Linear(width=5), m.add(GlobalPool(kind="max_avg"), x)), classes=True)


def two_heads() -> Network:
    m = Maker(channels=17)
    x = m.add(Relu(), m.add(BatchNorm(), m.conv(INPUT, 16)))
    y = m.add(Relu(), m.add(BatchNorm(), m.conv(x, 16)))
    x = m.add(Relu(), m.add(Add(), m.add(BatchNorm(), m.conv(y, 16)), x, name="b.add"))
    policy = m.add(Linear(width=9), m.add(Flatten(), m.add(Relu(), m.conv(x, 8, 1, bias=True))))
    value = m.add(Flatten(), m.add(Relu(), m.conv(x, 4, 1, bias=True)))
    value = m.add(Linear(width=1), m.add(Relu(), m.add(Linear(width=8), value)))
    return m.network(policy, value)


KINDS = {"pre-activation": pre_activation, "gated": gated, "chain": chain, "joined": joined, "two-heads": two_heads}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


@every_kind
@pytest.mark.parametrize("scope", ["all", pytest.param("inner", marks=pytest.mark.slow)])
def test_any_network_is_pruned_within_its_budget_and_repaired(make, scope) -> None:
    network = make()
    checkpoint = random_checkpoint(network)
    x = images(network, 48)
    if not prunable(list(Sizes(network).groups.values()), scope):
        pytest.skip("nothing to prune in this scope")
    budget = Budget(kind="macs", value=0.7 if scope == "inner" else 0.5)
    try:
        result = prune(checkpoint, budget=budget, scope=scope, align=1, calibration_x=x)
    except BudgetError:
        pytest.skip("the scope cannot reach the budget")
    assert result.macs_after <= budget.value * result.macs_before
    assert result.macs_after == total_macs(result.checkpoint.network.layers)
    cut = apply(checkpoint, result.plan)

    def error(spec, tensors) -> float:
        with torch.no_grad():
            wanted = build_model(network, checkpoint.state_dict).outputs(x)
            found = build_model(spec, tensors).outputs(x)
        return sum(float((a - b).square().sum() / b.var().clamp_min(1e-9)) for a, b in zip(found, wanted, strict=True))

    repaired = error(result.checkpoint.spec, result.checkpoint.state_dict)
    assert repaired < error(cut.spec, cut.state_dict)


def test_what_the_networks_are() -> None:
    assert droppable(pre_activation()) == ["b0", "b1", "b2"]
    assert [len(s) for s in stages(pre_activation())] == [3]
    assert not droppable(chain())
    assert not chain().is_residual
    assert Sizes(two_heads()).groups[two_heads().outputs[0].tensor].kind == "fixed"
    depthwise = Sizes(gated()).groups
    assert any(len(g.producers) > 2 and g.kind == "inner" for g in depthwise.values())  # convolution, depthwise, gate


def test_blocks_of_a_pre_activation_network_go_as_a_whole() -> None:
    network = pre_activation()
    checkpoint = random_checkpoint(network)
    checkpoint.state_dict[network.by_name["b1.add"].inputs[1] + ".weight"].mul_(1e-3)  # it does nearly nothing
    x = images(network, 96)
    result = prune(checkpoint, budget=Budget(kind="macs", value=0.6), align=1, calibration_x=x, drop_blocks=True)
    assert result.plan.dropped_blocks == ("b1",)
    assert [b.name for b in result.checkpoint.network.blocks] == ["b0", "b2"]


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(s, marks=pytest.mark.slow) for s in range(3, 120))])
def test_every_method_prunes_any_graph(seed: int) -> None:
    network = random_network(seed)
    checkpoint = random_checkpoint(network, seed)
    x = images(network, 16)
    before = total_macs(network.layers)
    for method in method_names():
        try:
            result = prune(
                checkpoint, method=method, budget=Budget(kind="macs", value=0.8), scope="all", align=1, calibration_x=x
            )
        except (BudgetError, BadInput):
            continue  # it cannot get so small, has nothing to prune, or (for bn_scale) no BatchNorm
        assert total_macs(result.checkpoint.network.layers) <= 0.8 * before
        outputs = build_model(result.checkpoint.spec, result.checkpoint.state_dict).outputs(x[:2])
        assert all(bool(torch.isfinite(o).all()) for o in outputs)


def test_rectangular_kernels_are_refitted_and_made_sparse() -> None:
    m = Maker(side=(9, 7))
    x = m.add(Relu(), m.add(Conv(width=8, kernel=(3, 1), stride=(2, 1), pads=(0, 0, 1, 0), bias=True), INPUT))
    x = m.add(Relu(), m.add(Conv(width=8, kernel=(1, 3), pads=(0, 1, 0, 1), dilation=(1, 2), bias=True), x))
    x = m.add(Relu(), m.add(Conv(width=8, kernel=(3, 3), pads=SAME, bias=True), x))
    network = m.network(m.add(Linear(width=4), m.add(GlobalPool(), x)), classes=True)
    checkpoint = random_checkpoint(network)
    found = sparsify(Context(checkpoint, (), (), images(network, 64)), checkpoint)
    assert len(found.layers) == 3
    assert all(has_pattern(found.checkpoint.state_dict[f"{name}.weight"]) for name in found.layers)
