"""The one list of columns: every table, page and file shows these; a new column is one entry in `COLUMNS`.

A column shows what stages record in `StageResult.metrics`, by its name there; ``rescompress compare RUN --json`` lists the
figures of a run, shown or not. One that no stage records yet is made where its like are: of a network (MACs, bytes) in
`rescompress.runs.stages.shared` and `rescompress.runs.stages.export`, of a timing here in `edge_targets.benchmark`, of one on
a board in `edge_targets.board_session`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rescompress.core.metric import Metric

Better = Literal["higher", "lower"]
Comparison = Literal["difference", "ratio", "none"]


QUALITY = ("top1", "infidelity")
"""How good a network is: where it scores classes its accuracy, else how far its outputs are from the dense network's."""


@dataclass(frozen=True)
class Column:
    """One figure of a row.

    Attributes:
        metric: Its name in `StageResult.metrics`, and in JSON and CSV.
        title: Its heading.
        better: Which way is better.
        text: The figure as people read it, unit included.
        against_dense: How it stands to the dense network: points of difference, a ratio, or not at all.
        per_target: Whether it belongs to a target: a run has one for each.
        brief: Whether it stands in a table by default; the rest needs ``-v``, CSV or JSON.
    """

    metric: str
    title: str
    better: Better
    text: Callable[[Metric], str]
    against_dense: Comparison = "ratio"
    per_target: bool = False
    brief: bool = True

    @property
    def is_cost(self) -> bool:
        """Whether it counts when rows are weighed against each other: what a table shows and less of is better."""
        return self.brief and self.better == "lower" and self.metric not in QUALITY


def percent(metric: Metric) -> str:
    """Return a fraction as ``89.09 ± 0.31 %``: the second number is the standard error."""
    if metric.std_error is None:
        return f"{100 * metric.value:.2f} %"
    return f"{100 * metric.value:.2f} ± {100 * metric.std_error:.2f} %"


def scaled(value: float) -> str:
    """Return a count with a decimal prefix and three digits: ``69.1 M``."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{_digits(value / limit)} {prefix}"
    return _digits(value) if value % 1 else f"{value:.0f}"


def plain_tick(value: float) -> str:
    """Return a number as it stands on an axis: no digit more than it needs."""
    return f"{value:.6g}"


def count_tick(value: float) -> str:
    """Return a count as it stands on an axis: ``2.5 M``, no digit more than it needs."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * (1 - 1e-9):
            return f"{value / limit:.6g} {prefix}"
    return f"{value:.6g}"


def size_tick(value: float) -> str:
    """Return a number of bytes as it stands on an axis: ``500 kB``."""
    text = count_tick(value)
    return f"{text}B" if " " in text else f"{text} B"


def _digits(value: float) -> str:
    """Return at least three significant digits, at most two of them after the point."""
    size = abs(value)
    return f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def count(metric: Metric) -> str:
    """Return a count: ``69.1 M``."""
    return scaled(metric.value)


def size(metric: Metric) -> str:
    """Return a number of bytes with a decimal prefix: ``1.86 MB``."""
    text = scaled(metric.value)
    return f"{text}B" if " " in text else f"{text} B"


def duration(value_ms: float) -> str:
    """Return milliseconds with about three digits: ``0.412 ms``."""
    return f"{value_ms:.3f} ms" if abs(value_ms) < 1 else f"{_digits(value_ms)} ms"


def latency(metric: Metric) -> str:
    """Return a latency that shows where it comes from: ``~`` and a band when predicted, a name when published."""
    text = duration(metric.value)
    if metric.provenance == "predicted":
        band = (
            ""
            if metric.low is None or metric.high is None
            else f", {duration(metric.low)[:-3]} to {duration(metric.high)[:-3]}"
        )
        return f"~{text} predicted{band}"
    if metric.provenance == "published":
        return f"{text} published"
    return text


def rate(metric: Metric) -> str:
    """Return a throughput: ``1.20 k/s``."""
    text = f"{scaled(metric.value)}/s".replace(" /s", "/s")
    return f"~{text} predicted" if metric.provenance == "predicted" else text


