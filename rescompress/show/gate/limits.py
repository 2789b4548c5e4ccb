"""`Limits`: what a gate allows, from YAML and from flags."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from rescompress.core import strict_yaml
from rescompress.core.described import Flag
from rescompress.core.errors import ConfigError, nearest
from rescompress.core.spec import Frozen

Ratio = Annotated[float, Field(gt=0)]
USUAL_RATIO = 1.05
RATIO = Flag(metavar="RATIO")
OFF = Flag(metavar="RATIO", usual="off")
OnInconclusive = Literal["inconclusive", "pass", "fail"]
OnMissing = Literal["fail", "inconclusive", "pass"]


class Limits(Frozen):
    """What a candidate may cost more than its baseline. ``null`` (or ``.inf``) leaves a check out.

    Attributes:
        max_drop: Points of top-1 that may be lost.
        max_infidelity: Of the candidate alone: relative error of its outputs, 0.05 for 5 %.
        max_latency: Ratio of latencies, for every target or, in a file, by target; those not named keep the default.
        max_size: Ratio of the sizes of the ONNX files.
        max_macs: Ratio of multiply-accumulates.
        max_params: Ratio of parameters.
        max_p99: Ratio of the latencies that one run in a hundred exceeds.
        max_jitter: Ratio of p99 - p50.
        max_cold_start: Ratio of the times that a new process takes.
        max_first_frame: Ratio of the latencies after idleness.
        max_contention: Ratio of the latencies beside other streams.
        max_end_to_end: Ratio of the latencies with copies.
        max_from_file: Ratio of the times from image files to classes.
        max_soak: Of the candidate alone: latency of a soak's last minute over its first.
        max_build_spread: Of the candidate alone: latency of the slowest build over that of the fastest.
        stage: Whose accuracy, size, MACs and parameters count; the last with accuracy by default.
        on_inconclusive: Whether an inconclusive gate ends as such, passes or fails.
        on_missing: Whether a target of the baseline that the candidate lacks or skipped fails, is inconclusive, or is left out.
    """

    max_drop: Annotated[Annotated[float, Field(ge=0)] | None, Flag(metavar="PTS")] = 1.0
    max_infidelity: Annotated[Ratio | None, Flag(metavar="ERROR", usual="off")] = None
    max_latency: Annotated[Ratio | dict[str, Ratio | None] | None, RATIO] = USUAL_RATIO
    max_size: Annotated[Ratio | None, RATIO] = USUAL_RATIO
    max_macs: Annotated[Ratio | None, OFF] = None
    max_params: Annotated[Ratio | None, OFF] = None
    max_p99: Annotated[Ratio | None, OFF] = None
    max_jitter: Annotated[Ratio | None, OFF] = None
    max_cold_start: Annotated[Ratio | None, OFF] = None
    max_first_frame: Annotated[Ratio | None, OFF] = None
    max_contention: Annotated[Ratio | None, OFF] = None
    max_end_to_end: Annotated[Ratio | None, OFF] = None
    max_from_file: Annotated[Ratio | None, OFF] = None
    max_soak: Annotated[Ratio | None, OFF] = None
    max_build_spread: Annotated[Ratio | None, OFF] = None
    stage: Annotated[str | None, Flag(metavar="S", usual="last with accuracy or fidelity")] = None
    on_inconclusive: Annotated[OnInconclusive, Flag(usual="exit 6")] = "inconclusive"
    on_missing: OnMissing = "fail"

    @field_validator("*")
    @classmethod
    def _without_end(cls, value: Any) -> Any:
        """Return None for an infinite limit: both leave the check out, and one of them is enough to ask for."""
        if isinstance(value, dict):
            return {target: cls._without_end(limit) for target, limit in value.items()}
        return None if isinstance(value, float) and math.isinf(value) else value

    def latency_limit(self, target: str) -> float | None:
        """Return the limit for a target, or None when it is not checked."""
        limits = self.max_latency
        return limits.get(target, USUAL_RATIO) if isinstance(limits, dict) else limits


def load_limits(path: Path) -> Limits:
    """Return the limits in a YAML file.

    Raises:
        ConfigError: It is missing, is no YAML mapping, or holds an unknown key or an impossible value.
    """
    document = strict_yaml.load(path, missing="name a YAML file with limits", remedy="see docs/gate.md for the keys")
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError("is no mapping of limits", where=str(path), remedy="write lines such as `max_drop: 1.0`")
    return limits_of(document, where=str(path))


def limits_of(values: dict[str, Any], *, where: str) -> Limits:
    """Return limits from plain values.

    Args:
        values: By key.
        where: Named in errors.

    Raises:
        ConfigError: A key is unknown or a value impossible.
    """
    for key in values:
        if key not in Limits.model_fields:
            raise ConfigError(f"unknown limit: {key}", where=where, remedy=nearest(str(key), Limits.model_fields))
    try:
        return Limits.model_validate(values)
    except ValidationError as e:
        first = e.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "limits"
        raise ConfigError(
            f"{key}: {first['msg']}", where=where, remedy="see docs/gate.md for the limits and their units"
        ) from e
