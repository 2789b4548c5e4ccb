"""What runs where POSIX's modules and calls are missing, as on Windows: every import, and files written whole."""

from __future__ import annotations

import ast
import os
import re
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

LOCKS_OF_WINDOWS = """
import os, sys, types, tempfile, threading, time
import fcntl
from pathlib import Path
held = {}
def locking(handle, mode, size):  # as the C library of Windows has it: an exclusive lock of bytes from the position on
    assert (mode, size) == (1, 1)
    key = os.fstat(handle).st_ino, os.lseek(handle, 0, os.SEEK_CUR)
    if held.get(key) not in (None, handle):
        raise OSError(36, "deadlock avoided")
    held[key] = handle
real = sys.platform
sys.platform = "win32"
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=1)
import rescompress.core.locks as locks
sys.platform = real
assert not locks.RENAMES_OPEN_FILES
path = Path(tempfile.mkdtemp()) / "l"
path.write_bytes(b"content")
one, other = (os.open(path, os.O_RDWR) for _ in range(2))
os.lseek(one, 3, os.SEEK_SET)
assert locks.lock(one) and locks.lock(one)
assert os.lseek(one, 0, os.SEEK_CUR) == 3, "reading goes on where it was"
assert not locks.lock(other) and not locks.lock(other, shared=True)
assert path.read_bytes() == b"content"
assert all(offset > 1 << 32 for _, offset in held), "what is locked can be read"
threading.Timer(0.2, held.clear).start()
begin = time.monotonic()
assert locks.lock(other, wait=True) and time.monotonic() - begin > 0.1
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


def test_the_locks_of_windows_exclude_and_leave_the_content_readable() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOCKS_OF_WINDOWS],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr


MODULES = {
    # Those of POSIX alone, and the files that may import them, with a way out where they are missing.
    "fcntl": {"rescompress/core/locks.py"},
    "resource": {"rescompress/cli/app.py"},
    "msvcrt": {"rescompress/core/locks.py"},
    **{key: set[str]() for key in ("pwd", "grp", "termios", "tty", "pty", "syslog", "winreg")},
}
CALLS = {
    "os": [
        "fork",
        "forkpty",
        "getuid",
        "geteuid",
        "getgid",
        "getpgid",
        "killpg",
        "kill",
        "setsid",
        "statvfs",
        "fstatvfs",
        "mkfifo",
        "chown",
        "lchown",
        "uname",
        "getloadavg",
        "sched_getaffinity",
        "wait",
        "waitpid",
        "O_DIRECTORY",
        "O_NOFOLLOW",
        "O_NONBLOCK",
        "O_CLOEXEC",
        "O_BINARY",
    ],
    "signal": [
        "SIGKILL",
        "SIGHUP",
        "SIGALRM",
        "SIGUSR1",
        "SIGUSR2",
        "SIGQUIT",
        "SIGSTOP",
        "SIGCONT",
        "alarm",
        "setitimer",
        "pthread_sigmask",
    ],
}
WORDS = re.compile("|".join(rf"\b{word}\b" for word in (*MODULES, *(name for names in CALLS.values() for name in names))))
ON_THE_BOARD = {"infer.py", "trt_builder.py"}
"""Files that run on a Jetson alone."""


def unguarded(path: Path) -> list[str]:
    """Return the uses of what Windows lacks in functions that do not ask first."""
    text = path.read_text(encoding="utf-8")
    if not WORDS.search(text):  # to parse and walk every module takes seconds
        return []
    tree = ast.parse(text)
    name = path.relative_to(ROOT).as_posix()
    found = []
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{name}: import {m}" for m in modules if name not in MODULES.get(m, {name})]
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(n): f for f in functions for n in ast.walk(f)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.attr in CALLS.get(node.value.id, ()):
            around = ast.unparse(inside.get(id(node), tree))
            asked = (f"'{node.attr}'" in around) or ("os.name ==" in around) or ("sys.platform" in around)
            found += [] if asked else [f"{name}:{node.lineno}: {node.value.id}.{node.attr}"]
    return found


def test_nothing_that_windows_lacks_is_used_without_asking() -> None:
    files = [p for top in ("rescompress", "compress", "export", "edge_targets") for p in (ROOT / top).rglob("*.py")]
    assert len(files) > 200
    assert [use for p in files if p.name not in ON_THE_BOARD for use in unguarded(p)] == []
