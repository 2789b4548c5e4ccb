"""`PruningPlan`: which channels stay and which blocks go, as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from compress.prune.groups import ChannelGroup, Scope, Sizes, droppable, prunable, stages
from rescompress.core.artifact import read_text
from rescompress.core.errors import BadInput, BudgetError
from rescompress.core.graph import Network
from rescompress.core.settings import BudgetKind
from rescompress.core.spec import Frozen, ModelSpec


class Budget(Frozen):
    """How much is to go.

    Attributes:
        kind: ``ratio`` removes that fraction of the channels of every group; the others leave at most that fraction of
            the dense network's MACs, parameters or latency.
        value: The fraction.
    """

    kind: BudgetKind
    value: float

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        low, high = (0.0, 1.0)
        inside = low <= self.value < high if self.kind == "ratio" else low < self.value <= high
        if not inside:
            what = "at least 0 and below 1" if self.kind == "ratio" else "above 0 and at most 1"
            raise BudgetError(
                f"{self.value:g} is no {self.kind} budget", where=f"--{self.kind}", remedy=f"give a fraction {what}"
            )
        return self


class PruningPlan(Frozen):
    """A decision about one network; applying it is `compress.prune.apply.apply`.

    Attributes:
        version: Of this format.
        arch: The network's name, for people.
        spec_digest: Of the network it was made for.
        method: What chose.
        scope: ``inner`` or ``all``.
        budget: What was asked for; None for a plan written by hand.
        align: Widths were multiples of this, in channels (finer where a group is small).
        seed: Of the calibration.
        keep: Per group, the units that stay, ascending; a group that is not named keeps all.
        dropped_blocks: Blocks that go as a whole.
    """

    version: Literal[1] = 1
    arch: str
    spec_digest: str
    method: str
    scope: Scope = "inner"
    budget: Budget | None = None
    align: int = Field(1, ge=1)
    seed: int = 0
    keep: dict[str, tuple[int, ...]]
    dropped_blocks: tuple[str, ...] = ()

    def kept(self, group: ChannelGroup) -> tuple[int, ...]:
        """Return the units of `group` that stay."""
        return self.keep.get(group.name, tuple(range(group.size)))

    def widths(self, spec: ModelSpec | Network) -> dict[str, tuple[int, int]]:
        """Return the channels of each group of the scope, before and after; none stay of a group inside a block that goes.

        Args:
            spec: The network that the plan is for.
        """
        sizes = Sizes(spec)
        gone = {layer.name for layer in sizes.layers if layer.block in self.dropped_blocks}
        return {
            g.name: (g.size * g.widest, 0 if gone.issuperset(g.producers) else len(self.kept(g)) * g.widest)
            for g in prunable(list(sizes.groups.values()), self.scope)
        }

    def fraction_gone(self, spec: ModelSpec | Network) -> float:
        """Return which part of the channels of these groups goes."""
        widths = self.widths(spec).values()
        return 1.0 - sum(after for _, after in widths) / sum(before for before, _ in widths)

    def after(self, first: PruningPlan, dense: ModelSpec | Network) -> PruningPlan:
        """Return the plan for the dense network that does what `first` and then this one do.

        Args:
            first: A plan for `dense`.
            dense: The network before both.

        Raises:
            BadInput: One plan cannot say it: `first` leaves a grouped convolution one group, and this one goes into it.
        """
        keep = {}
        groups = Sizes(dense).groups
        unknown = set(self.keep) - set(groups)
        if unknown:
            raise BadInput(
                f"no plan for the dense network names the channels of {', '.join(sorted(unknown))}",
                remedy="prune in fewer iterations",
            )
        for group in groups.values():
            once = first.kept(group)
            if max(self.keep.get(group.name, (0,))) >= len(once):
                raise BadInput(
                    f"'{group.name}' has one convolution group left, whose channels no plan for the dense network names",
                    remedy="prune in fewer iterations",
                )
            both = tuple(once[i] for i in self.keep[group.name]) if group.name in self.keep else once
            if len(both) < group.size:
                keep[group.name] = both
        dropped = tuple(sorted({*first.dropped_blocks, *self.dropped_blocks}))
        stated = {"arch": first.arch, "spec_digest": first.spec_digest, "keep": keep, "dropped_blocks": dropped}
        return self.model_copy(update=stated)

    def check(self, spec: ModelSpec | Network) -> None:
        """Make sure that the plan fits the network.

        Raises:
            BadInput: It is for another network, or names what is not there.
        """
        if self.spec_digest != spec.digest:
            raise BadInput(
                f"the pruning plan was made for another network ({self.arch}, {self.spec_digest[:12]}; "
                f"this is {spec.arch}, {spec.digest[:12]})",
                remedy="make a plan for this checkpoint with --plan-out",
            )
        groups = {name: g for name, g in Sizes(spec).groups.items() if g.kind != "fixed"}
        for name, keep in self.keep.items():
            if name not in groups:
                raise BadInput(f"the pruning plan names a group '{name}' that the network does not have")
            size = groups[name].size
            if not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= size:
                raise BadInput(f"the pruning plan keeps {keep} of the {size} units of '{name}'", remedy="list some, ascending")
        wrong = set(self.dropped_blocks) - set(droppable(spec))
        if wrong:
            raise BadInput(f"blocks that cannot be dropped: {', '.join(sorted(wrong))}", remedy="only identity shortcuts can")
        for stage in stages(spec):
            if all(b.name in self.dropped_blocks for b in stage):
                raise BadInput(f"the pruning plan drops every block of the stage of {stage[0].name}", remedy="leave one")


def load_plan(path: Path) -> PruningPlan:
    """Return the plan in a JSON file.

    Raises:
        BadInput: The file is missing or no plan.
    """
    try:
        return PruningPlan.model_validate(json.loads(read_text(path)))
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput("cannot read the pruning plan", where=str(path), remedy="check the path") from e
    except (json.JSONDecodeError, ValidationError) as e:
        reason = e.errors()[0]["msg"] if isinstance(e, ValidationError) else str(e)
        raise BadInput(f"no pruning plan: {reason}", where=str(path), remedy="write one with prune --plan-out") from e
