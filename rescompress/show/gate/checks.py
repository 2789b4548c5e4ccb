"""The checks of a gate: accuracy on paired samples, latency over processes, size and counts exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, Literal

from rescompress.core.details import MeasuredDetails
from rescompress.core.errors import BadInput, nearest
from rescompress.core.evidence import load_sound, outcomes_of, processes
from rescompress.core.manifest import Manifest, StageResult
from rescompress.core.metric import Metric
from rescompress.core.outcomes import Outcomes
from rescompress.show.figures.columns import count, duration, percent, provenance, quality_of, size
from rescompress.show.figures.tables import DENSE, figure, mixed, precision_of
from rescompress.show.gate import ratios, tango
from rescompress.show.gate.limits import Limits
from rescompress.show.gate.pairing import pair

Verdict = Literal["pass", "fail", "inconclusive"]

CONFIDENCE = 0.95
"""One-sided for verdicts, two-sided for the interval that is shown."""

EXACT = {"size": "size_bytes", "macs": "macs", "params": "params"}
"""Metric by the name of its check, whose limit is ``max_<name>``: figures without noise, of the stage that counts."""

PER_PROCESS = {
    "p99": "p99_ms",
    "jitter": "jitter_ms",
    "cold_start": "cold_start_ms",
    "first_frame": "first_frame_ms",
    "contention": "contention_ms",
    "end_to_end": "end_to_end_ms",
    "from_file": "from_file_ms",
}
"""As `EXACT`, for figures of a target that are compared by processes as latencies are: ``<metric>_runs`` in the details."""

OF_ITSELF = {"soak": "soak_ratio", "build_spread": "build_ratio"}
"""As `EXACT`, for ratios within the candidate, which need no baseline."""


@dataclass(frozen=True)
class Run:
    """A manifest and where it came from.

    Attributes:
        name: For messages: the path as the user gave it.
        folder: Where its files lie.
        manifest: Its content.
    """

    name: str
    folder: Path
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question and its answer.

    Attributes:
        name: ``accuracy``, ``accuracy:<target>``, ``infidelity``, ``latency:<target>`` (as ``p99:<target>`` and so on),
            ``size``, ``macs``, ``params``, ``target:<target>``, ``stage:<stage>``.
        verdict: The answer.
        value: The drop in points, the ratio candidate / baseline, or a relative error; None when it could not be computed.
        limit: What it may be at most.
        unit: ``points`` or ``ratio``.
        interval: Two-sided 95 % interval of `value`; None for exact and predicted figures.
        bounds: One-sided 95 % bounds, lower and upper, which decide.
        baseline: The figure of the baseline, as text.
        candidate: The figure of the candidate, as text.
        stale: The candidate is better than the baseline by more than the limit: the baseline should be renewed.
        samples_needed: Of an inconclusive accuracy check: how many samples would do, with a power of 80 %.
        message: One sentence for people.
    """

    name: str
    verdict: Verdict
    value: float | None
    limit: float
    unit: Literal["points", "ratio", "fraction"] = "ratio"
    interval: tuple[float, float] | None = None
    bounds: tuple[float, float] | None = None
    baseline: str = ""
    candidate: str
    stale: bool = False
    samples_needed: int | None = None
    message: str


