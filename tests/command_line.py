"""The command line in a process of its own, for what the fixture `rescompress` cannot show: imports, environments, signals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., subprocess.CompletedProcess[str]]
"""What the fixture `rescompress` is, and what is made of it."""

ROOT = Path(__file__).parents[1]
CI_VARIABLES = ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT", "GITLAB_CI", "CI_PROJECT_DIR")


def run_command(
    *args: object, cwd: Path | None = None, code: int | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line and return what it printed; without the variables of a CI system that runs these tests.

    Args:
        args: Its words.
        cwd: Where.
        code: The exit code to expect; any when None.
        variables: Of the environment.
    """
    plain = {k: v for k, v in os.environ.items() if k not in CI_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", "rescompress", *map(str, args)],
        cwd=cwd,
        env={**plain, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "NO_COLOR": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    if code is not None:
        assert done.returncode == code, done.stderr + done.stdout
    return done
