"""The network before and after pruning in the report."""

from __future__ import annotations

import json
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import prune

from compress.checkpoints import load_checkpoint, save_checkpoint
from compress.prune import Budget, PruningPlan, apply
from rescompress.core.stored import stored_network
from rescompress.show.report import before_after
from rescompress.show.report.before_after import side_by_side

DIGITS = Path(__file__).parents[1] / "examples" / "resnet20_digits.safetensors"
Command = Callable[..., subprocess.CompletedProcess[str]]
ENTRY = re.compile(r"<li( class=differs)?><code>(.*?)</code> <span>(.*?)</span>")
SIZE = struct.Struct("<Q").pack
HEADERS = (b"", b"\x01", SIZE(2**63), SIZE(4) + b"null", SIZE(2) + b"{}", b"PK\x03\x04" * 10)


def entries(markup: str) -> list[dict[str, tuple[str, bool]]]:
    """Return what each side says of each layer, and whether it is marked."""
    sides = markup.partition('class="sides"')[2].split("<figure>")[1:]
    return [{name: (text, bool(mark)) for mark, name, text in ENTRY.findall(side)} for side in sides]


def test_a_report_shows_the_network_before_and_after(rescompress: Command, tmp_path: Path) -> None:
    rescompress("prune", DIGITS, "--macs", "0.5", cwd=tmp_path)
    rescompress("report", "rescompress-out", "-o", "page.html", cwd=tmp_path)
    before, after = entries((tmp_path / "page.html").read_text(encoding="utf-8"))
    for side, file in ((before, DIGITS), (after, tmp_path / "rescompress-out" / "prune.safetensors")):
        network = load_checkpoint(file).network
        assert side.keys() == {layer.name for layer in network.layers}
        for layer in network.layers:
            assert side[layer.name][0].endswith("x".join(map(str, layer.out_shape)))
    changed = {name for name in before if before[name][0].split(", ")[-1] != after[name][0].split(", ")[-1]}
    assert changed
    assert all({name for name, (_, mark) in side.items() if mark} == changed for side in (before, after))


def test_a_block_that_went_is_on_the_left_alone() -> None:
    dense = load_checkpoint(DIGITS)
    plan = PruningPlan(arch="resnet20", spec_digest=dense.spec.digest, method="by hand", keep={}, dropped_blocks=("layer2.1",))
    before, after = entries(side_by_side(dense.network, apply(dense, plan).network))
    gone = before.keys() - after.keys()
    assert gone
    assert all(name.startswith("layer2.1") and before[name][1] for name in gone)


def test_a_header_with_markup_for_a_name_holds_no_network(tmp_path: Path) -> None:
    network = load_checkpoint(DIGITS).network.model_dump_json()
    for name, held in (("conv1", True), ("<img src=x>", False)):
        about = {"format": "rescompress", "network": network.replace('"conv1"', f'"{name}"')}
        header = json.dumps({"__metadata__": about}).encode()
        (tmp_path / "x.safetensors").write_bytes(SIZE(len(header)) + header)
        assert (stored_network(tmp_path / "x.safetensors") is not None) is held


@pytest.mark.parametrize("content", HEADERS)
def test_a_file_without_a_network_has_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    assert stored_network(tmp_path / "x.safetensors") is None
    assert stored_network(tmp_path / "none.safetensors") is None


def test_a_header_says_the_network_that_loading_gives(tmp_path: Path) -> None:
    dense = load_checkpoint(DIGITS)
    graph = prune(dense, budget=Budget(kind="macs", value=0.5), method="magnitude").checkpoint
    for checkpoint in (dense, graph):
        save_checkpoint(checkpoint, tmp_path / "n.safetensors")
        assert stored_network(tmp_path / "n.safetensors") == load_checkpoint(tmp_path / "n.safetensors").network


def test_graphviz_draws_both_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    network = load_checkpoint(DIGITS).network
    monkeypatch.setattr(before_after.shutil, "which", lambda _: None)
    assert "<img" not in side_by_side(network, network)
    monkeypatch.setattr(before_after.shutil, "which", lambda _: "dot")
    monkeypatch.setattr(before_after, "svg_of", lambda _, text: f"<svg>{len(text)}</svg>")
    assert side_by_side(network, network).count("data:image/svg+xml") == 2