def ratio(metric: Metric) -> str:
    """Return a ratio: ``1.042``."""
    return f"{metric.value:.3f}"


def similarity(metric: Metric) -> str:
    """Return a cosine: ``0.9987``."""
    return f"{metric.value:.4f}"


def quality_of(metrics: Mapping[str, Metric]) -> str | None:
    """Return the name of the figure that says how good a network is, or None where it has none."""
    return next((name for name in QUALITY if name in metrics), None)


COLUMNS: tuple[Column, ...] = (
    Column("top1", "top-1", "higher", percent, "difference"),
    Column("top5", "top-5", "higher", percent, "difference", brief=False),
    Column("infidelity", "infidelity", "lower", percent, "none"),
    Column("cosine", "cosine", "higher", similarity, "none"),
    Column("agreement", "same class", "higher", percent, "none"),
    Column("macs", "MACs", "lower", count),
    Column("params", "parameters", "lower", count),
    Column("size_bytes", "ONNX size", "lower", size),
    Column("engine_bytes", "engine size", "lower", size, per_target=True, brief=False),
    Column("p50_ms", "latency p50", "lower", latency, per_target=True),
    Column("p90_ms", "p90", "lower", latency, per_target=True, brief=False),
    Column("p99_ms", "p99", "lower", latency, per_target=True, brief=False),
    Column("jitter_ms", "p99 - p50", "lower", latency, per_target=True, brief=False),
    Column("end_to_end_ms", "p50 with copies", "lower", latency, per_target=True, brief=False),
    Column("from_file_ms", "p50 from image file to classes", "lower", latency, per_target=True, brief=False),
    Column("contention_ms", "p50 beside other streams", "lower", latency, per_target=True, brief=False),
    Column("cold_start_ms", "cold start", "lower", latency, per_target=True, brief=False),
    Column("first_frame_ms", "first frame after idleness", "lower", latency, per_target=True, brief=False),
    Column("soak_ratio", "last / first minute of a soak", "lower", ratio, per_target=True, brief=False),
    Column("build_ratio", "slowest / fastest build", "lower", ratio, per_target=True, brief=False),
    Column("images_per_s", "images/s", "higher", rate, per_target=True, brief=False),
)
"""Every column, from left to right. What stands beside them (run, stage, where the latency comes from) is of the row."""


def columns_of(metrics: Collection[str]) -> list[Column]:
    """Return the columns that show these metrics, in order.

    Where a row is a whole run it has a latency per target, named ``p50_ms:cpu``: each gets a column of its own.
    """
    found = []
    for column in COLUMNS:
        if column.metric in metrics:
            found.append(column)
        for name in sorted(m for m in metrics if m.startswith(f"{column.metric}:")):
            found.append(replace(column, metric=name, title=f"{column.title} {name.partition(':')[2]}"))
    return found


def conditions(metric: Metric) -> tuple[object, ...]:
    """Return what must be equal for two values of one metric to be compared: circumstances, or the number of samples."""
    if metric.std_error is not None:
        return (metric.n,)
    if metric.unit not in ("ms", "images/s", "W"):
        return ("any",)
    return (metric.provenance, metric.device, metric.runtime, metric.threads, metric.batch, metric.power_mode)


def provenance(metric: Metric) -> str:
    """Return where a number comes from: ``measured on cpu: openvino int8, 2 threads, batch 1``."""
    facts = [" ".join(p for p in (metric.runtime, metric.precision) if p)]
    if metric.threads is not None:
        facts.append(f"{metric.threads} thread" + ("s" if metric.threads != 1 else ""))
    if metric.batch is not None:
        facts.append(f"batch {metric.batch}")
    facts += [f for f in (metric.power_mode, metric.model, metric.source) if f]
    where = {"measured": "on", "predicted": "for"}.get(metric.provenance, "of")
    start = f"{metric.provenance} {where} {metric.device}" if metric.device else metric.provenance
    told = ", ".join(f for f in facts if f)
    return f"{start}: {told}" if told else start
