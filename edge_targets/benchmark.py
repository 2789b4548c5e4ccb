"""Measured latency: each model in processes of its own, in rounds that alternate when several are compared.

Two runtimes in one process disturb each other (idle worker threads of one spin on the cores of the other), and a
machine drifts within seconds. So every candidate gets a process that sleeps until it is its turn, and the candidates
take turns in short rounds. What differs between two processes of one model (memory layout, the cores it lands on) is
often more than what differs inside one, so every round starts new processes, and the median of each is kept: gates
compare those. A percentile is taken over all rounds of one candidate, each of them with the same number of samples: a
process that is slower makes fewer in its time, and must not count less for that.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from edge_targets.backends import cpu_threads, load_backend
from rescompress.core.errors import BadInput, EnvironmentFailed, ModelFileError, RescompressError, ToolMissing
from rescompress.core.metric import Metric
from rescompress.core.runner import Runner


@dataclass(frozen=True)
class Candidate:
    """One model on one runtime, to be measured.

    Attributes:
        path: ONNX file or built artifact.
        runtime: A file of `edge_targets.backends`.
        shape: Channels, height and width of one input.
        batch: Images per call.
        threads: CPU threads; all cores when None.
        precision: Told to the metrics.
    """

    path: Path
    runtime: str
    shape: tuple[int, int, int]
    batch: int = 1
    threads: int | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        warmup_s: Seconds before the first sample of a process counts.
        seconds: Seconds of samples per candidate, over all rounds.
        rounds: Turns each candidate gets, each in a new process.
        min_iterations: Samples per round, even where that takes longer.
    """

    warmup_s: float = 0.3
    seconds: float = 3.0
    rounds: int = 5
    min_iterations: int = 4


def percentile(sorted_ms: Sequence[float], q: float) -> float:
    """Return the `q` quantile (0..1) of sorted samples, linearly interpolated between neighbours."""
    position = q * (len(sorted_ms) - 1)
    below = math.floor(position)
    above = min(below + 1, len(sorted_ms) - 1)
    return sorted_ms[below] + (sorted_ms[above] - sorted_ms[below]) * (position - below)


