"""The rooms of the house: an import upwards, or a module outside a room, breaks the contracts."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rescompress", "compress", "export", "edge_targets")


def contracts(folder: Path) -> "subprocess.CompletedProcess[str]":
    call = "from importlinter.cli import lint_imports_command as call; sys.argv = ['lint-imports', '--no-cache']; call()"
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); {call}"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    pytest.importorskip("importlinter")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "*.npz"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text", "broken"),
    [
        ("compress/evaluate.py", "import rescompress.show.gate", "The siblings do not know the face"),
        ("rescompress/show/gate/checks.py", "import rescompress.show.report.html", "Inside show"),
        ("rescompress/show/figures/columns.py", "import rescompress.show.gate", "Inside show"),
        ("rescompress/runs/settings.py", "import rescompress.runs.pipeline", "Inside runs"),
        ("rescompress/loose.py", "", "Rooms"),
        ("rescompress/runs/loose.py", "", "Inside runs"),
    ],
)
@pytest.mark.slow
def test_a_planted_import_or_a_module_without_a_room_breaks_the_contracts(
    house: Path, file: str, text: str, broken: str
) -> None:
    target = house / file
    source = target.read_text(encoding="utf-8") if target.is_file() else '"""Loose."""\n\nfrom __future__ import annotations\n'
    head = "from __future__ import annotations\n"
    target.write_text(source.replace(head, f"{head}\n{text}\n", 1), encoding="utf-8")
    done = contracts(house)
    assert done.returncode == 1
    shown = " ".join((done.stdout + done.stderr).split())
    assert broken in shown.split("Broken contracts")[-1]


@pytest.mark.slow
def test_the_house_as_it_is_keeps_its_contracts(house: Path) -> None:
    done = contracts(house)
    assert done.returncode == 0, done.stdout
