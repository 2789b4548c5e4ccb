"""What `inspect` says of networks that are graphs, and of recipes beside it: the same words for the same network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from graph_zoo import random_checkpoint
from test_graph_prune import chain, gated, pre_activation, two_heads

from compress import zoo
from compress.checkpoints import save_checkpoint
from compress.checkpoints.base import Checkpoint
from rescompress.core.recipe import network_of
from rescompress.runs.inspection import describe, one_line


def test_a_graph_is_described_as_its_recipe_is() -> None:
    spec = zoo.spec("resnet50d")
    as_recipe, as_graph = describe(Checkpoint(spec, {})), describe(Checkpoint(network_of(spec), {}))
    assert {k for k in as_recipe if as_recipe[k] != as_graph[k]} == {"spec_sha256"}
    assert as_recipe["architecture"].startswith(
        "resnet50d: 3-4-6-3 bottleneck blocks of 256-512-1024-2048 channels, stem 3x3/2 32"
    )


def test_blocks_are_found_and_a_chain_is_none() -> None:
    assert one_line(pre_activation()).startswith("made: 3 basic blocks of 16 channels")
    assert "channel gates" in one_line(gated())
    assert one_line(chain()).startswith("made: a chain of 6 convolutions without shortcuts")
    assert one_line(two_heads()).endswith("head out0 512 -> 9, head out1 256 -> 8 -> 1")
    found = describe(random_checkpoint(pre_activation()))
    assert [(b["name"], b["shortcut"], b["widths"]) for b in found["blocks"]] == [
        (f"b{i}", "identity", [12, 16]) for i in range(3)
    ]
    assert found["outputs"] == [{"name": "logits", "tensor": found["layers"][-1]["name"], "shape": [5], "classes": True}]
    assert describe(random_checkpoint(two_heads()))["num_classes"] is None


def test_the_command_line_shows_and_refuses_networks_without_classes(tmp_path: Path, rescompress: Callable[..., Any]) -> None:
    path = tmp_path / "heads.safetensors"
    save_checkpoint(random_checkpoint(two_heads()), path)
    assert "basic blocks" in rescompress("inspect", path).stdout
    refused = rescompress("evaluate", path, "--data", "builtin:digits", code=5)
    assert "it makes out0 (9), out1 (1)" in refused.stderr
