"""The network before and after pruning, side by side."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from rescompress.core.errors import EnvironmentFailed
from rescompress.core.graph import Layer, Network
from rescompress.core.manifest import Manifest
from rescompress.core.stored import stored_network
from rescompress.show.report.graph import dot_of, svg_of, text_of
from rescompress.show.report.markup import NOTHING, Markup, html, joined

LARGEST_PICTURE = 400
"""Layers from which a picture is too small to read; the lists say the same."""


def networks_of(manifest: Manifest, folder: Path) -> tuple[Network, Network] | None:
    """Return a run's network as it came and as its last pruning left it, or None where it has not both.

    Args:
        manifest: Of the run.
        folder: Where its files lie.
    """
    first = next((s for s in manifest.stages if s.kind == "dense"), None)
    last = next((s for s in reversed(manifest.stages) if s.kind == "prune" and s.status == "done"), None)
    files = [stage.output("checkpoint") if stage is not None else None for stage in (first, last)]
    found = [stored_network(folder / file.path) if file is not None else None for file in files]
    before, after = found
    return (before, after) if before is not None and after is not None else None


def side_by_side(before: Network, after: Network) -> Markup:
    """Return both networks as lists of blocks beside each other, what changed marked; with graphviz their pictures, too."""
    shapes = tuple({layer.name: layer.out_shape for layer in network.layers} for network in (before, after))
    columns = [
        html(
            "<figure><figcaption>{}: {} layers</figcaption>{}<ul class=graph>{}</ul></figure>",
            word,
            len(network.layers),
            _picture(network, word),
            joined(_entries(network, other)),
        )
        for word, network, other in (("before", before, shapes[1]), ("after", after, shapes[0]))
    ]
    note = "Blocks open to their layers. A size that differs from the other side is marked."
    return html('<p class="note">{}</p><div class="sides">{}</div>', note, joined(columns))


def _picture(network: Network, word: str) -> Markup:
    tool = shutil.which("dot")
    if tool is None or len(network.layers) > LARGEST_PICTURE:
        return NOTHING
    try:
        data = base64.b64encode(svg_of(tool, dot_of(network)).encode()).decode()
    except EnvironmentFailed:
        return NOTHING  # the lists below say the same
    return html('<img alt="graph {} pruning" src="data:image/svg+xml;base64,{}">', word, data)


def _entries(network: Network, other: Mapping[str, tuple[int, ...]]) -> Iterator[Markup]:
    """Yield an entry for each layer outside of blocks, and one for each block."""
    seen: set[str] = set()
    for layer in network.layers:
        if layer.block is None:
            yield _entry(layer, other)
        elif layer.block not in seen:
            seen.add(layer.block)
            members = [x for x in network.layers if x.block == layer.block]
            differ = any(other.get(x.name) != x.out_shape for x in members)
            yield html(
                "<li{}><details><summary>{} <span>{}</span></summary><ul>{}</ul></details></li>",
                Markup(" class=differs") if differ else NOTHING,
                layer.block,
                " ".join(str(x.out_shape[0]) for x in members if x.op == "conv"),
                joined(_entry(x, other) for x in members),
            )


def _entry(layer: Layer, other: Mapping[str, tuple[int, ...]]) -> Markup:
    differs = Markup(" class=differs") if other.get(layer.name) != layer.out_shape else NOTHING
    return html("<li{}><code>{}</code> <span>{}</span></li>", differs, layer.name, text_of(layer))
