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

_RIDGE = 1e-3
_ENOUGH = 8
"""Rows for each column beyond which more of them are not worth a smaller penalty."""
_STEPS = 128
"""Most removal steps per group: wide groups lose several units at a time."""
_STRIPS = 8
"""Strips in which a matrix of products is computed."""
_CACHED = 250_000
"""Numbers of one output tensor between two products: what lies between them stays in the processor's cache."""


def ridge_for(rows: int, columns: int) -> float:
    """Return the penalty for a second moment that so many rows were measured on, relative to the mean of its diagonal.

    A moment of fewer rows than columns says of directions that no row took that nothing would be lost there, and one of about
    as many is worse: what is fitted to it follows the rows' noise and misses everything else. With `_ENOUGH` rows for each
    column the penalty is `_RIDGE`; below, it grows with the square of what is missing (decision 27).
    """
    return _RIDGE * max(1.0, _ENOUGH * columns / rows) ** 2


def damped(h_DD: Tensor, ridge: float) -> Tensor:
    """Return ``h + ridge * mean(diag h) * I``; an all-zero `h` becomes the identity."""
    mean = float(h_DD.diagonal().mean())
    return h_DD + (ridge * mean if mean > 0 else 1.0) * torch.eye(len(h_DD), dtype=h_DD.dtype)