def even(processes: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return as many samples of each process as the one with the fewest has, spread evenly over its time."""
    n = min(len(samples) for samples in processes)
    return [[samples[i * len(samples) // n] for i in range(n)] for samples in processes]


@dataclass(frozen=True)
class Conditions:
    """Under which a latency was measured; each of its metrics states them.

    Attributes:
        device: What computed.
        runtime: What ran the network.
        batch: Images per call.
        precision: What the file computes in, as far as it is known.
        threads: Of the CPU.
        power_mode: Of a board.
    """

    device: str
    runtime: str
    batch: int
    precision: str | None = None
    threads: int | None = None
    power_mode: str | None = None


def summarize(samples_ms: Sequence[float], conditions: Conditions) -> dict[str, Metric]:
    """Return ``p50_ms``, ``p90_ms``, ``p99_ms``, ``mean_ms``, ``spread`` and ``images_per_s`` of latency samples.

    ``p50_ms`` carries the 95 % confidence interval of a median by order statistics (ranks n/2 -+ 0.98 sqrt(n)), which
    assumes nothing of the distribution. ``spread`` is (p90 - p10) / p50: one outlier does not move it.

    Raises:
        BadInput: There is no sample.
    """
    if not samples_ms:
        raise BadInput("no latency sample", remedy="measure for longer")
    ordered = sorted(samples_ms)
    n = len(ordered)
    half = 0.98 * math.sqrt(n)
    low = ordered[max(0, math.floor(n / 2 - half))]
    high = ordered[min(n - 1, math.ceil(n / 2 + half))]
    mean = statistics.fmean(ordered)

    def metric(value: float, unit: str, low: float | None = None, high: float | None = None) -> Metric:
        return Metric(value=value, unit=unit, provenance="measured", n=n, low=low, high=high, **asdict(conditions))

    return {
        "p50_ms": metric(percentile(ordered, 0.5), "ms", low, high),
        "p90_ms": metric(percentile(ordered, 0.9), "ms"),
        "p99_ms": metric(percentile(ordered, 0.99), "ms"),
        "mean_ms": metric(mean, "ms"),
        "spread": metric(
            (percentile(ordered, 0.9) - percentile(ordered, 0.1)) / max(percentile(ordered, 0.5), 1e-9), "fraction"
        ),
        "images_per_s": metric(1000.0 * conditions.batch / mean if mean else 0.0, "images/s"),
    }


def summarize_processes(
    processes: Sequence[Sequence[float]], conditions: Conditions
) -> tuple[dict[str, Metric], tuple[float, ...]]:
    """Return what `summarize` says of the samples of several processes, and the median of each process.

    Every process counts alike (`even`). With more than one, ``p50_ms`` carries the range of their medians, smallest to
    largest: what differs between processes shows in no single one, and samples of one are no independent witnesses of it.

    Raises:
        BadInput: There is no sample.
    """
    metrics = summarize([ms for process in even(processes) for ms in process], conditions)
    medians = tuple(statistics.median(process) for process in processes)
    if len(medians) > 1:
        metrics["p50_ms"] = metrics["p50_ms"].model_copy(update={"low": min(medians), "high": max(medians)})
    return metrics, medians


def time_runner(runner: Runner, shape: tuple[int, int, int], *, batch: int, seconds: float, min_iterations: int) -> list[float]:
    """Return the latency of each call in ms, calling `runner` on random images for `seconds`, in this process.

    The images have the type of the model's input, so that no conversion of ours is measured.
    """
    import numpy as np

    kind = np.dtype(getattr(runner, "input_type", "float32"))
    generator = np.random.default_rng(0)
    x_NCHW = (
        generator.integers(0, 128, (batch, *shape)).astype(kind)
        if kind.kind in "iu"
        else generator.standard_normal((batch, *shape)).astype(kind)
    )
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < min_iterations or time.perf_counter() < end:
        start = time.perf_counter()
        runner(x_NCHW)
        samples.append((time.perf_counter() - start) * 1000.0)
    return samples


def cpu_name() -> str:
    """Return the model of this computer's CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Measured:
    """What was measured of one candidate.

    Attributes:
        metrics: Of `summarize_processes`, over all processes.
        process_medians_ms: Median latency of each process, in order of time.
        process_p99_ms: 99th percentile of each.
        runtime_options: Options, other than the runtime's defaults, that decide which kernels ran.
    """

    metrics: dict[str, Metric]
    process_medians_ms: tuple[float, ...]
    runtime_options: dict[str, str] = field(default_factory=dict)
    process_p99_ms: tuple[float, ...] = ()


def options_note(runtime: str, options: Mapping[str, str]) -> list[str]:
    """Return what to tell of `Measured.runtime_options`: one sentence, or none where everything is the runtime's default."""
    if not options:
        return []
    given = ", ".join(f"{key}={value}" for key, value in options.items())
    return [f"measured with {runtime}'s option {given}: an application that loads the file sets it too (docs/targets.md)"]


def measure_processes(candidates: Sequence[Candidate], *, effort: Effort | None = None) -> list[Measured]:
    """Return what was measured of each candidate, in their order, from interleaved rounds.

    Raises:
        BadInput: Unknown runtime, or a model it cannot load.
        ToolMissing: A runtime is not installed.
        EnvironmentFailed: A measuring process died.
    """
    effort = effort or Effort()
    for candidate in candidates:
        load_backend(candidate.runtime)
        check_threads(candidate.threads)
    samples: list[list[list[float]]] = [[] for _ in candidates]
    options: list[dict[str, str]] = [{} for _ in candidates]
    for _ in range(effort.rounds):
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(_worker(candidate)) for candidate in candidates]
            options = [worker.runtime_options for worker in workers]
            for mine, worker in zip(samples, workers, strict=True):
                worker.ask({"seconds": effort.warmup_s, "min_iterations": effort.min_iterations})
                each = {"seconds": effort.seconds / effort.rounds, "min_iterations": effort.min_iterations}
                mine.append(worker.ask(each)["samples_ms"])
    return [_measured(mine, c, used) for mine, c, used in zip(samples, candidates, options, strict=True)]


def check_threads(threads: int | None) -> None:
    """Refuse more threads than this machine can run at once: what they took would be told as if it had them.

    Raises:
        BadInput: There are too many.
    """
    most = max(os.cpu_count() or 1, cpu_threads(None))
    if threads is not None and threads > most:
        raise BadInput(
            f"{threads} threads cannot run at once on this machine of {most} logical CPUs",
            where="--threads",
            remedy=f"give 1 to {most}, or leave it out",
        )


def _measured(samples: Sequence[Sequence[float]], candidate: Candidate, options: dict[str, str]) -> Measured:
    where = Conditions(
        cpu_name(), candidate.runtime, candidate.batch, candidate.precision, threads=cpu_threads(candidate.threads)
    )
    metrics, medians = summarize_processes(samples, where)
    return Measured(metrics, medians, options, tuple(percentile(sorted(process), 0.99) for process in samples))


