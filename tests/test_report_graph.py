"""``inspect --graph``: the picture holds every layer, and no name of a file becomes markup or another statement."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import zoo
from rescompress.core.errors import BadInput, ToolMissing
from rescompress.core.graph import Network, Node, Output
from rescompress.core.operations import Add, Conv, Input, Relu
from rescompress.core.recipe import network_of
from rescompress.show.report.graph import dot_of, draw

DIGITS = Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors"


def test_every_layer_and_every_edge_is_in_the_picture() -> None:
    network = network_of(zoo.spec("resnet26d"))
    text = dot_of(network)
    for layer in network.layers:
        assert re.search(rf'"{re.escape(layer.name)}" \[label=', text)
        for source in layer.inputs:
            assert f'"{source}" -> "{layer.name}";' in text
    assert text.count("subgraph cluster_") == len(network.blocks)
    assert text.count("{") == text.count("}")


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    network = network_of(zoo.spec("resnet20"))
    draw(network, tmp_path / "net.html")
    page = (tmp_path / "net.html").read_text()
    for layer in network.layers:
        assert page.count(f"<code>{html.escape(layer.name)}</code>") >= 1
    assert page.count("<details") == len(network.blocks)
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_names_are_text(tmp_path: Path) -> None:
    nodes = (
        Node(name="input", operation=Input()),
        Node(name="a", operation=Conv(width=3, kernel=(3, 3), pads=(1, 1, 1, 1)), inputs=("input",)),
        Node(name="b", operation=Add(), inputs=("a", "input")),
        Node(name="c", operation=Relu(), inputs=("b",)),
    )
    bad = '<script>alert(1)</script>"; a -> b; "'
    network = Network(arch=bad, input_shape=(3, 8, 8), nodes=nodes, outputs=(Output(name=bad, tensor="c"),))
    draw(network, tmp_path / "net.html")
    assert "<script>" not in (tmp_path / "net.html").read_text()
    assert '"; a -> b; "' not in dot_of(network).replace('\\"', "")


def test_suffixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(zoo.spec("resnet20"))
    with pytest.raises(BadInput, match=r"\.png"):
        draw(network, tmp_path / "net.png")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ToolMissing, match="graphviz"):
        draw(network, tmp_path / "net.svg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_graphviz_draws_it(tmp_path: Path) -> None:
    network = network_of(zoo.spec("resnet20"))
    draw(network, tmp_path / "net.svg")
    assert (tmp_path / "net.svg").read_text().count("<title>layer1.0.conv1</title>") == 1


def test_the_command_writes_it(rescompress: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = rescompress("inspect", DIGITS, "--graph", tmp_path / "net.dot", "--json")
    assert '"graph"' in done.stdout
    assert (tmp_path / "net.dot").read_text().startswith("digraph")
    rescompress("inspect", DIGITS, "--graph", tmp_path / "net.jpg", code=5)
