"""`lint`: will this ONNX file run well on that target? One file per rule; works on anyone's files.

A rule is a module of this package (its name is the file's, with dashes) that offers ``check(graph, facts)``. Severities:
``error``: the target refuses the file, or silently computes something else or in floating point; ``warning``: it runs,
but slower, larger or less exactly than it could; ``note``: worth knowing.

``opset_unreadable.py`` is one of the shortest. `export.graph.GraphView` answers what rules ask of a graph; a finding's node is
`export.graph.label` of it. Each rule has a file that triggers it and a near miss in ``TRAPS`` of
``tests/test_lint_rules.py``, and its row in ``docs/lint.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, cast

import onnx

from export.graph import GraphView
from rescompress.core import plugins
from rescompress.core.showing import Showing

PACKAGE = "export.lint"
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Report:
    """What users report of the target's runtime in the version that it has.

    Attributes:
        kinds: Files that it is about: ``int8`` (quantized), ``float``.
        message: What is reported, with its sources.
        remedy: What to do.
    """

    kinds: frozenset[str]
    message: str
    remedy: str


@dataclass(frozen=True)
class TargetFacts:
    """What the rules need to know about a target: plain values, so that this package needs no target catalogue.

    Attributes:
        title: What people call the target.
        runtime: What runs the file: ``tensorrt``, ``tensorrt_rtx``, ``openvino``, ``onnxruntime``.
        max_opset: Newest ONNX opset it reads.
        precisions: What it computes in: ``fp32``, ``fp16``, ``int8``.
        align: Per precision, the multiple that channel counts should have.
        strongly_typed: Whether it takes every type from the file.
        reports: What users report of its runtime.
        compute_capability: Of its GPU, (8, 7) for an Orin; None where it has none or it is not known.
        version: Of its TensorRT, (10, 3) for instance; None for other runtimes.
    """

    title: str
    runtime: str
    max_opset: int
    precisions: tuple[str, ...]
    align: Mapping[str, int]
    strongly_typed: bool = False
    reports: tuple[Report, ...] = ()
    compute_capability: tuple[int, int] | None = None
    version: tuple[int, int] | None = None

    @property
    def tensorrt(self) -> bool:
        """Whether TensorRT, of either kind, runs the file."""
        return self.runtime in ("tensorrt", "tensorrt_rtx")

    def at_least(self, capability: tuple[int, int]) -> bool:
        """Whether the GPU is of this compute capability or later, with a TensorRT that has INT4 and FP8 (10 or later)."""
        if self.compute_capability is None or (self.version is not None and self.version < (10, 0)):
            return False
        return self.compute_capability >= capability


@dataclass(frozen=True, repr=False)
class Finding(Showing):
    """One thing that is wrong, or could be better.

    Attributes:
        rule: Which rule found it.
        severity: ``error``, ``warning`` or ``note``.
        node: The node it is about; empty for the file as a whole.
        message: What is wrong, and what it does on the target.
        remedy: What to do.
    """

    rule: str
    severity: Severity
    node: str
    message: str
    remedy: str

    def shows(self) -> Mapping[str, str]:
        """Return what was found, how bad it is, and what to do."""
        return {
            self.severity: self.rule,
            **({"node": self.node} if self.node else {}),
            "says": self.message,
            "remedy": self.remedy,
        }

    def document(self) -> dict[str, str]:
        """Return the values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Issue:
    """What a rule yields: a finding without the rule's name.

    Attributes:
        severity: As in `Finding`.
        node: As in `Finding`.
        message: As in `Finding`.
        remedy: As in `Finding`.
    """

    severity: Severity
    node: str
    message: str
    remedy: str


class Rule(Protocol):
    """What a file of this package offers."""

    def check(self, graph: GraphView, facts: TargetFacts) -> Iterator[Issue]:
        """Yield everything this rule finds in the graph for this target."""
        ...


def rule_names() -> list[str]:
    """Return the names of all rules, sorted."""
    return sorted(name.replace("_", "-") for name in plugins.names(PACKAGE))


def lint(model: onnx.ModelProto, facts: TargetFacts, *, rules: Iterable[str] | None = None) -> list[Finding]:
    """Return everything the rules find, errors first.

    Args:
        model: Any ONNX model; external data need not be loaded for most rules.
        facts: The target.
        rules: Names of the rules to run; all when None.

    Raises:
        BadInput: An unknown rule.
    """
    graph = GraphView(model)
    findings = []
    for name in rule_names() if rules is None else rules:
        rule = cast(Rule, plugins.load(PACKAGE, name.replace("-", "_"), what="lint rule", offers=Rule))
        findings += [Finding(name, i.severity, i.node, i.message, i.remedy) for i in rule.check(graph, facts)]
    return sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
