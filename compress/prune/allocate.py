"""`allocate`: the widths of all groups, and the blocks that go, of least summed error within a budget.

Within a block the cost of a layer depends on the widths on both its sides, so a *chunk* (block, stem or head) offers
every combination of its inner widths as one option, or to be dropped. For given stream widths the chunks are
independent, and the choice is a multiple-choice knapsack, solved by dynamic programming over the budget. Stream widths
couple the chunks: they are searched by coordinate descent on error + price * cost, for a price that is bisected.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.prune.cost import CachedCost, CostFunction, signature
from compress.prune.groups import ChannelGroup, Sizes
from compress.prune.method import Curves
from rescompress.core.errors import BudgetError
from rescompress.core.graph import Layer

Floats = NDArray[np.float64]

_BINS = 4000
_CLOSE = 0.003
"""Part of a budget that may be left over where the sum over segments misses the exact cost."""
_COMBINATIONS = 100_000
"""Most combinations of widths that one chunk offers."""
_OPTIONS = 40
"""Most widths of one group that the search looks at; the final filling looks at all."""


@dataclass(frozen=True)
class Allocation:
    """Widths in units per group, blocks to drop, and the summed error the curves predict."""

    units: dict[str, int]
    dropped: tuple[str, ...]
    error: float


def allowed_widths(group: ChannelGroup, align: int, *, strict: bool) -> tuple[tuple[int, ...], int]:
    """Return the units `group` may keep, ascending, and the alignment they have.

    All are multiples of the alignment in channels, besides the full width. Unless `strict`, the alignment is halved
    while it leaves fewer than four widths.

    Args:
        group: The group.
        align: Multiple wanted, in channels of every tensor of the group.
        strict: Never halve.
    """
    narrow = min(group.channels.values())
    while True:
        widths = [k for k in range(1, group.size) if all(k * c % align == 0 for c in group.channels.values())]
        if strict or align == 1 or len(widths) + 1 >= min(4, group.size):
            return (*widths, group.size), align
        align = align // 2 if align % 2 == 0 or align > narrow * group.size else 1


def nearest_width(widths: Sequence[int], wanted: float) -> int:
    """Return the allowed width nearest to `wanted`; ties keep more."""
    return min(widths, key=lambda k: (abs(k - wanted), -k))


@dataclass
class _Segment:
    layers: list[Layer]
    reads: str
    makes: str
    table: Floats


class _Chunk:
    """A block, the stem or the head, as options over its inner widths."""

    def __init__(self, name: str, segments: list[_Segment], inner: list[str], errors: list[Floats]) -> None:
        self.name = name
        self.segments = segments
        self.inner = inner
        self.streams = sorted({g for s in segments for g in (s.reads, s.makes)} - set(inner))
        self.shape = tuple(len(e) for e in errors)
        self.error: Floats = np.zeros(self.shape)
        for axis, e in enumerate(errors):
            self.error = self.error + e.reshape([-1 if a == axis else 1 for a in range(len(errors))])
        self._costs: dict[tuple[int, ...], Floats] = {}

    def cost(self, at: Mapping[str, int]) -> Floats:
        """Return the cost of every combination of inner widths, for these stream widths (as indices)."""
        key = tuple(at[s] for s in self.streams)
        if key not in self._costs:
            total = np.zeros(self.shape)
            for s in self.segments:
                axes = [self.inner.index(g) if g in self.inner else None for g in (s.reads, s.makes)]
                if s.reads == s.makes:
                    table, left = (s.table, [axes[0]]) if axes[0] is not None else (s.table[at[s.reads]], [])
                else:
                    pick = tuple(slice(None) if a is not None else at[g] for a, g in zip(axes, (s.reads, s.makes), strict=True))
                    table, left = s.table[pick], [a for a in axes if a is not None]
                if len(left) == 2 and left[0] is not None and left[1] is not None and left[0] > left[1]:
                    table, left = table.T, left[::-1]
                total = total + np.asarray(table).reshape([n if a in left else 1 for a, n in enumerate(self.shape)])
            self._costs[key] = total
        return self._costs[key]


class Allocator:
    """Finds the best widths for a network, its curves and a cost."""

    def __init__(
        self,
        sizes: Sizes,
        curves: Curves,
        widths: Mapping[str, Sequence[int]],
        cost: CostFunction,
        *,
        drop: Sequence[str] = (),
        keep_one_of: Sequence[Sequence[str]] = (),
    ) -> None:
        """Tabulate costs.

        Args:
            sizes: The network.
            curves: What removal costs in error.
            widths: Allowed units per group, ascending; groups not named keep all.
            cost: What the budget is about.
            drop: Blocks that may go.
            keep_one_of: Of each of these lists of blocks, one must stay.
        """
        self._sizes = sizes
        self._curves = curves
        self._all_widths = {g: list(w) for g, w in widths.items()}
        self._widths = {g: _thin(list(widths.get(g, (sizes.groups[g].size,)))) for g in sizes.groups}
        self._cost = CachedCost(cost)
        self._groups_in: dict[str, tuple[str, ...]] = {}
        self._known: dict[tuple[object, ...], float] = {}
        self._drop = set(drop)
        self._keep_one_of = keep_one_of
        self._coupled: set[str] = set()
        self._chunks = self._make_chunks()
        self._streams = [g for g in widths if sizes.groups[g].kind == "stream" or g in self._coupled]

    def _make_chunks(self) -> list[_Chunk]:
        chunks = []
        tables: dict[tuple[object, ...], Floats] = {}
        for name, run in itertools.groupby(self._sizes.segments(), key=lambda s: s[0].block or s[0].name):
            segments = []
            for layers in run:
                reads, makes = self._sizes.source(layers[0]), self._sizes.group_of[layers[0].name]
                segments.append(_Segment(layers, reads, makes, self._table(layers, reads, makes, tables)))
            inside = {g for s in segments for g in (s.reads, s.makes)}
            inner = [g for g in self._sizes.groups if g in inside and self._sizes.groups[g].kind == "inner"]
            chunks.append((name, segments, inner))
        for _, _, inner in _merge_stem(chunks):
            if math.prod(len(self._widths[g]) for g in inner) > _COMBINATIONS:  # a chain: its groups are searched as streams
                self._coupled |= set(inner)
        chunks = [(name, segments, [g for g in inner if g not in self._coupled]) for name, segments, inner in chunks]
        return [_Chunk(n, s, i, [self._errors(g) for g in i]) for n, s, i in _merge_stem(chunks)]

    def _table(self, layers: list[Layer], reads: str, makes: str, tables: dict[tuple[object, ...], Floats]) -> Floats:
        """Return the cost of a segment at every width on both its sides; segments alike share one table."""
        ins, outs = self._widths[reads], self._widths[makes]
        units = (self._sizes.groups[reads].size, self._sizes.groups[makes].size)
        key = (signature(layers), tuple(ins), tuple(outs), units, reads == makes)
        if key not in tables and reads == makes:
            tables[key] = np.array([self._segment_cost(layers, {reads: k}) for k in ins])
        elif key not in tables:
            tables[key] = np.array([[self._segment_cost(layers, {reads: i, makes: o}) for o in outs] for i in ins])
        return tables[key]

    def _segment_cost(self, layers: list[Layer], units: Mapping[str, int]) -> float:
        """Return the cost of a segment; it is asked for at the same few widths thousands of times."""
        name = layers[0].name
        if name not in self._groups_in:
            self._groups_in[name] = self._sizes.groups_in(layers)
        key = (name, *(units.get(g) for g in self._groups_in[name]))
        if key not in self._known:
            self._known[key] = self._cost([self._sizes.resized(layer, units) for layer in layers])
        return self._known[key]

    def _errors(self, group: str) -> Floats:
        curve = self._curves.groups.get(group)
        return np.array([curve.at(k) if curve else 0.0 for k in self._widths[group]])

    def _options(self, chunk: _Chunk, at: Mapping[str, int], kept: set[str]) -> tuple[Floats, Floats]:
        error, cost = chunk.error.ravel(), chunk.cost(at).ravel()
        if chunk.name in self._drop and chunk.name not in kept:
            error = np.append(error, self._curves.blocks[chunk.name])
            cost = np.append(cost, 0.0)
        return error, cost

    def smallest(self) -> Allocation:
        """Return the allocation of least cost."""
        at = dict.fromkeys(self._widths, 0)
        kept: set[str] = set()
        while True:
            found = self._settle(at, [int(np.argmin(self._options(c, at, kept)[1])) for c in self._chunks], kept)
            emptied = self._emptied(found)
            if not emptied:
                return found
            kept |= emptied

    def _emptied(self, found: Allocation) -> set[str]:
        """Return a block to keep for every stage that would be empty: the one that matters most."""
        stages = [stage for stage in self._keep_one_of if stage and set(stage) <= set(found.dropped)]
        return {max(stage, key=lambda b: self._curves.blocks[b]) for stage in stages}

    def solve(self, limit: float) -> Allocation | None:
        """Return the allocation of least error whose cost, summed over segments, is at most `limit`; None if none is.

        Args:
            limit: Absolute, in the cost's unit.
        """
        kept: set[str] = set()
        while True:
            found = self._solve(limit, kept)
            if found is None:
                return None
            emptied = self._emptied(found)
            if not emptied:
                return found
            kept |= emptied

    def _solve(self, limit: float, kept: set[str]) -> Allocation | None:
        full = {g: len(w) - 1 for g, w in self._widths.items()}
        starts = [full] if not self._streams else self._stream_search(limit, kept, full)
        best: Allocation | None = None
        for at in starts:
            options = [self._options(c, at, kept) for c in self._chunks]
            chosen = _knapsack(options, limit)
            if chosen is None:
                continue
            found = self._fill(self._settle(at, chosen, kept), limit)
            if best is None or found.error < best.error:
                best = found
        return best

    def _stream_search(self, limit: float, kept: set[str], full: dict[str, int]) -> list[dict[str, int]]:
        """Return stream widths worth a try: those of the prices around the one that just meets the limit."""
        found: list[dict[str, int]] = [full]
        low, high = 1e-9, 1e9
        scale = 1.0 / max(limit, 1e-300)
        for _ in range(24):
            price = (low * high) ** 0.5
            at, cost = self._descend(price * scale, kept, found[-1])
            if at not in found:
                found.append(at)
            low, high = (low, price) if cost <= limit else (price, high)
        smallest = {g: 0 if g in self._streams else i for g, i in full.items()}
        return [*found[-12:], *found[:1], smallest]

    def _descend(self, price: float, kept: set[str], start: dict[str, int]) -> tuple[dict[str, int], float]:
        at = dict(start)

        def best(chunk: _Chunk) -> tuple[float, float]:
            error, cost = self._options(chunk, at, kept)
            i = int(np.argmin(error + price * cost))
            return float(error[i] + price * cost[i]), float(cost[i])

        for _ in range(6):
            before = dict(at)
            for g in self._streams:
                touched = [c for c in self._chunks if g in c.streams]
                totals = []
                for i, error in enumerate(self._errors(g)):
                    at[g] = i
                    totals.append(float(error) + sum(best(c)[0] for c in touched))
                at[g] = int(np.argmin(totals))
            if at == before:
                break
        return at, sum(best(c)[1] for c in self._chunks)

    def _settle(self, at: Mapping[str, int], chosen: Sequence[int], kept: set[str]) -> Allocation:
        units = {g: self._widths[g][at[g]] for g in self._streams}
        dropped = []
        error = sum(self._curves.groups[g].at(k) for g, k in units.items())
        for chunk, choice in zip(self._chunks, chosen, strict=True):
            errors = self._options(chunk, at, kept)[0]
            error += float(errors[choice])
            if choice == chunk.error.size:
                dropped.append(chunk.name)
                continue
            for g, i in zip(chunk.inner, np.unravel_index(choice, chunk.shape) if chunk.inner else (), strict=True):
                if g in self._all_widths:
                    units[g] = self._widths[g][int(i)]
        return Allocation(units, tuple(dropped), error)

    def total(self, allocation: Allocation) -> float:
        """Return the cost of an allocation, summed over segments."""
        return sum(
            self._segment_cost(s.layers, allocation.units)
            for c in self._chunks
            if c.name not in allocation.dropped
            for s in c.segments
        )

    def _fill(self, allocation: Allocation, limit: float) -> Allocation:
        """Spend what is left of the budget on the widths that give most for it."""
        units = dict(allocation.units)
        error = allocation.error
        left = limit - self.total(allocation)
        where: dict[str, list[_Segment]] = {g: [] for g in units}
        for chunk in self._chunks:
            if chunk.name not in allocation.dropped:
                for s in chunk.segments:
                    for g in {s.reads, s.makes} & set(units):
                        where[g].append(s)
        blocked = {g for g in units if not where[g]}
        while True:
            steps = []
            for g, k in units.items():
                wider = next((w for w in self._all_widths[g] if w > k), None)
                if g in blocked or wider is None:
                    continue
                more = {**units, g: wider}
                price = sum(self._segment_cost(s.layers, more) - self._segment_cost(s.layers, units) for s in where[g])
                if price <= left:
                    gain = self._curves.groups[g].at(k) - self._curves.groups[g].at(wider)
                    steps.append((gain / max(price, 1e-300), g, wider, price, gain))
                else:
                    blocked.add(g)
            if not steps:
                return Allocation(units, allocation.dropped, max(error, 0.0))
            _, g, wider, price, gain = max(steps)
            units[g] = wider
            left -= price
            error -= gain


def _thin(widths: list[int]) -> list[int]:
    if len(widths) <= _OPTIONS:
        return widths
    return [widths[i] for i in sorted({round(i * (len(widths) - 1) / (_OPTIONS - 1)) for i in range(_OPTIONS)})]


def _merge_stem(
    chunks: list[tuple[str, list[_Segment], list[str]]],
) -> list[tuple[str, list[_Segment], list[str]]]:
    """Join neighbouring chunks that share an inner group (the convolutions of a deep stem)."""
    merged: list[tuple[str, list[_Segment], list[str]]] = []
    for name, segments, inner in chunks:
        if merged and set(merged[-1][2]) & set(inner):
            last = merged[-1]
            merged[-1] = (last[0], last[1] + segments, list(dict.fromkeys([*last[2], *inner])))
        else:
            merged.append((name, segments, inner))
    return merged


def _knapsack(options: Sequence[tuple[Floats, Floats]], limit: float) -> list[int] | None:
    """Return the index of one option per item, of least summed error, whose summed cost is at most `limit`.

    Costs above each item's least are rounded up to `_BINS` steps of the budget, so the result never exceeds it.
    """
    floor = [float(cost.min()) for _, cost in options]
    slack = limit - sum(floor)
    if slack < -1e-9 * max(limit, 1e-300):
        return None
    step = max(slack, 1e-300) / _BINS
    best = np.zeros(_BINS + 1)
    back: list[NDArray[np.int64]] = []
    for (error, cost), least in zip(options, floor, strict=True):
        bins = np.ceil((cost - least) / step * (1 - 1e-12)).clip(0, _BINS + 1).astype(np.int64)
        new = np.full(_BINS + 1, np.inf)
        choice = np.zeros(_BINS + 1, dtype=np.int64)
        for i in _pareto(error, bins):
            b = int(bins[i])
            if b > _BINS:
                continue
            candidate = best[: _BINS + 1 - b] + error[i]
            better = candidate < new[b:]
            new[b:][better] = candidate[better]
            choice[b:][better] = i
        best = new
        back.append(choice)
    at = int(np.argmin(best))
    chosen = []
    for (_, cost), least, choice in zip(reversed(options), reversed(floor), reversed(back), strict=True):
        i = int(choice[at])
        chosen.append(i)
        at -= int(np.ceil((cost[i] - least) / step * (1 - 1e-12)).clip(0, _BINS + 1))
    return chosen[::-1]


def _pareto(error: Floats, bins: NDArray[np.int64]) -> list[int]:
    order = np.lexsort((error, bins))
    kept: list[int] = []
    least = np.inf
    for i in order:
        if error[i] < least:
            kept.append(int(i))
            least = float(error[i])
    return kept


def meet(
    allocator: Allocator, limit: float, exact: Callable[[Allocation], float], *, describe: Callable[[float], str]
) -> Allocation:
    """Return the best allocation whose exact cost is at most `limit`.

    The segments' sum may miss the exact cost by a constant or a little more; the limit on the sum is moved until the
    exact cost fits closely.

    Args:
        allocator: With its tables.
        limit: Absolute.
        exact: Cost of the whole network an allocation leaves.
        describe: Words for a cost, for the error.

    Raises:
        BudgetError: Even the smallest network costs more.
    """
    smallest = allocator.smallest()
    if exact(smallest) > limit:
        raise BudgetError(
            f"no allowed network meets the budget of {describe(limit)}",
            remedy=f"the smallest reachable is {describe(exact(smallest))}; ask for more, widen the scope, or lower --align",
        )
    goal = limit - (exact(smallest) - allocator.total(smallest))
    best = smallest
    met: float | None = None
    missed: float | None = None
    for _ in range(12):
        found = allocator.solve(goal)
        if found is None:
            break
        over = exact(found) - limit
        if over <= 0:
            best = found if found.error <= best.error else best
            met = goal
        else:
            missed = goal
        if -_CLOSE * limit <= over <= 0:
            break
        goal = goal - over if met is None or missed is None else (met + missed) / 2
    return best