def add_gram(gram_DD: Tensor, x_ND: Tensor) -> None:
    """Add ``x^T x`` to the upper triangle of `gram_DD`, some of what is below it included; `mirrored` makes it whole.

    Strips of rows, from the diagonal on: little more than half of the products.
    """
    step = max(64, -(-len(gram_DD) // _STRIPS))
    for start in range(0, len(gram_DD), step):
        strip = slice(start, start + step)
        gram_DD[strip, start:].addmm_(x_ND[:, strip].T, x_ND[:, start:])


def mirrored(gram_DD: Tensor) -> Tensor:
    """Return the symmetric matrix, in float64, whose upper triangle is that of `gram_DD`."""
    upper_DD = gram_DD.double().triu_()
    return upper_DD + upper_DD.triu(1).T


def second_moment(x_ND: Tensor) -> Tensor:
    """Return ``x^T x / N`` (D, D) in float64; the products are summed in the type of `x_ND`."""
    gram_DD = torch.zeros(x_ND.shape[1], x_ND.shape[1], dtype=x_ND.dtype)
    add_gram(gram_DD, x_ND)
    return mirrored(gram_DD) / len(x_ND)


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
        costs = torch.stack([s.costs(alive) for s in states]).sum(0)
        go = torch.topk(costs, min(step, len(alive) - 1), largest=False, sorted=True).indices
        joint = sum(s.remove(alive[go]) for s in states)
        order += alive[go].tolist()
        error += [error[-1] + max(joint, 0.0) * (i + 1) / len(go) for i in range(len(go))]
        stay = torch.ones(len(alive), dtype=torch.bool)
        stay[go] = False
        alive = alive[stay]
    return ErrorCurve((*order, int(alive[0])), tuple(error))


class _Obs:
    """One reader while units are removed: its adjusted weights, and the inverse second moment of what is left.

    The inverse is kept as the first one minus ``f^T f``, with one row of the factor `f` per column removed: a block Cholesky
    factorisation of the first inverse in the order of removal. So a step touches the rows of the factor instead of the
    whole matrix; only the diagonal blocks, which costs need, are kept up to date.
    """

    def __init__(self, h_DD: Tensor, w_OD: Tensor, units: int) -> None:
        self.width = len(h_DD) // units
        self.first_DD = torch.cholesky_inverse(torch.linalg.cholesky(h_DD))
        self.factor_RD = torch.empty_like(self.first_DD)
        self.removed = 0
        self.w_OD = w_OD.clone()
        by_units = self.first_DD.view(units, self.width, units, self.width)
        self.blocks_KBB = by_units.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()

    def costs(self, alive: Tensor) -> Tensor:
        """Return what removing each of the units `alive` would cost."""
        w_KBO = self.w_OD.view(len(self.w_OD), -1, self.width).permute(1, 2, 0)[alive]
        factor_KBB = torch.linalg.cholesky(self.blocks_KBB[alive])
        costs_K: Tensor = torch.linalg.solve_triangular(factor_KBB, w_KBO, upper=False).square().sum((1, 2))
        return costs_K

    def remove(self, go: Tensor) -> float:
        """Remove the units `go`, adjust the others, and return the error."""
        columns = (go[:, None] * self.width + torch.arange(self.width)).flatten()
        known_RD = self.factor_RD[: self.removed]
        rows_GD = torch.addmm(self.first_DD[columns], known_RD[:, columns].T, known_RD, alpha=-1.0)
        triangle_GG = torch.linalg.cholesky(rows_GD[:, columns])
        new_GD = torch.linalg.solve_triangular(triangle_GG, rows_GD, upper=False)
        scaled_GO = torch.linalg.solve_triangular(triangle_GG, self.w_OD[:, columns].T, upper=False)
        self.w_OD.addmm_(scaled_GO.T, new_GD, alpha=-1.0)
        new_KBG = new_GD.T.reshape(-1, self.width, len(columns))
        self.blocks_KBB -= new_KBG @ new_KBG.transpose(1, 2)
        self.factor_RD[self.removed : self.removed + len(columns)] = new_GD
        self.removed += len(columns)
        return float(scaled_GO.square().sum())


@dataclass(frozen=True)
class Refit:
    """New weights, and what they make of the samples they were fitted to.

    Attributes:
        w_OD: Weights.
        b_O: Bias.
        mean_O: Mean of ``x w^T + b``.
        var_O: Its variance.
        before: Mean squared error of the old weights.
        after: Of the new ones.
    """

    w_OD: Tensor
    b_O: Tensor
    mean_O: Tensor
    var_O: Tensor
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
    ridge: float | None = None,
    rounds: int = 4,
) -> Refit:
    """Return the weights for which ``x w^T + b + skip`` comes closest to the target, where a ReLU follows: behind it.

    Least squares with a penalty on leaving the old weights, which grows where samples are few (`ridge_for`). Behind a
    ReLU any value below zero is as good as another where the target is not positive; there the target is set to the
    present output where that is negative, else to 0, and the fit is repeated (majorisation: the error never rises).

    Args:
        x_ND: Inputs.
        target_NO: Outputs wanted, in front of the ReLU.
        w_OD: Old weights.
        b_O: Old bias.
        skip_NO: What is added to the output, if anything.
        relu: Whether a ReLU follows.
        fit_bias: Whether the bias may change.
        ridge: Penalty, relative to the mean diagonal of the second moment of `x`; by default `ridge_for` the samples.
        rounds: Fits behind a ReLU.
    """
    mean_D = x_ND.mean(0)
    shift_D = mean_D if fit_bias else torch.zeros_like(mean_D)
    x_ND = x_ND - shift_D
    h_DD = second_moment(x_ND)
    anchor_DD = damped(h_DD, ridge_for(*x_ND.shape) if ridge is None else ridge)
    factor_DD = torch.linalg.cholesky(anchor_DD)
    old_OD, old_O = w_OD.double(), b_O.double() + w_OD.double() @ shift_D.double()
    if relu:
        limit_NO = torch.where(target_NO > 0, math.inf, 0.0).to(target_NO.dtype)
        samples = _Samples(x_ND, target_NO.clamp_min(0), skip_NO, limit_NO)
    else:
        samples = _Samples(x_ND, target_NO, skip_NO, None)
    w, b = old_OD, old_O  # of the shifted inputs
    before, gradient_DO, mean_O = samples.residual(w, b)
    best = (w, b, before)
    for _ in range(rounds if relu else 1):
        gradient_DO -= (anchor_DD - h_DD) @ (w - old_OD).T
        w = w + torch.cholesky_solve(gradient_DO, factor_DD).T
        b = b + mean_O if fit_bias else b
        after, gradient_DO, mean_O = samples.residual(w, b)
        if after < best[2]:
            best = (w, b, after)
    w, b, after = best
    rest_D = (mean_D - shift_D).double()
    out_mean_O = b + w @ rest_D
    out_var_O = ((w @ (h_DD - torch.outer(rest_D, rest_D))) * w).sum(1).clamp_min(0)
    if w is not old_OD:
        w_OD, b_O = w.to(w_OD.dtype), (b - w @ shift_D.double()).to(b_O.dtype)
    return Refit(w_OD, b_O, out_mean_O.to(b_O.dtype), out_var_O.to(b_O.dtype), before, after)


@dataclass(frozen=True)
class _Samples:
    """What a layer is fitted to.

    Attributes:
        x_ND: Inputs.
        target_NO: Outputs wanted; behind the ReLU where one follows.
        skip_NO: What is added to the output, if anything.
        limit_NO: Where a ReLU follows, the largest residual that counts: none where the target is positive, else 0,
            since there any output below zero is as good as another.
    """

    x_ND: Tensor
    target_NO: Tensor
    skip_NO: Tensor | None
    limit_NO: Tensor | None

    def residual(self, w_OD: Tensor, b_O: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the mean squared error, the moment of inputs and residual (D, O) and the residual's mean, in float64.

        The rows are taken some at a time, so that what lies between the two products stays in the processor's cache.
        """
        w_DO, b_O = w_OD.to(self.x_ND.dtype).T, b_O.to(self.x_ND.dtype)
        moment_DO = torch.zeros_like(w_DO)
        sum_O = torch.zeros_like(b_O, dtype=torch.float64)
        error = 0.0
        step = max(64, _CACHED // len(b_O))
        for start in range(0, len(self.x_ND), step):
            rows = slice(start, start + step)
            x_ND, target_NO = self.x_ND[rows], self.target_NO[rows]
            out_NO = torch.addmm(b_O, x_ND, w_DO)
            if self.skip_NO is not None:
                out_NO += self.skip_NO[rows]
            residual_NO = torch.sub(target_NO, out_NO, out=out_NO)
            if self.limit_NO is None:
                shown_NO = residual_NO
            else:
                shown_NO = torch.minimum(residual_NO, target_NO)  # an output below zero is shown as zero
                torch.minimum(residual_NO, self.limit_NO[rows], out=residual_NO)
            error += float(torch.dot(shown_NO.flatten(), shown_NO.flatten()))
            moment_DO.addmm_(x_ND.T, residual_NO)
            sum_O += residual_NO.sum(0)
        n = len(self.x_ND)
        return error / (n * len(b_O)), moment_DO.double() / n, sum_O / n
