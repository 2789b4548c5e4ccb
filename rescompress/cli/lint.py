"""``rescompress lint``: will this ONNX file run well on that target?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rescompress.cli import options as opt
from rescompress.cli.output import output_of

app = typer.Typer(add_completion=False)


@app.command("lint")
def lint_command(
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="ONNX file, ours or anyone's.", show_default=False)],
    target: Annotated[
        str, typer.Option("--target", "-t", help="Edge target (`rescompress targets`).", autocompletion=opt.targets)
    ] = "jetson",
    fix: Annotated[
        Path | None, typer.Option("--fix", metavar="OUT.onnx", help="Write a repaired copy, proven equal.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file of another kind.", show_default=False)] = False,
) -> None:
    """Check an ONNX file against a target: traps that are refused, run slowly, or silently run in float.

    Exit code 3 when something is found at error level (after repair, with --fix).

    Example: [bold]rescompress lint model.onnx --target jetson --fix repaired.onnx[/bold]
    """
    from rich.table import Table

    from edge_targets.catalog import alias_notes, load_target
    from export.lint import lint
    from export.load import load_onnx, save_onnx
    from export.passes import repair
    from rescompress.runs import claims
    from rescompress.runs.file_check import facts_of

    output = output_of(ctx)
    claims.check_outputs({"--fix": fix})  # over its input it may go: that is a repair in place
    claims.check_foreign(fix, claims.ONNX, "--fix", force=force)
    chosen = load_target(target)
    facts = facts_of(chosen)
    for note in alias_notes(chosen):
        output.hint(note)
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
        table.add_row(f.severity, f.rule, f.node, f.message, f.remedy)
    output.result([f.document() for f in findings], table if findings else f"{model.name}: nothing found for {facts.title}")
    errors = sum(f.severity == "error" for f in findings)
    if errors:
        output.hint(f"{errors} finding{'s' if errors > 1 else ''} at error level")
        raise typer.Exit(3)
