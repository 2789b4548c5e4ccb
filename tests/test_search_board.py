"""Search on a board over SSH: a real sshd on the loopback address, and a stand-in for trtexec."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_edge_deploy import Server, needs_sshd, write_onnx

from edge_targets.ssh import Board, Turn
from rescompress.search import board as boards

pytestmark = needs_sshd


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a server that plain `ssh board` reaches, as it would by the user's own config."""
    running = Server(tmp_path)
    tools = tmp_path / "client"
    tools.mkdir()
    (tools / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F "{running.ssh_config}" "$@"\n')
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    yield running
    running.process.terminate()
    running.process.wait()


def test_one_at_a_time_has_the_board(server: Server) -> None:
    inside, most, waited = [0], [0], []

    def measure() -> None:
        with Turn(Board("board"), waited.append):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.1)
            inside[0] -= 1

    threads = [threading.Thread(target=measure) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most == [1]
    assert waited
    assert server.left_behind() == []


def test_a_holder_that_is_killed_frees_the_board(server: Server) -> None:
    imports = "import time\nfrom edge_targets.ssh import Board, Turn\n"
    code = f"{imports}with Turn(Board('board')): print('in', flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"in\n"
        holder.kill()
    start = time.monotonic()
    with Turn(Board("board")):
        assert time.monotonic() - start < 20


@pytest.mark.slow
def test_a_candidate_is_measured_on_the_board(server: Server, tmp_path: Path) -> None:
    from rescompress.core.manifest import load_manifest
    from rescompress.search.worker import _measured

    model = write_onnx(tmp_path / "model.onnx", batch=1)
    boards.measure_on(["board"], "jetson", model, tmp_path / "run", lambda text: None)
    found = _measured(load_manifest(tmp_path / "run"))
    assert found is not None
    assert found.provenance == "measured"
    assert found.value > 0


@pytest.mark.slow
def test_a_board_that_is_away_is_no_fault_of_the_candidate(server: Server, tmp_path: Path) -> None:
    from rescompress.core.errors import EnvironmentFailed

    model = write_onnx(tmp_path / "model.onnx", batch=1)
    server.process.terminate()
    server.process.wait()
    with pytest.raises(EnvironmentFailed, match="board"):
        boards.measure_on(["board"], "jetson", model, tmp_path / "run", lambda text: None)


def test_a_worker_takes_the_board_that_is_free() -> None:
    with boards._free(["a", "b"]) as first, boards._free(["a", "b"]) as second:
        assert {first, second} == {"a", "b"}
        got: list[str] = []

        def third() -> None:
            with boards._free(["a", "b"]) as board:
                got.append(board)

        thread = threading.Thread(target=third)
        thread.start()
        thread.join(timeout=0.3)
        assert not got
    thread.join(timeout=10)
    assert got


@pytest.mark.slow
def test_a_search_measures_on_the_board(server: Server, tmp_path: Path) -> None:
    from command_line import run_command

    example = Path(__file__).parents[1] / "examples" / "search_digits.yaml"
    section = "search={trials: 2, objectives: [latency], boards: [board], space: {prune.macs: [1.0, 0.5]}}"
    words = ["--set", "finetune=null", "--set", "quantize.mode=ptq", "--set", section]
    done = run_command("search", example, *words, "-o", tmp_path / "s", "--json", "--threads", 1, code=0)
    rows = json.loads(done.stdout)["front"]
    assert rows
    status = json.loads(run_command("search", "status", tmp_path / "s", "--json", code=0).stdout)
    assert [r["rung"] for r in status["rungs"]][-1] == "measure"
    assert all(row["bands"].get("latency") for row in rows), "a measured latency has a band"
    assert server.left_behind() == []
