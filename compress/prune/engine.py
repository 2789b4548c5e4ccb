"""`prune`: groups, curves, allocation, plan, application and compensation, in this order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.finite import all_finite
from compress.prune.allocate import Allocation, Allocator, allowed_widths, meet, nearest_width
from compress.prune.apply import apply, pruned_network
from compress.prune.cost import CostFunction, cost_of
from compress.prune.groups import ChannelGroup, Scope, Sizes, droppable, prunable, stages
from compress.prune.method import Context, Curves, Method, Progress, Repairs
from compress.prune.plan import Budget, PruningPlan
from compress.prune.recalibrate import recalibrate
from rescompress.core import plugins
from rescompress.core.errors import BadInput, DataError
from rescompress.core.graph import Network
from rescompress.core.layers import total_macs, total_params, walk
from rescompress.core.settings import PruneSettings
from rescompress.core.showing import Showing, prefixed
from rescompress.core.spec import ModelSpec

PACKAGE = "compress.prune.methods"
PRUNE = PruneSettings()
"""Half of the MACs."""


@dataclass(frozen=True, repr=False)
class PruneResult(Showing):
    """What pruning made.

    Attributes:
        checkpoint: The pruned network.
        plan: What was taken away.
        curves: What the method found out.
        cost_before: Of the dense network, in the budget's cost (MACs for a ratio).
        cost_after: Of the pruned one.
        macs_before: MACs of the dense network.
        macs_after: MACs of the pruned one.
        params_before: Parameters of the dense network.
        params_after: Parameters of the pruned one.
        widths: Channels that stay per group; none of a group inside a block that goes.
        ratio: Fraction of the channels of the groups that went.
        error: Sum of the curves at the chosen widths, in their unit.
        seconds: It took.
        notes: What the user should know.
    """

    checkpoint: Checkpoint
    plan: PruningPlan
    curves: Curves
    cost_before: float
    cost_after: float
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    widths: Mapping[str, int]
    ratio: float
    error: float
    seconds: float
    notes: tuple[str, ...] = ()

    def shows(self) -> Mapping[str, str]:
        """Return what went, what stays, and what to know."""
        return {
            "network": self.checkpoint.spec.arch or "graph",
            "method": self.plan.method,
            "MACs": f"{prefixed(self.macs_before)} -> {prefixed(self.macs_after)} ({self.macs_after / self.macs_before:.2f})",
            "parameters": f"{prefixed(self.params_before)} -> {prefixed(self.params_after)}",
            "channels removed": f"{100 * self.ratio:.1f} %",
            "seconds": f"{self.seconds:.1f}",
            **({"notes": "; ".join(self.notes)} if self.notes else {}),
        }


def method_names() -> list[str]:
    """Return the names of all pruning methods."""
    return plugins.names(PACKAGE)


def load_method(name: str) -> Method:
    """Return a pruning method.

    Raises:
        BadInput: There is none of that name, or it lacks what a method offers.
    """
    return cast(Method, plugins.load(PACKAGE, name, what="pruning method", offers=Method))


def prune(
    checkpoint: Checkpoint,
    settings: PruneSettings = PRUNE,
    *,
    calibration_x: Tensor | None = None,
    multiple: int = 8,
    seed: int = 0,
    cost: CostFunction | None = None,
    reference: ModelSpec | Network | None = None,
    curves: Curves | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Return the checkpoint with channels (and blocks) removed to meet a budget.

    Args:
        checkpoint: A float network; not changed.
        settings: Method, budget (an upper bound, never exceeded), scope, widths, blocks and repair: one step, in which no plan
            is followed and no weight made zero.
        calibration_x: Preprocessed images (N, C, H, W), for methods that need them.
        multiple: Of which widths are where the settings leave that open; on small groups of the largest halving that leaves
            four widths.
        seed: Of everything random.
        cost: What a latency budget is about; MACs and parameters are built in.
        reference: The network that the budget is a fraction of, where the checkpoint is pruned already; its own by
            default.
        curves: Of this network by this method on these images, where `measure` has made them already.
        progress: Called with what is going on, how much is done, and how much there is.

    Raises:
        BudgetError: No allowed network meets the budget; the message names the smallest reachable.
        BadInput: The method is unknown or lacks data, the checkpoint is quantized, or no group has another width that is a
            multiple of what is asked for.
    """
    start = time.perf_counter()
    engine = load_method(settings.method)
    kind, value = settings.budget
    budget = Budget(kind=kind, value=value)
    strict_align = isinstance(settings.align, int)
    align = settings.align if isinstance(settings.align, int) else multiple
    _check(checkpoint, budget, align, cost)
    _check_images(calibration_x, settings.recalibrate)
    notes: list[str] = []
    groups = _groups(checkpoint.spec, settings.scope, reference)
    blocks = droppable(checkpoint.spec) if settings.may_drop and budget.kind != "ratio" else []
    if settings.drop_blocks and budget.kind == "ratio":
        notes.append(
            "a ratio is taken from every group: no block is dropped; a budget of MACs, parameters or latency drops some"
        )
    context = Context(checkpoint, groups, blocks, calibration_x, seed, progress or _silent, notes.append)
    if engine.NEEDS_DATA or (calibration_x is not None and settings.recalibrate is not False):
        notes += _data_notes(context.images())
    curves = curves or engine.curves(context)
    if blocks and not curves.blocks:
        notes.append(f"{settings.method} cannot tell what a block is worth; none is dropped")
    choice = choose(
        checkpoint.spec,
        curves,
        budget=budget,
        method=settings.method,
        scope=settings.scope,
        align=align,
        strict_align=strict_align,
        drop=blocks,
        seed=seed,
        cost=cost,
        reference=reference,
    )
    cut = apply(checkpoint, choice.plan)
    pruned = _repaired(engine, context, choice.plan, cut, settings)
    before, after = walk(reference or checkpoint.spec), walk(pruned.spec)
    return PruneResult(
        checkpoint=pruned,
        plan=choice.plan,
        curves=curves,
        cost_before=choice.cost_before,
        cost_after=choice.cost_after,
        macs_before=total_macs(before),
        macs_after=total_macs(after),
        params_before=total_params(before),
        params_after=total_params(after),
        widths={name: left for name, (_, left) in choice.plan.widths(checkpoint.spec).items()},
        ratio=choice.plan.fraction_gone(checkpoint.spec),
        error=choice.error,
        seconds=time.perf_counter() - start,
        notes=(*notes, *choice.notes),
    )


