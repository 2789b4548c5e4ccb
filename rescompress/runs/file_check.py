"""Checks an exported file for its target: lint, and the validity gate of TensorRT for RTX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from edge_targets.advice import advice_for
from edge_targets.backends import tensorrt_rtx
from edge_targets.device import Target
from export.half import HalfCheck
from export.lint import Finding, Report, TargetFacts, float16_overflow, lint, rule_names
from rescompress.core.errors import RescompressError

NEWEST_OPSET = 25
"""What runtimes other than TensorRT are taken to read, where no table of theirs says otherwise."""


def facts_of(target: Target) -> TargetFacts:
    """Return what lint rules need to know about a target."""
    known = target.capabilities
    return TargetFacts(
        title=f"{target.device.title}{f' (TensorRT {target.tensorrt_version})' if target.tensorrt_version else ''}",
        runtime=target.runtime,
        max_opset=known.max_opset if known else NEWEST_OPSET,
        precisions=target.precisions,
        align={str(precision): multiple for precision, multiple in target.device.align.items()},
        strongly_typed=target.strongly_typed,
        compute_capability=_capability(target.device.compute_capability),
        version=known.version if known else None,
        reports=_reports(target),
    )


def _reports(target: Target) -> tuple[Report, ...]:
    about = {
        kind: advice_for(target, [p for p in target.precisions if (p == "int8") == (kind == "int8")])
        for kind in ("int8", "float")
    }
    every = dict.fromkeys(a for found in about.values() for a in found)
    return tuple(
        Report(
            frozenset(kind for kind, found in about.items() if a in found), f"{a.message} ({', '.join(a.sources)})", a.remedy
        )
        for a in every
    )


def _capability(text: str | None) -> tuple[int, int] | None:
    major, _, minor = (text or "").partition(".")
    return (int(major), int(minor or 0)) if major else None


def lint_findings(model: onnx.ModelProto, target: Target, half: HalfCheck | None = None) -> list[dict[str, str]]:
    """Return everything lint finds in a model for a target, as JSON values.

    Args:
        model: The file.
        target: The device.
        half: What float16 was seen to do to it; it takes the place of what the rule sees on random noise.
    """
    facts = facts_of(target)
    found = lint(model, facts, rules=[r for r in rule_names() if half is None or r != _FLOAT16])
    if half is not None:
        issues = float16_overflow.issues(half, facts)
        found = [*(Finding(_FLOAT16, i.severity, i.node, i.message, i.remedy) for i in issues), *found]
    return [finding.document() for finding in found]


_FLOAT16 = "float16-overflow"


def validity_gate(path: Path) -> dict[str, Any]:
    """Return whether a real TensorRT parser and builder takes a file, and in which type each convolution runs.

    It builds for an Ampere GPU, which need not be here; nothing is measured. The keys: ``status`` (``passed``, ``failed``
    or ``not run``), ``reason``, ``runtime_version``, ``convolutions`` (type by node), ``int8_convolutions``.

    Args:
        path: The ONNX file; a dynamic batch is built as ``build.sh`` builds it.
    """
    available = tensorrt_rtx.available()
    if not available:
        return {"status": "not run", "reason": f"{available.reason} ({available.remedy})"}
    try:
        engine = tensorrt_rtx.engine(path)
    except RescompressError as e:
        return {"status": "failed", "reason": e.what, "runtime_version": available.version}
    types = dict(engine.compute_types(tensorrt_rtx.conv_nodes(path)))
    int8 = sum(t == "Int8" for t in types.values())
    return {
        "status": "passed",
        "reason": f"parsed and built; {int8} of {len(types)} convolutions in INT8",
        "runtime_version": available.version,
        "convolutions": types,
        "int8_convolutions": int8,
        "weights_bytes": engine.weights_bytes,
    }
