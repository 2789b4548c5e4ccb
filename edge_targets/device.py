"""`Device`, `PowerMode`, `Target`: what hardware can do, and where each number comes from."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from edge_targets.backends import PACKAGE as BACKENDS
from edge_targets.backends import load_backend
from edge_targets.tensorrt_versions import Capabilities, capabilities
from rescompress.core import plugins
from rescompress.core.errors import TargetError, nearest
from rescompress.core.quantizers import Profile
from rescompress.core.spec import Frozen

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
Architecture = Literal["maxwell", "pascal", "volta", "turing", "ampere", "ada", "blackwell", "x86_64", "aarch64", "host"]

Source = Annotated[str, Field(min_length=11)]
"""Where a figure was read; ten characters name no source."""

PREDICTED = ("maxwell", "pascal", "volta", "ampere", "blackwell")
"""Architectures with constants of the latency model (`edge_targets.latency`)."""


def base_precision(written: str) -> str:
    """Return the one of `PRECISIONS` that a file's precision counts as: ``int8`` for ``int8+fp16``, too."""
    return "int8" if "int8" in written else written


class Figure(Frozen):
    """One number with its source.

    Attributes:
        value: The number; its unit is in the name of the field that holds it.
        source: Where it was read.
        verified: False for figures that are commonly given but were not read in a primary source.
    """

    value: float
    source: Source
    verified: bool = True


def mode_name(told: str) -> str:
    """Return the name of a power mode without the ``MODE_`` that nvpmodel of some releases puts in front of it."""
    return told[len("MODE_") :] if told.upper().startswith("MODE_") else told


class PowerMode(Frozen):
    """One power mode of a board: it sets the number of active multiprocessors as well as the clocks.

    Attributes:
        name: As ``nvpmodel -q`` prints it, without the ``MODE_`` that some releases put in front.
        nvpmodel: Its number for ``nvpmodel -m``, where known.
        sm_count: Active streaming multiprocessors.
        gpu_mhz: Cap of the GPU clock.
        emc_mhz: Cap of the memory clock.
        source: Where the row was read.
        verified: False where the row was not read in a primary source.
    """

    name: str
    nvpmodel: int | None = None
    sm_count: int = Field(ge=1)
    gpu_mhz: float = Field(gt=0)
    emc_mhz: float = Field(gt=0)
    source: Source
    verified: bool = True


class Software(Frozen):
    """One system release of a board and the TensorRT that comes with it.

    Attributes:
        jetpack: Version of JetPack; with ``+`` and a version of TensorRT where that is not the one JetPack comes with.
        tensorrt: Version of TensorRT in it.
        cuda: Version of CUDA in it.
        l4t: Version of Jetson Linux, where known.
        python: Version of its Python, where known.
        source: Where the row was read.
        verified: False where the row was not read in a primary source.
    """

    jetpack: str
    tensorrt: str
    cuda: str
    l4t: str | None = None
    python: str | None = None
    source: Source
    verified: bool = True


