"""What one warm, undisturbed stream does not tell of an engine on its board.

* soak: the first minute against the last of a long run, with clocks, temperatures and power all the way;
* cold start: a new process that loads the engine and runs it once;
* first frame: a run after a second of idleness, when clocks have fallen;
* contention: latency while other streams run the same engine;
* end to end: latency with the copies to and from the GPU;
* from files: from image files to classes, with decoding and preprocessing on the board's CPU.

Each is measured only where it is asked for, on the engine that is kept, in processes of its own: gates compare processes.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from edge_targets import infer
from edge_targets.benchmark import Conditions, percentile, summarize
from edge_targets.tegrastats import Reading, parse_trace
from edge_targets.tensorrt_versions import Capabilities
from edge_targets.trtexec import TimingOptions, quoted, timing_command
from edge_targets.trtexec_log import read_times
from rescompress.core.artifact import write_text
from rescompress.core.errors import EnvironmentFailed
from rescompress.core.metric import Metric
from rescompress.core.settings import DeploySettings

if TYPE_CHECKING:
    from edge_targets.board_session import Session
    from edge_targets.board_work import Measured

EDGE_S = 60
"""The first and the last minute of a soak are what is compared."""

PART_S = 300
"""Longest part of a soak between them: trtexec keeps every run of a process in memory."""

TRACE_S = 1.0
"""Between two lines of tegrastats during a soak."""

TRACE_ROWS = 600
"""Rows of a trace that are kept; more are averaged."""

COLD_STARTS = 5
IDLE_MS = 1000
IDLE_FRAMES = 10
"""Frames after idleness in each process; the one before the first of them is not."""

ABOUT = "model.json"
"""What ``infer.py`` reads of the network."""

SLOWER_CLOCK = 0.98
"""A GPU clock below this share of its first minute's counts as throttled."""


@dataclass(frozen=True)
class Photos:
    """Image files to classify on the board.

    Attributes:
        files: Taken in turn.
        about: How their pixels become the network's input, as ``infer.py`` reads it.
        what: Kinds, sizes and a digest of them, for the conditions: other files take other times.
    """

    files: tuple[Path, ...]
    about: Mapping[str, Any]
    what: str


@dataclass(frozen=True)
class Step:
    """One process on the board.

    Attributes:
        what: ``soak``, ``cold_start``, ``first_frame``, ``contention``, ``end_to_end``, ``from_file``.
        number: Of its kind, from 1.
        command: Its command line.
        times: The file on the board with a record of each run; None where there is none.
        seconds: It takes at least.
    """

    what: str
    number: int
    command: tuple[str, ...]
    times: str | None
    seconds: float


