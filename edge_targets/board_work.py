"""What is to be built and measured on a board, the commands of it, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_targets import board_statistics
from edge_targets.board_probe import Probe
from edge_targets.board_statistics import Photos
from edge_targets.device import Precision, Target
from edge_targets.tensorrt_versions import Capabilities
from edge_targets.trtexec import (
    BuildOptions,
    InputShapes,
    TimingOptions,
    build_command,
    profile_command,
    timing_command,
)
from edge_targets.trtexec_log import TrtexecLog
from rescompress.core.errors import RescompressError, TargetError
from rescompress.core.metric import Metric
from rescompress.core.settings import DeploySettings

WARMUP_MS = 500
"""Before each measurement."""

BUILD_TIMEOUT_S = 3600.0
"""Until a build counts as hanging."""


@dataclass(frozen=True)
class Job:
    """One file to build in one precision.

    Attributes:
        precision: What it computes in.
        onnx: The file here.
        shapes: Profile of a dynamic batch; None for fixed shapes.
    """

    precision: Precision
    onnx: Path
    shapes: InputShapes | None = None


@dataclass(frozen=True)
class Measured:
    """One engine, built and timed on the board.

    Attributes:
        precision: What it computes in.
        engine: The engine, here.
        metrics: ``p50_ms`` and so on, at the first batch; ``batch<N>_p50_ms`` and ``batch<N>_images_per_s`` at the
            others; ``power_w``, ``images_per_s_per_w`` and ``memory_mb`` where they were watched.
        spread: Coefficient of variation of the samples that count. Of several runs, the largest one; that of their medians
            where it is larger still: runs that are each steady may disagree.
        stable: Whether the spread is small enough.
        log: What trtexec said.
        files: Everything fetched.
        run_medians_ms: Median of each run at the first batch.
        details: Layers, clocks, flags; JSON values only.
        statistics: What `metrics` cannot hold of the figures beside the latency: each process of them under
            ``<metric>_runs``, the builds, the soak, the conditions; JSON values only.
    """

    precision: Precision
    engine: Path
    metrics: dict[str, Metric]
    spread: float
    stable: bool
    log: TrtexecLog
    files: tuple[Path, ...]
    run_medians_ms: tuple[float, ...]
    details: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Deployment:
    """The outcome on one board.

    Attributes:
        probe: The board.
        results: One per precision.
        best: The fastest.
        notes: What the user should know.
        commands: Every command that ran on the board.
        unscored: Why an engine could not be evaluated there although that was asked for.
        unmeasured: Why a figure beside the latency could not be measured although it was asked for.
    """

    probe: Probe
    results: tuple[Measured, ...]
    best: Measured
    notes: tuple[str, ...]
    commands: tuple[str, ...]
    unscored: RescompressError | None = None
    unmeasured: RescompressError | None = None


def commands_of(
    known: Capabilities, job: Job, settings: DeploySettings, *, work: str, trtexec: str | Sequence[str], variant: str = ""
) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the build command, one timing command per batch, and the profile command of a job.

    Args:
        known: What the board's TensorRT understands.
        job: What to build.
        settings: How.
        work: Folder on the board.
        trtexec: trtexec on the board, or the words that start what stands in for it.
        variant: Such as ``.build2``, in the names of one of several engines; it starts from an empty timing cache.

    Raises:
        TargetError: That version cannot do what is asked.
    """
    onnx = f"{work}/model_{job.precision}.onnx"
    name = f"{work}/model_{job.precision}{variant}"
    build = build_command(
        known,
        onnx,
        f"{name}.engine",
        BuildOptions(
            job.precision,
            shapes=job.shapes,
            workspace_mb=settings.workspace,
            timing_cache=f"{name}.cache" if variant else f"{work}/timing.cache",
            dla_core=settings.dla,
            sparsity=settings.sparsity,
        ),
        executable=trtexec,
        layer_info=f"{name}.layers.json",
    )
    timing = [timing_of(job, settings, batch) for batch in settings.batches]
    times = [
        timing_command(known, f"{name}.engine", t, executable=trtexec, times=f"{name}.batch{t.batch}.times.json")
        for t in timing
    ]
    profile = profile_command(known, f"{name}.engine", timing[0], executable=trtexec, profile=f"{name}.profile.json")
    return build, times, profile


