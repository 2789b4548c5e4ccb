"""`prune`: groups, curves, allocation, plan, application and compensation, in this order."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from compress.checkpoints.base import Checkpoint
from compress.prune.allocate import Allocation, Allocator, allowed_widths, meet, nearest_width
from compress.prune.apply import apply, pruned_spec
from compress.prune.cost import CostFunction, cost_of
from compress.prune.groups import ChannelGroup, Scope, Sizes, droppable, prunable
from compress.prune.method import Context, Curves, Method, Progress
from compress.prune.plan import Budget, PruningPlan
from compress.prune.recalibrate import recalibrate
from rescompress.core import plugins
from rescompress.core.errors import BadInput
from rescompress.core.layers import total_macs, total_params, walk

PACKAGE = "compress.prune.methods"


@dataclass(frozen=True)
class PruneResult:
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
        widths: Channels that stay per group.
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


def method_names() -> list[str]:
    """Return the names of all pruning methods."""
    return plugins.names(PACKAGE)


def load_method(name: str) -> Method:
    """Return a pruning method.

    Raises:
        BadInput: There is none of that name.
    """
    return cast(Method, plugins.load(PACKAGE, name, what="pruning method"))


def prune(
    checkpoint: Checkpoint,
    *,
    method: str = "reconstruct",
    budget: Budget,
    scope: Scope = "inner",
    align: int = 8,
    strict_align: bool = False,
    calibration_x: Tensor | None = None,
    drop_blocks: bool | None = None,
    seed: int = 0,
    cost: CostFunction | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Return the checkpoint with channels (and blocks) removed to meet a budget.

    Args:
        checkpoint: A float network; not changed.
        method: One of `method_names()`.
        budget: How much is to go; an upper bound, never exceeded.
        scope: ``inner`` channels of blocks only, or ``all``: residual streams too.
        align: Widths are multiples of this; on small groups of the largest halving that leaves four widths.
        strict_align: Never go below `align`.
        calibration_x: Preprocessed images (N, C, H, W), for methods that need them.
        drop_blocks: Whether whole blocks may go; by default where the budget is latency and the method can tell what
            a block is worth.
        seed: Of everything random.
        cost: What a latency budget is about; MACs and parameters are built in.
        progress: Called with what is going on, how much is done, and how much there is.

    Raises:
        BudgetError: No allowed network meets the budget; the message names the smallest reachable.
        BadInput: The method is unknown or lacks data, or the checkpoint is quantized.
    """
    start = time.perf_counter()
    engine = load_method(method)
    _check(checkpoint, budget, align, cost)
    notes: list[str] = []
    sizes = Sizes(checkpoint.spec)
    groups = prunable(list(sizes.groups.values()), scope)
    if not groups:
        raise BadInput("the network has no channels that this scope may prune", remedy="use --scope all")
    may_drop = budget.kind == "latency" if drop_blocks is None else drop_blocks
    blocks = droppable(checkpoint.spec) if may_drop and budget.kind != "ratio" else []
    context = Context(checkpoint, groups, blocks, calibration_x, seed, progress or (lambda what, done, total: None))
    if engine.NEEDS_DATA:
        notes += _data_notes(context.images())
    curves = engine.curves(context)
    if drop_blocks and blocks and not curves.blocks:
        notes.append(f"{method} cannot tell what a block is worth; none is dropped")
    widths, reached = _widths(groups, align, strict=strict_align)
    notes += _align_notes(reached, align)
    function = cost or cost_of(budget.kind) or total_macs
    before = float(function(sizes.layers))

    def plan_for(allocation: Allocation) -> PruningPlan:
        return PruningPlan(
            arch=checkpoint.spec.arch,
            spec_digest=checkpoint.spec.digest,
            method=method,
            scope=scope,
            budget=budget,
            align=align,
            seed=seed,
            keep={g: curves.groups[g].keep(k) for g, k in allocation.units.items() if k < sizes.groups[g].size},
            dropped_blocks=allocation.dropped,
        )

    def exact(allocation: Allocation) -> float:
        return float(function(walk(pruned_spec(checkpoint.spec, plan_for(allocation)))))

    def describe(absolute: float) -> str:
        rounded_up = math.ceil(1000 * absolute / before - 1e-6) / 1000
        return f"{rounded_up:.3f} of the {'parameters' if budget.kind == 'params' else budget.kind}"

    if budget.kind == "ratio":
        allocation = _by_ratio(groups, curves, widths, budget.value)
    else:
        stages = [[b.name for b in stage] for stage in checkpoint.spec.stages]
        allocator = Allocator(
            sizes, curves, widths, function, drop=[b for b in blocks if b in curves.blocks], keep_one_of=stages
        )
        allocation = meet(
            allocator,
            budget.value * before,
            exact,
            describe=describe,
        )
    plan = plan_for(allocation)
    cut = apply(checkpoint, plan)
    pruned = engine.compensate(context, plan, cut)
    if pruned is cut and calibration_x is not None:
        pruned = recalibrate(cut, context.images())
        notes.append(f"{method} repairs nothing by itself; BatchNorm was measured again on the calibration images")
    after = walk(pruned.spec)
    gone = sum(sizes.groups[g].size - k for g, k in allocation.units.items())
    return PruneResult(
        checkpoint=pruned,
        plan=plan,
        curves=curves,
        cost_before=before,
        cost_after=float(function(after)),
        macs_before=total_macs(sizes.layers),
        macs_after=total_macs(after),
        params_before=total_params(sizes.layers),
        params_after=total_params(after),
        widths={g: k * sizes.groups[g].widest for g, k in allocation.units.items()},
        ratio=gone / sum(g.size for g in groups),
        error=allocation.error,
        seconds=time.perf_counter() - start,
        notes=tuple(notes),
    )


