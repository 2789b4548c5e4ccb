"""What runs where POSIX's modules and calls are missing, as on Windows: every import, and files written whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HIDE = """
import os, sys, signal
for name in ("fcntl", "pwd", "grp", "termios", "tty"):
    sys.modules[name] = None
for name in ("statvfs", "getuid", "geteuid", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "getloadavg"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGALRM"):
    if hasattr(signal, name):
        delattr(signal, name)
"""
IMPORT_ALL = """
import importlib, pkgutil
failed = []
for package in ("rescompress", "compress", "export", "edge_targets"):
    root = importlib.import_module(package)
    for found in pkgutil.walk_packages(root.__path__, package + "."):
        if found.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(found.name)
        except (ImportError, AttributeError) as e:
            missing = getattr(e, "name", None)
            if missing in ("tensorrt", "tensorrt_rtx", "optuna", "mlflow"):  # extras
                continue
            failed.append(f"{found.name}: {e}")
print("\\n".join(failed))
"""
WRITE = """
import tempfile
from pathlib import Path
from rescompress.core.artifact import sweep_partial, write_text
from rescompress.core.locks import FileLock, folder_held
from rescompress.core.manifest import Manifest, load_manifest, update_manifest
folder = Path(tempfile.mkdtemp())
write_text(folder / "a.txt", "one")
write_text(folder / "a.txt", "two")
sweep_partial([folder])
assert (folder / "a.txt").read_text() == "two"
assert [p.name for p in folder.iterdir()] == ["a.txt"]
with folder_held(folder), FileLock(folder / "l").held() as got:
    assert got
update_manifest(folder, lambda m: m)
assert load_manifest(folder) == Manifest()
"""


def run(script: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HIDE + script], capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_files_are_written_whole_where_nothing_of_posix_is() -> None:
    run(WRITE)


@pytest.mark.slow
def test_every_module_imports_where_nothing_of_posix_is() -> None:
    assert run(IMPORT_ALL).strip() == ""
