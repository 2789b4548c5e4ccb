"""Which candidates climb: cheap answers first, and a dear one only for those that could still reach the front.

At every rung a candidate meets those that were there before it. It climbs

- if none of them beats it: at least as cheap in every cost and more accurate (in the unit the rung has); or
- if it is among the best 1/eta of the rung by the number of those that beat it, and none beats it beyond doubt.

*Beyond doubt* is the gate's paired test on the very same held-out images (Tango 1998, one-sided, 95 %). This is
asynchronous successive halving (Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020, section 3)
with domination in the place of one objective; a candidate is judged when it arrives and never waits for others.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from statistics import NormalDist

from rescompress.core.errors import BadInput
from rescompress.core.outcomes import Outcomes
from rescompress.search.study import Answer, Trial
from rescompress.show.gate.pairing import pair
from rescompress.show.gate.tango import Paired, score

CONFIDENCE = 0.95
_SURE = NormalDist().inv_cdf(CONFIDENCE)
"""Score above which a difference is no chance: the one-sided lower bound of it lies above zero then."""
COMPARED = 64
"""Of the candidates at a rung, a newcomer meets the last so many."""


def paired(better: Outcomes, worse: Outcomes) -> Paired | None:
    """Return the gate's comparison of two networks, or None where it refuses: the images are not the same.

    `lost` are the images that only `better` has right.
    """
    try:
        return pair(worse, better, ("a candidate", "another"))
    except BadInput:
        return None


def surely_better(a: Answer, b: Answer) -> bool:
    """Whether `a` is more accurate than `b` beyond the interval of their paired difference."""
    if a.outcomes is None or b.outcomes is None:
        return False
    counts = paired(a.outcomes, b.outcomes)
    return counts is not None and score(counts, 0.0) > _SURE


def no_dearer(a: Answer, b: Answer) -> bool:
    """Whether `a` costs at most what `b` does, in every cost."""
    return all(a.costs[name] <= value for name, value in b.costs.items())


def beats(a: Answer, b: Answer) -> bool:
    """Whether `a` is at least as good as `b` in everything and better in something."""
    return _below(_losses(a), _losses(b))


def _losses(answer: Answer) -> tuple[float, ...]:
    """Return everything that is to be small, in a fixed order."""
    return (-answer.quality, *(answer.costs[name] for name in sorted(answer.costs)))


def _below(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(map(operator.le, a, b))


def latest(trials: Sequence[Trial], rung: str, *, besides: int) -> list[Answer]:
    """Return what a rung said of the last candidates that were there, in their order.

    Args:
        trials: By slot.
        rung: Which.
        besides: Slot that is left out.
    """
    found = (a for t in reversed(trials) if t.slot != besides and (a := t.answer(rung)) is not None)
    return list(itertools.islice(found, COMPARED))[::-1]


def climbs(mine: Answer, others: Sequence[Answer], eta: int) -> tuple[bool, str]:
    """Return whether a candidate goes on, and why.

    Args:
        mine: Its answer at this rung.
        others: Of those that were at this rung before.
        eta: One in so many climbs.
    """
    above = [o for o in others if beats(o, mine)]
    if not above:
        return True, "climbs: nothing known here is as cheap and as good"
    if any(surely_better(o, mine) and no_dearer(o, mine) for o in above):
        return False, "stops: one that costs no more is more accurate beyond its interval"
    losses = [_losses(o) for o in others]
    counts = sorted(sum(_below(o, each) for o in losses) for each in losses)
    places = max(1, math.ceil((len(others) + 1) / eta))
    if len(above) <= counts[min(places, len(counts)) - 1]:
        return True, f"climbs: among the best {places} of {len(others) + 1}"
    return False, f"stops: {len(above)} of {len(others)} cost no more and are as good"


def twin(mine: Trial, answer: Answer, trials: Sequence[Trial]) -> Trial | None:
    """Return an earlier candidate that becomes the very same network, or None.

    Of two that two workers take at the same time, the earlier one goes on.
    """
    if not answer.network:
        return None
    return next((t for t in trials if t.slot < mine.slot and any(a.network == answer.network for a in t.answers)), None)


def hopeless(trials: Sequence[Trial], objectives: Sequence[str]) -> list[float]:
    """Return what to tell the sampler of a place where nothing is to be had: quality and costs worse than all.

    That is a budget that no network meets, and one whose network is there already.
    """
    seen = [cost for t in trials for a in t.answers[:1] for cost in a.costs.values()]
    return [-1.0, *[10 * max(seen, default=1.0)] * len(objectives)]


def guessed(mine: Answer, trials: Sequence[Trial], objectives: Sequence[str]) -> list[float]:
    """Return what to tell the sampler of a candidate whose accuracy nobody measured: quality and costs; nothing without others.

    It is the quality of the candidate whose curves have the next smaller error (else the next larger), and its own costs,
    moved by what the last rung added to that candidate's: the first one counts parameters where the last weighs a file.
    """
    known = [(a, t.answers[-1]) for t in trials if (a := t.answer(mine.rung)) and t.answers[-1].accuracy is not None]
    if not known:
        return []
    error = mine.error or 0.0
    first, last = min(known, key=lambda pair: ((pair[0].error or 0.0) > error, abs((pair[0].error or 0.0) - error)))
    return [last.quality, *(mine.costs[name] + last.costs[name] - first.costs[name] for name in objectives)]


def rank_correlation(trials: Sequence[Trial], lower: str, upper: str) -> tuple[float, int] | None:
    """Return Spearman's correlation of what two rungs said of the same candidates, and of how many; None below three.

    It tells whether the cheaper rung was worth trusting. Ties have their mean rank.
    """
    pairs = [(a.quality, b.quality) for t in trials if (a := t.answer(lower)) and (b := t.answer(upper))]
    if len(pairs) < 3:
        return None
    xs, ys = _ranks([p[0] for p in pairs]), _ranks([p[1] for p in pairs])
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    sxy = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
    sxx, syy = sum((x - mx) ** 2 for x in xs), sum((y - my) ** 2 for y in ys)
    return (sxy / math.sqrt(sxx * syy), len(pairs)) if sxx and syy else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in order[start : end + 1]:
            ranks[i] = (start + end) / 2
        start = end + 1
    return ranks
