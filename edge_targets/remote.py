"""Builds and measures on the board itself, over SSH, and brings engine and timings back.

Steps: probe the board, copy the ONNX files, build each precision with the flags of the board's TensorRT, time the built
engines (GPU compute time of every run, from ``--exportTimes``), watch power and memory meanwhile, measure again where the
spread is large, keep the fastest; where asked for, run images through each engine there. The work folder on the board
is gone afterwards, whatever happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_targets import trt_builder
from edge_targets.board_probe import Probe, probe
from edge_targets.board_session import Say, Score, Session
from edge_targets.board_statistics import Photos
from edge_targets.board_work import Deployment, Job
from edge_targets.catalog import load_device
from edge_targets.device import Target
from edge_targets.ssh import Board, WorkFolder
from edge_targets.tensorrt_versions import capabilities
from rescompress.core.errors import EnvironmentFailed, RescompressError
from rescompress.core.settings import DeploySettings


def deploy(
    board: Board,
    jobs: Sequence[Job],
    settings: DeploySettings,
    out: Path,
    *,
    photos: Photos | None = None,
    target: Target | None = None,
    found: Probe | None = None,
    score: Score | None = None,
    say: Say = lambda text: None,
) -> Deployment:
    """Build and measure every job on the board; files land in `out`.

    What keeps `score` from running on the board costs none of the timings: it is told in `Deployment.unscored`.

    Args:
        board: Where.
        jobs: What; at least one.
        settings: How.
        out: Folder here.
        photos: Those of the settings, with what is known of them.
        target: The board as the user named it; else it is what the board says.
        found: What `probe` returned, where that is known.
        score: Called per engine, when all timings are done, with a runner that runs it on the board.
        say: Told what happens.

    Raises:
        EnvironmentFailed: Connection, disk or build failed; logs that exist are kept in `out`.
        ToolMissing: No ssh here, or no TensorRT there.
        TargetError: The board's TensorRT cannot do what is asked.
    """
    found = found or probe(board)
    known = load_device(found.device).capabilities(found.version) if found.device else capabilities(found.version)
    say(f"{found.model or board.host}: TensorRT {found.version}, power mode {found.power_mode or 'unknown'}")
    notes = _notes(found, target)
    device = found.device or (target.name if target else board.host)
    need = sum(3 * job.onnx.stat().st_size for job in jobs)
    if found.free_bytes is not None and found.free_bytes < need:
        raise EnvironmentFailed(
            f"the disk is full: {found.free_bytes} bytes free, about {need} needed",
            where=board.host,
            remedy="free some space on the board and run again",
        )
    ran: list[str] = []
    results = []
    unscored: RescompressError | None = None
    unmeasured: RescompressError | None = None
    with WorkFolder(board) as work:
        session = Session(work.board, found, known, settings, out, work.path, device, ran, say, photos)
        if found.trtexec is None:
            board.put(Path(trt_builder.__file__), f"{work.path}/trt_builder.py")
        for job in jobs:
            results.append(session.measure(job))
        if settings.more:
            kept = min(range(len(results)), key=lambda i: results[i].metrics["p50_ms"].value)
            try:
                results[kept] = session.extras(jobs[kept], results[kept])
            except RescompressError as e:
                unmeasured = e
        if score is not None:
            try:
                session.score(jobs, score)
            except RescompressError as e:
                unscored = e
            except OSError as e:
                unscored = EnvironmentFailed(f"images cannot be kept here: {e}", remedy="free some space, or set TMPDIR")
    best = min(results, key=lambda r: r.metrics["p50_ms"].value)
    notes += session.notes
    for r in results:
        if not r.stable:
            within = " within or between runs" if len(r.run_medians_ms) > 1 else ""
            notes.append(f"{r.precision}: spread {r.spread:.1%}{within} after a second try, inconclusive")
    if unmeasured is not None:
        notes.append(f"not everything that was asked for was measured: {unmeasured.what}")
    return Deployment(found, tuple(results), best, tuple(notes), tuple(ran), unscored, unmeasured)


def _notes(found: Probe, target: Target | None) -> list[str]:
    notes = []
    if target is not None and found.device is not None and found.device != target.name:
        notes.append(f"--target says {target.name}, the board says {found.device} ({found.model})")
    if found.trtexec is None:
        notes.append("no trtexec there: trt_builder.py, copied there, built and timed through the Python module of TensorRT")
    if found.power_mode is None:
        notes.append("power mode unknown: nvpmodel is not there or needs sudo without a password")
    if found.clocks is None:
        notes.append("clocks unknown: jetson_clocks is not there or needs sudo without a password; clocks may float")
    return notes
