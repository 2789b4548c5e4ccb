"""How much slower: the ratio of two latencies from several processes each, with an exact interval.

One process gives one figure, its median latency; what differs from process to process (memory layout, clocks, neighbours)
is larger than what differs inside one, so processes are the samples. The ratio is the Hodges-Lehmann estimate: the median
of all candidate / baseline pairs. Its interval inverts the Wilcoxon-Mann-Whitney test: with the pairs in order, it runs from
the ``k+1``-th smallest to the ``k+1``-th largest, where ``P(U <= k)`` is the error allowed on that side. The level holds
for every distribution of the noise, at five processes as at fifty, and one disturbed process cannot move it far.

J. L. Hodges, E. L. Lehmann, "Estimates of location based on rank tests", Annals of Mathematical Statistics 34 (1963)
598-611; H. B. Mann, D. R. Whitney, "On a test of whether one of two random variables is stochastically larger than the
other", ibid. 18 (1947) 50-60.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

LEAST_PROCESSES = 5


def ratio(baseline: Sequence[float], candidate: Sequence[float]) -> float:
    """Return how many times as long the candidate takes (Hodges-Lehmann)."""
    return median(_pairs(baseline, candidate))


def lower_bound(baseline: Sequence[float], candidate: Sequence[float], confidence: float) -> float:
    """Return the one-sided lower bound of the ratio; 0 when there are too few processes for this confidence."""
    k = _allowed(len(baseline), len(candidate), 1 - confidence)
    return 0.0 if k < 0 else _pairs(baseline, candidate)[k]


def upper_bound(baseline: Sequence[float], candidate: Sequence[float], confidence: float) -> float:
    """Return the one-sided upper bound of the ratio; infinite when there are too few processes for this confidence."""
    k = _allowed(len(baseline), len(candidate), 1 - confidence)
    return math.inf if k < 0 else _pairs(baseline, candidate)[-1 - k]


def interval(baseline: Sequence[float], candidate: Sequence[float], confidence: float) -> tuple[float, float]:
    """Return the two-sided interval of the ratio."""
    each = 0.5 + confidence / 2
    return lower_bound(baseline, candidate, each), upper_bound(baseline, candidate, each)


def _pairs(baseline: Sequence[float], candidate: Sequence[float]) -> list[float]:
    return sorted(c / b for c in candidate for b in baseline)


def _allowed(n: int, m: int, error: float) -> int:
    """Return the largest k with ``P(U <= k) <= error`` for samples of sizes n and m, or -1."""
    ways = _ways(n, m)
    total, sum_so_far = math.comb(n + m, n), 0
    for k, w in enumerate(ways):
        sum_so_far += w
        if sum_so_far > error * total:
            return k - 1
    return len(ways) - 1


def _ways(n: int, m: int) -> list[int]:
    """Return, for each value of U, how many orders of n and m samples give it: the Gaussian binomial's coefficients."""
    ways = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):
            ways[u] -= ways[u - m - i]
        for u in range(i, n * m + 1):
            ways[u] += ways[u - i]
    return ways