def parts_of(seconds: int) -> list[int]:
    """Return the seconds of each process of a soak: the first minute, what is between, the last; halves of less than two."""
    edge = min(EDGE_S, seconds // 2)
    middle = seconds - 2 * edge
    count = math.ceil(middle / PART_S)
    between = [middle // count + (i < middle % count) for i in range(count)]
    return [edge, *between, edge]


def steps(
    known: Capabilities,
    flags: frozenset[str],
    settings: DeploySettings,
    engine: str,
    timing: TimingOptions,
    *,
    executable: str | Sequence[str],
) -> tuple[list[Step], list[str]]:
    """Return the processes to run, and a note for each figure that this trtexec cannot give.

    Args:
        known: What the board's TensorRT understands.
        flags: Those that its trtexec names; empty where that is not known, which leaves the choice to the version.
        settings: What to measure, and in how many processes of each kind.
        engine: On the board.
        timing: As the latency that counts was timed.
        executable: trtexec on the board.
    """
    stem, runs = engine.removesuffix(".engine"), settings.runs

    def has(flag: str, *, since: tuple[int, int]) -> bool:
        return flag in flags if flags else known.version >= since

    def command(options: TimingOptions, file: str | None, *more: str, without: Sequence[str] = ()) -> tuple[str, ...]:
        line = timing_command(known, engine, options, executable=executable, times=file)
        return tuple([word for word in line if word not in without] + list(more))

    found: list[Step] = []
    notes: list[str] = []
    if settings.end_to_end:
        # before TensorRT 11 copies are timed unless that is switched off; from it on, where they are switched on
        on = next((f for f in ("--includeDataTransfers", "--dataTransfers") if has(f, since=(11, 0))), None)
        for i in range(1, runs + 1):
            file = f"{stem}.end_to_end.times.json"
            line = command(timing, file, *([on] if on else []), without=["--noDataTransfers"])
            found.append(Step("end_to_end", i, line, file, timing.duration_s))
    if settings.photo:
        folder, file = PurePosixPath(engine).parent, f"{stem}.from_file.times.json"
        names = [f"{folder}/{name}" for name in names_there(settings.photo)]
        line = ("python3", f"{folder}/infer.py", engine, *names, f"--about={folder}/{ABOUT}", f"--batch={timing.batch}")
        line += (f"--time={timing.duration_s}", f"--times={file}")
        line += () if timing.dla_core is None else (f"--dla={timing.dla_core}",)
        found += [Step("from_file", i, line, file, timing.duration_s) for i in range(1, runs + 1)]
    if settings.streams > 1:
        flag = "--infStreams" if has("--infStreams", since=(8, 6)) else "--streams"
        for i in range(1, runs + 1):
            file = f"{stem}.contention.times.json"
            line = command(timing, file, f"{flag}={settings.streams}")
            found.append(Step("contention", i, line, file, timing.duration_s))
    if settings.cold_start:
        once = replace(timing, warmup_ms=0, duration_s=0, iterations=1)
        graph = ["--noCudaGraph"] if has("--noCudaGraph", since=(11, 0)) else []
        for i in range(1, max(runs, COLD_STARTS) + 1):
            line = command(once, None, "--avgRuns=1", *graph, without=["--useCudaGraph", "--avgRuns=100"])
            found.append(Step("cold_start", i, line, None, 0))
        if flags and "--idleTime" not in flags:
            notes.append("first frame after idleness not measured: this trtexec has no --idleTime")
        else:
            rarely = replace(timing, warmup_ms=0, duration_s=0, iterations=IDLE_FRAMES + 1)
            for i in range(1, runs + 1):
                file = f"{stem}.first_frame.times.json"
                line = command(rarely, file, f"--idleTime={IDLE_MS}")
                found.append(Step("first_frame", i, line, file, (IDLE_FRAMES + 1) * IDLE_MS / 1000))
    if settings.soak:  # last: it leaves the board hot
        parts = parts_of(settings.soak)
        for i, seconds in enumerate(parts, 1):
            ends = i in (1, len(parts))
            timed: str | None = f"{stem}.soak.times.json" if ends else None
            line = command(replace(timing, duration_s=seconds), timed)
            found.append(Step("soak", i, line, timed, seconds))
    return found, notes


def names_there(files: Sequence[object]) -> list[str]:
    """Return the names of the image files in the work folder of the board; their kinds are told by their content."""
    return [f"photo{i}" for i in range(len(files))]


def conditions(settings: DeploySettings, photos: Photos | None) -> dict[str, str]:
    """Return how each figure comes about, by the name of its metric; gates compare figures of equal conditions."""
    told = {
        "end_to_end_ms": "median latency of a run with its copies to and from the GPU, page-locked memory; no decoding, no "
        "preprocessing",
        "from_file_ms": "median time of a batch from image files in the page cache to probabilities, by infer.py: decoding "
        f"and preprocessing on the board's CPU (Pillow, numpy), copies, run; {photos.what}"
        if photos is not None
        else "",
        "contention_ms": f"median latency of a run while {settings.streams} streams run the same engine at once",
        "cold_start_ms": "median over new processes, from their start to their end: CUDA, loading the engine, one run; an "
        "upper bound of the time to the first result, with the engine in the page cache",
        "first_frame_ms": f"median over runs that follow {IDLE_MS} ms of idleness",
        "soak_ratio": f"median latency of the last {parts_of(settings.soak)[-1]} s over that of the first, of "
        f"{settings.soak} s at full load; processes of at most {PART_S} s with a pause of a start between them"
        if settings.soak
        else "",
    }
    measured = {
        "end_to_end_ms": settings.end_to_end,
        "from_file_ms": photos is not None,
        "contention_ms": settings.streams > 1,
        "cold_start_ms": settings.cold_start,
        "first_frame_ms": settings.cold_start,
        "soak_ratio": bool(settings.soak),
    }
    return {name: text for name, text in told.items() if measured[name]}


def jitter(processes: Sequence[Sequence[float]], pooled: dict[str, Metric]) -> tuple[dict[str, Metric], dict[str, list[float]]]:
    """Return ``jitter_ms``, p99 - p50, and p99 and jitter of each process under ``<metric>_runs``."""
    p50, p99 = pooled["p50_ms"], pooled["p99_ms"]
    found = {"jitter_ms": p99.model_copy(update={"value": max(0.0, p99.value - p50.value)})}
    tails = [percentile(sorted(p), 0.99) for p in processes]
    runs = {"p99_ms_runs": tails}
    over = [tail - statistics.median(p) for tail, p in zip(tails, processes, strict=True)]
    return found, runs | ({"jitter_ms_runs": over} if min(over) > 0 else {})


def median_of_builds(medians_ms: Sequence[float]) -> int:
    """Return the index of the build to keep: the one in the middle, of two the faster.

    The fastest of several is luck that a further build need not have: a figure of it would flatter the network.
    """
    order = sorted(range(len(medians_ms)), key=lambda i: medians_ms[i])
    return order[(len(order) - 1) // 2]


def measure(session: Session, engine: str, batch: int, timing: TimingOptions, result: Measured) -> Measured:
    """Return `result` with what was asked for, measured on the engine file `engine` of the board.

    Raises:
        EnvironmentFailed: A process or the connection failed.
    """
    settings = session.settings
    todo, notes = steps(
        session.known,
        session.found.flags,
        settings,
        engine,
        timing,
        executable=session.tool,
    )
    session.notes += notes
    runs: dict[str, list[list[float]]] = {}
    files: list[Path] = []
    traces: list[str] = []
    parts: list[tuple[float, float]] = []
    parts_ms: list[dict[str, float]] = []
    if session.photos is not None:
        send(session, session.photos)
    for step in todo:
        session.say(f"{step.what.replace('_', ' ')} of {result.precision}, process {step.number}")
        stem = session.out / f"{Path(engine).stem}.{step.what}.{step.number}"
        log = stem.with_name(stem.name + ".log")
        watched = f"{session.work}/{stem.name}.tegrastats" if step.what == "soak" and session.found.tegrastats else None
        limit = step.seconds * 4 + 120
        said = None
        if step.what == "from_file":
            session.ran.append(quoted(step.command))
            write_text(log, session.infer(step.command, timeout_s=limit))
        else:
            said = session.run(
                list(step.command),
                log,
                timeout_s=limit,
                watch=watched,
                interval_ms=round(1000 * TRACE_S),
                clocked=step.what == "cold_start",
            )
        files.append(log)
        samples: list[float] = []
        if step.times is not None:
            times = stem.with_name(stem.name + ".times.json")
            session.board.get(step.times, times)
            files.append(times)
            samples = read_times(times, "latencyMs" if step.what in ("end_to_end", "from_file") else "computeMs")
            if step.what == "from_file":
                parts_ms.append({part: statistics.median(read_times(times, part)) for part in infer.PARTS})
        if step.what == "cold_start":
            samples = [wall_ms(log)]
        elif step.what == "first_frame":
            samples = samples[1:]
        elif step.what == "soak":
            median = said.gpu_compute.median if said is not None and said.gpu_compute is not None else None
            if not samples and median is not None:
                samples = [median]
            traces.append(session.board.run(["cat", watched]).output if watched is not None else "")
            parts.append((step.seconds, statistics.median(samples) if samples else math.nan))
        if not samples and step.what != "soak":
            raise EnvironmentFailed(f"{step.what} gave no sample", where=f"log in {log}", remedy="run it again")
        runs.setdefault(step.what, []).append(samples)
    base = result.metrics["p50_ms"].model_copy(update={"low": None, "high": None, "batch": batch})
    metrics, kept = dict(result.metrics), dict(result.statistics)
    for what, found in runs.items():
        if what == "soak" and settings.soak is not None:
            ratio = soak_ratio(found[0], found[-1], base)
            metrics |= {"soak_ratio": ratio, "soak_p50_ms": base.model_copy(update=_median(found[-1]))}
            kept["soak"] = soak_details(settings.soak, parts, traces)
            continue
        medians = [statistics.median(samples) for samples in found]
        value = base.model_copy(
            update={"value": statistics.median(medians), "n": sum(map(len, found)), "low": min(medians), "high": max(medians)}
        )
        metrics[f"{what}_ms"] = value if len(medians) > 1 else value.model_copy(update={"low": None, "high": None})
        kept[f"{what}_ms_runs"] = medians
    if parts_ms:
        kept["from_file_parts_ms"] = {
            part.removesuffix("Ms"): statistics.median(each[part] for each in parts_ms) for part in infer.PARTS
        }
    kept["conditions"] = {name: text for name, text in conditions(settings, session.photos).items() if name in metrics}
    return replace(result, metrics=metrics, statistics=kept, files=(*result.files, *files))


def send(session: Session, photos: Photos) -> None:
    """Copy what `Step`s of kind ``from_file`` read to the work folder of the board.

    Raises:
        ToolMissing: The board has no Python with numpy and TensorRT.
        EnvironmentFailed: The connection failed.
    """
    session.send_infer()
    for file, name in zip(photos.files, names_there(photos.files), strict=True):
        session.board.put(file, f"{session.work}/{name}")
    about = session.out / ABOUT
    write_text(about, json.dumps(dict(photos.about)) + "\n")
    session.board.put(about, f"{session.work}/{ABOUT}")


def wall_ms(log: Path) -> float:
    """Return the time between the two stamps that a shell put around a command, in ms.

    Raises:
        EnvironmentFailed: They are not there: the board's ``date`` knows no nanoseconds.
    """
    found = re.findall(r"^@@wall ([0-9]{18,20}) ([0-9]{18,20})\s*$", log.read_text(encoding="utf-8", errors="replace"), re.M)
    if not found or int(found[-1][1]) <= int(found[-1][0]):
        raise EnvironmentFailed(
            "the board's clock tells no nanoseconds", where=f"log in {log}", remedy="leave --cold-start out"
        )
    return (int(found[-1][1]) - int(found[-1][0])) / 1e6


def _median(samples: Sequence[float]) -> dict[str, Any]:
    found = summarize(samples, Conditions("", "", 1))["p50_ms"]
    return {"value": found.value, "n": found.n, "low": found.low, "high": found.high}


def soak_ratio(first: Sequence[float], last: Sequence[float], base: Metric) -> Metric:
    """Return the median of the last part over that of the first.

    The band takes the far ends of both 95 % intervals, so it is wider than 95 %; it covers the two processes and no others.
    """
    a, b = _median(first), _median(last)
    return base.model_copy(
        update={
            "value": b["value"] / a["value"],
            "unit": "ratio",
            "n": b["n"],
            "low": b["low"] / a["high"],
            "high": b["high"] / a["low"],
        }
    )


def soak_details(seconds: int, parts: Sequence[tuple[float, float]], traces: Sequence[str]) -> dict[str, Any]:
    """Return what is kept of a soak, as JSON values.

    Args:
        seconds: Asked for.
        parts: Seconds and median latency of each process.
        traces: What tegrastats wrote in each.
    """
    counts = [sum(1 for line in text.splitlines() if line.strip()) for text in traces]
    readings = parse_trace("\n".join(text.rstrip("\n") for text in traces if text.strip()), interval_s=TRACE_S)
    starts = [sum(counts[:i]) * TRACE_S if readings else sum(p[0] for p in parts[:i]) for i in range(len(parts))]
    told = [
        {"from_s": start, "seconds": length, "p50_ms": None if math.isnan(p50) else p50}
        for start, (length, p50) in zip(starts, parts, strict=True)
    ]
    ends = (readings[: counts[0]], readings[len(readings) - counts[-1] :]) if readings else ([], [])

    def two(get: Callable[[Reading], float | None]) -> list[float] | None:
        values = [
            [v for r in end if (v := get(r)) is not None and (r.load_percent is None or r.load_percent > 10)] for end in ends
        ]
        return [statistics.median(v) for v in values] if all(values) else None

    clocks = two(lambda r: r.clock_mhz)
    hot = [r.temperature_c for r in readings if r.temperature_c is not None]
    return {
        "seconds": seconds,
        "parts": told,
        "clock_mhz": clocks,
        "temperature_c": two(lambda r: r.temperature_c),
        "hottest_c": max(hot) if hot else None,
        "power_w": two(lambda r: r.power_w),
        "throttled": None if clocks is None else clocks[1] < SLOWER_CLOCK * clocks[0],
        "trace": {"columns": list(COLUMNS), "rows": list(_rows(readings))},
    }


COLUMNS = ("s", "load_percent", "clock_mhz", "temperature_c", "power_w", "memory_mb")
"""Of the rows of a trace."""


def _rows(readings: Sequence[Reading]) -> Iterator[list[float | None]]:
    """Yield at most `TRACE_ROWS` rows; several readings are averaged into one."""
    each = math.ceil(len(readings) / TRACE_ROWS) or 1
    for i in range(0, len(readings), each):
        group = readings[i : i + each]
        row: list[float | None] = [group[0].s]
        for column in COLUMNS[1:]:
            values = [v for r in group if (v := getattr(r, column)) is not None]
            row.append(round(statistics.fmean(values), 3) if values else None)
        yield row


def soak_note(details: dict[str, Any], ratio: float) -> str:
    """Return one sentence about a soak."""
    text = f"soak of {details['seconds']} s: the last part took {ratio:.3f} times the first"
    for key, unit in (("clock_mhz", "MHz"), ("temperature_c", "°C"), ("power_w", "W")):
        if details[key] is not None:
            text += f", {details[key][0]:.4g} to {details[key][1]:.4g} {unit}"
    throttled = {
        None: "; whether it throttled is unknown: tegrastats tells no GPU clock",
        True: "; the GPU clock fell",
        False: "",
    }
    return text + throttled[details["throttled"]]
