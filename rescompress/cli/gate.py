"""`rescompress gate`: may this run take the place of its baseline?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rescompress.cli import workspace
from rescompress.cli.from_settings import Options, with_options
from rescompress.cli.output import Output, output_of
from rescompress.show.gate.limits import Limits

if TYPE_CHECKING:
    from rescompress.show.gate import GateReport, Run

app = typer.Typer()

GITLAB_FILE = "gl-code-quality-report.json"


@app.command()
@with_options
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
    *,
    flags: Annotated[Limits, Options()],
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.", show_default=False)] = None,
    summary: Annotated[
        Path | None, typer.Option("--summary", metavar="FILE.md", help="Write a Markdown summary.", show_default=False)
    ] = None,
    save_baseline: Annotated[
        Path | None,
        typer.Option("--save-baseline", metavar="FILE", help="Write DIR as one small baseline file.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files of other origin.", show_default=False)] = False,
) -> None:
    """Compare a run with a baseline and fail when it lost too much accuracy, speed or size.

    Exit codes: 0 pass, 3 fail, 6 inconclusive (the data cannot decide), 5 the runs cannot be compared.
    A limit of `inf` leaves a check out.

    Example: rescompress gate rescompress-out/quickstart --baseline baseline.json --max-drop 1 --summary gate.md
    """
    from rescompress.core.errors import BadInput
    from rescompress.runs import claims
    from rescompress.show.gate import judge, load_run

    output = output_of(ctx)
    claims.check_outputs({"--junit": junit, "--summary": summary, "--save-baseline": save_baseline}, [limits])
    claims.check_outputs({"--junit": junit, "--summary": summary}, [baseline])
    claims.check_foreign(junit, claims.JUNIT, "--junit", force=force)
    claims.check_foreign(summary, claims.SUMMARY, "--summary", force=force)
    claims.check_foreign(save_baseline, claims.BASELINE, "--save-baseline", force=force)
    if os.environ.get("GITLAB_CI") == "true":
        claims.check_foreign(_project() / GITLAB_FILE, claims.CODE_QUALITY, "CI_PROJECT_DIR", force=force)
    allowed = _limits(limits, flags.model_dump(exclude_unset=True))
    candidate = load_run(run)
    workspace.tell_workspace(run, output)
    if save_baseline is not None and (
        candidate.manifest.unfinished or any(r.status == "failed" for r in candidate.manifest.stages)
    ):
        raise BadInput("a run that did not finish is no baseline", where=str(run), remedy="finish it: `rescompress run`")
    if baseline is None:
        if save_baseline is None:
            raise BadInput(
                "there is nothing to compare with",
                where="--baseline",
                remedy="name a run, or a file written by --save-baseline",
            )
        _save(candidate, save_baseline, output)
        output.result({"baseline": str(save_baseline)})
        return
    report = judge(candidate, load_run(baseline), allowed)  # before anything is written: it may be to the same file
    _write(report, candidate, allowed, junit, summary, limits or run, output)
    if save_baseline is not None and report.verdict == "pass":
        _save(candidate, save_baseline, output)
    elif save_baseline is not None:
        output.hint(f"baseline not written: the verdict is {report.verdict}; without --baseline it is written in any case")
    _show(output, report)
    _end(report, allowed)


def _save(candidate: Run, path: Path, output: Output) -> None:
    from rescompress.core.artifact import write_text
    from rescompress.show.gate.checks import baseline_of

    write_text(path, baseline_of(candidate).model_dump_json(exclude_defaults=True) + "\n")
    output.hint(f"baseline written: {path}")


def _limits(path: Path | None, flags: dict[str, object]) -> Limits:
    """Return the limits: flags over the file over the defaults."""
    from rescompress.show.gate import limits_of, load_limits

    base = load_limits(path).model_dump(exclude_unset=True) if path is not None else {}
    return limits_of({**base, **flags}, where="command line")


def _write(
    report: GateReport,
    candidate: Run,
    limits: Limits,
    junit: Path | None,
    summary: Path | None,
    points_at: Path,
    output: Output,
) -> None:
    from rescompress.core.artifact import write_text
    from rescompress.show.figures.tables import rows_of, to_markdown
    from rescompress.show.gate import render

    text = render.to_markdown(report, trade_off=to_markdown(rows_of(candidate.manifest)))
    if summary is not None:
        write_text(summary, text)
    if junit is not None:
        write_text(junit, render.to_junit(report, inconclusive_fails=limits.on_inconclusive != "pass"))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for command in render.github_commands(report):
            output.workflow_command(command)
        _append("GITHUB_STEP_SUMMARY", text)
        _append("GITHUB_OUTPUT", f"verdict={report.verdict}\n")
    if os.environ.get("GITLAB_CI") == "true":
        path = points_at.resolve()
        root = _project()
        shown = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        write_text(root / GITLAB_FILE, render.gitlab_code_quality(report, shown))


def _project() -> Path:
    """Return the root of the repository in a job of GitLab."""
    return Path(os.environ.get("CI_PROJECT_DIR", ".")).resolve()


def _append(variable: str, text: str) -> None:
    """Append to the file that a CI system names in a variable, if it does.

    Raises:
        EnvironmentFailed: It cannot be written.
    """
    from rescompress.core.errors import EnvironmentFailed

    name = os.environ.get(variable)
    if not name:
        return
    try:
        with Path(name).open("a", encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        raise EnvironmentFailed(f"cannot write: {e.strerror}", where=f"${variable} ({name})", remedy="check the runner") from e


def _show(output: Output, report: GateReport) -> None:
    from rescompress.show.gate import render

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
        raise GateFailed(f"gate failed: {these('fail')}", remedy="repair the candidate, or loosen the limit on purpose")
    if report.verdict == "inconclusive" and limits.on_inconclusive == "fail":
        raise GateFailed(f"gate inconclusive, which counts as failed: {these('inconclusive')}", remedy="measure more")
    if report.verdict == "inconclusive" and limits.on_inconclusive == "inconclusive":
        raise GateInconclusive(
            f"gate inconclusive: {these('inconclusive')}", remedy="measure more, or decide with --on-inconclusive pass|fail"
        )
