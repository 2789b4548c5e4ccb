"""trtexec, NVIDIA's command-line builder: its command lines by version of TensorRT (`edge_targets.tensorrt_versions`).

What it prints is read by `edge_targets.trtexec_log`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from edge_targets.device import Precision
from edge_targets.tensorrt_versions import DLA_REMEDY, Capabilities, capabilities
from rescompress.core.errors import TargetError

LOCATIONS = ("trtexec", "/usr/src/tensorrt/bin/trtexec")
"""Where a board has it: on the PATH, or where JetPack puts it."""


@dataclass(frozen=True)
class InputShapes:
    """The optimization profile of an ONNX file with a dynamic batch.

    Attributes:
        name: Of the ONNX input.
        shape: Channels, height and width.
        min_batch: Smallest batch the engine takes.
        opt_batch: The batch it is tuned for.
        max_batch: Largest.
    """

    name: str
    shape: tuple[int, int, int]
    min_batch: int = 1
    opt_batch: int = 1
    max_batch: int = 8

    def text(self, batch: int) -> str:
        """Return ``input:8x3x224x224``."""
        return f"{self.name}:{'x'.join(str(n) for n in (batch, *self.shape))}"


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        precision: What it may compute in; INT8 falls back to FP16 per layer where that is faster.
        shapes: Profile for a dynamic batch; None for a file with fixed shapes.
        workspace_mb: Scratch memory the builder may use.
        timing_cache: File that keeps kernel timings between builds.
        dla_core: Deep-learning accelerator to use, with the GPU for what it cannot run.
        sparsity: Use 2:4 sparse kernels where the weights allow it.
    """

    precision: Precision
    shapes: InputShapes | None = None
    workspace_mb: int = 1024
    timing_cache: str | None = None
    dla_core: int | None = None
    sparsity: bool = False


@dataclass(frozen=True)
class TimingOptions:
    """How an engine is timed.

    Attributes:
        warmup_ms: Time before the first sample counts.
        duration_s: Least seconds of samples.
        iterations: Least number of samples.
        shapes: Profile, where the engine has a dynamic batch.
        batch: Which batch of the profile to run.
        dla_core: The accelerator the engine was built for.
    """

    warmup_ms: int = 500
    duration_s: int = 10
    iterations: int = 100
    shapes: InputShapes | None = None
    batch: int = 1
    dla_core: int | None = None


def build_command(
    version: str | Capabilities,
    onnx: str,
    engine: str,
    options: BuildOptions,
    *,
    executable: str | Sequence[str] = "trtexec",
    layer_info: str | None = None,
) -> list[str]:
    """Return the command that builds `engine` from `onnx` without running it.

    Args:
        version: Of TensorRT on the board.
        onnx: Path on the board.
        engine: Path on the board.
        options: How.
        executable: trtexec on the board, or the words that start `edge_targets.trt_builder` there.
        layer_info: Where it writes the layers of the engine as JSON.

    Raises:
        TargetError: That version cannot do what is asked.
    """
    known = capabilities(version) if isinstance(version, str) else version
    command = [*_words(executable), f"--onnx={onnx}", f"--saveEngine={engine}"]
    if known.strongly_typed:
        # TensorRT 11 builds every network strongly typed; before it, that has to be asked for.
        command += ["--stronglyTyped"] if known.precision_flags else []
    elif options.precision == "fp16":
        command += ["--fp16"]
    elif options.precision == "int8":
        command += ["--int8", "--fp16"]
    pool = f"workspace:{options.workspace_mb}"
    command.append(f"--memPoolSize={pool}" if known.mem_pool_size else f"--workspace={options.workspace_mb}")
    if options.shapes:
        s = options.shapes
        command += [
            f"--minShapes={s.text(s.min_batch)}",
            f"--optShapes={s.text(s.opt_batch)}",
            f"--maxShapes={s.text(s.max_batch)}",
        ]
    if options.timing_cache:
        command.append(f"--timingCacheFile={options.timing_cache}")
    if options.sparsity:
        command.append("--sparsity=enable")
    command += _dla(known, options.dla_core)
    command.append("--profilingVerbosity=detailed")
    if layer_info:
        command.append(f"--exportLayerInfo={layer_info}")
    return [*command, known.skip_inference]


def _words(executable: str | Sequence[str]) -> list[str]:
    return [executable] if isinstance(executable, str) else list(executable)


def _dla(known: Capabilities, core: int | None) -> list[str]:
    if core is None:
        return []
    if not known.dla:
        raise TargetError(known.no_dla, remedy=DLA_REMEDY)
    return [f"--useDLACore={core}", "--allowGPUFallback"]


def timing_command(
    version: str | Capabilities,
    engine: str,
    options: TimingOptions,
    *,
    executable: str | Sequence[str] = "trtexec",
    times: str | None = None,
) -> list[str]:
    """Return the command that loads `engine` and times it.

    Defaults of trtexec changed in TensorRT 11 (transfers off, spin wait and CUDA graph on); every choice is written out
    so that all versions measure the same: no transfers, spin wait, CUDA graph.

    Args:
        version: Of TensorRT on the board.
        engine: Path on the board.
        options: How.
        executable: trtexec on the board, or the words that start `edge_targets.trt_builder` there.
        times: Where it writes one record per run as JSON.

    Raises:
        TargetError: That version cannot do what is asked.
    """
    known = capabilities(version) if isinstance(version, str) else version
    command = [
        *_words(executable),
        f"--loadEngine={engine}",
        f"--warmUp={options.warmup_ms}",
        f"--duration={options.duration_s}",
        f"--iterations={options.iterations}",
        "--avgRuns=100",
        "--noDataTransfers",
        "--useSpinWait",
        "--useCudaGraph",
    ]
    if options.shapes:
        command.append(f"--shapes={options.shapes.text(options.batch)}")
    command += _dla(known, options.dla_core)
    return [*command, f"--exportTimes={times}"] if times else command


def profile_command(
    version: str | Capabilities,
    engine: str,
    options: TimingOptions,
    *,
    executable: str | Sequence[str] = "trtexec",
    profile: str,
) -> list[str]:
    """Return the command that times every layer of `engine` into the JSON file `profile`.

    Raises:
        TargetError: That version cannot do what is asked.
    """
    command = [c for c in timing_command(version, engine, options, executable=executable) if c != "--useCudaGraph"]
    return [*command, "--dumpProfile", "--separateProfileRun", f"--exportProfile={profile}"]


def quoted(command: Sequence[str]) -> str:
    """Return a command as one line for a POSIX shell, every word quoted that needs it."""
    return shlex.join(command)
