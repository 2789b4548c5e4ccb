"""`repair`: mend what lint finds, one pass per file, each proven on the file it changed.

A pass is a module of this package with

* ``RULES``: the lint rules whose findings it mends,
* ``EXACT``: whether the repaired network computes the same (else: the same up to a rounding step),
* ``call(model, facts)``: the repaired copy and whether anything changed.

`repair` runs a pass where its rules find something (requires), calls it, and keeps the result only if the model is still
valid and computes the same on random images in onnxruntime (ensures).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from export.lint import TargetFacts, lint
from export.parity import OrtRunner
from rescompress.core import plugins
from rescompress.core.errors import ModelFileError

PACKAGE = "export.passes"
IMAGES = 8
EXACT_TOLERANCE = 1e-4
ROUNDING_TOLERANCE = 2 / 255


@dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    Attributes:
        model: The model after the pass; the argument is never changed.
        modified: Whether it differs.
    """

    model: onnx.ModelProto
    modified: bool


class Pass(Protocol):
    """What a file of this package offers."""

    RULES: tuple[str, ...]
    EXACT: bool

    def call(self, model: onnx.ModelProto, facts: TargetFacts) -> PassResult:
        """Return a repaired copy."""
        ...


@dataclass(frozen=True)
class Step:
    """One pass that was tried.

    Attributes:
        name: The pass.
        applied: Whether its result was kept.
        error: Mean absolute difference of the outputs as a fraction of their range; None where it could not be measured.
        outcome: What happened, in words.
    """

    name: str
    applied: bool
    error: float | None
    outcome: str


@dataclass(frozen=True)
class Repaired:
    """A repaired model.

    Attributes:
        model: With every proven repair.
        steps: What was tried, in order.
    """

    model: onnx.ModelProto
    steps: tuple[Step, ...]

    @property
    def modified(self) -> bool:
        """Whether any repair was kept."""
        return any(step.applied for step in self.steps)


def repair(model: onnx.ModelProto, facts: TargetFacts) -> Repaired:
    """Return the model with everything mended that can be mended and proven.

    Args:
        model: Any ONNX model; it is not changed.
        facts: The target it shall run on.
    """
    applied: list[Step] = []
    refused: list[Step] = []
    names = plugins.names(PACKAGE)
    for _ in names:  # a repair may make another one possible, such as integer weights the folding of a BatchNorm
        before, refused = len(applied), []
        for name in names:
            step, model = _try(name, model, facts)
            if step is not None:
                (applied if step.applied else refused).append(step)
        if len(applied) == before:
            break
    return Repaired(model, (*applied, *refused))


def _try(name: str, model: onnx.ModelProto, facts: TargetFacts) -> tuple[Step | None, onnx.ModelProto]:
    """Return what became of one pass, None where it has nothing to do, and the model after it."""
    one: Pass = plugins.load(PACKAGE, name, what="repair pass")
    before = lint(model, facts, rules=one.RULES)
    if not before:
        return None, model
    result = one.call(model, facts)
    if not result.modified:
        return None, model
    error = difference(model, result.model)
    limit = EXACT_TOLERANCE if one.EXACT else ROUNDING_TOLERANCE
    left = len(lint(result.model, facts, rules=one.RULES))
    if error is None:
        outcome = "left out: the outputs before and after could not be compared in onnxruntime"
    elif error > limit:
        outcome = f"left out: outputs would differ by {error:.2%} of their range, more than {limit:.2%}"
    elif left >= len(before):
        outcome = "left out: it mends nothing"
    else:
        outcome = f"mended {len(before) - left} of {len(before)}; outputs differ by {error:.2g} of their range"
        return Step(name, True, error, outcome), result.model
    return Step(name, False, error, outcome), model


def difference(before: onnx.ModelProto, after: onnx.ModelProto) -> float | None:
    """Return the mean absolute difference of the first outputs on random images, as a fraction of the range.

    None when a model is invalid or onnxruntime cannot run it.
    """
    try:
        onnx.checker.check_model(after)
        with OrtRunner(before, optimize=False) as a, OrtRunner(after, optimize=False) as b:
            shape = [d if isinstance(d, int) else (IMAGES if i == 0 else 64) for i, d in enumerate(a.input_shape)]
            x_NCHW = np.random.default_rng(0).standard_normal((IMAGES, *shape[1:]), dtype=np.float32)
            expected, found = _run(a, x_NCHW), _run(b, x_NCHW)
    except (ModelFileError, onnx.checker.ValidationError, RuntimeError, ValueError):
        return None
    if expected.shape != found.shape or not np.isfinite(expected).all():
        return None
    spread = float(expected.max() - expected.min())
    off = float(np.abs(expected - found).mean())
    return off / spread if spread else off


def _run(runner: OrtRunner, x_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
    try:
        return runner(x_NCHW)
    except Exception as e:
        raise ModelFileError(f"onnxruntime cannot run the model: {e}") from e
