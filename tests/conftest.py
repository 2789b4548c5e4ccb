"""What all tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import CI_VARIABLES, Command

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: one thread each, in them and in what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared data: $RESCOMPRESS_SHARED, or ``../shared`` beside the project; skip without it."""
    folder = Path(os.environ.get("RESCOMPRESS_SHARED", Path(__file__).parents[1] / ".." / "shared")).resolve()
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder} (set RESCOMPRESS_SHARED)")
    return folder


@pytest.fixture
def rescompress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return the command line as a function: the same main, without a process that imports torch anew for every call."""
    from rescompress.cli.app import main

    def run(*args: object, cwd: Path | None = None, code: int | None = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["rescompress", *map(str, args)])
            patch.setenv("COLUMNS", "160")
            patch.setenv("NO_COLOR", "1")
            for name in CI_VARIABLES:
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            if cwd is not None:
                patch.chdir(cwd)
            capsys.readouterr()
            with pytest.raises(SystemExit) as end:
                main()
        out, err = capsys.readouterr()
        done = subprocess.CompletedProcess(["rescompress", *map(str, args)], int(end.value.code or 0), out, err)
        assert "Traceback" not in err
        if code is not None:
            assert done.returncode == code, err + out
        return done

    return run
