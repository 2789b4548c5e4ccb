"""Reads what trtexec prints and writes: its text logs of TensorRT 7 to 11 and its JSON files.

Formats, from logs and from ``samples/common/sampleReporting.cpp`` on the release branches of github.com/NVIDIA/TensorRT:

* 7.x prints a section per quantity (``GPU Compute``, then ``min: 9.0 ms`` ... ``percentile: 9.8 ms at 99%``);
* 8.0 and later print one line per quantity (``GPU Compute Time: min = 0.5 ms, max = ..., percentile(99%) = ...``), 8.5 and
  later with three percentiles;
* the last ``&&&& PASSED`` or ``&&&& FAILED`` line decides; without one trtexec died;
* verbose logs explain each quantity in words: numbers are matched, not names.

A model's latency is ``GPU Compute Time``; ``Latency`` also counts copies. ``--exportTimes`` is the primary source: one record
per run, warm-up removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edge_targets.engine_proof import BuiltLayer, built_layers
from edge_targets.tensorrt_versions import Version, parse_version
from rescompress.core.errors import ModelFileError

Status = Literal["passed", "failed", "incomplete"]


@dataclass(frozen=True)
class Statistics:
    """One line of the performance summary, in ms.

    Attributes:
        minimum: Shortest.
        maximum: Longest.
        mean: Average.
        median: Half of the runs were shorter.
        percentiles: By percentage, such as 99.0.
    """

    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    median: float | None = None
    percentiles: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerTime:
    """One row of the layer profile.

    Attributes:
        name: Of the kernel; fused nodes are joined by ``+``.
        average_ms: Per run.
        percent: Of the whole.
    """

    name: str
    average_ms: float
    percent: float


@dataclass(frozen=True)
class TrtexecLog:
    """What a log says.

    Attributes:
        status: ``passed``, ``failed``, or ``incomplete`` where trtexec died or the text is an excerpt.
        tool: ``trtexec``, or ``trt_builder`` (`edge_targets.trt_builder`) where that spoke in its place.
        version: Major and minor of TensorRT, where the log names it.
        command: The command line it echoes.
        throughput_qps: Queries per second (not images).
        gpu_compute: The latency of the model.
        latency: With copies.
        enqueue: Time of the host.
        spread: Coefficient of variation of the GPU time, where it was called unstable.
        bound_by_enqueue: Whether it warned that the host was the bottleneck.
        device: Name of the GPU.
        compute_capability: Of the GPU.
        sm_count: Active multiprocessors.
        clock_mhz: Clock it names; not the live one.
        engine_mib: Size of the engine.
        build_s: Seconds of the build.
        skipped_inference: It only built.
        layers: The layer profile.
        errors: Lines marked as errors, and assertion texts.
    """

    status: Status
    tool: str | None = None
    version: Version | None = None
    command: str | None = None
    throughput_qps: float | None = None
    gpu_compute: Statistics | None = None
    latency: Statistics | None = None
    enqueue: Statistics | None = None
    spread: float | None = None
    bound_by_enqueue: bool = False
    device: str | None = None
    compute_capability: str | None = None
    sm_count: int | None = None
    clock_mhz: float | None = None
    engine_mib: float | None = None
    build_s: float | None = None
    skipped_inference: bool = False
    layers: tuple[LayerTime, ...] = ()
    errors: tuple[str, ...] = ()


_N = r"([-+]?[0-9]{1,30}(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,2})?)"
_PREFIX = re.compile(r"^\[\d\d/\d\d/\d{4}-\d\d:\d\d:\d\d\] ?")
_LEVEL = re.compile(r"^\[([VIWE])\] ?(?:\[TRT\] ?)?")
_BANNER = re.compile(
    r"^&&&& (RUNNING|PASSED|FAILED) TensorRT\.(trtexec|trt_builder) \[TensorRT v(\d+)\](?: \[b\d+\])?(?: # (.*))?"
)
_ONE_LINE = re.compile(rf"^(GPU Compute Time|Latency|Enqueue Time): min ?=? ?{_N} ms")
_SECTION = re.compile(r"^(GPU Compute|Host Latency|Enqueue Time)$")
_SECTION_ROW = re.compile(rf"^(min|max|mean|median): {_N} ms")
_SECTION_PERCENTILE = re.compile(rf"^percentile: {_N} ms at {_N}%")
_NAMES = {
    "GPU Compute Time": "gpu_compute",
    "GPU Compute": "gpu_compute",
    "Latency": "latency",
    "Host Latency": "latency",
    "Enqueue Time": "enqueue",
}
_ROW_NAME_FIRST = re.compile(rf"^\s*(\S.*?)\s{{2,}}{_N}\s+{_N}(?:\s+{_N})?\s+{_N}\s*$")
_ROW_NAME_LAST = re.compile(rf"^\s+{_N}\s+{_N}(?:\s+{_N})?\s+{_N}\s{{2,}}(\S.*?)\s*$")


def _value(name: str, line: str) -> float | None:
    # pasted logs sometimes lack the "="
    found = re.search(rf"(?:^|[ ,]){name} ?=? ?{_N} ms", line)
    return float(found[1]) if found else None


def _statistics(line: str) -> Statistics:
    percentiles = {float(p): float(v) for p, v in re.findall(rf"percentile\({_N}%\) ?=? ?{_N} ms", line)}
    return Statistics(_value("min", line), _value("max", line), _value("mean", line), _value("median", line), percentiles)


def parse_log(text: str) -> TrtexecLog:
    """Return what a trtexec log says; whatever it does not say is None.

    Args:
        text: All of it, stdout and stderr together.
    """
    found: dict[str, Any] = {"status": "incomplete"}
    errors: list[str] = []
    layers: list[LayerTime] = []
    sections: dict[str, dict[str, Any]] = {}
    section: str | None = None
    table: re.Pattern[str] | None = None
    for raw in text.splitlines():
        line = _PREFIX.sub("", raw.rstrip("\r"))
        level = _LEVEL.match(line)
        line = line[level.end() :] if level else line
        if level and level[1] == "V":
            continue
        banner = _BANNER.match(line)
        if banner:
            found["tool"] = banner[2]
            found["version"] = parse_version(f"v{banner[3]}")
            found["command"] = banner[4] or found.get("command")
            if banner[1] != "RUNNING":
                found["status"] = banner[1].lower()
            continue
        if (level and level[1] == "E") or "Assertion" in line or "Segmentation fault" in line:
            errors.append(line.strip())
        if table is not None:
            row = table.match(line)
            if row is None or not line.strip():
                table = None
            else:
                layers.append(_layer(row, name_first=table is _ROW_NAME_FIRST))
                continue
        if re.match(r"^\s*Layer\s+Time \(ms\)", line):
            table = _ROW_NAME_FIRST
        elif re.match(r"^\s*Time\(ms\)\s+Avg", line):
            table = _ROW_NAME_LAST
        line = line.strip()
        one = _ONE_LINE.match(line)
        if one:
            found[_NAMES[one[1]]] = _statistics(line)
            continue
        header = _SECTION.match(line)
        if header:
            section = _NAMES[header[1]]
            sections.setdefault(section, {"percentiles": {}})
            continue
        if section is not None:
            row = _SECTION_ROW.match(line)
            percentile = _SECTION_PERCENTILE.match(line)
            if row:
                sections[section][{"min": "minimum", "max": "maximum"}.get(row[1], row[1])] = float(row[2])
                continue
            if percentile:
                sections[section]["percentiles"][float(percentile[2])] = float(percentile[1])
                continue
            section = None
        _facts(line, found)
    for name, values in sections.items():
        found.setdefault(name, Statistics(**values))
    return TrtexecLog(**found, layers=tuple(r for r in layers if r.name != "Total"), errors=tuple(errors))


def _layer(row: re.Match[str], *, name_first: bool) -> LayerTime:
    if name_first:
        return LayerTime(row[1].strip(), float(row[3]), float(row[5]))
    return LayerTime(row[5].strip(), float(row[2]), float(row[4]))


def _facts(line: str, found: dict[str, Any]) -> None:
    """Read the single-line facts of a log."""
    for pattern, name, kind in _FACTS:
        match = pattern.search(line)
        if match:
            found[name] = kind(match[1])
    if "bound by Enqueue Time" in line:
        found["bound_by_enqueue"] = True
    if line.startswith("Skipped inference phase"):
        found["skipped_inference"] = True


def _mhz(text: str) -> float:
    return round(float(text) * 1000.0, 3)


def _fraction(text: str) -> float:
    return float(text) / 100.0


_FACTS: tuple[tuple[re.Pattern[str], str, Any], ...] = (
    (re.compile(rf"^Throughput: {_N} qps"), "throughput_qps", float),
    (re.compile(rf"GPU compute time is unstable, with coefficient of variance = {_N}%"), "spread", _fraction),
    (re.compile(r"^Selected Device: (.+)$"), "device", str),
    (re.compile(r"^Compute Capability: (\S+)"), "compute_capability", str),
    (re.compile(r"^SMs: ([0-9]{1,9})"), "sm_count", int),
    (re.compile(rf"^(?:Application )?Compute Clock Rate: {_N} GHz"), "clock_mhz", _mhz),
    (re.compile(rf"^Created engine with size: {_N} MiB"), "engine_mib", float),
    (re.compile(rf"^Engine built in {_N} sec"), "build_s", float),
    (re.compile(r"^TensorRT version: (\d+\.\d+)"), "version", parse_version),
)


LONGEST_MS = 1e7
"""No run of a network and no layer of it takes hours."""


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError) as e:
        raise ModelFileError(f"is no JSON of trtexec: {e}", where=str(path), remedy="measure again") from e


def _records(path: Path, document: Any) -> list[dict[str, Any]]:
    """Return a list of JSON objects.

    Raises:
        ModelFileError: It is something else.
    """
    if not isinstance(document, list) or not all(isinstance(record, dict) for record in document):
        raise ModelFileError("is no list of records", where=str(path), remedy="measure again")
    return document


def _number(path: Path, record: dict[str, Any], key: str, least: float, most: float) -> float:
    """Return a number of a record.

    Raises:
        ModelFileError: It is missing, no number, or none that anything real has.
    """
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        problem = (
            f"has no {key} in a record" if value is None else f"{key} is {str(value)[:40]!r} in a record, expected a number"
        )
        raise ModelFileError(problem, where=str(path), remedy="measure again")
    if not least <= value <= most:
        raise ModelFileError(
            f"{key} is {str(value)[:40]} in a record, which is impossible", where=str(path), remedy="measure again"
        )
    return float(value)


def read_times(path: Path, key: str = "computeMs") -> list[float]:
    """Return the GPU compute time of every run in ms, from an ``--exportTimes`` file; ``latencyMs`` is that with copies.

    Raises:
        ModelFileError: It is missing, damaged, has no run in it, or a time that is impossible.
    """
    records = _records(path, _json(path))
    times = [_number(path, r, key, 1e-6, LONGEST_MS) for r in records]
    if not times:
        raise ModelFileError("holds no run", where=str(path), remedy="measure for longer")
    return times


def read_profile(path: Path) -> list[LayerTime]:
    """Return the layers of an ``--exportProfile`` file.

    Raises:
        ModelFileError: It is missing or damaged, or holds a figure that is impossible.
    """
    rows = [r for r in _records(path, _json(path)) if "name" in r]
    return [
        LayerTime(str(r["name"]), _number(path, r, "averageMs", 0.0, LONGEST_MS), _number(path, r, "percentage", 0.0, 101.0))
        for r in rows
    ]


def read_layer_info(path: Path) -> list[BuiltLayer]:
    """Return the layers of an ``--exportLayerInfo`` file, in any of its forms (`edge_targets.engine_proof`).

    Raises:
        ModelFileError: It is missing or damaged.
    """
    try:
        return built_layers(_json(path))
    except ValueError as e:
        raise ModelFileError(str(e), where=str(path), remedy="build again") from e
