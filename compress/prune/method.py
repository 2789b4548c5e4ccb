"""What a pruning method offers, and what it is given.

A method is one file in `compress.prune.methods`; its module-level names are those of `Method`, and of `Repairs` where it
makes up for what it removed. It returns a curve per group: `curve_of` makes one of independent scores. `ChannelGroup` says
which layers make a group's channels (``producers``), which read them (``consumers``), and where its units stand in each
tensor (``indices``). ``fpgm.py`` begins at the weights, with BatchNorm folded in (`compress.prune.fold.folded`);
``taylor.py`` at what the layers make of the calibration images. `rescompress.testing.check_method` tells what a new one
does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.finite import all_finite
from compress.prune.groups import ChannelGroup
from compress.prune.plan import PruningPlan
from rescompress.core.errors import BadInput, DataError
from rescompress.core.showing import Showing

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how much is done, and how much there is."""


@dataclass(frozen=True)
class ErrorCurve:
    """What it costs to remove channels of one group.

    Attributes:
        order: Units in the order in which they go; the last one stays in any case.
        error: ``error[k]`` is the cost of removing the first k of them, from 0 to ``size - 1``; it starts at 0 and never
            falls. Methods choose the unit, but it must be the same for all groups.
    """

    order: tuple[int, ...]
    error: tuple[float, ...]

    def __post_init__(self) -> None:
        """Make sure that the curve is one."""
        if sorted(self.order) != list(range(len(self.order))) or len(self.error) != len(self.order):
            raise ValueError(
                f"an error curve orders each unit once and has an error for each: here {self.order}, {len(self.error)} errors"
            )
        if self.error[0] != 0 or not all(a <= b < math.inf for a, b in zip(self.error, self.error[1:], strict=False)):
            raise ValueError("an error curve starts at 0, is finite and never falls")

    def keep(self, units: int) -> tuple[int, ...]:
        """Return the `units` units that stay longest, ascending."""
        return tuple(sorted(self.order[len(self.order) - units :]))

    def at(self, units: int) -> float:
        """Return the error when `units` units stay."""
        return self.error[len(self.order) - units]


def curve_of(score_K: Tensor) -> ErrorCurve:
    """Return the curve of independent scores: least first, errors add up; shares of the group's total.

    Args:
        score_K: What each unit is worth, at least 0.
    """
    score = score_K.double()
    total = float(score.sum()) or 1.0
    order = torch.argsort(score, stable=True)
    error = torch.cumsum(score[order], 0) / total
    return ErrorCurve(tuple(order.tolist()), (0.0, *error[:-1].tolist()))


@dataclass(frozen=True)
class Context:
    """What a method works on.

    Attributes:
        checkpoint: The dense network; never changed.
        groups: The groups it may prune.
        blocks: The blocks that may be dropped.
        calibration_NCHW: Preprocessed images, or None.
        seed: Of everything random.
        progress: Where progress goes.
        note: Takes what the user should know.
        scratch: What a method's curves leave for its compensation of the same network.
    """

    checkpoint: Checkpoint
    groups: Sequence[ChannelGroup]
    blocks: Sequence[str] = ()
    calibration_NCHW: Tensor | None = None
    seed: int = 0
    progress: Progress = field(default=lambda what, done, total: None)
    note: Callable[[str], None] = field(default=lambda text: None)
    scratch: dict[str, object] = field(default_factory=dict)

    def images(self) -> Tensor:
        """Return the calibration images (N, C, H, W).

        Raises:
            BadInput: There are none.
            DataError: They do not fit the network, or hold NaN.
        """
        x = self.calibration_NCHW
        if x is None:
            raise BadInput("this pruning method needs images", remedy="give --data, or use --method magnitude")
        if x.dim() != 4 or len(x) == 0 or tuple(x.shape[1:]) != self.checkpoint.spec.input_shape:
            raise DataError(
                f"calibration images have shape {tuple(x.shape)}, the network reads (N, "
                + ", ".join(str(n) for n in self.checkpoint.spec.input_shape)
                + ")"
            )
        if not all_finite(x):
            raise DataError("calibration images hold NaN or infinity", remedy="check the data and its preprocessing")
        return x


@dataclass(frozen=True, repr=False)
class Curves(Showing):
    """What a method found out.

    Attributes:
        groups: Per group.
        blocks: Per block that may be dropped, what dropping it costs, in the unit of the curves.
        unit: What the numbers are, for people.
    """

    groups: Mapping[str, ErrorCurve]
    blocks: Mapping[str, float] = field(default_factory=dict)
    unit: str = "share"

    def shows(self) -> Mapping[str, str]:
        """Return the groups by what losing half of their channels costs, most first."""
        half = {name: c.error[len(c.order) // 2] for name, c in self.groups.items()}
        worst = sorted(half, key=half.__getitem__, reverse=True)
        costly = ", ".join(f"{name} {half[name]:.3g}" for name in worst[:3])
        return {"groups": str(len(half)), "half gone costs most in": costly, "unit": self.unit}


class Method(Protocol):
    """A pruning method: the module-level names of one file."""

    DESCRIPTION: str
    NEEDS_DATA: bool

    def curves(self, context: Context) -> Curves:
        """Return what removing channels and blocks costs."""
        ...


@runtime_checkable
class Repairs(Protocol):
    """What a method offers besides if it can make up for what was removed; one that only ranks leaves it out."""

    def compensate(self, context: Context, plan: PruningPlan, pruned: Checkpoint) -> Checkpoint:
        """Return the pruned checkpoint with its remaining weights adjusted; `pruned` itself where there is nothing to do."""
        ...