def timing_of(job: Job, settings: DeploySettings, batch: int) -> TimingOptions:
    """Return how an engine is timed at one batch."""
    return TimingOptions(WARMUP_MS, settings.seconds, shapes=job.shapes, batch=batch, dla_core=settings.dla)


def variants(settings: DeploySettings) -> list[str]:
    """Return what stands in the names of the engines of one precision."""
    return [f".build{i}" for i in range(1, settings.builds + 1)] if settings.builds > 1 else [""]


def builder_words(work: str) -> list[str]:
    """Return the words that start the builder that travels, in the folder `work`; it takes the flags of trtexec."""
    return ["python3", f"{work}/trt_builder.py"]


def infer_command(work: str, precision: Precision, dla: int | None = None) -> list[str]:
    """Return the command that runs a piece of the images through the engine of `precision` in the folder `work`."""
    images, logits = f"{work}/images.npy", f"{work}/logits.npy"
    command = ["python3", f"{work}/infer.py", f"{work}/model_{precision}.engine", "--npy", images, "--out", logits]
    return command if dla is None else [*command, f"--dla={dla}"]


def dry_run(
    target: Target, jobs: Sequence[Job], settings: DeploySettings, *, photos: Photos | None = None, scored: bool = False
) -> list[str]:
    """Return the commands that would run on the board, for the TensorRT that its default release has.

    Args:
        target: The board.
        jobs: What to build.
        settings: How.
        photos: Those of the settings, with what is known of them.
        scored: Whether accuracy is measured there too.

    Raises:
        TargetError: The target is no TensorRT board.
    """
    known = target.capabilities
    if known is None:
        raise TargetError(f"{target.name} does not run TensorRT", where="--target", remedy="name a Jetson")
    lines = ['WORK=$(mktemp -d "${TMPDIR:-/tmp}/rescompress.XXXXXX")']
    for job in jobs:
        build, times, profile = commands_of(known, job, settings, work="$WORK", trtexec="trtexec")
        lines.append(f"cat > $WORK/model_{job.precision}.onnx    # {job.onnx.name}, {job.onnx.stat().st_size} bytes")
        for variant in variants(settings) if settings.builds > 1 else ():
            each, timed, _ = commands_of(known, job, settings, work="$WORK", trtexec="trtexec", variant=variant)
            lines += [" ".join(c) for c in (each, *timed[:1] * settings.runs)]
        if settings.builds > 1:
            engine = f"$WORK/model_{job.precision}"
            lines.append(f"mv {engine}.build?.engine {engine}.engine    # of the build in the middle, with its layers")
            lines += [" ".join(c) for c in (*times[1:], profile)]
        else:
            lines += [" ".join(c) for c in (build, *times[:1] * settings.runs, *times[1:], profile)]
    if settings.more:
        lines.append("# and of the fastest engine (here as if it were the last):")
        engine, timing = f"$WORK/model_{jobs[-1].precision}.engine", timing_of(jobs[-1], settings, settings.batches[0])
        todo, _ = board_statistics.steps(known, frozenset(), settings, engine, timing, executable="trtexec")
        if photos is not None:
            names = board_statistics.names_there(photos.files)
            lines.append(f"cat > $WORK/infer.py    # likewise {board_statistics.ABOUT}, {', '.join(names)}")
        lines += [" ".join(step.command) for step in todo]
    if scored and photos is None:
        lines.append("cat > $WORK/infer.py")
    for job in jobs if scored else ():
        lines.append("cat > $WORK/images.npy    # and the next line: for each piece of the images")
        lines.append(" ".join(infer_command("$WORK", job.precision, settings.dla)))
    return [*lines, "rm -rf -- $WORK"]