def measure(
    checkpoint: Checkpoint,
    *,
    method: str = "reconstruct",
    scope: Scope = "inner",
    calibration_x: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Curves:
    """Return what a method says removing channels would cost, without removing any.

    Args:
        checkpoint: A float network; not changed.
        method: One of `method_names()`.
        scope: ``inner`` or ``all``.
        calibration_x: Preprocessed images (N, C, H, W), for methods that need them.
        seed: Of everything random.
        progress: As for `prune`.

    Raises:
        BadInput: The method is unknown or lacks data, or the checkpoint is quantized.
    """
    _check_float(checkpoint)
    groups = prunable(list(Sizes(checkpoint.spec).groups.values()), scope)
    context = Context(
        checkpoint, groups, droppable(checkpoint.spec), calibration_x, seed, progress or (lambda what, done, total: None)
    )
    return load_method(method).curves(context)


def prune_by_plan(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    *,
    calibration_x: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Checkpoint:
    """Return the checkpoint pruned as a plan says, repaired by the plan's method where there are images.

    Args:
        checkpoint: The network the plan was made for; not changed.
        plan: What goes.
        calibration_x: Preprocessed images (N, C, H, W); without them the channels are cut out and nothing else.
        seed: Of everything random.
        progress: As for `prune`.

    Raises:
        BadInput: The plan is for another network, or the checkpoint is quantized.
    """
    _check_float(checkpoint)
    cut = apply(checkpoint, plan)
    if calibration_x is None:
        return cut
    groups = prunable(list(Sizes(checkpoint.spec).groups.values()), plan.scope)
    context = Context(checkpoint, groups, (), calibration_x, seed, progress or (lambda what, done, total: None))
    images = context.images()
    engine = load_method(plan.method) if plan.method in method_names() else load_method("reconstruct")
    repaired = engine.compensate(context, plan, cut)
    return recalibrate(cut, images) if repaired is cut else repaired


def _check_float(checkpoint: Checkpoint) -> None:
    if checkpoint.quantization is not None:
        raise BadInput("this checkpoint is quantized already", remedy="prune the float checkpoint, then quantize")


def _check(checkpoint: Checkpoint, budget: Budget, align: int, cost: CostFunction | None) -> None:
    _check_float(checkpoint)
    if align < 1:
        raise BadInput(f"widths cannot be multiples of {align}", where="--align", remedy="give 1 or more, or auto")
    if budget.kind == "latency" and cost is None:
        raise BadInput("a latency budget needs a target with a latency model", where="--latency", remedy="give --target")


def _widths(
    groups: Sequence[ChannelGroup], align: int, *, strict: bool
) -> tuple[dict[str, tuple[int, ...]], dict[int, list[str]]]:
    widths: dict[str, tuple[int, ...]] = {}
    reached: dict[int, list[str]] = {}
    for g in groups:
        widths[g.name], used = allowed_widths(g, align, strict=strict)
        reached.setdefault(used, []).append(g.name)
    return widths, reached


def _align_notes(reached: Mapping[int, Sequence[str]], align: int) -> list[str]:
    return [
        f"{len(names)} small groups are aligned to {used} instead of {align}, which would leave them no choice"
        for used, names in sorted(reached.items())
        if used != align
    ]


def _data_notes(x: Tensor) -> list[str]:
    few = len(x) < 64
    return [f"only {len(x)} calibration images: some hundred give a much better result"] if few else []


def _by_ratio(groups: Sequence[ChannelGroup], curves: Curves, widths: Mapping[str, Sequence[int]], ratio: float) -> Allocation:
    units = {g.name: nearest_width(widths[g.name], (1 - ratio) * g.size) for g in groups}
    return Allocation(units, (), sum(curves.groups[g].at(k) for g, k in units.items()))
