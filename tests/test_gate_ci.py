"""The CI examples: their files are what the systems expect, and their commands run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from command_line import Command

from rescompress.core.manifest import Manifest, StageResult

ROOT = Path(__file__).parents[1]
CI = ROOT / "examples" / "ci"
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
WORKFLOW = yaml.safe_load((CI / "github-workflow.yml").read_text())
GITLAB = yaml.safe_load((CI / "gitlab-ci.yml").read_text())
INSTALLS = "pip install"


def script_of(step: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Return the commands of a workflow step and their variables, the composite action unfolded."""
    if "run" in step:
        return step["run"], {}
    given = step["with"]
    assert set(given) <= set(ACTION["inputs"]), "the action knows every input the workflow gives"
    judge = next(s for s in ACTION["runs"]["steps"] if s.get("id") == "gate")
    inputs = {name: str(given.get(name, entry.get("default", ""))) for name, entry in ACTION["inputs"].items()}
    variables = {}
    for name, text in judge["env"].items():
        variables[name] = inputs[text.removeprefix("${{ inputs.").removesuffix(" }}")]
    return judge["run"], variables


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like a checkout, with `rescompress` on the PATH."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "rescompress"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rescompress.cli.app "$@"\n')
    command.chmod(0o755)
    shutil.copytree(ROOT / "examples", tmp_path / "work" / "examples")
    return tmp_path


def shell(commands: str, checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    known = {"PATH": f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=checkout / "work",
        env={**os.environ, **known, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def steps() -> list[dict[str, Any]]:
    chosen = [s for s in WORKFLOW["jobs"]["gate"]["steps"] if "run" in s or s.get("uses") == "./"]
    return [s for s in chosen if INSTALLS not in s.get("run", "")]


def finished_run(checkout: Path) -> None:
    """Stand in for `rescompress run`: the run that the baseline was saved from."""
    (checkout / "work" / "out").mkdir()
    shutil.copy(CI / "baseline.json", checkout / "work" / "out" / "manifest.json")


def run_workflow(checkout: Path) -> None:
    summary, output = checkout / "summary.md", checkout / "output"
    for step in steps():
        commands, variables = script_of(step)
        if "rescompress run" in commands and (checkout / "work" / "out").exists():
            continue
        github = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(output)}
        done = shell(commands, checkout, **variables, **github)
        assert done.returncode == 0, done.stderr
    assert "verdict=pass" in output.read_text()
    assert "rescompress gate: pass" in summary.read_text()
    out = checkout / "work" / "out"
    assert {c.get("name") for c in ElementTree.parse(out / "gate.xml").iter("testcase")} >= {"accuracy", "size", "macs"}
    assert (out / "report.html").stat().st_size > 50_000
    assert (out / "README.md").read_text().startswith("---")


def test_the_workflow_runs_on_a_finished_run(checkout: Path) -> None:
    finished_run(checkout)
    run_workflow(checkout)


@pytest.mark.slow
def test_the_workflow_runs_from_the_start(checkout: Path) -> None:
    run_workflow(checkout)


def test_the_gitlab_job_runs_and_writes_its_reports(checkout: Path) -> None:
    finished_run(checkout)
    job = GITLAB["compress"]
    commands = "\n".join(c for c in job["script"] if INSTALLS not in c and "rescompress run" not in c)
    done = shell(commands, checkout, GITLAB_CI="true", CI_PROJECT_DIR=str(checkout / "work"))
    assert done.returncode == 0, done.stderr
    reports = job["artifacts"]["reports"]
    ElementTree.parse(checkout / "work" / reports["junit"])
    assert json.loads((checkout / "work" / reports["codequality"]).read_text()) == []
    assert job["allow_failure"]["exit_codes"] == [6]


def test_the_action_passes_every_input_and_fails_with_the_gate(checkout: Path) -> None:
    finished_run(checkout)
    manifest = json.loads((checkout / "work" / "out" / "manifest.json").read_text())
    for stage in manifest["stages"]:
        if "size_bytes" in stage["metrics"] and stage["stage"] != "dense":  # whose file is told with its size
            stage["metrics"]["size_bytes"]["value"] *= 2
    (checkout / "work" / "out" / "manifest.json").write_text(json.dumps(manifest))
    step = {"with": {"run": "out", "baseline": "examples/ci/baseline.json", "max-latency": "inf", "max-drop": "50"}}
    assert shell(*_unfold(step, checkout)).returncode == 3
    loose = {"with": {**step["with"], "max-size": "2.5"}}
    assert shell(*_unfold(loose, checkout)).returncode == 0
    asked = {"with": {**step["with"], "run": "--help"}}
    assert shell(*_unfold(asked, checkout)).returncode == 5, "a name that looks like an option is a name"
    named = {"with": {**step["with"], "max-size": "inf", "stage": "quantise"}}
    assert shell(*_unfold(named, checkout)).returncode == 5
    used = {
        text.removeprefix("${{ inputs.").removesuffix(" }}")
        for s in ACTION["runs"]["steps"]
        for text in s.get("env", {}).values()
    }
    assert used | {"install"} == set(ACTION["inputs"])


def _unfold(step: dict[str, Any], checkout: Path) -> tuple[str, Path]:
    commands, variables = script_of(step)
    exports = "".join(f"export {name}='{value}'\n" for name, value in variables.items())
    return exports + commands, checkout


def test_the_runs_below_a_folder_are_named(rescompress: Command, tmp_path: Path) -> None:
    result = StageResult(stage="dense", status="done")
    Manifest(stages=(result,)).save(tmp_path / "rescompress-out" / "half")
    for command in ("gate", "report"):
        done = rescompress(command, "rescompress-out", cwd=tmp_path, code=5)
        assert "runs below it: rescompress-out/half" in done.stderr, command
    Manifest(stages=(result,)).save(tmp_path / "rescompress-out")
    done = rescompress("gate", "rescompress-out", "--save-baseline", "b.json", cwd=tmp_path, code=0)
    assert "rescompress-out is the workspace" in done.stderr
    done = rescompress("report", "rescompress-out", cwd=tmp_path, code=0)
    assert "rescompress-out is the workspace" in done.stderr


def test_every_limit_is_an_option_an_input_and_documented() -> None:
    import typer

    from rescompress.cli import gate
    from rescompress.show.gate import Limits

    command = typer.main.get_command(gate.app)
    flags = {name.replace("_", "-") for name in Limits.model_fields}
    assert {f"--{flag}" for flag in flags} <= {option for parameter in command.params for option in parameter.opts}
    assert all(parameter.help for parameter in command.params), "the description of a field is the help of its option"
    assert flags <= ACTION["inputs"].keys()
    judge = next(s for s in ACTION["runs"]["steps"] if s.get("id") == "gate")
    for flag in flags:
        variable = flag.upper().replace("-", "_")
        assert judge["env"][variable] == f"${{{{ inputs.{flag} }}}}"
        assert f"{flag}={variable}" in judge["run"], "an input must reach the command line"
    block = re.search(r"```yaml\n(max_drop.*?)```", (ROOT / "docs" / "gate.md").read_text(), re.DOTALL)
    assert block is not None
    assert Limits.model_validate(yaml.safe_load(block[1])) == Limits()
    assert yaml.safe_load(block[1]).keys() == Limits.model_fields.keys()
