"""What a stage tells beside its metrics, typed by the kind of stage: what reports, gates and commands read of it.

A key that is renamed in one place is an error of the type checker. In a manifest the details are a plain mapping with the
same keys, of which those stand there that were given; keys of other versions are kept and not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from rescompress.core.spec import Frozen

Numbers = list[float | None]
"""JSON has no infinity: null stands for it."""


KEPT = "kept"
"""Marks what a baseline keeps that is one file."""
Real = Annotated[float, Field(strict=True)]
Processes = Annotated[list[Real], KEPT]


class Details(Frozen):
    """Of any stage.

    Attributes:
        notes: What the user should know.
        data_notes: What the user should know of the images.
        outcomes: Which samples were right, in a baseline that is one file.
        fidelity: Of a network without class scores, how near each of its outputs is to the dense network's.
    """

    if not TYPE_CHECKING:  # a type checker is to find a key that no class has
        model_config = ConfigDict(extra="allow")
    kind: ClassVar[str] = ""

    notes: list[str] = Field(default_factory=list)
    data_notes: list[str] = Field(default_factory=list)
    outcomes: dict[str, Any] | None = None
    fidelity: dict[str, dict[str, float]] | None = None

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was not given."""
        found: dict[str, Any] = handler(self)
        given = self.model_fields_set | set(self.model_extra or {})
        return {k: v for k, v in found.items() if k in given}

    def with_data_notes(self, notes: list[str]) -> Self:
        """Return them with what is to be known of the images."""
        return self.model_copy(update={"data_notes": notes})

    def with_fidelity(self, outputs: dict[str, dict[str, float]]) -> Self:
        """Return them with how near each output is to the dense network's."""
        return self.model_copy(update={"fidelity": outputs})

    def for_baseline(self, outcomes: dict[str, Any] | None) -> Self:
        """Return what a baseline keeps that is one file, with the outcomes inside."""
        kept = {name for name, field in type(self).model_fields.items() if KEPT in field.metadata}
        found = {name: value for name, value in self.given().items() if name in kept}
        if outcomes is not None:
            found["outcomes"] = outcomes
        return type(self)(**found)

    def given(self) -> dict[str, Any]:
        """Return what was given, by name: what details of a larger kind are made of."""
        return {name: getattr(self, name) for name in (*self.model_fields_set, *(self.model_extra or {}))}

    def document(self) -> dict[str, Any]:
        """Return what was given, JSON values."""
        return self.model_dump()


class DenseDetails(Details):
    """Of the network as it came.

    Attributes:
        provenance: Where it is from.
        arch: Its architecture.
        search: Of a search, what its page shows.
    """

    kind = "dense"

    provenance: dict[str, Any] = Field(default_factory=dict)
    arch: str = ""
    search: Any = None


class Curve(Frozen):
    """An error curve.

    Attributes:
        order: Channels, the first to go first.
        error: Of removing so many.
    """

    order: list[int] = Field(default_factory=list)
    error: Numbers = Field(default_factory=list)


class Sparsity(Frozen):
    """Zeros for sparse tensor cores.

    Attributes:
        pattern: Such as ``2:4``.
        layers: That have them.
        dense: That cannot have them.
        wide: Of `layers`, those that TensorRT can profit in.
    """

    pattern: str
    layers: list[str]
    dense: list[str]
    wide: list[str] = Field(default_factory=list)


class PruneDetails(Details):
    """Of pruning.

    Attributes:
        method: That chose.
        scope: Of the groups.
        widths_before: Channels by group.
        widths_after: Channels that are left.
        dropped_blocks: That went whole.
        achieved_ratio: Fraction of the channels that went.
        budget: Its value by its kind.
        align: Multiple of the widths.
        curves: By group.
        curves_unit: Of their errors.
        error: At the chosen widths.
        cost_before: In the unit of the budget.
        cost_after: Likewise.
        seconds: That it took.
        sparsity: Of the weights, where it was asked for.
    """

    kind = "prune"

    method: str = ""
    scope: str = ""
    widths_before: dict[str, int] = Field(default_factory=dict)
    widths_after: dict[str, int] = Field(default_factory=dict)
    dropped_blocks: list[str] = Field(default_factory=list)
    achieved_ratio: float = 0.0
    budget: dict[str, float] = Field(default_factory=dict)
    align: int | None = None
    curves: dict[str, Curve] = Field(default_factory=dict)
    curves_unit: str = "error"
    error: float | None = None
    cost_before: float | None = None
    cost_after: float | None = None
    seconds: float = 0.0
    sparsity: Sparsity | None = None


