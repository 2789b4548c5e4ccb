"""`repair`: repair what lint finds, one pass per file, each proven on the file it changed.

A pass is a module of this package with

* ``RULES``: the lint rules whose findings it mends,
* ``EXACT``: whether the repaired network computes the same (else: the same up to a rounding step),
* ``call(model, facts)``: the repaired copy and whether anything changed.

`repair` runs a pass where its rules find something (requires), calls it, and keeps the result only if the model is still
valid and computes the same in onnxruntime on images of the range that its input takes (ensures; `export.proof`).

``scalar_scales.py`` is one of the shortest. The rules that a new pass mends stand in ``REPAIRED`` of
``tests/test_lint_rules.py``, where it is tried on the file that triggers each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import onnx

from export.lint import TargetFacts, lint
from export.proof import Array, Proof
from rescompress.core import plugins
from rescompress.core.errors import ModelFileError

PACKAGE = "export.passes"
EXACT_TOLERANCE = 1e-4
"""Of the output range, on average: a sum in another order may push single values over a rounding step."""
ROUNDING_TOLERANCE = 2 / 255
"""Of the output range, for every value, against the file as it came."""


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
        error: Largest difference of an output as a fraction of its range; None where it could not be measured.
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
    """Return the model with everything repaired that can be repaired and proven.

    Args:
        model: Any ONNX model; it is not changed.
        facts: The target it shall run on.

    Raises:
        ModelFileError: The model is malformed.
    """
    applied: list[Step] = []
    refused: list[Step] = []
    names = plugins.names(PACKAGE)
    work = _Work(model, facts)
    for _ in names:  # a repair may make another one possible, such as integer weights the folding of a BatchNorm
        before, refused = len(applied), []
        for name in names:
            step = work.attempt(name)
            if step is not None:
                (applied if step.applied else refused).append(step)
        if len(applied) == before:
            break
    return Repaired(work.model, (*applied, *refused))


class _Work:
    """A model under repair, what it answers, and what the file answered at first."""

    def __init__(self, model: onnx.ModelProto, facts: TargetFacts) -> None:
        self.model = model
        self.facts = facts

    @cached_property
    def proof(self) -> Proof:
        """Return the images, and the answers of the file as it came."""
        return Proof(self.model)  # asked for in front of the first repair

    def attempt(self, name: str) -> Step | None:
        """Try one pass and keep its model where that is proven; return what became of it, None where it has nothing to do."""
        one: Pass = plugins.load(PACKAGE, name, what="repair pass", offers=Pass)
        before = lint(self.model, self.facts, rules=one.RULES)
        if not before:
            return None
        result = one.call(self.model, self.facts)
        if not result.modified:
            return None
        try:
            left = len(lint(result.model, self.facts, rules=one.RULES))
            onnx.checker.check_model(result.model)
        except (ModelFileError, onnx.checker.ValidationError, ValueError):
            return Step(name, False, None, "left out: the file would be malformed")
        expected, now = self.proof.reference, self.answers
        found = self.proof.outputs(result.model)
        whole, alone = Proof.between(expected, found), Proof.between(now, found)
        if whole is None or alone is None:
            return Step(name, False, None, "left out: the outputs before and after could not be compared in onnxruntime")
        error = max(whole.largest, alone.largest)
        if error > ROUNDING_TOLERANCE or (one.EXACT and alone.mean > EXACT_TOLERANCE):
            limit = f"{ROUNDING_TOLERANCE:.2%}" if error > ROUNDING_TOLERANCE else f"{EXACT_TOLERANCE:.2%} on average"
            return Step(
                name, False, error, f"left out: outputs would differ by up to {error:.2%} of their range, more than {limit}"
            )
        if left >= len(before):
            return Step(name, False, error, "left out: it mends nothing")
        self.model, self.answers = result.model, found
        return Step(
            name,
            True,
            error,
            f"repaired {len(before) - left} of {len(before)}; outputs differ by at most {error:.2g} of their range",
        )

    @cached_property
    def answers(self) -> list[Array] | None:
        """What the model answers as it is now."""
        return self.proof.reference
