"""Search at scale and on a real database: slow."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_search import SPACE, Synthetic, assert_nothing_lost, begin, document, kill_at_random, start_workers

from rescompress.runs.search_settings import anchors
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


def same_candidates(n: int) -> list[dict[str, object]]:
    return [{"budget.macs": 0.1 + 0.9 * i / n, "precision": ("int8", "float")[i % 2]} for i in range(n)]


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_the_front_of_four_workers_is_that_of_one_on_the_same_candidates(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every candidate climbs to the top, so that none depends on who came before it."""
    queue = same_candidates(30)
    one, four = tmp_path / "one", tmp_path / "four"
    for folder in (one, four):
        folder.mkdir()
    doc = document(len(queue))
    work(create(storage_of(str(one)), "s", doc, 0, queue), Synthetic(), one / "trials", beat_s=1)
    address = str(four) if kind == "journal" else request.getfixturevalue("server").url
    create(storage_of(address), "s", doc, 0, queue)
    for process in start_workers(address, four, 4, 0.01):
        assert process.wait(timeout=240) == 0
    trials = join(storage_of(address), "s")
    assert_nothing_lost(trials, four)
    assert sorted((four / "log").read_text().split()) == [f"{i:05d}" for i in range(len(queue))], "each is done exactly once"
    workers = {t.worker for t in trials.all()}
    assert len(workers) > 1
    rows = [front_document(t)["front"] for t in (join(storage_of(str(one)), None), trials)]
    for row in (*rows[0], *rows[1]):
        row.pop("folder")
    assert rows[0] == rows[1]


def test_a_disk_that_is_full_for_a_while_loses_no_trial(tmp_path: Path) -> None:
    """A file system of its own for the search's folder, which something else fills; the workers wait until there is room."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        begin(place, 30, lease_s=2.0)
        workers = start_workers(str(place), tmp_path, 3, 0.02)
        time.sleep(3)
        ballast = place / "ballast"
        with ballast.open("wb", buffering=0) as f, contextlib.suppress(OSError):
            while True:
                f.write(b"x" * 512)
        with pytest.raises(OSError, match="No space left"):
            (place / "more").write_bytes(b"x" * 8192)
        time.sleep(5)
        ballast.unlink()
        for process in workers:
            assert process.wait(timeout=240) == 0
        assert_nothing_lost(join(storage_of(str(place)), None), place)
    finally:
        subprocess.run(["umount", "-l", place], check=False)
