"""Search at scale and on a real database: slow."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_search import SPACE, Synthetic, assert_nothing_lost, begin, document, kill_at_random, start_workers

from rescompress.search.settings import anchors
from rescompress.search.show import front_document
from rescompress.search.study import create, join, storage_of
from rescompress.search.worker import work

pytest.importorskip("optuna")
pytestmark = pytest.mark.slow


class Server:
    """A PostgreSQL of this test alone: own folder, own port, on the loopback address."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self.folder, self.binaries = folder, binaries
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"postgresql://searcher@127.0.0.1:{self.port}/postgres"

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self.binaries / program), *arguments]
        if os.geteuid() == 0:  # which the server refuses
            command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")

    def start(self) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder}"
        self.run("pg_ctl", "-D", str(self.folder / "db"), "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        self.run("pg_ctl", "-D", str(self.folder / "db"), "-m", mode, "-w", "stop")


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("psycopg")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("PostgreSQL is not installed")
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    made = Server(folder, found[-1])
    made.run("initdb", "-D", str(folder / "db"), "-U", "searcher", "-A", "trust")
    made.start()
    try:
        yield made
    finally:
        made.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)


def test_four_workers_on_postgresql_try_every_candidate_once(server: Server, tmp_path: Path) -> None:
    doc = document(30)
    create(storage_of(server.url), "s", doc, 0, anchors(doc, SPACE))
    for process in start_workers(server.url, tmp_path, 4, 0.01):
        assert process.wait(timeout=240) == 0
    trials = join(storage_of(server.url), "s")
    assert_nothing_lost(trials, tmp_path)
    assert len((tmp_path / "log").read_text().split()) == sum(t.state == "done" for t in trials.all())


def test_kills_and_a_restart_of_the_server_lose_nothing(server: Server, tmp_path: Path) -> None:
    import threading

    doc = document(60, lease_s=3.0)
    create(storage_of(server.url), "s", doc, 0, anchors(doc, SPACE))

    def restart() -> None:
        time.sleep(6)
        server.stop("immediate")
        time.sleep(2)
        server.start()

    thread = threading.Thread(target=restart)
    thread.start()
    kill_at_random(server.url, tmp_path, kills=40, workers=3, seed=3)
    thread.join()
    assert_nothing_lost(join(storage_of(server.url), "s"), tmp_path)


def test_the_front_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    """With random choices by slot, four workers and one try the same anchors; their answers are the same."""
    one, four = tmp_path / "one", tmp_path / "four"
    work(begin(one, 5), Synthetic(), one / "trials", beat_s=1)
    begin(four, 5)
    for process in start_workers(str(four), four, 4, 0.01):
        assert process.wait(timeout=120) == 0
    rows = [front_document(join(storage_of(str(f)), None))["front"] for f in (one, four)]
    for row in (*rows[0], *rows[1]):
        row.pop("folder")
    assert rows[0] == rows[1]
