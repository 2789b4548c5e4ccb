"""The work on one board, inside its work folder: builds, timings, statistics, and images run through the engines."""

from __future__ import annotations

import json
import shlex
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_targets import board_statistics, infer, placement
from edge_targets.benchmark import Conditions, summarize_processes
from edge_targets.board_probe import Probe
from edge_targets.board_statistics import Photos
from edge_targets.board_work import (
    BUILD_TIMEOUT_S,
    Job,
    Measured,
    builder_words,
    commands_of,
    infer_command,
    timing_of,
    variants,
)
from edge_targets.device import Precision
from edge_targets.onnx_kernels import asked_of
from edge_targets.ssh import Board, Completed
from edge_targets.tegrastats import AT_WORK, parse_tegrastats
from edge_targets.tensorrt_versions import Capabilities
from edge_targets.trtexec import (
    quoted,
)
from edge_targets.trtexec_log import TrtexecLog, parse_log, read_profile, read_times
from rescompress.core.artifact import file_sha256, write_text
from rescompress.core.errors import EnvironmentFailed, ToolMissing
from rescompress.core.metric import Metric
from rescompress.core.runner import Runner
from rescompress.core.settings import DeploySettings

UNSTABLE = 0.05
"""Coefficient of variation above which a measurement is repeated, and then called inconclusive."""


PIECE_BYTES = 32 << 20
"""Preprocessed images that travel to a board at a time, as float32."""


PIECE_TIMEOUT_S = 900.0
"""Until an inference over one piece counts as hanging."""


Say = Callable[[str], None]


Score = Callable[[Precision, Runner], None]
"""Evaluates one engine through a runner that runs it on the board."""


@dataclass(frozen=True)
class Timed:
    """One timing of an engine.

    Attributes:
        samples_ms: Time of each run.
        log: What trtexec said.
        times: File with the samples, here; what trtexec said lies beside it, as ``.log``.
        watched: Log of tegrastats, on the board; None where it was not watched.
    """

    samples_ms: tuple[float, ...]
    log: TrtexecLog
    times: Path
    watched: str | None

    @property
    def spread(self) -> float:
        """Coefficient of variation of the samples."""
        return variation(self.samples_ms)


@dataclass(frozen=True)
class Builds:
    """Several engines of one file.

    Attributes:
        kept: Index of the one that is kept.
        medians_ms: Latency of each: the median over its processes.
        command: That built the one that is kept.
        log: Of that.
        timed: Its timings.
        files: Logs and samples of all, here.
    """

    kept: int
    medians_ms: tuple[float, ...]
    command: list[str]
    log: TrtexecLog
    timed: tuple[Timed, ...]
    files: tuple[Path, ...]


def variation(values_ms: Sequence[float]) -> float:
    """Return the coefficient of variation: standard deviation over mean."""
    return statistics.pstdev(values_ms) / statistics.fmean(values_ms)


