"""Short ways to the engines for tests: the settings by keyword, of which a test states what it is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from compress import prune as pruning
from compress import quantize as quantization
from compress.checkpoints.base import Checkpoint
from compress.prune import Budget, PruneResult, PruningPlan
from rescompress.core.quantizers import Profile
from rescompress.core.settings import PruneSettings, QuantizeSettings


def prune(checkpoint: Checkpoint, *, budget: Budget, align: int = 8, strict_align: bool = False, **more: Any) -> PruneResult:
    """Prune with settings by keyword; `align` is what the widths are multiples of where they may be finer."""
    given = {name: more.pop(name) for name in set(PruneSettings.model_fields).intersection(more)}
    settings = PruneSettings(**given, align=align if strict_align else "auto", **{budget.kind: budget.value})
    return pruning.prune(checkpoint, settings, multiple=align, **more)


def prune_by_plan(checkpoint: Checkpoint, plan: PruningPlan, **more: Any) -> Checkpoint:
    """Follow a plan with settings by keyword."""
    given = {name: more.pop(name) for name in set(PruneSettings.model_fields).intersection(more)}
    return pruning.prune_by_plan(checkpoint, plan, PruneSettings(**given), **more)


def ptq(
    checkpoint: Checkpoint,
    batches: Iterable[Tensor | Sequence[Tensor]],
    *,
    profile: Profile = "tensorrt",
    keep_float: frozenset[str] = frozenset(),
    calibration: str = "nncf",
    **more: Any,
) -> Checkpoint:
    """Quantize with settings by keyword, by NNCF's calibration where nothing else is stated."""
    given = {name: more.pop(name) for name in set(QuantizeSettings.model_fields).intersection(more)}
    settings = QuantizeSettings.model_validate({"calibration": calibration, **given})
    return quantization.ptq(checkpoint, batches, settings, profile=profile, keep_float=keep_float, **more)