class Device(Frozen):
    """One piece of hardware.

    Attributes:
        name: Of the file that describes it, such as ``jetson-orin-nano-8gb``.
        title: What people call it.
        architecture: Of the GPU, or of the CPU where there is no GPU.
        compute_capability: Of the GPU, such as ``8.7``.
        runtime: What runs models on it: a file of `edge_targets.backends`.
        precisions: What the runtime computes in on it, fastest last.
        align: Per precision, the multiple that channel counts should have.
        align_source: Where `align` was read.
        max_gpu_mhz: Highest GPU clock.
        bandwidth_gb_s: Memory bandwidth at the highest memory clock, `max_emc_mhz`.
        max_emc_mhz: Highest memory clock.
        memory_gb: Of the board.
        l2_mb: Second-level cache of the GPU.
        int8_macs: Dense INT8 tensor multiply-accumulates per multiprocessor and clock.
        fp16_macs: Dense FP16 multiply-accumulates per multiprocessor and clock.
        fp32_macs: FP32 multiply-accumulates per multiprocessor and clock, in TF32 where the GPU has it.
        dla_count: Deep-learning accelerators.
        dla_again: Whether TensorRT 11.4.1 and later run on them.
        modes: Power modes; the first is the one with the highest clocks.
        default_mode: The mode a new board starts in.
        software: System releases, newest first.
        default_jetpack: The release that is assumed when none is named.
        models: Texts in ``/proc/device-tree/model`` that tell this board.
        notes: What a user should know.
    """

    name: str
    title: str
    architecture: Architecture
    compute_capability: str | None = None
    runtime: str
    precisions: tuple[Precision, ...] = Field(min_length=1)
    align: dict[Precision, Annotated[int, Field(ge=1)]]
    align_source: Source
    max_gpu_mhz: Figure | None = None
    bandwidth_gb_s: Figure | None = None
    max_emc_mhz: Figure | None = None
    memory_gb: Figure | None = None
    l2_mb: Figure | None = None
    int8_macs: Figure | None = None
    fp16_macs: Figure | None = None
    fp32_macs: Figure | None = None
    dla_count: Figure | None = None
    dla_again: bool = False
    modes: tuple[PowerMode, ...] = ()
    default_mode: str | None = None
    software: tuple[Software, ...] = ()
    default_jetpack: str | None = None
    models: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @field_validator("runtime")
    @classmethod
    def _known_runtime(cls, name: str) -> str:
        if not plugins.known(BACKENDS, name):
            raise ValueError(f"unknown runtime '{name}', {nearest(name, plugins.names(BACKENDS))}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if set(self.align) != set(self.precisions):
            raise ValueError(f"{self.name}: align names {sorted(self.align)}, precisions are {sorted(self.precisions)}")
        if self.modes and self.default_mode not in {m.name for m in self.modes}:
            raise ValueError(f"{self.name}: default mode {self.default_mode!r} is not one of its modes")
        if self.software and self.default_jetpack not in {s.jetpack for s in self.software}:
            raise ValueError(f"{self.name}: default JetPack {self.default_jetpack!r} is not one of its releases")
        # What commands ask of every listed device must not fail there: one such file would end them all.
        for release in self.software:
            capabilities(release.tensorrt)
        if self.modes:
            self._predictable()
        return self

    def _predictable(self) -> None:
        """Refuse a device with power modes, whose latency is predicted, where a figure is missing for that."""
        rates = tuple(f"{precision}_macs" for precision in self.precisions)
        needed = ("compute_capability", "max_gpu_mhz", "bandwidth_gb_s", "max_emc_mhz", "l2_mb", *rates)
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"{self.name}: a device with power modes has its latency predicted, which needs {', '.join(missing)} too"
            )
        if self.architecture not in PREDICTED:
            raise ValueError(
                f"{self.name}: a device with power modes has its latency predicted, which cannot be done for "
                f"'{self.architecture}': leave the modes out, or give one of {', '.join(PREDICTED)}"
            )

    def capabilities(self, version: str) -> Capabilities:
        """Return what a version of TensorRT understands on this board: the version's row, less the DLA where that is amiss.

        Raises:
            TargetError: It is no version, or too old.
        """
        known = capabilities(version)
        if self.dla_count is None or not self.dla_count.value:
            return known._replace(no_dla=f"{self.title} has no DLA", qdq_on_dla=False)
        if known.qdq_on_dla and not self.dla_again:
            return known._replace(no_dla=f"TensorRT {version} runs on the DLA of the AGX Orin only", qdq_on_dla=False)
        return known

    @property
    def best_float(self) -> Precision:
        """What a network that is not quantized computes in at its fastest."""
        return "fp16" if "fp16" in self.precisions else "fp32"

    def mode(self, name: str | None = None) -> PowerMode:
        """Return the power mode called `name`; without a name the one with the highest clocks.

        Case does not count, nor does a ``MODE_`` in front.

        Raises:
            TargetError: The device has no such mode, or none at all.
        """
        if not self.modes:
            raise TargetError(f"{self.name} has no power modes", remedy="leave the power mode out")
        if name is None:
            return self.modes[0]
        for mode in self.modes:
            if mode_name(mode.name).lower() == mode_name(name).lower():
                return mode
        raise TargetError(f"{self.name} has no power mode '{name}'", remedy=nearest(name, [m.name for m in self.modes]))

    def macs_per_clock(self, precision: Precision) -> float:
        """Return the dense multiply-accumulates per multiprocessor and clock in `precision`.

        Raises:
            TargetError: The device does not compute in `precision`, or its rate is not known.
        """
        rates: dict[Precision, Figure | None] = {"int8": self.int8_macs, "fp16": self.fp16_macs, "fp32": self.fp32_macs}
        rate = rates[precision]
        if precision not in self.precisions:
            raise TargetError(
                f"{self.title} does not compute in {precision}", remedy=f"choose one of: {', '.join(self.precisions)}"
            )
        if rate is None:
            raise TargetError(
                f"how fast {self.title} computes in {precision} is not known", remedy=f"give {precision}_macs in its file"
            )
        return rate.value

    def peak_tops(self, precision: Precision, mode: PowerMode | None = None) -> float:
        """Return dense tera-operations per second (two per multiply-accumulate) in a power mode.

        Raises:
            TargetError: As `macs_per_clock` and `mode`.
        """
        mode = mode or self.mode()
        return mode.sm_count * mode.gpu_mhz * self.macs_per_clock(precision) * 2 / 1e6

    def tensorrt(self, jetpack: str | None = None) -> Software:
        """Return the system release for `jetpack`, or the default one.

        Raises:
            TargetError: The board does not run that release.
        """
        for release in self.software:
            if release.jetpack == (jetpack or self.default_jetpack):
                return release
        raise TargetError(
            f"{self.title} does not run JetPack {jetpack}", remedy=nearest(str(jetpack), [s.jetpack for s in self.software])
        )


