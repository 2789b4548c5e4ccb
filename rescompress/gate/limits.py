"""`Limits`: what a gate allows, from YAML and from flags."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from rescompress import strict_yaml
from rescompress.core.errors import ConfigError, nearest
from rescompress.core.spec import Frozen

Ratio = Annotated[float, Field(gt=0)]
USUAL_RATIO = 1.05
OnInconclusive = Literal["inconclusive", "pass", "fail"]
OnMissing = Literal["fail", "inconclusive", "pass"]


class Limits(Frozen):
    """What a candidate may cost more than its baseline. ``null`` (or ``.inf``) leaves a check out.

    The command line has an option for each field, with its description as help.

    Attributes:
        max_drop: Points of top-1 that may be lost.
        max_latency: Ratio of latencies, for every target or by target; those not named keep the default.
        max_size: Ratio of file sizes.
        max_macs: Ratio of multiply-accumulates.
        max_params: Ratio of parameters.
        max_p99: Ratio of the latencies that one run in a hundred exceeds.
        max_jitter: Ratio of p99 - p50.
        max_cold_start: Ratio of the times that a new process takes.
        max_first_frame: Ratio of the latencies after idleness.
        max_contention: Ratio of the latencies beside other streams.
        max_end_to_end: Ratio of the latencies with copies.
        max_soak: Of the candidate alone: latency of a soak's last minute over its first.
        max_build_spread: Of the candidate alone: latency of the slowest build over that of the fastest.
        stage: Whose accuracy, size, MACs and parameters count; the last with accuracy by default.
        on_inconclusive: Whether an inconclusive gate ends as such, passes or fails.
        on_missing: Whether a target of the baseline that the candidate lacks or skipped fails, is inconclusive, or is left out.
    """

    max_drop: Annotated[float, Field(ge=0)] | None = Field(1.0, description="Points of top-1 that may be lost.")
    max_latency: Ratio | dict[str, Ratio | None] | None = Field(USUAL_RATIO, description="Latency, times the baseline's.")
    max_size: Ratio | None = Field(USUAL_RATIO, description="File size, times the baseline's.")
    max_macs: Ratio | None = Field(None, description="MACs, times the baseline's.")
    max_params: Ratio | None = Field(None, description="Parameters, times the baseline's.")
    max_p99: Ratio | None = Field(None, description="p99 latency, times the baseline's.")
    max_jitter: Ratio | None = Field(None, description="p99 - p50, times the baseline's.")
    max_cold_start: Ratio | None = Field(None, description="Cold start, times the baseline's.")
    max_first_frame: Ratio | None = Field(None, description="First frame after idleness, times the baseline's.")
    max_contention: Ratio | None = Field(None, description="Latency beside other streams, times the baseline's.")
    max_end_to_end: Ratio | None = Field(None, description="Latency with copies, times the baseline's.")
    max_soak: Ratio | None = Field(None, description="A soak's last minute, times its first.")
    max_build_spread: Ratio | None = Field(None, description="Slowest build, times the fastest.")
    stage: str | None = Field(None, description="Stage to compare.")
    on_inconclusive: OnInconclusive = Field("inconclusive", description="How an inconclusive gate ends.")
    on_missing: OnMissing = Field("fail", description="What a target that only the baseline has comes to.")

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