@dataclass
class Session:
    """The work on one board, inside its work folder."""

    board: Board
    found: Probe
    known: Capabilities
    settings: DeploySettings
    out: Path
    work: str
    device: str
    ran: list[str]
    say: Say
    photos: Photos | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def tool(self) -> str | list[str]:
        """What builds and times on the board: trtexec there, or the words that start the builder that travels."""
        return self.found.trtexec or builder_words(self.work)

    def run(
        self,
        command: Sequence[str],
        log: Path,
        *,
        timeout_s: float,
        watch: str | None = None,
        interval_ms: int = 100,
        clocked: bool = False,
    ) -> TrtexecLog:
        """Run trtexec; keep its output in `log`, whatever happened; return what it says.

        Args:
            command: Its command line.
            log: Here.
            timeout_s: Until it counts as hanging.
            watch: Where tegrastats writes meanwhile, on the board.
            interval_ms: Between two lines of it.
            clocked: Print when the process started and ended, for `board_statistics.wall_ms`.

        Raises:
            EnvironmentFailed: It failed, or the connection did.
        """
        line = quoted(command)
        self.ran.append(line)
        if clocked:
            line = f'{{ s=$(date +%s%N); {line}; r=$?; echo "@@wall $s $(date +%s%N)"; exit $r; }}'
        if watch is not None:
            # in braces: `cd ... && tegrastats &` would be one job, and killing that shell would leave tegrastats alive
            line = (
                f"{{ tegrastats --interval {interval_ms} > {shlex.quote(watch)} 2>/dev/null & t=$!; {line}; r=$?; "
                "kill $t 2>/dev/null; wait $t 2>/dev/null; exit $r; }"
            )
        done: Completed = self.board.run(f"cd {shlex.quote(self.work)} && {line}", timeout_s=timeout_s)
        write_text(log, done.output)
        said = parse_log(done.output)
        if done.code != 0 or said.status != "passed":
            if "No space left on device" in done.output or "disk is full" in done.output:
                raise EnvironmentFailed(
                    "the disk of the board is full", where=f"{self.board.host}, log in {log}", remedy="free some space there"
                )
            reason = said.errors[0] if said.errors else (done.output.strip().splitlines() or ["no output"])[-1]
            raise EnvironmentFailed(
                f"{said.tool or 'trtexec'} {said.status} with exit code {done.code}: {reason}",
                where=f"{self.board.host}, log in {log}",
                remedy="read the log; `rescompress lint` names what a board refuses",
            )
        return said

    def measure(self, job: Job) -> Measured:
        """Build, time and fetch one job."""
        name = f"model_{job.precision}"
        build, times, profile = commands_of(self.known, job, self.settings, work=self.work, trtexec=self.tool)
        if self.found.trtexec is None:
            build.append("--check")  # trtexec has no such thing
        self.say(f"copy {job.onnx.name} ({job.precision})")
        self.board.put(job.onnx, f"{self.work}/{name}.onnx")
        built = self.builds(job) if self.settings.builds > 1 else None
        if built is None:
            self.say(f"build {job.precision}")
            log_file = self.out / f"{name}.build.log"
            build_log = self.run(build, log_file, timeout_s=BUILD_TIMEOUT_S)
        else:
            build, build_log = built.command, built.log
            log_file = self.out / f"{name}{variants(self.settings)[built.kept]}.build.log"
        placed = self.prove(name, job, log_file)
        metrics: dict[str, Metric] = {}
        spread, stable, log = 0.0, True, build_log
        medians: tuple[float, ...] = ()
        more: dict[str, Any] = {}
        files = [self.out / f"{name}.build.log"] if built is None else list(built.files)
        for batch, command in zip(self.settings.batches, times, strict=True):
            first = batch == self.settings.batches[0]
            timed = (
                list(built.timed)
                if built is not None and first
                else [self.time(name, batch, command, number) for number in range(1, (self.settings.runs if first else 1) + 1)]
            )
            log = timed[-1].log
            files += [file for t in timed for file in (t.times, t.times.with_suffix(".log"))]
            where = Conditions(self.device, "tensorrt", batch, job.precision, power_mode=self.found.power_mode)
            summary, found_medians = summarize_processes([t.samples_ms for t in timed], where)
            if first:
                medians = found_medians
                spread = max(*(t.spread for t in timed), variation(medians))
                metrics, stable = {**summary, **metrics}, spread <= UNSTABLE
                tail, more = board_statistics.jitter([t.samples_ms for t in timed], summary)
                metrics |= tail
                metrics |= self.power([t.watched for t in timed if t.watched is not None], summary)
            else:
                metrics[f"batch{batch}_p50_ms"] = summary["p50_ms"]
                metrics[f"batch{batch}_images_per_s"] = summary["images_per_s"]
        self.run(profile, self.out / f"{name}.profile.log", timeout_s=self.settings.seconds * 4 + 120)
        files += [layers] if (layers := self.out / f"{name}.layers.json").is_file() else []
        for suffix in ("profile.json", "engine"):
            self.board.get(f"{self.work}/{name}.{suffix}", self.out / f"{name}.{suffix}")
            files.append(self.out / f"{name}.{suffix}")
        files.append(self.note(name, job, build_log))
        profile_rows = read_profile(self.out / f"{name}.profile.json")
        details = {
            "build_s": build_log.build_s,
            "sm_count": log.sm_count,
            "clock_mhz": log.clock_mhz,
            "throughput_qps": log.throughput_qps,
            "builder": build_log.tool,
            "kernels": placed.kernels,
            "layers": placed.rows(),
            "profile": [{"name": r.name, "ms": r.average_ms, "percent": r.percent} for r in profile_rows],
            "build_command": quoted(build),
            "timing_command": quoted(times[0]),
        }
        if built is not None:
            metrics["build_ratio"] = metrics["p50_ms"].model_copy(
                update={
                    "value": max(built.medians_ms) / min(built.medians_ms),
                    "unit": "ratio",
                    "n": len(built.medians_ms),
                    "low": None,
                    "high": None,
                }
            )
            more["builds_ms"], more["build_kept"] = list(built.medians_ms), built.kept + 1
        engine = self.out / f"{name}.engine"
        files = list(dict.fromkeys(files))
        return Measured(job.precision, engine, metrics, spread, stable, log, tuple(files), medians, details, more)

    def builds(self, job: Job) -> Builds:
        """Build a job several times, time each engine, and make the one in the middle ``model_<precision>.engine``."""
        name = f"model_{job.precision}"
        logs, commands, all_timed, files = [], [], [], []
        for number, variant in enumerate(variants(self.settings), 1):
            command, times, _ = commands_of(self.known, job, self.settings, work=self.work, trtexec=self.tool, variant=variant)
            self.say(f"build {job.precision}, {number} of {self.settings.builds}")
            log = self.out / f"{name}{variant}.build.log"
            logs.append(self.run(command, log, timeout_s=BUILD_TIMEOUT_S))
            commands.append(command)
            timed = [
                self.time(f"{name}{variant}", self.settings.batches[0], times[0], n) for n in range(1, self.settings.runs + 1)
            ]
            all_timed.append(timed)
            files += [log, *(file for t in timed for file in (t.times, t.times.with_suffix(".log")))]
        medians = [statistics.median(statistics.median(t.samples_ms) for t in timed) for timed in all_timed]
        kept = board_statistics.median_of_builds(medians)
        for suffix in ("engine", "layers.json"):
            chosen = f"{self.work}/{name}{variants(self.settings)[kept]}.{suffix}"
            done = self.board.run(["mv", chosen, f"{self.work}/{name}.{suffix}"])
            if done.code != 0:
                raise EnvironmentFailed(
                    f"cannot keep {chosen}: {done.output.strip()}", where=self.board.host, remedy="run again"
                )
        self.board.run(
            ["rm", "-f", *(f"{self.work}/{name}{v}.{s}" for v in variants(self.settings) for s in ("engine", "cache"))]
        )
        told = f"{job.precision}: {len(medians)} builds of one file took {min(medians):.3f} to {max(medians):.3f} ms"
        self.notes.append(f"{told} ({max(medians) / min(medians) - 1:.1%} apart); build {kept + 1}, in the middle, is kept")
        return Builds(kept, tuple(medians), commands[kept], logs[kept], tuple(all_timed[kept]), tuple(files))

    def extras(self, job: Job, result: Measured) -> Measured:
        """Return what was measured of a job, with the figures beside the latency."""
        batch = self.settings.batches[0]
        engine = f"{self.work}/model_{job.precision}.engine"
        found = board_statistics.measure(self, engine, batch, timing_of(job, self.settings, batch), result)
        parts = found.statistics.get("from_file_parts_ms")
        if parts is not None:
            told = ", ".join(f"{part} {ms:.3f} ms" for part, ms in parts.items())
            self.notes.append(
                f"{job.precision}: of the {found.metrics['from_file_ms'].value:.3f} ms from file to classes: {told}"
            )
        if "soak" in found.statistics:
            self.notes.append(board_statistics.soak_note(found.statistics["soak"], found.metrics["soak_ratio"].value))
        return found

    def prove(self, name: str, job: Job, log: Path) -> placement.Placement:
        """Fetch the layers of a built engine and hold them against its ONNX file.

        Raises:
            EnvironmentFailed: It does not compute in what the file asks, or not on the DLA, and that is not allowed.
        """
        layers = self.out / f"{name}.layers.json"
        try:
            self.board.get(f"{self.work}/{name}.layers.json", layers)
        except EnvironmentFailed:
            if not self.settings.allow_fallback:
                raise
            layers.unlink(missing_ok=True)  # that of an earlier deployment proves nothing
        found = placement.placement(
            asked_of(job.onnx, input_shape=job.shapes.shape if job.shapes else None),
            layers,
            log.read_text(encoding="utf-8", errors="replace"),
            float_as=None if self.known.strongly_typed or job.precision == "fp32" else "fp16",
            dla=self.settings.dla,
        )
        if self.settings.allow_fallback:
            found = placement.allowed(found)
        found.check(f"{self.board.host}, {job.precision} engine, layers in {layers}")
        self.notes += [f"{job.precision}: {note}" for note in found.notes]
        return found

    def note(self, name: str, job: Job, log: TrtexecLog) -> Path:
        """Write beside an engine, here and on the board, what it was built on; who loads it elsewhere is told."""
        path = self.out / f"{name}.engine.json"
        built_on = {
            "tensorrt": self.found.version,
            "compute_capability": log.compute_capability,
            "board": self.found.model,
            "onnx_sha256": file_sha256(job.onnx),
            "precision": job.precision,
        }
        write_text(path, json.dumps(built_on, indent=1) + "\n")
        self.board.put(path, f"{self.work}/{path.name}")
        return path

    def score(self, jobs: Sequence[Job], score: Score) -> None:
        """Run `score` for every engine, with the Python and the TensorRT of the board.

        Raises:
            ToolMissing: The board has no Python with numpy and TensorRT.
            EnvironmentFailed: Connection, disk or inference failed.
        """
        self.send_infer()
        for job in jobs:
            self.say(f"accuracy of {job.precision} on the board")
            with _BoardRunner(self, job.precision) as runner:
                score(job.precision, runner)

    def send_infer(self) -> None:
        """Copy ``infer.py`` to the work folder.

        Raises:
            ToolMissing: The board has no Python with numpy and TensorRT.
            EnvironmentFailed: The connection failed.
        """
        asked = self.board.run(["python3", "-c", "import numpy, tensorrt; print(tensorrt.__version__)"])
        if asked.code != 0:
            said = (asked.output.strip().splitlines() or ["no reason given"])[-1]
            raise ToolMissing(
                f"no Python with TensorRT there to run images with: {said}",
                where=self.board.host,
                remedy="on the board: sudo apt install python3-libnvinfer python3-numpy; timings are kept",
            )
        self.board.put(Path(infer.__file__), f"{self.work}/infer.py")

    def infer(self, command: Sequence[str], *, timeout_s: float) -> str:
        """Run ``infer.py`` there; return what it prints.

        Raises:
            ToolMissing: The board lacks a library that it needs.
            EnvironmentFailed: Connection, disk or inference failed.
        """
        done = self.board.run(list(command), timeout_s=timeout_s)
        if done.code == 0:
            return done.output
        said = (done.output.strip().splitlines() or ["no reason given"])[-1].removeprefix("error: ")
        where = f"{self.board.host}: {' '.join(command[:3])}"
        if done.code == infer.EXIT_MISSING:
            raise ToolMissing(said, where=where, remedy="install it on the board; timings are kept")
        full = "the disk of the board is full: " if "No space left on device" in done.output else ""
        raise EnvironmentFailed(
            f"{full}infer.py failed (exit code {done.code}): {said}",
            where=where,
            remedy="repair it on the board; timings are kept",
        )

    def time(self, name: str, batch: int, command: Sequence[str], number: int) -> Timed:
        """Time an engine at one batch; once more where the spread is large, and keep the calmer of the two and its files."""
        stem = f"{name}.batch{batch}{f'.run{number}' if number > 1 else ''}"
        what = f"time {name} at batch {batch}{f', run {number}' if number > 1 else ''}"
        self.say(what)
        kept = self.attempt(stem, f"{name}.batch{batch}.times.json", command)
        if kept.spread <= UNSTABLE:
            return kept
        self.say(f"{what}, once more")
        again = self.attempt(f"{stem}.again", f"{name}.batch{batch}.times.json", command)
        calmer = again.spread < kept.spread
        for written, final in ((again.times, kept.times), (again.times.with_suffix(".log"), kept.times.with_suffix(".log"))):
            if calmer:
                written.replace(final)
            else:
                written.unlink()
        return replace(again, times=kept.times) if calmer else kept

    def attempt(self, stem: str, there: str, command: Sequence[str]) -> Timed:
        """Run a timing command that writes the file `there` in the work folder; files here are named after `stem`."""
        times = self.out / f"{stem}.times.json"
        watch = f"{self.work}/{stem}.tegrastats" if self.found.tegrastats else None
        limit = self.settings.seconds * 4 + 120
        log = self.run(command, times.with_suffix(".log"), timeout_s=limit, watch=watch)
        self.board.get(f"{self.work}/{there}", times)
        return Timed(tuple(read_times(times)), log, times, watch)

    def power(self, logs: Sequence[str], summary: dict[str, Metric]) -> dict[str, Metric]:
        """Return power and memory while timing, where tegrastats wrote them into `logs` on the board."""
        if not logs:
            return {}
        watched = parse_tegrastats(self.board.run(["cat", *logs]).output)
        if watched.unknown_rails:
            rails = ", ".join(watched.unknown_rails)
            note = f"power not reported: it is not known which of the board's rails add up to the module's ({rails})"
            self.notes += [note] if note not in self.notes else []
        base = summary["p50_ms"].model_copy(update={"low": None, "high": None})
        metrics = {}
        if watched.power_w is not None and watched.power_w > 0:
            if watched.power_of != AT_WORK:
                note = "power is the median while trtexec ran: tegrastats does not tell when the GPU worked"
                self.notes += [note] if note not in self.notes else []
            metrics["power_w"] = base.model_copy(update={"value": watched.power_w, "unit": "W", "n": watched.power_lines})
            rate = summary["images_per_s"].value / watched.power_w
            metrics["images_per_s_per_w"] = base.model_copy(update={"value": rate, "unit": "images/s/W"})
        if watched.memory_mb is not None:
            metrics["memory_mb"] = base.model_copy(update={"value": watched.memory_mb, "unit": "MB", "n": watched.samples})
        return metrics


