"""`Metric`: one number that says where it comes from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, field_validator

from rescompress.core.spec import Frozen

Provenance = Literal["counted", "measured", "predicted", "published"]


class Metric(Frozen):
    """One finite number with its origin; JSON has no other, and a manifest with one could not be read again.

    Attributes:
        value: The number.
        unit: ``fraction``, ``macs``, ``params``, ``bytes``, ``MB``, ``ms``,
            ``images/s``, ``W``, ``images/s/W``.
        provenance: ``counted`` is exact (MACs, bytes); ``measured`` was run here or on the named device; ``predicted``
            comes from a model and has a band; ``published`` is somebody's figure and has a source.
        n: Samples or timed iterations behind it.
        std_error: Standard error of the value, in its unit.
        low: Lower end of the band or interval.
        high: Upper end.
        device: Where it was measured, or what it was predicted for.
        runtime: ``torch``, ``onnxruntime``, ``openvino``, ``tensorrt``, ``tensorrt_rtx``.
        precision: ``fp32``, ``fp16``, ``int8``, ``int8+fp16``.
        threads: CPU threads.
        batch: Images per call.
        power_mode: Of the device.
        model: Name and version of the prediction model.
        source: Of a published figure.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    value: float
    unit: str
    provenance: Provenance
    n: int | None = None
    std_error: float | None = None
    low: float | None = None
    high: float | None = None
    device: str | None = None
    runtime: str | None = None
    precision: str | None = None
    threads: int | None = None
    batch: int | None = None
    power_mode: str | None = None
    model: str | None = None
    source: str | None = None

    @field_validator("value", "n", "std_error", "low", "high", "threads", "batch", mode="before")
    @classmethod
    def _a_number(cls, value: Any) -> Any:
        """Refuse what pydantic would make a number of."""
        if isinstance(value, str | bytes | bool):
            raise ValueError("should be a number")
        return value


def counted(value: int, unit: str) -> Metric:
    """Return an exact count."""
    return Metric(value=value, unit=unit, provenance="counted")


def accuracy(correct: int, n: int, *, runtime: str, distinct: int | None = None) -> Metric:
    """Return a measured accuracy with its binomial standard error ``sqrt(p (1 - p) / n)``.

    Args:
        correct: Right answers.
        n: Samples, at least 1.
        runtime: What computed the answers.
        distinct: Samples that are no copies of others, where that is not all of them: only these make the error smaller.
    """
    p = correct / n
    error = (p * (1 - p) / (distinct or n)) ** 0.5
    return Metric(value=p, unit="fraction", provenance="measured", n=n, std_error=error, runtime=runtime)
