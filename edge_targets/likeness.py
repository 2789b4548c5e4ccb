"""Whether a network resembles one that published latencies are known of: by what its kernels are, not by its name.

An error band that was made from ResNets of one shape says nothing about a network of another. So a network is described by
what its arithmetic consists of and how much of it a kernel has, and compared with the networks that the model was fitted to
on the same GPU architecture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from edge_targets.kernels import Kernel

SHARES_APART = 0.2
"""Alike are networks whose arithmetic differs in at most this share. Folds come out the same from 0.1 to 0.3."""

IDLE_APART = 0.1
"""Whose share of kernels without arithmetic differs by at most this."""

SIZE_APART = 1.5
"""And whose multiply-accumulates per kernel differ by at most this factor."""


class Profile(NamedTuple):
    """What the arithmetic of a network consists of.

    Attributes:
        pointwise: Share of the multiply-accumulates in dense 1x1 convolutions.
        spatial: In dense 3x3 convolutions.
        grouped: In grouped and depthwise ones.
        other: In anything else: the stem, linear layers, larger kernels.
        idle: Share of the kernels that have none: pools, copies, sums, activations of their own.
        macs: Multiply-accumulates per kernel that has any, for one image.
    """

    pointwise: float
    spatial: float
    grouped: float
    other: float
    idle: float
    macs: float


def profile_of(kernels: Sequence[Kernel]) -> Profile:
    """Return the profile of a network that consists of `kernels`."""
    pointwise = spatial = grouped = other = 0
    for kernel in kernels:
        if kernel.groups > 1:
            grouped += kernel.macs
        elif kernel.kind != "conv" or kernel.first or kernel.taps not in (1, 9):
            other += kernel.macs
        elif kernel.taps == 1:
            pointwise += kernel.macs
        else:
            spatial += kernel.macs
    total = pointwise + spatial + grouped + other
    working = sum(k.macs > 0 for k in kernels)
    if not total:
        return Profile(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    shares = (pointwise / total, spatial / total, grouped / total, other / total)
    return Profile(*shares, idle=1 - working / len(kernels), macs=total / working)


def alike(a: Profile, b: Profile) -> bool:
    """Whether what is known of the one network says something about the other."""
    if not (a.macs and b.macs):
        return False
    apart = sum(abs(x - y) for x, y in zip(a[:4], b[:4], strict=True)) / 2
    return (
        apart <= SHARES_APART and abs(a.idle - b.idle) <= IDLE_APART and abs(math.log(a.macs / b.macs)) <= math.log(SIZE_APART)
    )