@dataclass(frozen=True)
class Choice:
    """What goes, chosen from curves.

    Attributes:
        plan: As data.
        error: Sum of the curves at the chosen widths, in their unit.
        cost_before: Of the network that the budget is a fraction of.
        cost_after: Of the network that the plan leaves.
        notes: What the user should know.
    """

    plan: PruningPlan
    error: float
    cost_before: float
    cost_after: float
    notes: tuple[str, ...]


def choose(
    spec: ModelSpec | Network,
    curves: Curves,
    *,
    budget: Budget,
    method: str = "reconstruct",
    scope: Scope = "inner",
    align: int = 8,
    strict_align: bool = False,
    drop: Sequence[str] = (),
    seed: int = 0,
    cost: CostFunction | None = None,
    reference: ModelSpec | Network | None = None,
) -> Choice:
    """Return the plan of least error within a budget; curves once measured serve for many budgets.

    Args:
        spec: The network.
        curves: Of its groups.
        budget: See `prune`, as for all that follows.
        method: What made the curves.
        scope: Groups that may go; each has a curve.
        align: Multiple of the widths.
        strict_align: Never go below `align`.
        drop: Blocks that may go; those without a price stay.
        seed: For the plan.
        cost: What a latency budget is about.
        reference: What the budget is a fraction of.

    Raises:
        BudgetError: No allowed network meets the budget; the message names the smallest reachable.
    """
    sizes, whole = Sizes(spec), Sizes(reference or spec)
    groups = _groups(spec, scope, reference)
    widths, reached = _widths(groups, whole, align, strict=strict_align)
    first = reference is None  # a later step may find that rounding has left it nothing to do
    if first and not drop and all(len(allowed) == 1 for allowed in widths.values()):
        raise BadInput(
            f"no group can have fewer channels and still a multiple of {align}",
            where="--align",
            remedy="give a smaller one, or auto",
        )
    function = cost or cost_of(budget.kind) or total_macs
    before = float(function(whole.layers))

    def plan_for(allocation: Allocation) -> PruningPlan:
        return PruningPlan(
            arch=spec.arch,
            spec_digest=spec.digest,
            method=method,
            scope=scope,
            budget=budget,
            align=align,
            seed=seed,
            keep={g: curves.groups[g].keep(k) for g, k in allocation.units.items() if k < sizes.groups[g].size},
            dropped_blocks=allocation.dropped,
        )

    def exact(allocation: Allocation) -> float:
        return float(function(walk(pruned_network(spec, plan_for(allocation)))))

    def describe(absolute: float) -> str:
        rounded_up = math.ceil(1000 * absolute / before - 1e-6) / 1000
        return f"{rounded_up:.3f} of the {'parameters' if budget.kind == 'params' else budget.kind}"

    if budget.kind == "ratio":
        allocation = _by_ratio(groups, curves, widths, budget.value, whole)
    else:
        whole_stages = [[b.name for b in stage] for stage in stages(spec)]
        may_go = [b for b in drop if b in curves.blocks]
        allocator = Allocator(sizes, curves, widths, function, drop=may_go, keep_one_of=whole_stages)
        allocation = meet(allocator, budget.value * before, exact, describe=describe)
    notes = (*_align_notes(reached, align), *_stuck_notes(widths, align))
    return Choice(plan_for(allocation), allocation.error, before, exact(allocation), notes)


