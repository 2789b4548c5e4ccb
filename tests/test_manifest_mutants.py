"""Manifests of any content in every command that reads one: an answer, or an error that says why; never a traceback."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from manifest_mutants import mutants
from report_factory import write_run

Command = Callable[..., subprocess.CompletedProcess[str]]
VIEWS: dict[str, list[str]] = {
    "compare": ["compare", "cand", "base", "--json"],
    "history": ["compare", ".", "--history"],
    "table": ["compare", "cand", "--format", "md", "-v"],
    "report": ["report", "cand", "-o", "page.html", "--force", "--model-card", "card.md"],
    "gate": ["gate", "cand", "-b", "base"],
    "baseline": ["gate", "base", "-b", "cand", "--json"],
}


def read_by_every_command(rescompress: Command, folder: Path, count: int, seed: int) -> None:
    write_run(folder / "base")
    write_run(folder / "cand")
    text = (folder / "cand" / "manifest.json").read_text()
    answered = 0
    for mutant in mutants(text, count, seed):
        (folder / "cand" / "manifest.json").write_text(mutant)
        for view, words in VIEWS.items():
            done = rescompress(*words, cwd=folder, code=None)
            assert done.returncode in (0, 3, 5, 6), f"{view}: {done.returncode} {done.stderr}\n{mutant[:3000]}"
            assert "bug of" not in done.stderr, f"{view}: {done.stderr}\n{mutant[:3000]}"
            if "--json" in words and done.returncode != 5:
                json.loads(done.stdout)
            answered += done.returncode == 0
    assert answered > 0, "some changes matter to nobody"


def test_a_sample_of_changed_manifests(rescompress: Command, tmp_path: Path) -> None:
    read_by_every_command(rescompress, tmp_path, 8, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_changed_manifests(rescompress: Command, tmp_path: Path, seed: int) -> None:
    read_by_every_command(rescompress, tmp_path, 150, seed)
