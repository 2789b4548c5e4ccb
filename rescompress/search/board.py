"""The rung on a board: what ``rescompress deploy`` measures there, one candidate at a time on each board."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rescompress.core.errors import BadInput, EnvironmentFailed
from rescompress.core.locks import FileLock

RUNS = 3
"""Processes that time a candidate on a board: they tell how far the board itself varies."""

_POLL_S = 0.5


def measure_on(boards: Sequence[str], target: str, model: Path, folder: Path, note: Callable[[str], None]) -> None:
    """Measure a model on whichever board is free; the manifest in `folder` has it then.

    Args:
        boards: As ssh knows them.
        target: What they are.
        model: ONNX file.
        folder: Of the candidate's run.
        note: Told where it waits or measures.

    Raises:
        EnvironmentFailed: The board cannot be reached, or fails.
        BadInput: The board cannot run this model.
    """
    with _free(boards) as board:
        note(f"measures on {board}")
        words = [sys.executable, "-P", "-m", "rescompress", "deploy", str(model)]
        words += ["--host", board, "--target", target, "--runs", str(RUNS), "-o", str(folder), "--json"]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no reason given"]
        what = said[-1].removeprefix("error: ")
        if done.returncode == BadInput.exit_code:
            raise BadInput(what, where=board)
        raise EnvironmentFailed(what, where=board, remedy="look after the board, then run the same command again")


@contextlib.contextmanager
def _free(boards: Sequence[str]) -> Iterator[str]:
    """Hold a board that no other worker of this user on this machine has; workers elsewhere wait for their turn on it."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    while True:
        for board in random.sample(list(boards), len(boards)):
            name = hashlib.sha256(board.encode()).hexdigest()[:16]
            with FileLock(Path(tempfile.gettempdir()) / f"rescompress-{user}.{name}.board").held(wait=False) as mine:
                if mine:
                    yield board
                    return
        time.sleep(_POLL_S)