Epoch = dict[str, float | None]
"""What was logged of one pass over the data."""


class TrainedDetails(Details):
    """Of a stage that may train.

    Attributes:
        epochs: The log.
        lr: Peak learning rate.
        waiting: Part of the time in which the device waited for images.
        workers: Processes that read images.
        best_epoch: That was kept, of images held out; the end of a part of an epoch is a fraction.
    """

    epochs: list[Epoch] = Field(default_factory=list)
    lr: float | None = None
    waiting: float | None = None
    workers: int | None = None
    best_epoch: float | None = None

    def noting(self, text: str) -> Self:
        """Return them with one more note."""
        return self.model_copy(update={"notes": [*self.notes, text]})


class FinetuneDetails(TrainedDetails):
    """Of fine-tuning."""

    kind = "finetune"


class QuantizeDetails(TrainedDetails):
    """Of quantization.

    Attributes:
        profile: Placement of the quantizers.
        mode: ``ptq`` or ``qat``.
        calibration: That was asked for.
        chosen: What calibration came to.
        float_top1: Accuracy before.
        ptq_top1: Accuracy before training.
        float_infidelity: Before, of a network without class scores.
        ptq_infidelity: Before training, likewise.
        keep_float: Layers in floating point.
        float_operations: How many of which operations no INT8 runtime computes in integers.
        kept: Which network is kept, ``qat`` or ``ptq``.
    """

    kind = "quantize"

    profile: str = ""
    mode: str = ""
    calibration: str = ""
    chosen: Any = None
    float_top1: float | None = None
    ptq_top1: float | None = None
    float_infidelity: float | None = None
    ptq_infidelity: float | None = None
    keep_float: list[str] = Field(default_factory=list)
    float_operations: dict[str, int] = Field(default_factory=dict)
    kept: str | None = None


class FileDetails(Details):
    """Of an exported file.

    Attributes:
        parity: How far it is from the torch network.
        parity_in_integers: The same in exact sums, of INT8 files.
        float16: What float16 does to it, where it computes in that.
        opset: Of the file.
        batch: Of the file.
        precision: What it computes in.
        profile: Placement of its quantizers.
        arch: Architecture of the network.
        input_shape: CxHxW.
        file_key: Hash of all that the file and its comparison are made of: what asks for the same gets this one.
        file_notes: Of `notes`, those of the file itself.
        host: Of a trunk, the file of its host with it inside: where it is, and how far its outputs are from the original's.
    """

    parity: dict[str, Any] = Field(default_factory=dict)
    parity_in_integers: dict[str, Any] | None = None
    float16: dict[str, Any] | None = None
    opset: int | None = None
    batch: int | str | None = None
    precision: Annotated[str | None, KEPT] = None
    profile: str | None = None
    arch: str | None = None
    input_shape: list[int] = Field(default_factory=list)
    file_key: str = ""
    file_notes: list[str] = Field(default_factory=list)
    host: dict[str, Any] | None = None


class ExportDetails(FileDetails):
    """Of the export of a run."""

    kind = "export"


class MeasuredDetails(Details):
    """Of a stage that measures latency.

    Attributes:
        latency_runs: Median of each process, in ms.
        dense_latency_runs: Of the dense network, measured in turns.
        fp32_latency_runs: Of the same network in float32.
        p99_ms_runs: The 99th percentile of each process.
        jitter_ms_runs: Of each process.
        cold_start_ms_runs: Likewise, as for what follows.
        first_frame_ms_runs: After idleness.
        contention_ms_runs: Beside other streams.
        end_to_end_ms_runs: With copies.
        from_file_ms_runs: From image files to classes.
        from_file_parts_ms: Medians of what that consists of: ``decode``, ``preprocess``, ``run``.
        runtime_version: Of what ran it.
        conditions: How figures beside the latency came about, by metric.
        soak: What a soak measured in the course of time.
    """

    latency_runs: Processes = Field(default_factory=list)
    dense_latency_runs: Processes = Field(default_factory=list)
    fp32_latency_runs: list[Real] = Field(default_factory=list)
    p99_ms_runs: Processes = Field(default_factory=list)
    jitter_ms_runs: Processes = Field(default_factory=list)
    cold_start_ms_runs: Processes = Field(default_factory=list)
    first_frame_ms_runs: Processes = Field(default_factory=list)
    contention_ms_runs: Processes = Field(default_factory=list)
    end_to_end_ms_runs: Processes = Field(default_factory=list)
    from_file_ms_runs: Processes = Field(default_factory=list)
    from_file_parts_ms: dict[str, Real] | None = None
    runtime_version: Annotated[str | None, KEPT] = None
    conditions: Annotated[dict[str, str], KEPT] = Field(default_factory=dict)
    soak: dict[str, Any] | None = None

    def runs(self, metric: str) -> list[float]:
        """Return the value of a latency in each process.

        Args:
            metric: ``latency``, ``dense_latency``, ``fp32_latency``, or a metric such as ``p99_ms``.
        """
        return {
            "latency": self.latency_runs,
            "dense_latency": self.dense_latency_runs,
            "fp32_latency": self.fp32_latency_runs,
            "p99_ms": self.p99_ms_runs,
            "jitter_ms": self.jitter_ms_runs,
            "cold_start_ms": self.cold_start_ms_runs,
            "first_frame_ms": self.first_frame_ms_runs,
            "contention_ms": self.contention_ms_runs,
            "end_to_end_ms": self.end_to_end_ms_runs,
            "from_file_ms": self.from_file_ms_runs,
        }[metric]