class _BoardRunner:
    """Runs an engine on the board: images travel there, ``infer.py`` runs them, logits come back."""

    runtime = "tensorrt"

    def __init__(self, session: Session, precision: Precision) -> None:
        self._session = session
        self._command = infer_command(session.work, precision, session.settings.dla)
        self._folder = tempfile.TemporaryDirectory(prefix="rescompress-images-")
        session.ran.append(quoted(self._command))

    def __call__(self, batch_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits (N, K) of preprocessed images (N, C, H, W), computed on the board.

        Raises:
            ToolMissing: The board lacks a library that infer.py needs.
            EnvironmentFailed: Connection, disk or inference failed.
        """
        session, folder = self._session, Path(self._folder.name)
        images, logits = folder / "images.npy", folder / "logits.npy"
        np.save(images, np.ascontiguousarray(batch_NCHW, np.float32), allow_pickle=False)
        session.board.put(images, f"{session.work}/{images.name}")
        session.infer(self._command, timeout_s=PIECE_TIMEOUT_S)
        session.board.get(f"{session.work}/{logits.name}", logits)
        try:
            found: NDArray[np.float32] = np.load(logits, allow_pickle=False)
        except (ValueError, EOFError, OSError) as e:
            raise EnvironmentFailed(f"the logits cannot be read: {e}", where=session.board.host, remedy="run again") from e
        if found.ndim != 2 or len(found) != len(batch_NCHW):
            raise EnvironmentFailed(
                f"{len(batch_NCHW)} images gave logits of shape {found.shape}", where=session.board.host, remedy="run again"
            )
        return found

    def __enter__(self) -> _BoardRunner:
        """Return itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove what was kept here."""
        self._folder.cleanup()
