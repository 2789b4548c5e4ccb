"""`rescompress inspect` and `rescompress formats`: what a checkpoint is, and what can be read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rescompress.cli import options
from rescompress.cli.from_settings import Options, with_options
from rescompress.cli.output import output_of

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer()


@app.command()
@with_options
def inspect(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint file.", show_default=False)],
    stated: Annotated[options.Stated, Options()],
    graph: Annotated[
        Path | None,
        typer.Option("--graph", help="Write the graph as a picture: .svg (needs graphviz), .html or .dot.", show_default=False),
    ] = None,
) -> None:
    """Show what a checkpoint is: architecture, format, preprocessing, every layer, block and prunable group.

    Example: rescompress inspect resnet50.pt --input 3x224x224

    Where a file leaves something open (input size, preprocessing, where bottlenecks stride), the reading that was taken
    is told, and --input, --preprocess and --arch-option take its place.
    """
    output = output_of(ctx)
    loaded = stated.opening(checkpoint).load()  # the page holds the warnings
    from rescompress.runs.inspection import describe  # after what may refuse the file: it takes seconds to import

    document = {"path": str(checkpoint), **describe(loaded)}
    if graph is not None:
        from rescompress.show.report.graph import draw

        draw(loaded.network, graph, loaded.host)
        document["graph"] = str(graph)
    output.result(document, *_pages(document, everything=output.verbosity > 0))


@app.command()
def formats(ctx: typer.Context) -> None:
    """List the checkpoint formats and architectures that are known here.

    Example: rescompress formats --json
    """
    from rich.table import Table

    from compress import zoo
    from compress.checkpoints.base import Format
    from compress.checkpoints.load import FORMATS
    from compress.checkpoints.options import KNOWN
    from compress.preprocessing import KEYS
    from rescompress.core import plugins

    known = {name: plugins.load(FORMATS, name, what="format", offers=Format) for name in plugins.names(FORMATS)}
    found = [{"name": name, "description": str(one.DESCRIPTION)} for name, one in known.items()]
    table = Table("format", "what it reads", title="Checkpoint formats, recognised by keys and shapes", title_justify="left")
    for entry in found:
        table.add_row(entry["name"], entry["description"])
    facts = Table("--arch-option", "meaning", title="Facts a file may leave open", title_justify="left")
    for name, meaning in KNOWN.items():
        facts.add_row(name, meaning)
    pixels = Table("--preprocess", "meaning", title="What can be stated about preprocessing", title_justify="left")
    for name, meaning in KEYS.items():
        pixels.add_row(name, meaning)
    document = {
        "formats": found,
        "architectures": zoo.names(),
        "preprocessing": list(zoo.PREPROCESSING_NAMES),
        "preprocessing_keys": KEYS,
        "arch_options": KNOWN,
    }
    output_of(ctx).result(document, table, facts, pixels, "architectures: " + ", ".join(zoo.names()))


def _pages(document: dict[str, Any], *, everything: bool) -> list[Any]:
    from rich.text import Text

    totals = document["totals"]
    lines = [
        f"format         {document['format']}" + (f" ({document['container']})" if document["container"] else ""),
        f"input          {_shape(document['input_shape'])}",
        f"preprocessing  {document['preprocessing']['text']}",
        f"totals         {totals['params']:,} parameters, {totals['macs']:,} MACs, {totals['size_bytes'] / 1e6:.2f} MB, "
        f"{totals['blocks']} blocks",
    ]
    if document["host"]:
        sizes = {o["name"]: _shape(o["shape"]) for o in document["outputs"]}
        host = document["host"]
        of = Path(host["files"][0]["path"]).name if host["files"] else "a module"
        lines.append(
            f"trunk of       {of}, from '{host['input']}' on; these widths stay:" if host["input"] else f"trunk of       {of}"
        )
        lines += [f"  border       {tensor} ({sizes[name]})" for name, tensor in host["borders"].items()]
    if document["quantization"]:
        q = document["quantization"]
        lines.append(
            f"quantized      {q['method']}, profile {q['profile']}: {q['weights']} weights, {q['activations']} activations"
        )
    if document["labels"]:
        more = " ..." if len(document["labels"]) > 10 else ""
        lines.append(f"labels         {', '.join(document['labels'][:10])}{more}")
    lines += [f"note           {note}" for note in document["notes"]]
    name = Text(document["architecture"], style="bold")
    return [name, "\n".join(lines), _layer_table(document, everything=everything), _group_table(document)]


def _layer_table(document: dict[str, Any], *, everything: bool) -> Table:
    from rich.table import Table

    title = "Layers" if everything else "Layers (BatchNorm and ReLU in the line of their convolution; -v: one line each)"
    table = Table(title=title, title_justify="left")
    table.add_column("layer")
    table.add_column("operation")
    for name in ("output", "kernel", "stride", "parameters", "MACs"):
        table.add_column(name, justify="right")
    blocks = {b["name"]: b for b in document["blocks"]}
    rows = _rows(document["layers"]) if not everything else [(x, x["op"], x["params"]) for x in document["layers"]]
    before: str | None = None
    for layer, operation, params in rows:
        if layer["block"] != before:
            table.add_section()
            before = layer["block"]
            if before is not None:
                b = blocks[before]
                table.add_row(
                    before,
                    f"{b['kind']}, shortcut: {b['shortcut_text']}",
                    _shape(b["out_shape"]),
                    "",
                    "",
                    f"{b['params']:,}",
                    f"{b['macs']:,}",
                    style="bold",
                )
        spatial = layer["op"] in ("conv", "max_pool", "avg_pool")
        table.add_row(
            ("  " if layer["block"] else "") + layer["name"].removeprefix(f"{layer['block']}."),
            operation,
            _shape(layer["out_shape"]),
            _pair(layer["kernel"]) if spatial else "",
            _size(layer["stride"]) if spatial or layer["op"] == "channel_select" else "",
            f"{params:,}" if params else "",
            f"{layer['macs']:,}" if layer["macs"] else "",
        )
    totals = document["totals"]
    table.add_section()
    table.add_row("total", "", "", "", "", f"{totals['params']:,}", f"{totals['macs']:,}", style="bold")
    return table


_WORDS = {
    "batch_norm": "BN",
    "group_norm": "GN",
    "relu": "ReLU",
    "clip": "clip",
    "leaky_relu": "leaky ReLU",
    "elu": "ELU",
    "prelu": "PReLU",
    "silu": "SiLU",
    "gelu": "GELU",
    "hard_swish": "hard-swish",
    "hard_sigmoid": "hard-sigmoid",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "dropout": "dropout",
}
"""What stands in the line of the layer before, where that is a layer of its own."""


def _rows(layers: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str, int]]:
    """Return one row per layer, with norms and activations added to the layer whose output they read."""
    rows: list[tuple[dict[str, Any], list[str], int]] = []
    at: dict[str, int] = {}
    for layer in layers:
        source = at.get(layer["inputs"][0]) if layer["inputs"] else None
        if layer["op"] in _WORDS and source is not None and source == len(rows) - 1:
            row, operations, params = rows[source]
            word = _WORDS[layer["op"]]
            rows[source] = (row, [*operations, word], params + layer["params"])
            at[layer["name"]] = source
            continue
        name = layer["op"].replace("_", " ")
        rows.append((layer, [f"{name}, {layer['groups']} groups" if layer["groups"] > 1 else name], layer["params"]))
        at[layer["name"]] = len(rows) - 1
    return [(row, " + ".join(operations), params) for row, operations, params in rows]


def _group_table(document: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title="Prunable groups of channels", title_justify="left")
    table.add_column("group")
    table.add_column("kind")
    table.add_column("channels", justify="right")
    table.add_column("removed in steps of", justify="right")
    for group in document["groups"]:
        table.add_row(group["name"], group["kind"], str(group["channels"]), str(group["unit"]))
    return table


def _pair(sizes: int | list[int]) -> str:
    return f"{sizes}x{sizes}" if isinstance(sizes, int) else _shape(sizes)


def _size(sizes: int | list[int]) -> str:
    return str(sizes) if isinstance(sizes, int) else _shape(sizes)


def _shape(shape: list[int]) -> str:
    return "x".join(str(n) for n in shape)
