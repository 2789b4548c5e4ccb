"""The front: networks of which none is surely beaten, and the cheapest that is surely good enough.

Objectives carry their errors. A point leaves the front only where another costs no more, beyond the interval of every cost,
and is more accurate beyond the interval of their paired difference on the same images. Points that another merely seems to
beat stay, marked as within the error.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rescompress.core.outcomes import Outcomes
from rescompress.search.ladder import CONFIDENCE, paired, surely_better
from rescompress.search.study import Answer, Trial
from rescompress.show.gate.tango import Paired, score


@dataclass(frozen=True)
class Point:
    """A network that reached the top of the ladder.

    Attributes:
        trial: The candidate.
        answer: Of its last rung, on held-out training images.
        clear: Whether none beats it by its estimates either.
    """

    trial: Trial
    answer: Answer
    clear: bool


def points_of(trials: Sequence[Trial]) -> list[tuple[Trial, Answer]]:
    """Return the candidates that may be on a front: those trained in full, with their last answer."""
    found = []
    for trial in trials:
        if trial.state == "done" and trial.answer("full") is not None:
            last = trial.answers[-1]
            found.append((trial, last if last.accuracy is not None else _joined(trial)))
    return found


def _joined(trial: Trial) -> Answer:
    """Return the last answer with the accuracy of the last rung that measured one."""
    known = [a for a in trial.answers if a.accuracy is not None][-1]
    kept = {"accuracy": known.accuracy, "sureness": known.sureness, "outcomes": known.outcomes}
    return trial.answers[-1].model_copy(update=kept)


def cheaper(a: Answer, b: Answer, name: str) -> bool:
    """Whether `a` costs less than `b` beyond the bands of both, where they have some."""
    low, high = b.band.get(name, (b.costs[name],) * 2), a.band.get(name, (a.costs[name],) * 2)
    return high[1] < low[0]


def surely_beats(a: Answer, b: Answer) -> bool:
    """Whether `a` beats `b` beyond doubt: no cost of it may be the higher, and its accuracy is surely the better."""
    same = all(a.costs[n] <= v for n, v in b.costs.items())
    apart = all(cheaper(a, b, n) or a.costs[n] == v or n not in a.band for n, v in b.costs.items())
    return same and apart and surely_better(a, b)


def front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Point]:
    """Return the points that none surely beats, the cheapest in the first objective first."""
    known = points_of(trials)
    answers = [a for _, a in known]
    rivals = [[answers[i] for i in found] for found in _rivals(answers)]
    kept = [i for i, b in enumerate(answers) if not any(surely_beats(a, b) for a in rivals[i])]
    found = [Point(*known[i], not any(_seems_to_beat(a, answers[i]) for a in rivals[i])) for i in kept]
    return sorted(found, key=lambda p: [p.answer.costs[name] for name in objectives])


def unjudged(points: Sequence[Point], final: Mapping[str, object]) -> list[str]:
    """Return the networks that the evaluation split has not been read for: ``dense``, and slots of the front."""
    return [name for name in ("dense", *(str(p.trial.slot) for p in points)) if name not in final]


def _rivals(answers: Sequence[Answer]) -> list[list[int]]:
    """Return, for each answer, the others that are at least as good in everything: only they can beat it; the best first."""
    import numpy as np

    if not answers:
        return []
    names = sorted(answers[0].costs)
    losses = np.array([[-a.quality, *(a.costs[n] for n in names)] for a in answers])
    order = np.argsort(losses[:, 0], kind="stable")
    ranked = losses[order]
    found = []
    for i, mine in enumerate(losses):
        better = order[(ranked <= mine).all(1)]
        found.append([int(j) for j in better if j != i])
    return found


def _seems_to_beat(a: Answer, b: Answer) -> bool:
    some = a.quality > b.quality or any(a.costs[n] < v for n, v in b.costs.items())
    return a.quality >= b.quality and all(a.costs[n] <= v for n, v in b.costs.items()) and some


def p_value(pair: Paired, margin: float) -> float:
    """Return the chance of so small a drop, or a smaller one, were the true drop the margin (Tango's score test)."""
    from statistics import NormalDist

    return NormalDist().cdf(score(pair, margin))


def good_enough(
    dense: Outcomes, candidates: Mapping[int, Outcomes], margin: float, *, confidence: float = CONFIDENCE
) -> dict[int, bool]:
    """Return which candidates are not worse than the dense network by more than the margin.

    That any one that is worse passes has at most the probability 1 - confidence, however many are tried: Holm's step-down
    procedure over their non-inferiority tests (S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70).

    Args:
        dense: Of the dense network.
        candidates: By slot, on the same images.
        margin: The largest drop that is good enough, a fraction.
        confidence: Of the whole answer.
    """
    tested = {slot: p_value(pair, margin) for slot, found in candidates.items() if (pair := paired(dense, found)) is not None}
    passed = dict.fromkeys(candidates, False)
    for rank, slot in enumerate(sorted(tested, key=tested.__getitem__)):
        if tested[slot] > (1 - confidence) / (len(tested) - rank):
            break
        passed[slot] = True
    return passed


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Return the volume that points dominate below a reference point; every coordinate is to be small.

    Three coordinates are swept along the last one, over the staircase of the others; more are cut into slices.
    """
    inside = sorted((tuple(p) for p in points if all(x < r for x, r in zip(p, reference, strict=True))), key=lambda p: p[-1])
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - inside[0][0]
    total, levels = 0.0, [*(p[-1] for p in inside[1:]), reference[-1]]
    if len(reference) > 3:
        for i, (point, above) in enumerate(zip(inside, levels, strict=True)):
            if above > point[-1]:
                total += (above - point[-1]) * hypervolume([p[:-1] for p in inside[: i + 1]], reference[:-1])
        return total
    stairs = _Stairs((reference[0], reference[1]) if len(reference) == 3 else (reference[0], 1.0))
    for point, above in zip(inside, levels, strict=True):
        stairs.add(point[0], point[1] if len(reference) == 3 else 0.0)
        total += (above - point[-1]) * stairs.area
    return total


class _Stairs:
    """The area that points of a plane dominate below a corner, kept while points are added."""

    def __init__(self, corner: tuple[float, float]) -> None:
        self.corner = corner
        self.xs: list[float] = []
        self.ys: list[float] = []
        self.area = 0.0

    def add(self, x: float, y: float) -> None:
        first = bisect.bisect_left(self.xs, x)
        height = self.ys[first - 1] if first else self.corner[1]
        if height <= y or (first < len(self.xs) and self.xs[first] == x and self.ys[first] <= y):
            return
        last, at = first, x
        while last < len(self.xs) and self.ys[last] >= y:  # what the new point dominates is no step any more
            self.area += (self.xs[last] - at) * (height - y)
            at, height = self.xs[last], self.ys[last]
            last += 1
        self.area += ((self.xs[last] if last < len(self.xs) else self.corner[0]) - at) * (height - y)
        self.xs[first:last] = [x]
        self.ys[first:last] = [y]