def measure(
    checkpoint: Checkpoint,
    *,
    method: str = "reconstruct",
    scope: Scope = "inner",
    calibration_x: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Curves:
    """Return what a method says removing channels would cost, without removing any.

    Args:
        checkpoint: A float network; not changed.
        method: One of `method_names()`.
        scope: ``inner`` or ``all``.
        calibration_x: Preprocessed images (N, C, H, W), for methods that need them.
        seed: Of everything random.
        progress: As for `prune`.
        note: Takes what the user should know.

    Raises:
        BadInput: The method is unknown or lacks data, or the checkpoint is quantized.
    """
    engine = load_method(method)
    _check_float(checkpoint)
    groups = prunable(list(Sizes(checkpoint.spec).groups.values()), scope)
    tell = note or _unheard
    context = Context(checkpoint, groups, droppable(checkpoint.spec), calibration_x, seed, progress or _silent, tell)
    if engine.NEEDS_DATA:
        for text in _data_notes(context.images()):
            tell(text)
    return engine.curves(context)


def prune_by_plan(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    settings: PruneSettings = PRUNE,
    *,
    calibration_x: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Return the checkpoint pruned as a plan says, repaired by the plan's method where there are images.

    Args:
        checkpoint: The network the plan was made for; not changed.
        plan: What goes.
        settings: Of what comes after: whether it is repaired, and BatchNorm measured again.
        calibration_x: Preprocessed images (N, C, H, W); without them the channels are cut out and nothing else.
        seed: Of everything random.
        progress: As for `prune`.
        note: Takes what the user should know.

    Raises:
        BadInput: The plan is for another network, the checkpoint is quantized, or BatchNorm is to be measured without
            images.
    """
    _check_float(checkpoint)
    _check_images(calibration_x, settings.recalibrate)
    cut = apply(checkpoint, plan)
    if calibration_x is None:
        return cut
    groups = prunable(list(Sizes(checkpoint.spec).groups.values()), plan.scope)
    tell = note or _unheard
    context = Context(checkpoint, groups, (), calibration_x, seed, progress or _silent, tell)
    images = context.images()  # refuses, before any work, images that do not fit
    if settings.repair or settings.recalibrate is not False:
        for text in _data_notes(images):
            tell(text)
    engine = load_method(plan.method) if plan.method in method_names() else load_method("reconstruct")
    return _repaired(engine, context, plan, cut, settings)


def _repaired(engine: Method, context: Context, plan: PruningPlan, cut: Checkpoint, settings: PruneSettings) -> Checkpoint:
    """Return what was cut as the method repairs it, with BatchNorm measured again where asked or where nothing was repaired.

    Without the repair the weights that stay are those of the network: a much worse start, and no worse an end after ten epochs
    of training (docs/decisions/0026).
    """
    result = engine.compensate(context, plan, cut) if settings.repair and isinstance(engine, Repairs) else cut
    again = settings.recalibrate if settings.recalibrate is not None else result is cut and context.calibration_NCHW is not None
    if not again:
        return result
    if not any(layer.op == "batch_norm" for layer in walk(result.spec)):
        context.note("there is no BatchNorm to measure again")
    elif result is cut:
        why = f"{plan.method} repairs nothing by itself" if settings.repair else "nothing was repaired, as asked"
        context.note(f"{why}; BatchNorm was measured again on the calibration images")
    return recalibrate(result, context.images())


def _groups(spec: ModelSpec | Network, scope: Scope, reference: ModelSpec | Network | None = None) -> list[ChannelGroup]:
    """Return the groups that may be pruned: those whose units a plan for the reference can name.

    A grouped convolution that an earlier step left one group is none of them: its channels were never units. Tensors of a
    block that an earlier step dropped are missing, the group of the stream they belonged to stays one.
    """
    groups = prunable(list(Sizes(spec).groups.values()), scope)
    if reference is not None:
        whole = Sizes(reference).groups
        groups = [
            g
            for g in groups
            if g.name in whole and all(whole[g.name].channels.get(name) == units for name, units in g.channels.items())
        ]
    if not groups:
        raise BadInput("the network has no channels that this scope may prune", remedy="use --scope all")
    return groups


def _silent(what: str, done: int, total: int) -> None:
    """Show no progress."""


def _unheard(text: str) -> None:
    """Tell nobody."""


def _check_float(checkpoint: Checkpoint) -> None:
    if checkpoint.quantization is not None:
        raise BadInput("this checkpoint is quantized already", remedy="prune the float checkpoint, then quantize")
    broken = next((name for name, value in checkpoint.state_dict.items() if not all_finite(value)), None)
    if broken is not None:
        raise DataError(f"{broken} holds NaN or infinity", remedy="check the checkpoint")


def _check_images(calibration_x: Tensor | None, recalibrate: bool | None) -> None:
    if recalibrate and calibration_x is None:
        raise BadInput("BatchNorm cannot be measured without images", where="--recalibrate", remedy="give --data")


def _check(checkpoint: Checkpoint, budget: Budget, align: int, cost: CostFunction | None) -> None:
    _check_float(checkpoint)
    if align < 1:
        raise BadInput(f"widths cannot be multiples of {align}", where="--align", remedy="give 1 or more, or auto")
    if budget.kind == "latency" and cost is None:
        raise BadInput("a latency budget needs a target with a latency model", where="--latency", remedy="give --target")


def _widths(
    groups: Sequence[ChannelGroup], whole: Sizes, align: int, *, strict: bool
) -> tuple[dict[str, tuple[int, ...]], dict[int, list[str]]]:
    """Return the units each group may keep, and the groups by the alignment they got, which their size in `whole` decides."""
    widths: dict[str, tuple[int, ...]] = {}
    reached: dict[int, list[str]] = {}
    for g in groups:
        allowed, used = allowed_widths(whole.groups[g.name], align, strict=strict)
        widths[g.name] = (*(k for k in allowed if k < g.size), g.size)
        reached.setdefault(used, []).append(g.name)
    return widths, reached


def _align_notes(reached: Mapping[int, Sequence[str]], align: int) -> list[str]:
    finer = [f"{len(names)} to {used}" for used, names in sorted(reached.items()) if used != align]
    return (
        [f"small groups are aligned to less than {align}, which would leave them no choice: {', '.join(finer)}"]
        if finer
        else []
    )


def _stuck_notes(widths: Mapping[str, Sequence[int]], align: int) -> list[str]:
    stuck = [name for name, allowed in widths.items() if len(allowed) == 1 < max(allowed)]
    return [f"{len(stuck)} groups stay as they are: they have no smaller multiple of {align}"] if stuck else []


def _data_notes(x: Tensor) -> list[str]:
    few = len(x) < 64
    return [f"only {len(x)} calibration images: some hundred give a much better result"] if few else []


def _by_ratio(
    groups: Sequence[ChannelGroup], curves: Curves, widths: Mapping[str, Sequence[int]], ratio: float, whole: Sizes
) -> Allocation:
    units = {g.name: nearest_width(widths[g.name], (1 - ratio) * whole.groups[g.name].size) for g in groups}
    return Allocation(units, (), sum(curves.groups[g].at(k) for g, k in units.items()))
