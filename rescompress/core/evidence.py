"""Whether a manifest agrees with itself and the files beside it: what contradicts itself is not judged, shown or reused."""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

from pydantic import ValidationError

from rescompress.core.artifact import Artifact
from rescompress.core.details import MeasuredDetails, TargetDetails
from rescompress.core.errors import BadInput, EnvironmentFailed
from rescompress.core.manifest import TARGET_PREFIX, Manifest, StageResult, load_manifest
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

WHOLE = ("bytes", "macs", "params")
"""Units that are counted: nothing is a part of one."""
NEAR = 0.1
"""How far a latency may lie beyond the medians of its processes, as a share; it is the median of all their samples."""


def load_sound(path: Path) -> Manifest:
    """Return the manifest at `path`, a ``manifest.json``, the folder that holds one, or a baseline, if it is sound.

    Raises:
        BadInput: It is missing, damaged, of a layout that this version cannot read, holds a value that is impossible, or
            contradicts itself or the files beside it.
    """
    manifest = load_manifest(path)
    check(str(path), path if path.is_dir() else path.parent, manifest)
    return manifest


def contradiction(stages: Sequence[StageResult], folder: Path) -> str | None:
    """Return what is impossible in the outcomes of stages, or contradicts their own evidence; None if nothing is.

    Args:
        stages: The outcomes.
        folder: Where their files lie.
    """
    try:
        check("", folder, Manifest(stages=tuple(stages)))
    except BadInput as e:
        return e.what
    return None


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
        _status(stage, where)
        for key, metric in stage.metrics.items():
            _possible(key, metric, where)
        _size(stage, where)
        _told_twice(stage, where)
        _target(stage, where)
        _latencies(stage, where)
        if "top1" in stage.metrics:
            _accuracy(stage, folder, name)
        for key, metric in stage.metrics.items():
            if re.fullmatch(r"top\d+", key) and metric.n:
                _share(key, metric, metric.n, where)
    for key, ((value, one), (other, second)) in _differing(manifest.stages):
        of = next(s.of for s in manifest.stages if s.stage == one)
        _refuse(f"{key} is {other:.0f}, {one} has {value:.0f} of the same network ({of})", f"{name}: {second}")


def disagreeing(stages: Sequence[StageResult]) -> frozenset[str]:
    """Return the names of the stages that tell different counts of one network: at least one of them is wrong."""
    return frozenset(name for _, pair in _differing(stages) for _, name in pair)


def _differing(stages: Sequence[StageResult]) -> Iterator[tuple[str, tuple[tuple[float, str], tuple[float, str]]]]:
    """Yield what is counted of a network, and a value with its stage beside another one of a later stage."""
    first: dict[tuple[str, str], tuple[float, str]] = {}
    for stage, key in itertools.product(stages, ("macs", "params")):
        metric = stage.metrics.get(key)
        if metric is not None and stage.of:
            known = first.setdefault((stage.of, key), (metric.value, stage.stage))
            if known[0] != metric.value:
                yield key, (known, (metric.value, stage.stage))


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
    if metric.unit in WHOLE and metric.value != int(metric.value):
        _refuse(f"{key} is {metric.value:.16g} {metric.unit}, which is no whole number", where)
    for part, beyond in (("low", 1), ("high", -1)):
        end = getattr(metric, part)
        if end is not None and (end - metric.value) * beyond > NEAR * metric.value:
            _refuse(f"{key} is {metric.value:.4g} {metric.unit}, outside of its own interval, whose {part} is {end:.4g}", where)
    for part in ("n", "threads", "batch"):
        value = getattr(metric, part)
        if value is not None and value < 1:
            _refuse(f"{part} of {key} is {value}, which is impossible", where)


def _share(key: str, metric: Metric, n: int, where: str) -> None:
    """Make sure that a share of right answers is one of so many samples, and its standard error the binomial one of these.

    Samples that are copies of others make it no smaller, so it may be larger.
    """
    right = metric.value * n
    if abs(right - round(right)) > 1e-6 * n:
        _refuse(f"{key} is {100 * metric.value:.6g} %, which is no number of {n} samples", where)
    least = math.sqrt(metric.value * (1 - metric.value) / n)
    if metric.std_error is not None and metric.std_error < least * (1 - 1e-6):
        told = f"{key} is {100 * metric.value:.2f} ± {100 * metric.std_error:.4g} %"
        _refuse(f"{told}, but of {n} samples that is known to ± {100 * least:.4g} % at best", where)


def _status(stage: StageResult, where: str) -> None:
    """Make sure that a stage which did no work says why, and tells nothing of its work; and one that did, no such reason."""
    if stage.status == "done":
        if stage.reason:
            _refuse(f"is done, and tells why it is not: {stage.reason}", where)
        return
    if stage.reason is None:
        _refuse(f"is {stage.status}, and does not tell why", where)
    told = [*stage.metrics, *(a.path for a in stage.outputs)]
    if told:
        _refuse(f"is {stage.status}, and tells of work all the same: {', '.join(told[:3])}", where)


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


def _told_twice(stage: StageResult, where: str) -> None:
    """Make sure that files are as large as is told, and that what is right at first is right among five."""
    told, engines = stage.metrics.get("engine_bytes"), [a.size_bytes for a in stage.outputs if a.kind == "engine"]
    if told is not None and engines and told.value != sum(engines):
        _refuse(f"engine_bytes is {told.value:.0f}, its files have {sum(engines)} bytes", where)
    first, fifth = stage.metrics.get("top1"), stage.metrics.get("top5")
    if first is not None and fifth is not None and fifth.value < first.value:
        _refuse(f"top5 is {100 * fifth.value:.2f} %, less than top1 with {100 * first.value:.2f} %", where)


def _target(stage: StageResult, where: str) -> None:
    """Make sure that what a target's stage says of its target and its precision is said once."""
    details = stage.details_as(TargetDetails)
    if details is None:
        return
    for told in (details.target, stage.stage.removeprefix(TARGET_PREFIX)):
        if told and told != stage.target:
            _refuse(f"is about '{told}' and about '{stage.target}'", where)
    p50 = stage.metrics.get("p50_ms")
    if p50 is not None and p50.precision and details.precision and _base(p50.precision) != _base(details.precision):
        _refuse(f"p50_ms is of {p50.precision}, the file of {details.precision}", where)


def _base(precision: str) -> str:
    """Return what most layers compute in: ``int8`` of ``int8+fp16``."""
    return precision.partition("+")[0]


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
    there = False
    if artifact is not None:
        with contextlib.suppress(EnvironmentFailed):  # another user's
            there = artifact.intact(_inside(artifact, folder, name))
    if stage.details.outcomes is not None or there:
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
    whole = outcomes.n >= 1 and len(packed) == (outcomes.n + 7) // 8 and not packed[-1] & ((1 << (-outcomes.n % 8)) - 1)
    rising = all(a < b for a, b in itertools.pairwise((0, *outcomes.copies, outcomes.n)))  # the first sample copies none
    if not whole or not rising:
        raise BadInput("the outcomes are damaged", where=where, remedy="restore the file, or run the pipeline again")
    return outcomes