class _Worker:
    """A process that holds one runner and measures when asked; one JSON document per line each way."""

    def __init__(self, candidate: Candidate, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._in: IO[str] = process.stdin
        self._out: IO[str] = process.stdout
        self._process = process
        self._errors = errors
        self._path = candidate.path
        self.runtime_options: dict[str, str] = self.ask({**asdict(candidate), "path": str(candidate.path)})["options"]

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one question.

        Raises:
            RescompressError: The worker's own error, under its own class.
            EnvironmentFailed: The worker died.
        """
        try:
            self._in.write(json.dumps(question) + "\n")
            self._in.flush()
            line = self._out.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise EnvironmentFailed(
                f"the measuring process {ended_with(code)}: {_last_line(self._errors)}",
                where=str(self._path),
                remedy=_REMEDY_OF_KILL if code in (-9, 137) else "measure it alone, and look at what it says",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kinds = {k.__name__: k for k in (ToolMissing, ModelFileError, BadInput, EnvironmentFailed)}
            kind = kinds.get(answer["error"], EnvironmentFailed)
            raise kind(answer["what"], where=answer["where"], remedy=answer["remedy"])
        return answer


_REMEDY_OF_KILL = "the system ends processes so when memory is short: use a smaller batch, or free some memory"


def ended_with(code: int) -> str:
    """Return how a process ended, in words."""
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _last_line(errors: IO[bytes]) -> str:
    """Return the last line that a process wrote to its standard error."""
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - 4096))
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _search_path() -> list[str]:
    """Return where a measuring process looks for modules: where this one does, but not in the current folder.

    A folder with somebody's model may hold a ``statistics.py``, too; Python puts it first for ``-m``, and for an empty entry.
    It stays where our own packages lie there, or where PYTHONPATH names it.
    """
    here = os.path.realpath(os.curdir)
    named = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    wanted = {str(Path(__file__).resolve().parents[1]), *(p for p in named if Path(p).is_absolute())}
    kept = [p for p in sys.path if p and (os.path.realpath(p) != here or os.path.realpath(p) in wanted or p in wanted)]
    return [str(Path(p).absolute()) for p in kept]


@contextlib.contextmanager
def _worker(candidate: Candidate) -> Iterator[_Worker]:
    threads = str(cpu_threads(candidate.threads))
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed below, when the process has ended
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "edge_targets.benchmark"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,  # an interrupt from the keyboard is for this process, which ends the other
        env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(_search_path())},
    )
    try:
        yield _Worker(candidate, process, errors)
    except KeyboardInterrupt:
        process.kill()
        raise
    finally:
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        errors.close()


def _serve(questions: IO[str], answers: IO[str]) -> None:
    """Answer questions until the other side closes: the first names the model, each further one asks for samples."""

    def answer(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    line = questions.readline()
    if not line:
        return  # the other side was interrupted before it could ask
    first = json.loads(line)
    shape = tuple(first["shape"])
    try:
        backend = load_backend(first["runtime"])
        with backend.runner(Path(first["path"]), threads=first["threads"], batch=first["batch"]) as runner:
            if runner.batch not in (None, first["batch"]):
                raise ModelFileError(
                    f"takes {runner.batch} images per call, not {first['batch']}",
                    where=first["path"],
                    remedy="measure at that batch, or export with --batch dynamic",
                )
            answer({"options": dict(runner.options)})
            for line in questions:
                asked = json.loads(line)
                samples = time_runner(
                    runner, shape, batch=first["batch"], seconds=asked["seconds"], min_iterations=asked["min_iterations"]
                )
                answer({"samples_ms": samples})
    except RescompressError as e:
        answer({"error": type(e).__name__, "what": e.what, "where": e.where, "remedy": e.remedy})
    except MemoryError:
        answer({"error": "EnvironmentFailed", "what": "out of memory", "where": first["path"], "remedy": "use a smaller batch"})
    except Exception as e:  # runtimes have exceptions of their own; what they say is the cause
        said = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        short = any(word in said.lower() for word in ("bad_alloc", "bad allocation", "failed to allocate", "out of memory"))
        answer(
            {
                "error": "EnvironmentFailed" if short else "ModelFileError",
                "what": f"{first['runtime']} cannot run it: {said[:300]}",
                "where": first["path"],
                "remedy": "use a smaller batch" if short else "check it with: rescompress lint",
            }
        )


def _end_with_the_other_side(patience_s: float = 5.0) -> None:
    """End this process soon after the other side closes its end, also in the middle of a long measurement."""
    if not hasattr(select, "poll"):  # Windows
        return
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLHUP)

    def watch() -> None:
        poll.poll()
        time.sleep(patience_s)  # who was asked to end in peace does so by then
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    # Runtimes print to stdout; the protocol keeps a copy of it for itself and sends theirs to stderr.
    _protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _end_with_the_other_side()
    try:
        _serve(sys.stdin, _protocol)
    except BrokenPipeError:  # the other side was killed
        os._exit(0)