class TargetDetails(FileDetails, MeasuredDetails):
    """Of one edge target.

    Attributes:
        target: Its name.
        alias: The name it was asked for by.
        device: Title of the board.
        runtime: That runs it.
        lint: Findings.
        engine: Its file, relative to the run's folder; None without one.
        engine_status: What became of it.
        build: What the builder tells.
        runtime_options: Of the measurement.
        dense_runtime_options: Likewise.
        fp32_runtime_options: Likewise.
        validity_gate: Whether TensorRT for RTX takes the file.
        power_mode: Of the prediction.
        tensorrt: Version on the board.
        layers: Time by layer.
        layers_provenance: Of `layers`.
    """

    kind = "target"

    target: str = ""
    alias: str | None = None
    device: str = ""
    runtime: str = ""
    lint: list[dict[str, Any]] = Field(default_factory=list)
    engine: str | None = None
    engine_status: str | None = None
    build: Any = None
    runtime_options: dict[str, Any] = Field(default_factory=dict)
    dense_runtime_options: dict[str, Any] = Field(default_factory=dict)
    fp32_runtime_options: dict[str, Any] = Field(default_factory=dict)
    validity_gate: dict[str, Any] | None = None
    power_mode: str | None = None
    tensorrt: str | None = None
    layers: list[dict[str, Any]] = Field(default_factory=list)
    layers_provenance: str | None = None


class Engine(Frozen):
    """One engine that was built on a board.

    Attributes:
        path: Of its file, relative to the run's folder.
        latency_runs: Median of each process, in ms.
        stable: Whether the measurement was.
        spread: Of the samples.
        layers: What each convolution and matrix product became.
    """

    path: str
    latency_runs: list[Real] = Field(default_factory=list)
    stable: bool = True
    spread: float = 0.0
    layers: list[dict[str, Any]] = Field(default_factory=list)


class DeployDetails(MeasuredDetails):
    """Of a deployment to a board.

    Attributes:
        target: Its name.
        tensorrt: Version there.
        builder: What built and timed the engines: ``trtexec`` there, or ``trt_builder``, which travelled.
        model: What the board says it is.
        power_mode: Of it.
        clocks: Of it.
        precision: Of the fastest engine.
        stable: Whether the measurement was.
        spread: Of the samples.
        results: The metrics of every engine, by precision.
        engines: What else is known of every engine, by precision.
        engine: What is known of the engine.
        commands: That ran.
    """

    kind = "deploy"

    target: str = ""
    tensorrt: str | None = None
    builder: str | None = None
    model: str | None = None
    power_mode: str | None = None
    clocks: Any = None
    precision: Annotated[str | None, KEPT] = None
    stable: bool | None = None
    spread: float | None = None
    results: dict[str, Any] = Field(default_factory=dict)
    engines: dict[str, Engine] = Field(default_factory=dict)
    engine: dict[str, Any] = Field(default_factory=dict)
    commands: list[str] = Field(default_factory=list)


class TrialDetails(Details):
    """Of a network that a search found.

    Attributes:
        choices: Of the candidate.
        folder: Of its run.
        clear: Whether it is surely on the front.
    """

    kind = "trial"

    choices: dict[str, Any] = Field(default_factory=dict)
    folder: str = ""
    clear: bool | None = None


KINDS: dict[str, type[Details]] = {
    kind.kind: kind
    for kind in (
        DenseDetails,
        PruneDetails,
        FinetuneDetails,
        QuantizeDetails,
        ExportDetails,
        TargetDetails,
        DeployDetails,
        TrialDetails,
    )
}
"""The details of each kind of stage."""

D = TypeVar("D", bound=Details)
