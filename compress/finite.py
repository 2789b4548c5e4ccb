"""Whether tensors hold NaN or infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Return whether no number of a floating-point tensor is NaN or infinite.

    A sum is finite only where all its terms are, and costs a quarter of looking at each; large terms may overflow, so a
    sum that is not finite is no proof.
    """
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
