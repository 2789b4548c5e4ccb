"""The numerics of reconstruction: block-wise Optimal Brain Surgeon, and least squares anchored at the old weights.

Shape suffixes: N samples, D inputs (columns; unit c owns the columns ``c * b`` to ``(c + 1) * b``), O outputs, K units,
B columns of a unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.prune.method import ErrorCurve

_STEPS = 128
"""Most removal steps per group: wide groups lose several units at a time."""


def damped(h_DD: Tensor, ridge: float) -> Tensor:
    """Return ``h + ridge * mean(diag h) * I``; an all-zero `h` becomes the identity."""
    mean = float(h_DD.diagonal().mean())
    return h_DD + (ridge * mean if mean > 0 else 1.0) * torch.eye(len(h_DD), dtype=h_DD.dtype)


def obs_curve(readers: Sequence[tuple[Tensor, Tensor]], units: int) -> ErrorCurve:
    """Return the order in which units go, and the summed squared output error when the rest is adjusted to it.

    Removing unit c, with the best adjustment of the others, costs a reader ``trace(w_c (H^-1_cc)^-1 w_c^T)``; after it,
    ``w -= w_c (H^-1_cc)^-1 H^-1_c:`` and ``H^-1 -= H^-1_:c (H^-1_cc)^-1 H^-1_c:`` (Hassibi & Stork 1993; by blocks as in
    Kurtic et al. 2023, arXiv:2302.04089, section 3.1). Where several layers read the units, their costs add up.

    Args:
        readers: Per layer that reads the units: second moment of its inputs (D, D), positive definite, and weights
            (O, D); float64.
        units: How many units the columns of each reader belong to.
    """
    states = [_Obs(h_DD, w_OD, units) for h_DD, w_OD in readers]
    alive = torch.arange(units)
    step = max(1, math.ceil(units / _STEPS))
    order: list[int] = []
    error = [0.0]
    while len(alive) > 1:
        costs = torch.stack([s.costs() for s in states]).sum(0)
        go = torch.topk(costs, min(step, len(alive) - 1), largest=False, sorted=True).indices
        stay = torch.ones(len(alive), dtype=torch.bool)
        stay[go] = False
        joint = sum(s.remove(go, stay) for s in states)
        order += alive[go].tolist()
        error += [error[-1] + max(joint, 0.0) * (i + 1) / len(go) for i in range(len(go))]
        alive = alive[stay]
    return ErrorCurve((*order, int(alive[0])), tuple(error))


class _Obs:
    """What is left of one reader: inverse second moment and adjusted weights of the units still there."""

    def __init__(self, h_DD: Tensor, w_OD: Tensor, units: int) -> None:
        self.inverse_DD = torch.cholesky_inverse(torch.linalg.cholesky(h_DD))
        self.w_OD = w_OD.clone()
        self.width = len(h_DD) // units

    def costs(self) -> Tensor:
        """Return what removing each unit would cost (K,)."""
        k, b = len(self.inverse_DD) // self.width, self.width
        blocks_KBB = self.inverse_DD.view(k, b, k, b).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        w_KBO = self.w_OD.view(-1, k, b).permute(1, 2, 0)
        costs_K: Tensor = (torch.linalg.solve(blocks_KBB, w_KBO) * w_KBO).sum((1, 2))
        return costs_K

    def remove(self, go: Tensor, stay: Tensor) -> float:
        """Remove the units `go`, adjust the ones of the mask `stay`, and return the error."""
        columns = (go[:, None] * self.width + torch.arange(self.width)).flatten()
        rest = stay.repeat_interleave(self.width).nonzero().flatten()
        factor = torch.linalg.cholesky(self.inverse_DD[columns][:, columns])
        w_OG = self.w_OD[:, columns]
        solved_GO = torch.cholesky_solve(w_OG.T, factor)
        coupling_GR = self.inverse_DD[columns][:, rest]
        self.w_OD = self.w_OD[:, rest] - solved_GO.T @ coupling_GR
        self.inverse_DD = self.inverse_DD[rest][:, rest] - coupling_GR.T @ torch.cholesky_solve(coupling_GR, factor)
        return float((solved_GO.T * w_OG).sum())


@dataclass(frozen=True)
class Refit:
    """New weights, and the mean squared error before and after, on the samples they were fitted to."""

    w_OD: Tensor
    b_O: Tensor
    before: float
    after: float


def refit(
    x_ND: Tensor,
    target_NO: Tensor,
    w_OD: Tensor,
    b_O: Tensor,
    *,
    skip_NO: Tensor | None = None,
    relu: bool,
    fit_bias: bool = True,
    ridge: float = 1e-3,
    rounds: int = 4,
) -> Refit:
    """Return the weights for which ``x w^T + b + skip`` comes closest to the target, where a ReLU follows: behind it.

    Least squares with a penalty on leaving the old weights, so that few samples cannot do harm. Behind a ReLU any value
    below zero is as good as another where the target is not positive; there the target is set to the present output
    where that is negative, else to 0, and the fit is repeated (majorisation: the error never rises).

    Args:
        x_ND: Inputs.
        target_NO: Outputs wanted, in front of the ReLU.
        w_OD: Old weights.
        b_O: Old bias.
        skip_NO: What is added to the output, if anything.
        relu: Whether a ReLU follows.
        fit_bias: Whether the bias may change.
        ridge: Penalty, relative to the mean diagonal of the second moment of `x`.
        rounds: Fits behind a ReLU.
    """
    n = len(x_ND)
    mean_D = x_ND.mean(0) if fit_bias else torch.zeros_like(x_ND[0])
    x_ND = x_ND - mean_D
    h = (x_ND.T @ x_ND).double() / n
    anchor = damped(h, ridge)
    factor = torch.linalg.cholesky(anchor)
    w, b = w_OD.double(), b_O.double() + w_OD.double() @ mean_D.double()  # b: of the centred inputs
    out = _output(x_ND, w, b, skip_NO)
    before = _error(out, target_NO, relu=relu)
    best = Refit(w_OD, b_O, before, before)
    penalty = anchor - h
    for _ in range(rounds if relu else 1):
        want = torch.where(target_NO > 0, target_NO, out.clamp_max(0)) if relu else target_NO
        residual = want - out
        mean_O = residual.mean(0) if fit_bias else torch.zeros_like(residual[0])
        gradient = (x_ND.T @ residual).double() / n
        gradient -= penalty @ (w - w_OD.double()).T
        change = torch.cholesky_solve(gradient, factor).T
        w = w + change
        b = b + mean_O.double()
        out = _output(x_ND, w, b, skip_NO)
        after = _error(out, target_NO, relu=relu)
        if after < best.after:
            best = Refit(w.to(w_OD.dtype), (b - w @ mean_D.double()).to(b_O.dtype), before, after)
    return best


def _output(x_ND: Tensor, w_OD: Tensor, b_O: Tensor, skip_NO: Tensor | None) -> Tensor:
    out = torch.addmm(b_O.to(x_ND.dtype), x_ND, w_OD.to(x_ND.dtype).T)
    return out if skip_NO is None else out.add_(skip_NO)


def _error(out_NO: Tensor, target_NO: Tensor, *, relu: bool) -> float:
    if relu:
        return float((out_NO.clamp_min(0) - target_NO.clamp_min(0)).square().mean())
    return float((out_NO - target_NO).square().mean())
