"""How much accuracy was lost, from paired outcomes: Tango's score test and interval.

Two models answered the same `n` samples. `lost` samples only the baseline has right, `won` only the candidate; samples on
which both agree carry no information about the *difference* but count in `n`. The drop in accuracy is
``p_lost - p_won``, estimated by ``(lost - won) / n``.

For a supposed drop D the score statistic is ``z(D) = (lost - won - n D) / sqrt(n (2 q + D (1 - D)))``, where ``q`` is the
maximum-likelihood estimate of ``p_won`` under ``p_lost = p_won + D``: the larger root of ``A q^2 + B q + C = 0`` with
``A = 2 n``, ``B = (2 n - lost + won) D - lost - won``, ``C = -won D (1 - D)``. The interval holds every D that the test does
not reject. It needs no cell to be large, and with no disagreement at all its upper end is ``z^2 / (n + z^2)``, not zero.

T. Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
Statistics in Medicine 17 (1998) 891-908.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

MOST_SAMPLES = 10_000_000
"""Beyond this many samples no number is named: the drop lies too near the margin to be told from it."""


@dataclass(frozen=True)
class Paired:
    """Two models on the same samples.

    Attributes:
        n: Samples.
        lost: Samples that the baseline has right and the candidate wrong.
        won: Samples that the candidate has right and the baseline wrong.
    """

    n: int
    lost: int
    won: int

    @property
    def drop(self) -> float:
        """The observed drop in accuracy, a fraction; negative when the candidate is better."""
        return (self.lost - self.won) / self.n


def score(paired: Paired, drop: float) -> float:
    """Return the score statistic for a supposed drop, about standard normal if it is the true one.

    Args:
        paired: What was observed.
        drop: The supposed drop, strictly between -1 and 1.
    """
    return _score(paired.n, paired.lost, paired.won, drop)


def _score(n: float, lost: float, won: float, drop: float) -> float:
    distance = lost - won - n * drop
    variance = n * (2 * _won_rate(n, lost, won, drop) + drop * (1 - drop))
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _won_rate(n: float, lost: float, won: float, drop: float) -> float:
    """Return the maximum-likelihood estimate of p_won under ``p_lost = p_won + drop``."""
    a = 2 * n
    b = (2 * n - lost + won) * drop - lost - won
    c = -won * drop * (1 - drop)
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    return -2 * c / (b + root) if b > 0 else (root - b) / (2 * a)


def lower_bound(paired: Paired, confidence: float) -> float:
    """Return the one-sided lower bound of the drop: smaller drops are rejected at this confidence."""
    return _crossing(paired, NormalDist().inv_cdf(confidence))


def upper_bound(paired: Paired, confidence: float) -> float:
    """Return the one-sided upper bound of the drop: larger drops are rejected at this confidence."""
    return _crossing(paired, -NormalDist().inv_cdf(confidence))


def interval(paired: Paired, confidence: float) -> tuple[float, float]:
    """Return the two-sided interval of the drop."""
    each = 0.5 + confidence / 2
    return lower_bound(paired, each), upper_bound(paired, each)


def _crossing(paired: Paired, z: float) -> float:
    """Return the drop at which the score, which falls as the drop grows, crosses `z`."""
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if score(paired, middle) > z:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def samples_needed(paired: Paired, margin: float, *, confidence: float = 0.95, power: float = 0.8) -> int | None:
    """Return how many samples would decide, were the observed rates the true ones; None if no practical number would.

    The usual size for a score test: the standardised distance to the margin must reach ``z_confidence`` under the margin
    and leave ``z_power`` under the observed rates.

    Args:
        paired: What was observed.
        margin: The drop that is tested, a fraction.
        confidence: One-sided.
        power: Chance that as many samples decide.
    """
    distance = abs(margin - paired.drop)
    p_lost, p_won = paired.lost / paired.n, paired.won / paired.n
    at_margin = 2 * _won_rate(1.0, p_lost, p_won, margin) + margin * (1 - margin)
    observed = p_lost + p_won - paired.drop**2
    normal = NormalDist()
    spread = normal.inv_cdf(confidence) * math.sqrt(at_margin) + normal.inv_cdf(power) * math.sqrt(max(observed, 0.0))
    if distance * math.sqrt(MOST_SAMPLES) <= spread:
        return None
    return max(math.ceil((spread / distance) ** 2), paired.n + 1)
