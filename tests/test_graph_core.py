"""The graph itself: what fits together, what is inferred, which blocks are found; over the recipes of the zoo."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from compress import zoo
from rescompress.core.graph import INPUT, Network, Node, Output, safe_name
from rescompress.core.operations import (
    Add,
    AvgPool,
    BatchNorm,
    Conv,
    Flatten,
    GlobalPool,
    Input,
    Linear,
    MaxPool,
    Multiply,
    Operation,
    Relu,
    Sigmoid,
)
from rescompress.core.recipe import network_of

SAME = (1, 1, 1, 1)


def network(*nodes: tuple[str, Operation, tuple[str, ...]], side: int = 8, **fields: object) -> Network:
    every = [Node(name=INPUT, operation=Input()), *(Node(name=n, operation=o, inputs=i) for n, o, i in nodes)]
    outputs = (Output(name="out", tensor=every[-1].name),)
    return Network.model_validate({"input_shape": (3, side, side), "nodes": every, "outputs": outputs, **fields})


@pytest.mark.parametrize("name", ["resnet20", "resnet34d", "resnet50", "resnext50_32x4d", "keras_resnet50"])
def test_a_recipe_is_a_graph_that_json_carries(name: str) -> None:
    spec = zoo.spec(name)
    net = network_of(spec)
    again = Network.model_validate_json(net.model_dump_json())
    assert again == net
    assert again.digest == net.digest
    assert again.layers == net.layers
    assert [b.name for b in net.blocks] == [b.name for b in spec.blocks]
    assert all(b.contained for b in net.blocks)
    assert net.num_classes == spec.head.num_classes
    assert net.replace(arch="other").arch == "other"
    assert net.model_copy(update={"input_shape": (3, 64, 64)}).layers[-1].macs == net.layers[-1].macs


def test_the_blocks_of_a_pre_activation_network_and_of_gates_are_found() -> None:
    net = network(
        ("stem", Conv(width=8, kernel=(3, 3), pads=SAME), (INPUT,)),
        ("a.bn", BatchNorm(), ("stem",)),
        ("a.relu", Relu(), ("a.bn",)),
        ("a.conv", Conv(width=8, kernel=(3, 3), pads=SAME), ("a.relu",)),
        ("a.pool", GlobalPool(), ("a.conv",)),
        ("a.fc", Linear(width=8), ("a.pool",)),
        ("a.gate", Sigmoid(), ("a.fc",)),
        ("a.scaled", Multiply(), ("a.conv", "a.gate")),
        ("a.add", Add(), ("stem", "a.scaled")),
        ("last.bn", BatchNorm(), ("a.add",)),
    )
    (block,) = net.blocks
    assert (block.name, block.source, block.tail, block.shortcut, block.contained) == ("a", "stem", "a.add", (), True)
    assert block.main == ("a.bn", "a.relu", "a.conv", "a.pool", "a.fc", "a.gate", "a.scaled")
    assert net.by_name["last.bn"].block is None


def test_a_chain_has_no_blocks() -> None:
    net = network(("a", Conv(width=4), (INPUT,)), ("b", Relu(), ("a",)), ("c", Conv(width=4), ("b",)))
    assert not net.is_residual


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        (Conv(width=4, kernel=(3, 1), stride=(2, 1), pads=(0, 0, 1, 0), dilation=(2, 1)), (4, 3, 8)),
        (MaxPool(kernel=(3, 3), stride=(2, 2), ceil=True), (3, 4, 4)),
        (MaxPool(kernel=(1, 1), stride=(3, 3), ceil=True), (3, 3, 3)),
        (AvgPool(kernel=(2, 2), stride=(3, 3), pads=(1, 0, 1, 0)), (3, 3, 3)),
        (GlobalPool(kind="max_avg", keep=True), (6, 1, 1)),
        (Flatten(), (192,)),
    ],
)
def test_shapes(operation: Operation, shape: tuple[int, ...]) -> None:
    assert network(("x", operation, (INPUT,))).layers[-1].out_shape == shape


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([("x", Relu(), ("y",))], "reads 'y', which no node before it makes"),
        ([("x", Linear(width=3), (INPUT,))], "node 'x' (linear) reads a vector, not 3x8x8"),
        ([("x", Conv(width=4, groups=2), (INPUT,))], "no multiples of its 2 groups"),
        ([("x", Conv(width=4, kernel=(9, 9)), (INPUT,))], "does not fit"),
        ([("x", Conv(width=4), (INPUT,)), ("y", Add(), ("x", INPUT))], "adds two tensors of one shape"),
        ([("x", Relu(), (INPUT,)), ("x", Relu(), (INPUT,))], "two nodes are called x"),
        ([("x", Relu(), (INPUT,)), ("y", Relu(), (INPUT,))], "nothing reads x"),
        ([("a b", Relu(), (INPUT,))], "a name is letters"),
        ([("x", Input(), ())], "the first node, and no other"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_the_name_of_the_node(
    nodes: list[tuple[str, Operation, tuple[str, ...]]], words: str
) -> None:
    with pytest.raises(ValidationError) as e:
        network(*nodes)
    assert words in str(e.value)


def test_safe_names() -> None:
    assert safe_name("/layer1/0/Conv:0") == "layer1/0/Conv_0"
    assert safe_name("a", ["a", "a_1"]) == "a_2"
    assert safe_name("..") == "node"