@dataclass(frozen=True)
class GateReport:
    """The answers of a gate.

    Attributes:
        verdict: ``fail`` if any check fails, else ``inconclusive`` if any is, else ``pass``.
        checks: In order.
        stale_baseline: Names of the checks in which the candidate is far better than the baseline.
        notes: What was not compared, and why.
        baseline: Name of the baseline run.
        candidate: Name of the candidate run.
    """

    verdict: Verdict
    checks: tuple[Check, ...]
    stale_baseline: tuple[str, ...]
    notes: tuple[str, ...]
    baseline: str
    candidate: str

    def document(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def load_run(path: Path) -> Run:
    """Return the run at `path`: its folder, its ``manifest.json``, or a baseline file.

    Raises:
        BadInput: It is missing, damaged, of a layout that this version cannot read, holds a value that is impossible, or
            contradicts itself or the files beside it.
    """
    manifest = load_sound(path)
    if not any(s.status == "done" for s in manifest.stages):
        raise BadInput("the run holds no finished stage", where=str(path), remedy="run the pipeline first")
    return Run(str(path), path if path.is_dir() else path.parent, manifest)


def judge(candidate: Run, baseline: Run, limits: Limits) -> GateReport:
    """Return whether `candidate` may take the place of `baseline`.

    Raises:
        BadInput: The runs cannot be compared: another data set, other classes, another order of the samples, no accuracy,
            an unknown stage or target, damaged outcomes; a run that is not finished, unless a stage is named.
    """
    for run in (candidate, baseline):
        if limits.stage is None and run.manifest.unfinished and all(s.status != "failed" for s in run.manifest.stages):
            raise BadInput(
                f"the run is not finished: {', '.join(run.manifest.unfinished)} not reached",
                where=run.name,
                remedy="run it again to go on, or judge a finished stage with --stage",
            )
    checks: list[Check] = []
    notes: list[str] = []
    stages = _stage_of(candidate, limits.stage), _stage_of(baseline, limits.stage)
    labelled = ["top1" in stage.metrics for stage in stages]
    if limits.max_drop is not None and labelled[0] != labelled[1]:
        raise BadInput(
            "one run has an accuracy, the other the fidelity of a network without class scores",
            where=candidate.name,
            remedy="compare runs of one network",
        )
    if limits.max_infidelity is not None:
        checks.append(_infidelity(stages[0], limits.max_infidelity, candidate.name, stages[1]))
    elif not labelled[0]:
        notes.append("fidelity is not judged: --max-infidelity sets a limit")
    if limits.max_drop is not None and labelled[0]:
        checks.append(_told_precision(_accuracy(candidate, baseline, stages, limits.max_drop), *stages, notes))
        if limits.stage is None:
            checks += _other_accuracies(candidate, baseline, stages, limits.max_drop, notes)
    for name, metric in EXACT.items():
        limit = getattr(limits, f"max_{name}")
        if limit is not None:
            pair = figure(candidate.manifest, stages[0], metric), figure(baseline.manifest, stages[1], metric)
            if pair[0] is not None and pair[1] is not None:
                checks.append(_exact(name, pair[0], pair[1], limit))
            elif pair[0] is None and pair[1] is None:
                notes.append(f"{name} is not compared: {candidate.name} and {baseline.name} have no {metric}")
            else:
                checks.append(_lacking(name, pair, stages, candidate, baseline, limit))
    checks += _latencies(candidate, baseline, limits, stages[0], notes)
    checks += _figures_of_targets(candidate, baseline, limits, notes)
    checks += _missing(candidate, baseline, limits, notes)
    for result in candidate.manifest.stages:
        if result.status == "failed":
            checks.append(_stage_failed(result))
    if not checks:
        raise BadInput(
            "nothing was compared: " + ("; ".join(notes) or "every check is switched off"),
            where=candidate.name,
            remedy="set a limit, or name runs that hold the same figures",
        )
    verdicts = {c.verdict for c in checks}
    verdict: Verdict = "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"
    stale = tuple(c.name for c in checks if c.stale)
    return GateReport(verdict, tuple(checks), stale, tuple(notes), baseline.name, candidate.name)


def _stage_of(run: Run, name: str | None) -> StageResult:
    """Return the stage whose figures count: the named one, or the last with accuracy, in networks without labels fidelity."""
    judged = [s for s in run.manifest.stages if s.status == "done" and quality_of(s.metrics)]
    with_accuracy = [s for s in judged if "top1" in s.metrics] or judged
    if name is None:
        if not with_accuracy:
            raise BadInput("no stage of the run has an accuracy", where=run.name, remedy="run it with --data")
        return with_accuracy[-1]
    result = next((s for s in with_accuracy if s.stage == name), None)
    if result is None:
        known = [s.stage for s in with_accuracy]
        raise BadInput(f"has no stage '{name}' with an accuracy", where=run.name, remedy=nearest(name, known))
    return result


def _lacking(
    name: str,
    pair: tuple[Metric | None, Metric | None],
    stages: tuple[StageResult, StageResult],
    candidate: Run,
    baseline: Run,
    limit: float,
) -> Check:
    """Return the check of a figure that one of the runs has no more, or not yet, which is no reason to pass."""
    run, stage = (candidate, stages[0]) if pair[0] is None else (baseline, stages[1])
    precision = precision_of(stage)
    of = f"{stage.stage} ({precision})" if precision else stage.stage
    why = f"{run.name} has no {name} of {of}"
    new, old = ("" if m is None else _text_of(name)(m) for m in pair)
    return _inconclusive(name, limit, why, old, new)


def _told_precision(check: Check, candidate: StageResult, baseline: StageResult, notes: list[str]) -> Check:
    """Return the check, which says so where the two networks compute in different precisions; that goes to `notes`, too."""
    new, old = precision_of(candidate), precision_of(baseline)
    if new is None or old is None or new == old:
        return check
    told = f"the candidate's {candidate.stage} computes in {new}, the baseline's {baseline.stage} in {old}"
    notes.append(f"{check.name}: {told}")
    return replace(check, message=f"{check.message}; {told}")


def _other_accuracies(
    candidate: Run, baseline: Run, judged: tuple[StageResult, StageResult], max_drop: float, notes: list[str]
) -> list[Check]:
    """Return one check per target whose accuracy both runs have, beside that of the stages that are judged anyway."""
    checks = []
    for new in candidate.manifest.stages:
        old = baseline.manifest.stage(new.stage)
        if new.target is None or old is None or (new, old) == judged:
            continue
        if all(s.status == "done" and "top1" in s.metrics for s in (new, old)):
            check = _accuracy(candidate, baseline, (new, old), max_drop)
            name = f"accuracy:{new.stage if new.is_deployment else new.target}"
            checks.append(_told_precision(replace(check, name=name), new, old, notes))
    return checks


def _missing(candidate: Run, baseline: Run, limits: Limits, notes: list[str]) -> list[Check]:
    """Return one check per target of the baseline that the candidate has no figure of any more.

    Nothing of a target that is left out can be judged, which is no reason to pass (`Limits.on_missing`).
    """
    checks = []
    for old in baseline.manifest.stages:
        target = old.target
        if target is None or old.status != "done" or target in candidate.manifest.unfinished_targets:
            continue
        wanted = [m for m, limit in (("top1", limits.max_drop), ("p50_ms", limits.latency_limit(target))) if limit is not None]
        figures = [m for m in wanted if m in old.metrics and not (m == "top1" and limits.stage is not None)]
        same = [s for s in candidate.manifest.stages if s.target == target]
        lost = [m for m in figures if not any(s.status == "done" and m in s.metrics for s in same)]
        if not lost or any(s.status == "failed" for s in same):  # what failed has a check of its own
            continue
        skipped = next((s for s in same if s.status == "skipped"), None)
        what = " and ".join({"top1": "accuracy", "p50_ms": "latency"}[m] for m in lost)
        why = f"the baseline has the {what} of {old.stage}, the candidate has not"
        if skipped is not None:
            why += f" (skipped: {skipped.reason or 'no reason given'})"
        if limits.on_missing == "pass":
            notes.append(f"{old.stage} is not judged: {why}")
            continue
        checks.append(
            Check(
                name=f"target:{old.stage if old.is_deployment else target}",
                verdict=limits.on_missing,
                value=None,
                limit=0.0,
                candidate="skipped" if skipped is not None else "missing",
                message=f"{why}; --on-missing pass leaves it out on purpose",
            )
        )
    return checks


def _accuracy(candidate: Run, baseline: Run, stages: tuple[StageResult, StageResult], max_drop: float) -> Check:
    outcomes = _outcomes(candidate, stages[0]), _outcomes(baseline, stages[1])
    paired = pair(*outcomes, (candidate.name, baseline.name))
    margin = max_drop / 100
    lower, upper = tango.lower_bound(paired, CONFIDENCE), tango.upper_bound(paired, CONFIDENCE)
    verdict: Verdict = "pass" if upper < margin else "fail" if lower > margin else "inconclusive"
    needed = tango.samples_needed(paired, margin, confidence=CONFIDENCE) if verdict == "inconclusive" else None
    low, high = tango.interval(paired, CONFIDENCE)
    names = [s.stage for s in stages]
    of = f"of {names[0]}" if names[0] == names[1] else f"of {names[0]} against {names[1]}"
    changed = "drops by" if paired.drop >= 0 else "rises by"
    message = (
        f"top-1 {of} {changed} {abs(100 * paired.drop):.2f} points on {paired.n} samples "
        f"({paired.lost} lost, {paired.won} won; 95 % interval of the drop {100 * low:+.2f} to {100 * high:+.2f}); "
        f"the limit is {points(max_drop)}"
    )
    if (copies := outcomes[0].n - paired.n) > 0:
        message += f" ({copies} copies of samples are left out)"
    if verdict == "pass":
        message += f", and a drop of {100 * upper:.2f} or more is ruled out (one-sided 95 %)"
    elif verdict == "fail":
        message += f", and a drop of {100 * lower:.2f} or less is ruled out (one-sided 95 %)"
    elif needed is None:
        message += "; the drop is too near it for any practical number of samples to decide"
    else:
        message += f"; about {needed} samples would decide (power 80 %)"
    return Check(
        name="accuracy",
        verdict=verdict,
        value=100 * paired.drop,
        limit=max_drop,
        unit="points",
        interval=(100 * low, 100 * high),
        bounds=(100 * lower, 100 * upper),
        baseline=_share(stages[1]),
        candidate=_share(stages[0]),
        stale=upper < -margin,
        samples_needed=needed,
        message=message,
    )


def points(value: float) -> str:
    """Return a number of points of accuracy: ``1 point``, ``0.5 points``."""
    return f"{value:g} point" if value == 1 else f"{value:g} points"


def _infidelity(stage: StageResult, limit: float, name: str, baseline: StageResult) -> Check:
    """Return the check of a relative error; its one-sided bounds decide."""
    metric = stage.metrics.get("infidelity")
    if metric is None:
        return _inconclusive(
            "infidelity", limit, f"{name} has no infidelity of {stage.stage}: its network scores classes", "", ""
        )
    if not (0 <= metric.value < math.inf and 0 <= (metric.std_error or 0.0) < math.inf):
        raise BadInput(f"the candidate's infidelity is {metric.value:g}", where=name, remedy="run the pipeline again")
    error = metric.std_error or 0.0
    lower, upper = (metric.value + sign * NormalDist().inv_cdf(CONFIDENCE) * error for sign in (-1, 1))
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    verdict: Verdict = "pass" if upper <= limit else "fail" if lower > limit else "inconclusive"
    before = baseline.metrics.get("infidelity")
    return Check(
        name="infidelity",
        verdict=verdict,
        value=metric.value,
        limit=limit,
        unit="fraction",
        interval=(max(0.0, metric.value - half), metric.value + half),
        bounds=(lower, upper),
        baseline=percent(before) if before is not None else "",
        candidate=percent(metric),
        message=(
            f"the outputs of {stage.stage} are off by {percent(metric)} of the dense network's on {metric.n} images; "
            f"the limit is {100 * limit:g} %" + ("" if verdict != "inconclusive" else "; more images would decide")
        ),
    )


def _share(stage: StageResult) -> str:
    return f"{100 * stage.metrics['top1'].value:.2f} %"


def _outcomes(run: Run, stage: StageResult) -> Outcomes:
    """Return the per-sample outcomes of a stage."""
    return outcomes_of(stage, run.folder, run.name)


def _exact(name: str, candidate: Metric, baseline: Metric, limit: float) -> Check:
    words = "times as large, as ONNX files" if name == "size" else "times as much"
    return _without_noise(name, candidate, baseline, limit, _text_of(name), words)


def _text_of(name: str) -> Callable[[Metric], str]:
    return size if name == "size" else count


def _predicted(target: str, candidate: Metric, baseline: Metric, limit: float) -> Check:
    def text(metric: Metric) -> str:
        return f"~{duration(metric.value)} predicted"

    return _without_noise(f"latency:{target}", candidate, baseline, limit, text, "times as long by the same model")


def _without_noise(
    name: str, candidate: Metric, baseline: Metric, limit: float, text: Callable[[Metric], str], words: str
) -> Check:
    """Return the check of a figure that is the same however often it is taken: there is no interval.

    Args:
        name: Of the check.
        candidate: The figure.
        baseline: What it is compared with.
        limit: The ratio that is still good.
        text: Writes a figure.
        words: What a ratio means.

    Raises:
        BadInput: A figure is no positive number.
    """
    _check_positive(name, candidate, baseline)
    ratio = candidate.value / baseline.value
    texts = [text(m) for m in (baseline, candidate)]
    return Check(
        name=name,
        verdict="fail" if ratio > limit else "pass",
        value=ratio,
        limit=limit,
        baseline=texts[0],
        candidate=texts[1],
        stale=ratio * limit < 1,
        message=f"{texts[1]} against {texts[0]}, {ratio:.3f} {words}; the limit is {limit:g}",
    )


def _check_positive(name: str, candidate: Metric, baseline: Metric) -> None:
    """Refuse figures that nothing real has; a ratio of theirs would pass any limit.

    Raises:
        BadInput: One is not above zero, or not finite.
    """
    for whose, metric, remedy in (
        ("candidate", candidate, "run the pipeline again, or restore the manifest"),
        ("baseline", baseline, "renew the baseline"),
    ):
        if not 0 < metric.value < math.inf:
            raise BadInput(f"the {whose}'s {name} is {metric.value:g} {metric.unit}", remedy=remedy)


def _stage_failed(result: StageResult) -> Check:
    return Check(
        name=f"stage:{result.stage}",
        verdict="fail",
        value=None,
        limit=0.0,
        candidate="failed",
        message=f"the candidate failed here: {result.reason or 'no reason given'}",
    )


def _latencies(candidate: Run, baseline: Run, limits: Limits, judged: StageResult, notes: list[str]) -> list[Check]:
    """Return one check per target that both runs have a latency for; what is left out goes to `notes`.

    Args:
        candidate: The run.
        baseline: What it is compared with.
        limits: What is allowed.
        judged: The candidate's stage whose accuracy and size are judged.
        notes: What was not compared, or is not of one network.
    """
    found = _targets(candidate.manifest), _targets(baseline.manifest)
    named = limits.max_latency if isinstance(limits.max_latency, dict) else {}
    for target in named:
        if target not in found[0] and target not in found[1]:
            known = [*found[0], *found[1]]
            raise BadInput(
                f"a limit is set for target '{target}', which neither run has",
                where=candidate.name,
                remedy=nearest(target, known),
            )
    checks = []
    for target in dict.fromkeys([*found[1], *found[0]]):
        limit = limits.latency_limit(target)
        if limit is None:
            continue
        new, old = _of_one_kind(found[0].get(target, ()), found[1].get(target, ()))
        if new is not None and old is not None:
            same = _beside(candidate.manifest, new) == _beside(baseline.manifest, old) is not None
            checks.append(_told_precision(_latency(target, new, old, limit, drift_is_known=same), new, old, notes))
            notes += mixed(judged, [new])
            continue
        lacking = candidate if new is None else baseline
        why = f"{lacking.name} has no latency on {target}"
        if target in named:
            checks.append(_undecided(target, limit, why, old, new))
        else:
            notes.append(f"latency on {target} is not compared: {why}")
    return checks


def _figures_of_targets(candidate: Run, baseline: Run, limits: Limits, notes: list[str]) -> list[Check]:
    """Return the checks of what is told of a target beside its latency; a limit without a figure is inconclusive."""
    checks = []
    for name, metric in PER_PROCESS.items():
        limit = getattr(limits, f"max_{name}")
        if limit is None:
            continue
        found = _targets(candidate.manifest, metric), _targets(baseline.manifest, metric)
        if not any(found):
            checks.append(_inconclusive(name, limit, f"neither run has {metric}", "", ""))
        for target in dict.fromkeys([*found[1], *found[0]]):
            new, old = _of_one_kind(found[0].get(target, ()), found[1].get(target, ()))
            if new is not None and old is not None:
                checks.append(
                    _told_precision(_latency(target, new, old, limit, drift_is_known=False, name=name), new, old, notes)
                )
            else:
                lacking = candidate if new is None else baseline
                checks.append(_undecided(target, limit, f"{lacking.name} has no {metric} on {target}", old, new, name))
    for name, metric in OF_ITSELF.items():
        limit = getattr(limits, f"max_{name}")
        if limit is None:
            continue
        here = _targets(candidate.manifest, metric)
        if not here:
            checks.append(_inconclusive(name, limit, f"{candidate.name} has no {metric}", "", ""))
        for target, stages in here.items():
            before = _targets(baseline.manifest, metric).get(target, ())
            checks.append(_of_itself(f"{name}:{target}", stages[0].metrics[metric], [s.metrics[metric] for s in before], limit))
    return checks


def _of_itself(name: str, metric: Metric, before: Sequence[Metric], limit: float) -> Check:
    """Return the check of a ratio within one run; its band decides where it has one."""
    if not 0 < metric.value < math.inf:
        raise BadInput(f"the candidate's {name} is {metric.value:g}", remedy="deploy it again")
    low, high = (metric.value if end is None else end for end in (metric.low, metric.high))
    verdict: Verdict = "pass" if high <= limit else "fail" if low > limit else "inconclusive"
    band = "" if metric.low is None or metric.high is None else f" ({low:.3f} to {high:.3f})"
    return Check(
        name=name,
        verdict=verdict,
        value=metric.value,
        limit=limit,
        interval=None if not band else (low, high),
        baseline=f"{before[0].value:.3f}" if before else "",
        candidate=f"{metric.value:.3f}",
        message=f"{metric.value:.3f}{band} within the candidate itself; the limit is {limit:g}",
    )


def _targets(manifest: Manifest, metric: str = "p50_ms") -> dict[str, list[StageResult]]:
    """Return the stages with a latency, or another figure, by target; what was measured on a board stands first."""
    found: dict[str, list[StageResult]] = {}
    for stage in sorted(manifest.stages, key=lambda s: not s.is_deployment):
        if stage.target is not None and metric in stage.metrics:
            found.setdefault(stage.target, []).append(stage)
    return found


def _of_one_kind(
    candidate: Sequence[StageResult], baseline: Sequence[StageResult]
) -> tuple[StageResult | None, StageResult | None]:
    """Return a stage of each: of one kind (deployed, or built or predicted in the run) where both have one."""
    alike = next(((a, b) for a in candidate for b in baseline if a.is_deployment == b.is_deployment), None)
    return alike or (next(iter(candidate), None), next(iter(baseline), None))


def _beside(manifest: Manifest, stage: StageResult) -> tuple[str, object] | None:
    """Return the identity of the dense network that was measured in turns with a target's, and the runtime's version."""
    dense = manifest.stage(DENSE)
    onnx = dense.output("onnx") if dense is not None else None
    packages = manifest.environment.get("packages")
    usual = packages.get(stage.metrics["p50_ms"].runtime) if isinstance(packages, dict) else None
    measured = stage.details_as(MeasuredDetails)
    version = (measured.runtime_version if measured is not None else None) or usual
    if onnx is None or version is None or len(processes(stage, "dense_latency")) != len(processes(stage, "latency")):
        return None
    return onnx.sha256, version


def _latency(
    target: str,
    candidate: StageResult,
    baseline: StageResult,
    limit: float,
    *,
    drift_is_known: bool,
    name: str = "latency",
) -> Check:
    metric = PER_PROCESS.get(name, "p50_ms")
    own = "latency" if name == "latency" else metric
    new, old = candidate.metrics[metric], baseline.metrics[metric]
    _check_positive(f"{name}:{target}", new, old)

    def undecided(why: str) -> Check:
        return _undecided(target, limit, why, baseline, candidate, name)

    for fact in ("provenance", "device", "runtime", "threads", "batch", "power_mode"):
        a, b = getattr(new, fact), getattr(old, fact)
        if a != b:
            return undecided(f"the candidate's {fact.replace('_', ' ')} is {a}, the baseline's {b}")
    told = [_condition(stage, metric) for stage in (candidate, baseline)]
    if told[0] != told[1]:
        return undecided(f"the candidate's is the {told[0]}; the baseline's the {told[1]}")
    if new.provenance == "predicted":
        if new.model != old.model:
            return undecided(f"the candidate was predicted by {new.model}, the baseline by {old.model}")
        return _predicted(target, new, old, limit)
    if new.provenance != "measured":
        return undecided(f"{new.provenance} figures are not compared")
    runs = processes(candidate, own), processes(baseline, own)
    short = min(len(r) for r in runs)
    if short < ratios.LEAST_PROCESSES:
        return undecided(f"{short} processes were measured, {ratios.LEAST_PROCESSES} are needed")
    beside = (processes(candidate, "dense_latency"), processes(baseline, "dense_latency")) if drift_is_known else None
    return _measured(target, runs[0], runs[1], beside, limit, name)


def _condition(stage: StageResult, metric: str) -> str | None:
    """Return how a figure of a stage came about, where that is told."""
    details = stage.details_as(MeasuredDetails)
    return details.conditions.get(metric) if details is not None else None


def _measured(
    target: str,
    candidate: Sequence[float],
    baseline: Sequence[float],
    beside: tuple[Sequence[float], Sequence[float]] | None,
    limit: float,
    name: str = "latency",
) -> Check:
    """Return the check of two lists of process medians.

    A machine is not equally fast today and yesterday, which no number of processes on one day shows. Where the same dense
    network was measured in turns with both (`beside`), each process counts in multiples of the dense one of its turn.
    """
    new, old = list(candidate), list(baseline)
    if beside is not None:
        new = [own / dense for own, dense in zip(candidate, beside[0], strict=True)]
        old = [own / dense for own, dense in zip(baseline, beside[1], strict=True)]
    value = ratios.ratio(old, new)
    lower = ratios.lower_bound(old, new, CONFIDENCE)
    upper = ratios.upper_bound(old, new, CONFIDENCE)
    low, high = ratios.interval(old, new, CONFIDENCE)
    same = list(candidate) == list(baseline)
    if same:  # one measurement, not two that chance made alike
        lower = upper = low = high = value = 1.0
    verdict: Verdict = "pass" if upper <= limit else "fail" if lower > limit else "inconclusive"
    texts = [f"{duration(median(r))} over {len(r)} processes" for r in (baseline, candidate)]
    how = "times as long"
    if beside is not None:
        drift = median(beside[0]) / median(beside[1])
        how = (
            f"times as long in multiples of the dense network measured in turns with each ({drift:.3f} times its earlier self)"
        )
    message = (
        f"{texts[1]} against {texts[0]}, {value:.3f} {how} (95 % interval {low:.3f} to {high:.3f}); the limit is {limit:g}"
    )
    if same:
        message = f"{texts[1]}: the very same measurement; the limit is {limit:g}"
    if verdict == "inconclusive":
        message += "; more processes or a quieter machine would decide"
    return Check(
        name=f"{name}:{target}",
        verdict=verdict,
        value=value,
        limit=limit,
        interval=(low, high),
        bounds=(lower, upper),
        baseline=texts[0],
        candidate=texts[1],
        stale=upper * limit < 1,
        message=message,
    )


def _undecided(
    target: str,
    limit: float,
    why: str,
    baseline: StageResult | None,
    candidate: StageResult | None,
    name: str = "latency",
) -> Check:
    def text(stage: StageResult | None) -> str:
        metric = None if stage is None else stage.metrics.get(PER_PROCESS.get(name, "p50_ms"))
        return "" if metric is None else f"{duration(metric.value)}, {provenance(metric)}"

    return _inconclusive(f"{name}:{target}", limit, why, text(baseline), text(candidate))


def _inconclusive(name: str, limit: float, why: str, baseline: str, candidate: str) -> Check:
    return Check(
        name=name,
        verdict="inconclusive",
        value=None,
        limit=limit,
        baseline=baseline,
        candidate=candidate,
        message=f"cannot be compared: {why}",
    )


def baseline_of(run: Run) -> Manifest:
    """Return the run as a baseline that needs no other file: outcomes inside, no details but processes, precision; no paths."""
    stages = []
    for result in run.manifest.stages:
        paired = result.output("outcomes") is not None or result.details.outcomes is not None
        details = result.details.for_baseline(_outcomes(run, result).model_dump() if paired else None)
        # The dense file itself is not kept, its hash is: it says whether latencies were measured beside the same network.
        kept = tuple(a for a in result.outputs if a.kind == "onnx" and result.stage == DENSE)
        stages.append(result.model_copy(update={"outputs": kept, "details": details, "environment": {}}))
    config = {k: Path(v).name if isinstance(v, str) and Path(v).is_absolute() else v for k, v in run.manifest.config.items()}
    return run.manifest.model_copy(update={"stages": tuple(stages), "config": config, "config_file": ""})