class Target(Frozen):
    """A device with the software that runs on it: what ``--target`` names.

    Attributes:
        name: What the user wrote, or the device an alias stands for.
        alias: The alias the user wrote, if it was one.
        device: The hardware.
        tensorrt_version: Of the TensorRT on the board, None for other runtimes.
        jetpack: The system release that version comes from.
    """

    name: str
    alias: str | None = None
    device: Device
    tensorrt_version: str | None = None
    jetpack: str | None = None

    @property
    def runtime(self) -> str:
        """What runs the model."""
        return self.device.runtime

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What it computes in, fastest last."""
        return self.device.precisions

    @property
    def profile(self) -> Profile:
        """Where quantizers go for this runtime (`rescompress.core.quantizers`)."""
        return load_backend(self.runtime).PROFILE

    @property
    def capabilities(self) -> Capabilities | None:
        """What its TensorRT understands; None for other runtimes."""
        return self.device.capabilities(self.tensorrt_version) if self.tensorrt_version else None

    @property
    def opset(self) -> int:
        """The ONNX opset to write for it."""
        known = self.capabilities
        return known.opset if known else load_backend(self.runtime).OPSET

    @property
    def strongly_typed(self) -> bool:
        """Whether float16 must be written into the ONNX, because the runtime takes the types from the file."""
        known = self.capabilities
        return known.strongly_typed if known else load_backend(self.runtime).STRONGLY_TYPED

    @property
    def builds_here(self) -> bool:
        """Whether the runtime needs nothing but this machine to make a runnable or checkable artifact."""
        return load_backend(self.runtime).BUILDS_HERE

    def align(self, precision: Precision | None = None) -> int:
        """Return the multiple that channel counts should have.

        Args:
            precision: What the network will run in; without it, the fastest that the target has.

        Raises:
            TargetError: The target lacks that precision.
        """
        return self.device.align[self.check_precision(precision)]

    def check_precision(self, precision: str | None = None) -> Precision:
        """Return `precision`, or the fastest one of the target when it is None or ``auto``.

        Raises:
            TargetError: The target lacks it.
        """
        if precision is None or precision == "auto":
            return self.precisions[-1]
        for known in self.precisions:
            if known == precision:
                return known
        if precision == "fp8":
            from edge_targets.fp8 import refusal  # which reads devices itself

            raise refusal(self.device)
        raise TargetError(
            f"{self.device.title} does not run {precision}",
            where=f"--precision {precision}",
            remedy=f"choose one of: {', '.join(self.precisions)}",
        )
