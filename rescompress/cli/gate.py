"""`rescompress gate`: may this run take the place of its baseline?"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rescompress.cli.output import Output, output_of

if TYPE_CHECKING:
    from rescompress.gate import GateReport, Limits, Run

app = typer.Typer()

GITLAB_FILE = "gl-code-quality-report.json"


class OnInconclusive(StrEnum):
    """How an inconclusive gate ends."""

    inconclusive = "inconclusive"
    passes = "pass"
    fails = "fail"


@app.command()
def gate(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The candidate: the folder of a run.", show_default=False)],
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", "-b", metavar="DIR|FILE", help="The run to compare with, or a saved baseline."),
    ] = None,
    limits: Annotated[
        Path | None, typer.Option("--limits", metavar="FILE", help="Limits as YAML; flags win over it.", show_default=False)
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", metavar="PTS", help="Points of top-1 that may be lost.", show_default="1.0")
    ] = None,
    max_latency: Annotated[
        float | None, typer.Option("--max-latency", metavar="RATIO", help="Latency, times the baseline's.", show_default="1.05")
    ] = None,
    max_size: Annotated[
        float | None, typer.Option("--max-size", metavar="RATIO", help="File size, times the baseline's.", show_default="1.05")
    ] = None,
    max_macs: Annotated[
        float | None, typer.Option("--max-macs", metavar="RATIO", help="MACs, times the baseline's.", show_default="off")
    ] = None,
    max_params: Annotated[
        float | None,
        typer.Option("--max-params", metavar="RATIO", help="Parameters, times the baseline's.", show_default="off"),
    ] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="S", help="Stage to compare.", show_default="last with accuracy")
    ] = None,
    on_inconclusive: Annotated[
        OnInconclusive | None,
        typer.Option("--on-inconclusive", help="How an inconclusive gate ends.", show_default="exit 6"),
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.", show_default=False)] = None,
    summary: Annotated[
        Path | None, typer.Option("--summary", metavar="FILE.md", help="Write a Markdown summary.", show_default=False)
    ] = None,
    save_baseline: Annotated[
        Path | None,
        typer.Option("--save-baseline", metavar="FILE", help="Write DIR as one small baseline file.", show_default=False),
    ] = None,
) -> None:
    """Compare a run with a baseline and fail when it lost too much accuracy, speed or size.

    Exit codes: 0 pass, 3 fail, 6 inconclusive (the data cannot decide), 5 the runs cannot be compared.
    A limit of `inf` leaves a check out.

    Example: rescompress gate rescompress-out --baseline baseline.json --max-drop 1 --summary gate.md
    """
    from rescompress.core.errors import BadInput
    from rescompress.gate import judge, load_run
    from rescompress.gate.checks import baseline_of

    output = output_of(ctx)
    flags = {
        "max_drop": max_drop,
        "max_latency": max_latency,
        "max_size": max_size,
        "max_macs": max_macs,
        "max_params": max_params,
        "stage": stage,
        "on_inconclusive": on_inconclusive.value if on_inconclusive else None,
    }
    allowed = _limits(limits, {k: v for k, v in flags.items() if v is not None})
    candidate = load_run(run)
    if save_baseline is not None:
        from rescompress.core.artifact import write_text

        write_text(save_baseline, baseline_of(candidate).model_dump_json(exclude_defaults=True) + "\n")
        output.hint(f"baseline written: {save_baseline}")
    if baseline is None:
        if save_baseline is not None:
            output.result({"baseline": str(save_baseline)})
            return
        raise BadInput(
            "there is nothing to compare with", where="--baseline", remedy="name a run, or a file written by --save-baseline"
        )
    report = judge(candidate, load_run(baseline), allowed)
    _write(report, candidate, allowed, junit, summary, limits or run)
    _show(output, report)
    _end(report, allowed)


def _limits(path: Path | None, flags: dict[str, object]) -> Limits:
    """Return the limits: flags over the file over the defaults."""
    from rescompress.gate import limits_of, load_limits

    base = load_limits(path).model_dump(exclude_unset=True) if path is not None else {}
    return limits_of({**base, **flags}, where="command line")


def _write(
    report: GateReport, candidate: Run, limits: Limits, junit: Path | None, summary: Path | None, points_at: Path
) -> None:
    from rescompress.core.artifact import write_text
    from rescompress.gate import render
    from rescompress.report.tables import rows_of, to_markdown

    text = render.to_markdown(report, trade_off=to_markdown(rows_of(candidate.manifest)))
    if summary is not None:
        write_text(summary, text)
    if junit is not None:
        write_text(junit, render.to_junit(report, inconclusive_fails=limits.on_inconclusive != "pass"))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for command in render.github_commands(report):
            sys.stderr.write(command + "\n")
        _append("GITHUB_STEP_SUMMARY", text)
        _append("GITHUB_OUTPUT", f"verdict={report.verdict}\n")
    if os.environ.get("GITLAB_CI") == "true":
        path = points_at.resolve()
        root = Path(os.environ.get("CI_PROJECT_DIR", ".")).resolve()
        shown = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        write_text(root / GITLAB_FILE, render.gitlab_code_quality(report, shown))


def _append(variable: str, text: str) -> None:
    """Append to the file that a CI system names in a variable, if it does."""
    name = os.environ.get(variable)
    if name:
        with Path(name).open("a", encoding="utf-8") as f:
            f.write(text)


def _show(output: Output, report: GateReport) -> None:
    from rescompress.gate import render

    marks = [f"{c.name}: {c.message}" for c in report.checks]
    notes = [f"note: {n}" for n in report.notes]
    stale = [render.stale_text(report)] if report.stale_baseline else []
    from rich.text import Text

    verdict = Text(f"gate: {report.verdict}", style=render.STYLES[report.verdict])
    output.result(report.document(), render.to_rich(report), *(Text(t) for t in [*marks, *notes, *stale]), verdict)


def _end(report: GateReport, limits: Limits) -> None:
    """End with the exit code of the verdict."""
    from rescompress.core.errors import GateFailed, GateInconclusive

    def these(verdict: str) -> str:
        return ", ".join(c.name for c in report.checks if c.verdict == verdict)

    if report.verdict == "fail":
        raise GateFailed(f"gate failed: {these('fail')}", remedy="mend the candidate, or loosen the limit on purpose")
    if report.verdict == "inconclusive" and limits.on_inconclusive == "fail":
        raise GateFailed(f"gate inconclusive, which counts as failed: {these('inconclusive')}", remedy="measure more")
    if report.verdict == "inconclusive" and limits.on_inconclusive == "inconclusive":
        raise GateInconclusive(
            f"gate inconclusive: {these('inconclusive')}", remedy="measure more, or decide with --on-inconclusive pass|fail"
        )
