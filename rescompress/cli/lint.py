"""``rescompress lint``: will this ONNX file run well on that target?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rescompress.cli.output import output_of

if TYPE_CHECKING:
    from edge_targets.device import Target
    from export.lint import TargetFacts

app = typer.Typer(add_completion=False)

NEWEST_OPSET = 25
"""What runtimes other than TensorRT are taken to read, where no table of theirs says otherwise."""


def facts_of(target: Target) -> TargetFacts:
    """Return what lint rules need to know about a target."""
    from export.lint import TargetFacts

    known = target.capabilities
    return TargetFacts(
        title=f"{target.device.title}{f' (TensorRT {target.tensorrt_version})' if target.tensorrt_version else ''}",
        runtime=target.runtime,
        max_opset=known.max_opset if known else NEWEST_OPSET,
        precisions=target.precisions,
        align={str(precision): multiple for precision, multiple in target.device.align.items()},
        strongly_typed=target.strongly_typed,
    )


@app.command("lint")
def lint_command(
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="ONNX file, ours or anyone's.", show_default=False)],
    target: Annotated[str, typer.Option("--target", "-t", help="Edge target (`rescompress targets`).")] = "jetson",
    fix: Annotated[
        Path | None, typer.Option("--fix", metavar="OUT.onnx", help="Write a repaired copy, proven equal.", show_default=False)
    ] = None,
) -> None:
    """Check an ONNX file against a target: traps that are refused, run slowly, or silently run in float.

    Exit code 3 when something is found at error level (after repair, with --fix).

    Example: [bold]rescompress lint model.onnx --target jetson --fix repaired.onnx[/bold]
    """
    from rich.markup import escape
    from rich.table import Table

    from edge_targets.catalog import load_target
    from export.lint import lint
    from export.load import load_onnx, save_onnx
    from export.passes import repair

    output = output_of(ctx)
    chosen = load_target(target)
    facts = facts_of(chosen)
    loaded = load_onnx(model)
    if fix is not None:
        repaired = repair(loaded, facts)
        for step in repaired.steps:
            output.hint(f"{step.name}: {step.outcome}")
        if repaired.modified:
            save_onnx(repaired.model, fix)
            output.hint(f"wrote {fix}")
        else:
            output.hint("nothing was repaired; no file was written")
        loaded = repaired.model
    findings = lint(loaded, facts)
    table = Table(title=f"{model.name} on {facts.title}", title_justify="left")
    for column in ("severity", "rule", "node", "what is wrong", "remedy"):
        table.add_column(column, overflow="fold")
    for f in findings:
        table.add_row(*(escape(text) for text in (f.severity, f.rule, f.node, f.message, f.remedy)))
    output.result([f.document() for f in findings], table if findings else f"{model.name}: nothing found for {facts.title}")
    errors = sum(f.severity == "error" for f in findings)
    if errors:
        output.hint(f"{errors} finding{'s' if errors > 1 else ''} at error level")
        raise typer.Exit(3)
