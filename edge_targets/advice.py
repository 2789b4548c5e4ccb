"""What users report of single TensorRT versions: shown by `deploy`, `export` and `lint` for the versions it is about.

The reports are in ``data/tensorrt_advice.yaml``, each with its source.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from edge_targets.device import Precision, Target
from edge_targets.tensorrt_versions import Release, parse_release
from rescompress.core.spec import Frozen

REPORTS = Path(__file__).parent / "data" / "tensorrt_advice.yaml"


class Advice(Frozen):
    """One report.

    Attributes:
        name: What it is called.
        since: First version of TensorRT that it is about.
        before: First later version that it is not about; none is known when None.
        compute_capabilities: GPUs that it is about; all when empty.
        precisions: What it is about; all when empty.
        dla: Whether it is about networks that are to run on a DLA, and them alone.
        message: What is reported.
        remedy: What to do.
        sources: Where it was read.
    """

    name: str
    since: str
    before: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    precisions: tuple[Precision, ...] = ()
    dla: bool = False
    message: str
    remedy: str
    sources: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.before is not None and parse_release(self.since) >= parse_release(self.before):
            raise ValueError(f"{self.name}: since {self.since} is not before {self.before}")
        return self

    def applies(self, release: Release, compute_capability: str | None, precision: Precision, *, dla: bool) -> bool:
        """Whether it is about an engine of `precision` that this release builds for this GPU."""
        return (
            parse_release(self.since) <= release
            and (self.before is None or release < parse_release(self.before))
            and (not self.compute_capabilities or compute_capability in self.compute_capabilities)
            and (not self.precisions or precision in self.precisions)
            and (dla or not self.dla)
        )

    def __str__(self) -> str:
        """Return it as one line, with its sources."""
        return f"{self.message}; {self.remedy} ({', '.join(self.sources)})"


@cache
def reports() -> tuple[Advice, ...]:
    """Return every report."""
    import yaml

    return tuple(Advice.model_validate(row) for row in yaml.safe_load(REPORTS.read_text(encoding="utf-8")))


def advice_for(target: Target, precisions: Iterable[Precision], *, dla: bool = False) -> list[Advice]:
    """Return the reports about engines of any of `precisions` that are built for `target`; none without TensorRT."""
    if target.tensorrt_version is None:
        return []
    release, gpu = parse_release(target.tensorrt_version), target.device.compute_capability
    wanted = list(precisions)
    return [a for a in reports() if any(a.applies(release, gpu, p, dla=dla) for p in wanted)]
