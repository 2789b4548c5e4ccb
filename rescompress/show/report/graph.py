"""The graph of a network as a picture that a person can read: for graphviz's ``dot``, or as a page of nested lists.

Layout is graphviz's work, or the browser's; nothing here computes a place.
"""

from __future__ import annotations

import base64
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from rescompress.core.artifact import write_text
from rescompress.core.errors import BadInput, EnvironmentFailed, ToolMissing
from rescompress.core.graph import Layer, Network
from rescompress.core.host import Host
from rescompress.show.report.markup import NOTHING, Markup, html, joined

SUFFIXES = (".svg", ".html", ".dot")
SECONDS = 120.0
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}li{margin:.1em 0}"
    "ul{list-style:none;padding-left:1.4em;border-left:2px solid #ccd}summary{cursor:pointer;font-weight:600}"
    "code{font-size:13px}.size{color:#567}.skip{color:#a60}img{max-width:100%}"
)


def draw(network: Network, path: Path, host: Host | None = None) -> None:
    """Write a picture of a network's graph.

    Args:
        network: The network.
        host: What it is the trunk of, or None.
        path: ``.svg`` (needs graphviz), ``.dot`` (its input), or ``.html`` (with graphviz's picture where it is installed).

    Raises:
        BadInput: The suffix is none of those.
        ToolMissing: An ``.svg`` is asked for, and graphviz is not installed.
        EnvironmentFailed: The file cannot be written, or graphviz fails.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise BadInput(
            f"is no picture of a graph: '{path.suffix}'", where=f"--graph {path}", remedy="name it .svg, .html or .dot"
        )
    if suffix == ".dot":
        write_text(path, dot_of(network, host))
        return
    tool = shutil.which("dot")
    if suffix == ".svg" and tool is None:
        raise ToolMissing(
            "an .svg needs graphviz's dot, which is not installed", remedy="install graphviz, or name an .html file"
        )
    svg = svg_of(tool, dot_of(network, host)) if tool is not None else None
    write_text(path, svg if suffix == ".svg" and svg is not None else page_of(network, svg, host))


def svg_of(tool: str, text: str) -> str:
    """Return what graphviz makes of a graph in its language.

    Raises:
        EnvironmentFailed: It cannot be run, fails, or takes too long.
    """
    try:
        done = subprocess.run([tool, "-Tsvg"], input=text, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as e:
        raise EnvironmentFailed(f"graphviz's dot failed: {e}", remedy="name an .html or .dot file") from e
    return done.stdout


def dot_of(network: Network, host: Host | None = None) -> str:
    """Return the graph in graphviz's language: one box per residual block; behind a trunk's borders, its host as one box."""
    lines = [
        "digraph network {",
        '  node [shape=box, fontname="sans-serif", fontsize=10, style="rounded,filled", fillcolor=white];',
    ]
    inside: dict[str | None, list[Layer]] = {}
    for layer in network.layers:
        inside.setdefault(layer.block, []).append(layer)
    for i, (block, layers) in enumerate(inside.items()):
        if block is not None:
            lines += [f"  subgraph cluster_{i} {{", f'    label="{_quoted(block)}"; color="#99aacc"; bgcolor="#eef2fa";']
        lines += [f'    "{_quoted(x.name)}" [label="{_quoted(x.name)}\\n{_quoted(text_of(x))}"];' for x in layers]
        if block is not None:
            lines.append("  }")
    lines += [f'  "{_quoted(source)}" -> "{_quoted(x.name)}";' for x in network.layers for source in x.inputs]
    for output in network.outputs:
        lines.append(f'  "output {_quoted(output.name)}" [shape=plaintext, fillcolor=none, label="{_quoted(output.name)}"];')
        lines.append(f'  "{_quoted(output.tensor)}" -> "output {_quoted(output.name)}";')
        if host is not None:
            lines.append(
                f'  "output {_quoted(output.name)}" -> "host of the trunk" [label="{_quoted(_border(host, output.name))}"];'
            )
    if host is not None:
        lines.append(f'  "host of the trunk" [label="the rest of {_quoted(host.name)}", style="rounded,dashed"];')
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")


def _border(host: Host, output: str) -> str:
    """Return what a host calls an output of its trunk."""
    return host.borders.get(output, output)


def text_of(layer: Layer) -> str:
    """Return what a layer does, in a few words: ``conv 3x3/2, 64x56x56``."""
    operation = layer.operation
    words = [layer.op.replace("_", " ")]
    kernel, stride = getattr(operation, "kernel", None), getattr(operation, "stride", None)
    if kernel is not None:
        words.append("x".join(map(str, kernel)) + (f"/{max(stride)}" if stride is not None and max(stride) > 1 else ""))
    groups = getattr(operation, "groups", 1)
    if groups > 1:
        words.append(f"{groups} groups")
    return f"{' '.join(words)}, {'x'.join(map(str, layer.out_shape))}"


def page_of(network: Network, svg: str | None, host: Host | None = None) -> str:
    """Return a page of HTML that needs nothing else: the picture, if there is one, and the layers as nested lists."""
    picture = NOTHING
    if svg is not None:
        data = base64.b64encode(svg.encode()).decode()
        picture = html('<p><img alt="" src="data:image/svg+xml;base64,{}"></p>', data)
    outputs = ", ".join(f"{o.name} ({o.tensor})" for o in network.outputs)
    if host is not None:
        borders = ", ".join(f"{_border(host, o.name)} ({o.tensor})" for o in network.outputs)
        outputs = f"{borders}: what the rest of {host.name} reads, so these widths stay"
    return html(
        "<!doctype html>\n<html lang=en><meta charset=utf-8><title>{}</title><style>{}</style>\n<h1>{}</h1>\n{}\n"
        "<ul>\n{}\n</ul>\n"
        "<p>outputs: {}</p></html>\n",
        network.arch,
        _STYLE,
        network.arch,
        picture,
        joined(_items(network), "\n"),
        outputs,
    )


def _items(network: Network) -> Iterable[Markup]:
    """Yield an entry for each layer outside of blocks, and one for each block that holds its branches."""
    told: set[str] = set()
    for layer in network.layers:
        if layer.block is None:
            yield _item(layer)
            continue
        if layer.block in told:
            continue
        told.add(layer.block)
        block = network.block(layer.block)
        members = [network.by_name[name] for name in block.members]
        main = [x for x in members if x.name in block.main]
        short = [x for x in members if x.name in block.shortcut]
        end = [x for x in members if x not in main and x not in short]
        yield html(
            "<li><details open><summary>{} <span class=size>{}</span></summary><ul><li>main branch<ul>{}</ul></li>"
            "<li class=skip>shortcut from <code>{}</code>: {}</li>{}</ul></details></li>",
            block.name,
            "x".join(map(str, end[-1].out_shape)),
            joined(map(_item, main)),
            block.source,
            html("<ul>{}</ul>", joined(map(_item, short))) if short else "identity",
            joined(map(_item, end)),
        )


def _item(layer: Layer) -> Markup:
    return html("<li><code>{}</code> <span class=size>{}</span></li>", layer.name, text_of(layer))
