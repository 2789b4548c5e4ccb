"""A gate's report for machines and people: terminal, Markdown summary, JUnit, GitHub and GitLab."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree

from rescompress.core.text import markdown, one_line, shown, xml_text
from rescompress.show.gate.checks import Check, GateReport, points

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

SIGNS = {"pass": "✅", "fail": "❌", "inconclusive": "❔"}
STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}


def value_text(check: Check) -> str:
    """Return the value with its unit: ``+0.35 points``, ``1.02x``; empty if there is none."""
    if check.value is None:
        return ""
    if check.unit == "fraction":
        return f"{100 * check.value:.2f} %"
    return f"{check.value:+.2f} points" if check.unit == "points" else f"{check.value:.3f}x"


def interval_text(check: Check) -> str:
    """Return the two-sided interval, or ``exact``; empty if there is no value."""
    if check.interval is None:
        return "" if check.value is None else "exact"
    low, high = check.interval
    if check.unit == "fraction":
        return f"{100 * low:.2f} to {100 * high:.2f} %"
    return f"{low:+.2f} to {high:+.2f}" if check.unit == "points" else f"{low:.3f} to {high:.3f}"


def limit_text(check: Check) -> str:
    """Return the limit with its unit."""
    if check.name.startswith(("stage:", "target:")):
        return ""
    if check.unit == "fraction":
        return f"{100 * check.limit:g} %"
    return points(check.limit) if check.unit == "points" else f"{check.limit:g}x"


HEAD = ("check", "verdict", "baseline", "candidate", "drop or ratio", "two-sided 95 %", "limit")


def _cells(check: Check) -> list[str]:
    return [check.baseline, check.candidate, value_text(check), interval_text(check), limit_text(check)]


_LONGEST_WHOLE = 24
"""Letters of a check's name that are never broken over lines; the names of some boards are longer."""


def to_rich(report: GateReport) -> RenderableType:
    """Return the checks as a table for a terminal, set closer where the line is narrow: words stay whole on 80 columns."""
    from rescompress.show.figures.fitting import Fitting

    return Fitting(_table(report, close=False), _table(report, close=True))


def _table(report: GateReport, *, close: bool) -> Table:
    """Return the table, with every column as wide as it wants, or as its longest word."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [[check.name, check.verdict, *_cells(check)] for check in report.checks]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0 if close else 1))
    whole = all(len(check.name) <= _LONGEST_WHOLE for check in report.checks)
    for name, *cells in zip(HEAD, *rows, strict=True):
        words = name in ("check", "verdict")
        keeps = name == "verdict" or (name == "check" and whole)
        longest = max(len(word) for text in (name, *cells) for word in text.split() or [""])
        justify: Literal["left", "right"] = "left" if words else "right"
        table.add_column(name, justify=justify, no_wrap=keeps, overflow="fold", max_width=longest if close else None)
    for name, verdict, *cells in rows:
        table.add_row(name, Text(verdict, style=STYLES[verdict]), *cells)
    return table


def to_markdown(report: GateReport, *, trade_off: str = "") -> str:
    """Return a summary for a pull request.

    Args:
        report: The gate's answers.
        trade_off: A Markdown table of the candidate's stages, folded away below the checks.
    """
    lines = [
        f"## {SIGNS[report.verdict]} rescompress gate: {report.verdict}",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---|---|" + "---:|" * (len(HEAD) - 2),
    ]
    for check in report.checks:
        cells = [check.name, f"{SIGNS[check.verdict]} {check.verdict}", *_cells(check)]
        lines.append("| " + " | ".join(markdown(c) for c in cells) + " |")
    lines.append("")
    lines += [f"- **{markdown(c.name)}**: {markdown(c.message)}" for c in report.checks if c.verdict != "pass"]
    lines += [f"- {markdown(note)}" for note in report.notes]
    if report.stale_baseline:
        lines.append(f"- {markdown(stale_text(report))}")
    if trade_off:
        lines += ["", "<details><summary>Every stage of the candidate</summary>", "", trade_off.rstrip(), "", "</details>"]
    return "\n".join(lines).rstrip() + "\n"


def stale_text(report: GateReport) -> str:
    """Return the advice to renew a baseline that the candidate left far behind."""
    return f"stale baseline: far better than the baseline in {', '.join(report.stale_baseline)}; renew it with --save-baseline"


def to_junit(report: GateReport, *, inconclusive_fails: bool) -> str:
    """Return the checks as a JUnit XML document.

    Args:
        report: The gate's answers.
        inconclusive_fails: Whether an inconclusive check counts as a failure; otherwise it counts as skipped.
    """
    failures = sum(c.verdict == "fail" or (inconclusive_fails and c.verdict == "inconclusive") for c in report.checks)
    skipped = sum(not inconclusive_fails and c.verdict == "inconclusive" for c in report.checks)
    counts = {"tests": str(len(report.checks)), "failures": str(failures), "skipped": str(skipped), "errors": "0"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "rescompress gate", "time": "0", **counts})
    for check in report.checks:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "rescompress.gate", "name": xml_text(check.name), "time": "0"}
        )
        if check.verdict == "fail" or (inconclusive_fails and check.verdict == "inconclusive"):
            failure = ElementTree.SubElement(case, "failure", {"type": check.verdict, "message": xml_text(check.message)})
            failure.text = xml_text(check.message)
        elif check.verdict == "inconclusive":
            ElementTree.SubElement(case, "skipped", {"message": xml_text(check.message)})
        ElementTree.SubElement(case, "system-out").text = xml_text(check.message)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def github_commands(report: GateReport) -> list[str]:
    """Return one GitHub workflow command per check that did not pass, and one for a stale baseline."""
    commands = []
    for check in report.checks:
        if check.verdict != "pass":
            level = "error" if check.verdict == "fail" else "warning"
            commands.append(f"::{level} title={_property(f'rescompress gate: {check.name}')}::{_data(check.message)}")
    if report.stale_baseline:
        commands.append(f"::notice title=rescompress gate::{_data(stale_text(report))}")
    return commands


def _data(text: str) -> str:
    return shown(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def gitlab_code_quality(report: GateReport, path: str) -> str:
    """Return the checks that did not pass as a GitLab Code Quality report.

    Args:
        report: The gate's answers.
        path: The file that a finding points at, relative to the repository.
    """
    findings = []
    for check in report.checks:
        if check.verdict != "pass":
            findings.append(
                {
                    "description": shown(check.message),
                    "check_name": one_line(f"rescompress gate: {check.name}"),
                    "fingerprint": hashlib.sha256(f"{path}\0{check.name}".encode()).hexdigest(),
                    "severity": "critical" if check.verdict == "fail" else "minor",
                    "location": {"path": path, "lines": {"begin": 1}},
                }
            )
    return json.dumps(findings, indent=1) + "\n"
