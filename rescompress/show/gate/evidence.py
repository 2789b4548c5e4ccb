"""Whether a manifest agrees with itself and with the files beside it; a gate judges nothing that contradicts itself."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

from pydantic import ValidationError

from rescompress.core.artifact import Artifact
from rescompress.core.details import MeasuredDetails
from rescompress.core.errors import BadInput
from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.metric import Metric
from rescompress.core.outcomes import Outcomes

_KINDS: tuple[tuple[str, str, float, float], ...] = (
    # Name of the metric, its unit, and the least and the most that anything real has.
    (r"top\d+", "fraction", 0.0, 1.0),
    (r"macs", "macs", 1.0, 1e18),
    (r"params", "params", 1.0, 1e15),
    (r"size_bytes", "bytes", 1.0, 1e15),
    (r"(\w+_)?(p50|p90|p99|mean)_ms", "ms", 1e-6, 1e9),
    (r"(end_to_end|from_file|contention|cold_start|first_frame)_ms", "ms", 1e-6, 1e9),
    (r"jitter_ms", "ms", 0.0, 1e9),
    (r"(soak|build)_ratio", "ratio", 1e-6, 1e6),
    (r"(\w+_)?images_per_s", "images/s", 1e-9, 1e12),
)

NEAR = 0.1
"""How far a latency may lie beyond the medians of its processes, as a share; it is the median of all their samples."""


def check(name: str, folder: Path, manifest: Manifest) -> None:
    """Make sure that a manifest holds nothing impossible, and nothing that contradicts its own evidence.

    Args:
        name: Of the run, for messages.
        folder: Where its files lie.
        manifest: Its content.

    Raises:
        BadInput: It does; both values are named.
    """
    seen: set[str] = set()
    for stage in manifest.stages:
        where = f"{name}: {stage.stage}"
        if stage.stage in seen:
            _refuse("stands twice in the manifest", where)
        seen.add(stage.stage)
        for key, metric in stage.metrics.items():
            _possible(key, metric, where)
        _size(stage, where)
        _latencies(stage, where)
        if "top1" in stage.metrics:
            _accuracy(stage, folder, name)


def _refuse(problem: str, where: str) -> NoReturn:
    raise BadInput(problem, where=where, remedy="restore the manifest, or run the pipeline again")


def _possible(key: str, metric: Metric, where: str) -> None:
    _, unit, least, most = next((k for k in _KINDS if re.fullmatch(k[0], key)), ("", metric.unit, -math.inf, math.inf))
    if metric.unit != unit:
        _refuse(f"{key} is in {metric.unit or 'no unit'}, expected {unit}", where)
    if not (math.isfinite(metric.value) and least <= metric.value <= most):
        _refuse(f"{key} is {metric.value:g} {metric.unit}, which is impossible", where)
    for part in ("std_error", "low", "high"):
        value = getattr(metric, part)
        if value is not None and not (math.isfinite(value) and value >= 0):
            _refuse(f"{part} of {key} is {value:g} {metric.unit}, which is impossible", where)
    for part in ("n", "threads", "batch"):
        value = getattr(metric, part)
        if value is not None and value < 1:
            _refuse(f"{part} of {key} is {value}, which is impossible", where)


def _size(stage: StageResult, where: str) -> None:
    size = stage.metrics.get("size_bytes")
    if size is None or stage.output("onnx") is None:
        return
    sizes = [a.size_bytes for a in stage.outputs]
    kinds = {a.kind for a in stage.outputs}
    sums = [sum(a.size_bytes for a in stage.outputs if a.kind == kind) for kind in sorted(kinds)]
    if size.value not in (*sizes, *sums):
        onnx = stage.output("onnx")
        assert onnx is not None
        _refuse(f"size_bytes is {size.value:.0f}, the file {onnx.path} has {onnx.size_bytes} bytes", where)


def _latencies(stage: StageResult, where: str) -> None:
    for prefix in ("", "dense_", "fp32_"):
        p50 = stage.metrics.get(f"{prefix}p50_ms")
        medians = processes(stage, f"{prefix}latency")
        if p50 is None or p50.provenance != "measured" or not medians:
            continue
        if not min(medians) * (1 - NEAR) <= p50.value <= max(medians) * (1 + NEAR):
            told = f"{min(medians):.4g} to {max(medians):.4g} ms"
            _refuse(f"{prefix}p50_ms is {p50.value:.4g} ms, the processes it is from took {told}", where)


def processes(stage: StageResult, metric: str) -> list[float]:
    """Return the median latency of each process, in ms; nothing for a stage that measures none.

    Args:
        stage: The stage.
        metric: As for `MeasuredDetails.runs`.

    Raises:
        BadInput: They are no positive numbers.
    """
    details = stage.details_as(MeasuredDetails)
    runs = details.runs(metric) if details is not None else []
    if not all(0 < r < math.inf for r in runs):
        raise BadInput(f"{metric}_runs is no list of positive numbers", where=stage.stage, remedy="measure it again")
    return runs


def _accuracy(stage: StageResult, folder: Path, name: str) -> None:
    top1 = stage.metrics["top1"]
    for outcomes, where in _found(stage, folder, name):
        if top1.n is not None and top1.n != outcomes.n:
            _refuse(f"top1 is of {top1.n} samples, the outcomes are of {outcomes.n}", where)
        if abs(top1.value * outcomes.n - outcomes.correct) >= 0.5:
            _refuse(f"top1 is {100 * top1.value:.2f} %, the outcomes say {100 * outcomes.correct / outcomes.n:.2f} %", where)


def _found(stage: StageResult, folder: Path, name: str) -> Iterator[tuple[Outcomes, str]]:
    """Yield the outcomes of a stage, if they are whole, and where they are from; what is judged by others is read again."""
    artifact = stage.output("outcomes")
    if stage.details.outcomes is not None or (artifact is not None and artifact.intact(_inside(artifact, folder, name))):
        yield outcomes_of(stage, folder, name), f"{name}: {stage.stage}"


def outcomes_of(stage: StageResult, folder: Path, name: str) -> Outcomes:
    """Return the per-sample outcomes of a stage.

    Args:
        stage: The stage.
        folder: Where the files of its run lie.
        name: Of the run, for messages.

    Raises:
        BadInput: There are none, they are damaged, or those in the manifest are not those in the file.
    """
    inline = stage.details.outcomes
    artifact = stage.output("outcomes")
    where = f"{name}: {stage.stage}"
    if inline is None and artifact is None:
        raise BadInput(
            "holds no per-sample outcomes, so accuracies cannot be paired", where=where, remedy="run the pipeline again"
        )
    found = []
    if inline is not None:
        found.append(_read(inline, where))
    if artifact is not None:
        path = _inside(artifact, folder, name) / artifact.path
        if not artifact.intact(folder):
            problem = "was changed since the run" if path.is_file() else "is missing"
            raise BadInput(f"the stage's outcomes: {problem}", where=str(path), remedy="restore the file, or run it again")
        found.append(_read(path, str(path)))
    if found[0] != found[-1]:
        right = [f"{o.correct} of {o.n}" for o in found]
        _refuse(f"the outcomes in the manifest ({right[0]} right) are not those in the file ({right[1]} right)", where)
    return found[0]


def _inside(artifact: Artifact, folder: Path, name: str) -> Path:
    """Return the folder of a run, in which the artifact lies.

    Raises:
        BadInput: It names a file elsewhere, which is no evidence of this run.
    """
    path = PurePosixPath(artifact.path)
    if path.is_absolute() or PureWindowsPath(artifact.path).drive or ".." in path.parts:
        _refuse(f"names a file outside of the run: {artifact.path}", name)
    return folder


def _read(source: object, where: str) -> Outcomes:
    """Return outcomes from a file or from plain values.

    Raises:
        BadInput: They are damaged.
    """
    try:
        if isinstance(source, Path):
            outcomes = Outcomes.model_validate_json(source.read_text(encoding="utf-8"))
        else:
            outcomes = Outcomes.model_validate(source)
        packed = base64.b64decode(outcomes.bits, validate=True)
    except (ValidationError, UnicodeDecodeError, binascii.Error, ValueError, OSError) as e:
        raise BadInput("the outcomes are damaged", where=where, remedy="restore the file, or run the pipeline again") from e
    if outcomes.n < 1 or len(packed) != (outcomes.n + 7) // 8 or packed[-1] & ((1 << (-outcomes.n % 8)) - 1):
        raise BadInput("the outcomes are damaged", where=where, remedy="restore the file, or run the pipeline again")
    return outcomes
